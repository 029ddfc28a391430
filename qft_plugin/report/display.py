"""How phases are shown: a line that lives in a terminal, or plain lines where there is none."""

import contextlib
import logging
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from qft_plugin.report.progress import Display, Progress, Running, following, now

EVERY: Final = 10.0
"""Seconds between two plain lines of one phase."""

AT_ONCE: Final = 1.0
"""Seconds within which the end of a phase is not worth a plain line."""

REFRESHES: Final = 4
"""How often in a second the line in a terminal is drawn."""

BAR: Final = 16
"""Columns of a bar: beside it, a finetune's steps, loss and time left fit into the 80 of a usual terminal."""

LABEL: Final = re.compile(r" *(?:\S+(?: \S+)* {2,})?")
"""What stands before the text of a line: spaces, and a name that two or more spaces follow."""


@contextlib.contextmanager
def shown(verbose: bool) -> Iterator[Progress]:
    """Show the phases of a block on stderr: in a line that lives where it is a terminal and rich is there, else plain.

    Args:
        verbose: show them; the time of each is taken in any case.
    """
    with contextlib.ExitStack() as stack:
        display: Display | None = None
        if verbose:
            live = _live() if sys.stderr is not None and sys.stderr.isatty() else None
            display = Plain() if live is None else stack.enter_context(live)
        yield stack.enter_context(following(Progress(display)))


class Plain:
    """One line when a phase begins, one every few seconds while it says how far it is, and one when it ends.

    The last one is left out where it would follow at once.
    """

    def __init__(self) -> None:
        """Start with nothing shown."""
        self._last = 0.0

    def begin(self, phase: Running) -> None:
        """Write its name."""
        self._last = now()
        self._line(f"{phase.name} ...")

    def advance(self, phase: Running) -> None:
        """Write how far it is, if it is time to."""
        if now() - self._last >= EVERY:
            self._last = now()
            self._line(f"{phase.name}: {_how_far(phase)}")

    def end(self, phase: Running, seconds: float, *, failed: bool) -> None:
        """Write how long it took."""
        if failed or seconds >= AT_ONCE:
            self._line(f"{phase.name}: {_ended(phase, seconds, failed=failed)}")

    def say(self, text: str) -> None:
        """Write it as it is."""
        self._write(text)

    def _line(self, text: str) -> None:
        self._write(f"qft_plugin: {text}")

    def _write(self, text: str) -> None:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)  # looked up now: the stream may have been replaced


def _how_far(phase: Running) -> str:
    parts = [str(phase.done) if phase.total is None else f"{phase.done} of {phase.total}"]
    parts += [phase.note] if phase.note else []
    left = phase.seconds_left
    return ", ".join([*parts, *([] if left is None else [f"{_time(left)} left"])])


def _ended(phase: Running, seconds: float, *, failed: bool) -> str:
    note = f", {phase.note}" if phase.note else ""
    return f"{'stopped after ' if failed else ''}{_time(seconds)}{note}"


def _time(seconds: float) -> str:
    """Write seconds, and minutes where there are any."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


@contextlib.contextmanager
def _lives(console: Any) -> Iterator[Display]:
    """Draw in a terminal until the block ends, however it ends; other output appears above the line.

    Args:
        console: rich's console of the terminal.
    """
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    texts = TextColumn("{task.description}"), TextColumn("{task.fields[far]}")
    columns = (SpinnerColumn(), texts[0], BarColumn(bar_width=BAR), TimeElapsedColumn(), texts[1])
    bars = Bars(*columns, console=console, refresh_per_second=REFRESHES, transient=True)
    before = sys.stdout, sys.stderr
    with bars, _handlers_follow(before):
        yield Terminal(console, bars)


class Terminal:
    """A line for the phase that runs, and one with a tick and its seconds for each that has ended."""

    def __init__(self, console: Any, bars: Any) -> None:
        """Start with nothing shown.

        Args:
            console: rich's console.
            bars: rich's display of it, which is live.
        """
        self._console, self._bars, self._task = console, bars, None
        plain = console.options.ascii_only
        self._tick, self._cross = ("ok", "failed") if plain else ("✓", "✗")

    def begin(self, phase: Running) -> None:
        """Draw a line for it."""
        self._task = self._bars.add_task(phase.name, total=phase.total, far="")

    def advance(self, phase: Running) -> None:
        """Change its line; it is drawn a few times in a second, whatever is called."""
        self._bars.update(self._task, completed=phase.done, total=phase.total, far=_how_far(phase))

    def end(self, phase: Running, seconds: float, *, failed: bool) -> None:
        """Let a line with its seconds stay, in the place of its own."""
        self._bars.remove_task(self._task)
        sign = f"[red]{self._cross}[/]" if failed else f"[green]{self._tick}[/]"
        words = _ended(phase, seconds, failed=failed)
        self._console.print(f"{sign} {phase.name} [dim]{words}[/]", highlight=False)

    def say(self, text: str) -> None:
        """Let lines stay, broken between words where the terminal is narrower."""
        self._console.print(broken(text, self._console.width), highlight=False, markup=False, soft_wrap=True)


def broken(text: str, width: int) -> str:
    """Break long lines between words; what follows stands below where the text of the line begins.

    Args:
        text: lines, some of which begin with a name and two or more spaces.
        width: columns that they should fit into; a word that is longer stays whole.
    """
    lines: list[str] = []
    for line in text.splitlines():
        found = LABEL.match(line)
        indent = found.end() if found else 0
        after = " " * (indent if indent <= width // 2 else 0)
        wrapped = textwrap.wrap(line, width, subsequent_indent=after, break_long_words=False, break_on_hyphens=False)
        lines += wrapped or [line]
    return "\n".join(lines)


def _live() -> contextlib.AbstractContextManager[Display] | None:
    """Return a display for the terminal; `None` where rich is missing or finds that it cannot draw in it."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return _lives(console) if console.is_terminal and not console.is_dumb_terminal else None


@contextlib.contextmanager
def _handlers_follow(before: tuple[Any, Any]) -> Iterator[None]:
    """Let handlers of logs that write to the terminal write above the line that lives there.

    They hold the stream that there was when they were made, past what rich has put in its place.

    Args:
        before: the streams of output and errors before rich replaced them.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {id(h): h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in handlers.values():
        for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old is not new:
                moved.append((handler, old))
                handler.setStream(new)
    try:
        yield
    finally:
        for handler, old in moved:
            handler.setStream(old)
