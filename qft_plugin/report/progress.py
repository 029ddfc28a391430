"""The phases of long work: how long each took, and what may be shown of them while they run."""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol


def now() -> float:
    """Return the time of a clock that only goes on, seconds."""
    return time.perf_counter()


@dataclass
class Running:
    """The phase that runs, or has just ended.

    Attributes:
        name: what it does.
        total: how many units of work it has; `None` where that is not known.
        done: how many of them are done.
        note: a few words beside it, such as a loss.
        begun: when it began, by `now`.
    """

    name: str
    total: int | None
    done: int = 0
    note: str = ""
    begun: float = field(default_factory=now)

    @property
    def seconds(self) -> float:
        """For how long it has run."""
        return now() - self.begun

    @property
    def seconds_left(self) -> float | None:
        """How long it will still run at this pace; `None` where that is not known."""
        if not self.done or self.total is None:
            return None
        return self.seconds / self.done * max(self.total - self.done, 0)


class Display(Protocol):
    """Shows phases to a user; each method is called in the thread that works."""

    def begin(self, phase: Running, /) -> None:
        """Show that a phase begins."""

    def advance(self, phase: Running, /) -> None:
        """Show how far it is."""

    def end(self, phase: Running, seconds: float, /, *, failed: bool) -> None:
        """Show that it has ended.

        Args:
            phase: the phase.
            seconds: that it took.
            failed: an exception ended it.
        """

    def say(self, text: str, /) -> None:
        """Show lines that stay."""


class Advance(Protocol):
    """Reports that a part of a phase is done."""

    def __call__(self, units: int = 1, /, *, note: str = "", total: int | None = None) -> None:
        """Add units of work that are done.

        Args:
            units: how many.
            note: a few words to show beside them.
            total: how many units the phase has, where that was not known before.
        """


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
        display, running, failed = self._display, Running(name, total), True

        def advance(units: int = 1, /, *, note: str = "", total: int | None = None) -> None:
            running.done, running.note = running.done + units, note
            running.total = running.total if total is None else total
            if display is not None:
                display.advance(running)

        self._inside = True
        if display is not None:
            display.begin(running)
        try:
            yield advance
            failed = False
        finally:
            self._inside = False
            seconds = running.seconds
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if display is not None:
                display.end(running, seconds, failed=failed)

    def say(self, text: str) -> None:
        """Show lines that stay, where anything is shown."""
        if self._display is not None:
            self._display.say(text)


def _nothing(units: int = 1, /, *, note: str = "", total: int | None = None) -> None:
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
