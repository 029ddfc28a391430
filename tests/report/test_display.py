"""What is shown of phases: plain lines without a terminal, a line that lives in one, nothing where nobody asked."""

import io
import logging
import re
import sys

import pytest

from qft_plugin.report import progress
from qft_plugin.report.display import broken, shown
from qft_plugin.report.progress import Progress, Running, following, phase


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal of 100 columns; a test puts it in the place of stderr, which pytest sets when one begins."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


class Clock:
    """Counts seconds when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Return the time as it is."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let time pass when a test says so."""
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_seconds_are_taken_in_any_case(clock: Clock) -> None:
    """Of each phase, in order, those of one name together; one inside another counts with it."""
    with shown(False) as taken:
        for name, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
            with phase(name), phase("inside"):
                clock.now += seconds
    assert taken.seconds == {"a": 5.0, "b": 2.0}
    assert list(taken.seconds) == ["a", "b"]


def test_without_a_job_nothing_is_told_and_nothing_breaks() -> None:
    """Work may be done outside of any display."""
    with phase("alone", total=3) as advance:
        advance(2, note="x")


def test_a_phase_that_fails_is_over(clock: Clock) -> None:
    """Its time counts, and another can begin: a job may go on."""

    def fail() -> None:
        with phase("a"):
            clock.now += 1
            raise ValueError("no")

    with following(Progress()) as taken:
        with pytest.raises(ValueError, match="no"):
            fail()
        with phase("b"):
            clock.now += 2
    assert taken.seconds == {"a": 1.0, "b": 2.0}


def test_how_long_it_will_take(clock: Clock) -> None:
    """By the pace so far, where the number of units is known."""
    running = Running("a", total=10)
    clock.now += 6
    assert running.seconds_left is None
    running.done = 3
    assert running.seconds_left == pytest.approx(14)


def test_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """When a phase begins, every ten seconds, and when it ends, unless that is at once; on stderr."""
    with shown(True) as told:
        with phase("images"):
            clock.now += 0.5
        with phase("finetune") as advance:
            for step in range(1, 51):
                clock.now += 0.5
                advance(note=f"loss {1 / step:.3f}", total=100)
        told.say("the end")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "qft_plugin: images ...",
        "qft_plugin: finetune ...",
        "qft_plugin: finetune: 20 of 100, loss 0.050, 40.0 s left",
        "qft_plugin: finetune: 40 of 100, loss 0.025, 30.0 s left",
        "qft_plugin: finetune: 25.0 s, loss 0.020",
        "the end",
    ]


def test_nothing_is_shown_to_who_did_not_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither phases nor what is said."""
    with shown(False) as told:
        with phase("images") as advance:
            advance()
        told.say("the end")
    assert capsys.readouterr() == ("", "")


def plain(text: str) -> str:
    """Return what a terminal was told, without the codes that colour it and move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_in_a_terminal_ticks_stay(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each phase that has ended, with its seconds; the line that lives is gone, and the cursor is back."""
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(True) as told:
        with phase("images"):
            pass
        with phase("finetune", total=2) as advance:
            advance(note="loss 0.5")
            advance(note="loss 0.25")
        told.say("the [end]")
    lines = [line.rstrip() for line in plain(terminal.getvalue()).replace("\r", "\n").splitlines()]
    ends = [line for line in lines if re.match(r"(✓|ok) ", line)]
    assert [line.split()[1] for line in ends] == ["images", "finetune"]
    assert ends[1].endswith(" s, loss 0.25")
    assert "the [end]" in lines
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert sys.stderr is terminal


def test_long_lines_are_broken_between_words(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows stands below the text, beside the name of the line."""
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "30")
    with shown(True) as told:
        told.say("Net, quantized\n  loss     it is nearly the same as before\n  seconds  3.0")
    lines = [line.rstrip() for line in plain(terminal.getvalue()).replace("\r", "\n").splitlines() if line.strip()]
    assert lines == [
        "Net, quantized",
        "  loss     it is nearly the",
        "           same as before",
        "  seconds  3.0",
    ]


def test_breaking_loses_nothing() -> None:
    """A word that is longer than a line stays whole, and so do empty lines and names that leave no room."""
    path = "/a/" + "very/" * 9 + "long.xml"
    assert broken(f"file  {path} is there\n\nend", 30) == f"file\n      {path}\n      is there\n\nend"
    assert broken("a name of twenty-three  some words", 30) == "a name of twenty-three  some\nwords"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_a_clean_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """The phase says that it was stopped, the cursor is back, and the streams are the old ones."""
    monkeypatch.setattr(sys, "stderr", terminal)
    out = sys.stdout
    with pytest.raises(error), shown(True), phase("finetune"):
        raise error
    assert re.search(r"(✗|failed) finetune stopped after", plain(terminal.getvalue()))
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == (out, terminal)


def test_warnings_and_logs_stand_above_the_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a line of its own, also those of handlers that hold the old stream, which they get back."""
    monkeypatch.setattr(sys, "stderr", terminal)
    logger, handler = logging.getLogger("qft_plugin.test_display"), logging.StreamHandler(terminal)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with shown(True), phase("finetune"):
            print("a warning", file=sys.stderr)  # as Python writes one; pytest collects the real ones
            logger.warning("a log line")
            assert handler.stream is not terminal
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    lines = [line.strip() for line in plain(terminal.getvalue()).replace("\r", "\n").splitlines()]
    assert "a log line" in lines
    assert "a warning" in lines


def test_without_rich_lines_are_plain(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is no error."""
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with shown(True), phase("images"):
        pass
    assert terminal.getvalue() == "qft_plugin: images ...\n"


def test_a_terminal_that_cannot_draw_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """As editors have them."""
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with shown(True), phase("images"):
        pass
    assert terminal.getvalue() == "qft_plugin: images ...\n"
