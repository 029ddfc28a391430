"""The phases of long work: how long each took, and what may be shown of them while they run."""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Display(Protocol):
    """Shows phases to a user; each method is called in the thread that works."""

    def begin(self, name: str, total: int | None, /) -> None:
        """Show that a phase begins.

        Args:
            name: of the phase.
            total: how many units of work it has; `None` where that is not known.
        """

    def advance(self, done: int, note: str, /) -> None:
        """Show how many units of the phase are done, and a few words beside them."""

    def end(self, name: str, seconds: float, note: str, /) -> None:
        """Show that the phase has ended.

        Args:
            name: of the phase.
            seconds: that it took.
            note: the last words that `advance` was given.
        """

    def say(self, text: str, /) -> None:
        """Show lines that stay."""

    def close(self) -> None:
        """Leave the terminal as it was; a phase that is still running has failed."""


class Advance(Protocol):
    """Reports that a part of a phase is done."""

    def __call__(self, units: int = 1, /, note: str = "") -> None:
        """Add units of work that are done, with a few words to show beside them."""


class Progress:
    """The phases of one piece of work, in order."""

    def __init__(self, display: Display | None = None) -> None:
        """Start with no phase.

        Args:
            display: shows them; `None` shows nothing.
        """
        self._display, self._inside = display, False
        self.seconds: dict[str, float] = {}
        """Of each phase that has ended, by its name, in order; of phases of one name together."""

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int | None = None) -> Iterator[Advance]:
        """Take the time of a block and show it; one inside another phase is a part of that one, and not shown.

        Args:
            name: what it does, in a few words.
            total: how many units of work it has; `None` where that is not known.
        """
        if self._inside:
            yield _nothing
            return
        display, done, words, begun = self._display, 0, "", time.perf_counter()

        def advance(units: int = 1, /, note: str = "") -> None:
            nonlocal done, words
            done, words = done + units, note
            if display is not None:
                display.advance(done, note)

        self._inside = True
        if display is not None:
            display.begin(name, total)
        try:
            yield advance
        finally:
            self._inside = False
        seconds = time.perf_counter() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if display is not None:
            display.end(name, seconds, words)

    def say(self, text: str) -> None:
        """Show lines that stay, where anything is shown."""
        if self._display is not None:
            self._display.say(text)


def _nothing(units: int = 1, /, note: str = "") -> None:
    """Report to nobody."""


_current: ContextVar[Progress | None] = ContextVar("qft_plugin_progress", default=None)


def phase(name: str, *, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
    """Take the time of a block of the work that runs, and show it where the user wants to see it; see `Progress.phase`.

    Args:
        name: what it does, in a few words.
        total: how many units of work it has; `None` where that is not known.
    """
    return (_current.get() or Progress()).phase(name, total=total)


@contextlib.contextmanager
def following(progress: Progress | None = None) -> Iterator[Progress]:
    """Let `phase` report to one object inside a block, in this thread.

    Args:
        progress: gets the phases; `None` takes the one that gets them already, or a silent one.
    """
    found = progress or _current.get() or Progress()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)
