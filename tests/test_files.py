"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from qft_plugin.files import draft_of, write_whole


def test_a_file_is_replaced(tmp_path: Path) -> None:
    """By what was written last, with nothing beside it."""
    target = tmp_path / "a.txt"
    for text in ("first", "second\nä"):
        write_whole(target, text)
    assert target.read_bytes() == "second\nä".encode()
    assert list(tmp_path.iterdir()) == [target]


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no draft."""
    target = tmp_path / "a.txt"
    write_whole(target, "first")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, "second")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_draft_is_on_the_same_disk(tmp_path: Path) -> None:
    """Under the same name, so that it can be moved to its place at once."""
    with draft_of(tmp_path / "a.txt") as draft:
        assert draft.name == "a.txt"
        assert draft.parent.parent == tmp_path
    assert not list(tmp_path.iterdir())
