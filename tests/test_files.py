"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qft_plugin.files import draft_of, put, put_both, remove_abandoned, used_alone, write_whole

if sys.platform != "win32":
    pass

KILLED = """
import os, pathlib, signal, sys
from qft_plugin.files import draft_of
with draft_of(pathlib.Path(sys.argv[1])) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """By the next one that writes there; a draft in use stays."""
    target = tmp_path / "a.txt"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with draft_of(target) as draft:
        assert list(tmp_path.iterdir()) == [draft.parent]
        draft.write_text("first")
        write_whole(tmp_path / "b.txt", "")
        assert draft.read_text() == "first"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_what_a_process_left_that_was_killed_at_once_is_removed(tmp_path: Path) -> None:
    """Before it wrote anything, or while it removed its draft."""
    (tmp_path / ".qft_abandoned").mkdir()
    write_whole(tmp_path / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    """What it leads to is replaced."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = tmp_path / "a.txt"
    link.symlink_to(folder / "b.txt")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (folder / "b.txt").read_text() == "text"
    assert len(list(folder.iterdir())) == 1


def test_a_pair_through_links(tmp_path: Path) -> None:
    """Programs look for the second file beside the name that they were given: it goes where its own name leads."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "a.xml").symlink_to(folder / "b.xml")
    with draft_of(tmp_path / "a.xml") as draft:
        pair(draft.parent, "new")
        put_both(draft, tmp_path / "a.xml", ".bin")
    assert [(tmp_path / name).read_text() for name in ("a.xml", "a.bin")] == ["new", "new"]
    assert [path.name for path in folder.iterdir()] == ["b.xml"]


def test_a_link_to_another_disk(tmp_path: Path) -> None:
    """What cannot be moved there at once is copied beside its place first."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        link = tmp_path / "a.bin"
        link.symlink_to(Path(folder) / "b.bin")
        draft = tmp_path / "draft"
        draft.write_text("text")
        put(draft, link)
        assert link.is_symlink()
        assert link.read_text() == "text"
        assert [path.name for path in Path(folder).iterdir()] == ["b.bin"]


def pair(folder: Path, text: str) -> tuple[Path, Path]:
    """Write two files that belong together."""
    files = folder / "a.xml", folder / "a.bin"
    for file in files:
        file.write_text(text)
    return files


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_an_interrupted_pair_never_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """After any number of moves, the main file that is there belongs to the other."""
    xml, other = pair(tmp_path, "old")
    replace, done = os.replace, []

    def interrupted(*paths: Path) -> None:
        if len(done) == moves:
            raise RuntimeError
        done.append(replace(*paths))

    with draft_of(xml) as draft:
        pair(draft.parent, "new")
        monkeypatch.setattr(os, "replace", interrupted)
        if moves < 3:
            with pytest.raises(RuntimeError):
                put_both(draft, xml, ".bin")
        else:
            put_both(draft, xml, ".bin")
    found = xml.read_text() if xml.exists() else None
    assert found == {0: "old", 1: None, 2: None, 3: "new"}[moves]
    assert other.read_text() == ("old" if moves < 2 else "new")


def test_a_pair_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """The old one is whole again."""
    xml, other = pair(tmp_path, "old")
    with draft_of(xml) as draft:
        draft.write_text("new")
        with pytest.raises(FileNotFoundError):
            put_both(draft, xml, ".bin")
    assert xml.read_text() == other.read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_pairs_never_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second waits until both files of the first one are there."""
    xml, other = tmp_path / "a.xml", tmp_path / "a.bin"
    replace, both, seen = os.replace, threading.Barrier(2), []

    def slowly(*paths: Path) -> None:
        time.sleep(0.05)
        replace(*paths)
        if paths[1] == xml:
            seen.append((xml.read_text(), other.read_text()))

    monkeypatch.setattr(os, "replace", slowly)

    def save(text: str) -> None:
        with draft_of(xml) as draft:
            pair(draft.parent, text)
            both.wait(10)
            put_both(draft, xml, ".bin")

    with ThreadPoolExecutor() as threads:
        for each in [threads.submit(save, text) for text in ("one", "two")]:
            each.result()
    assert sorted(seen) == [("one", "one"), ("two", "two")]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_a_draft_that_another_process_takes_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is locked its folder may be removed; then another one is made."""
    make, made = tempfile.mkdtemp, list[str]()

    def cleaned_up(**where: object) -> str:
        made.append(make(**where))  # type: ignore[call-overload]
        if len(made) == 1:
            remove_abandoned(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", cleaned_up)
    write_whole(tmp_path / "a.txt", "text")
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_is_missing_in_a_draft_is_said(tmp_path: Path) -> None:
    """It is no folder that is missing, for which another one would be made."""
    with pytest.raises(FileNotFoundError), draft_of(tmp_path / "a.txt") as draft:
        put(draft, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_a_folder_is_used_alone(tmp_path: Path) -> None:
    """By one at a time, the next one after it has ended; nothing is left in it."""
    with used_alone(tmp_path) as first, used_alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with used_alone(tmp_path) as third:
        assert third
    assert not list(tmp_path.iterdir())
