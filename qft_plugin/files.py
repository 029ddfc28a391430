"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

PREFIX: Final = ".qft_"
"""Of the folders in which files are drafted."""

IN_USE: Final = ".in_use"
"""A file in such a folder that is locked as long as the process that made it lives."""


@contextlib.contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside the target, on the same disk; the folder is removed at the end.

    What should stay is moved to its place by `put`. Folders that killed processes have left there are removed first.

    Args:
        target: where the file will be; of a symbolic link, the file that it leads to.
    """
    parent = target.resolve().parent
    with contextlib.ExitStack() as draft:
        with _alone_in(parent):  # else a process that cleans up could find the folder before it is marked
            _remove_abandoned(parent)
            folder = Path(draft.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=PREFIX)))
            _lock(draft.enter_context((folder / IN_USE).open("wb")).fileno())
        yield folder / target.name


def put(draft: Path, target: Path) -> None:
    """Move a file to its place; it is on the disk before it takes the place of another one.

    Args:
        draft: what `draft_of` gave, or a file beside it.
        target: where it goes; of a symbolic link, the file that it leads to.
    """
    place = target.resolve()
    if draft.stat().st_dev != place.parent.stat().st_dev:  # beside a link to another disk
        with draft_of(place) as near:
            shutil.copyfile(draft, near)
            put(near, place)
        return
    with draft.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(draft, place)


def put_both(draft: Path, target: Path, suffix: str) -> None:
    """Move a file and the one beside it that belongs to it; of several processes, one pair after the other.

    A process that is killed in between leaves one file without the other, and never one beside the other of an earlier
    pair.

    Args:
        draft: the main file.
        target: where it goes.
        suffix: of the other file, which has the same name else; where that is a link, it stays one too.

    Raises:
        OSError: a file cannot be replaced; then both are as before, or the main one is missing.
    """
    other, place, earlier = draft.with_suffix(suffix), target.resolve(), draft.with_suffix(".earlier")
    with _alone_in(place.parent):
        if place.exists():
            os.replace(place, earlier)
        try:
            put(other, target.with_suffix(suffix))
        except BaseException:
            if earlier.exists():
                os.replace(earlier, place)
            raise
        put(draft, place)


def write_whole(target: Path, text: str) -> None:
    """Write a file of text, in the place of one that is there.

    Args:
        target: where it will be.
        text: what will be in it.

    Raises:
        OSError: the folder cannot be written to.
    """
    with draft_of(target) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
        put(draft, target)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is here for this folder, and keep them waiting."""
    if sys.platform == "win32":
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # on a disk that knows no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _lock(file: int) -> bool:
    """Lock a file for as long as it is open in this process; returns whether no other process had done so."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or on a disk that knows no locks
        return False
    return True


def _remove_abandoned(parent: Path) -> None:
    for mark in parent.glob(f"{PREFIX}*/{IN_USE}"):
        with contextlib.suppress(OSError), mark.open("rb+") as opened:
            if _lock(opened.fileno()):
                shutil.rmtree(mark.parent, ignore_errors=True)
