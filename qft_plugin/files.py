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
"""Of the folders in which files are drafted; each is locked as long as the process that made it lives."""


@contextlib.contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside the target, on the same disk; the folder is removed at the end.

    What should stay is moved to its place by `put`. Folders that killed processes have left there are removed first.

    Args:
        target: where the file will be; of a symbolic link, the file that it leads to.
    """
    parent = target.resolve().parent
    remove_abandoned(parent)
    folder, opened = _locked_folder(parent)
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if opened is not None:
            os.close(opened)


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
    """Move a file and the one beside it that belongs to it.

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
def used_alone(folder: Path) -> Iterator[bool]:
    """Tell whether no other process is inside such a block with the same folder; where locks are unknown, it is so.

    Args:
        folder: it is there.
    """
    opened, locked = _locked(folder)
    try:
        yield locked is not False
    finally:
        if opened is not None:
            os.close(opened)


def remove_abandoned(parent: Path) -> None:
    """Remove the drafts that processes have left in a folder which were killed."""
    for folder in parent.glob(f"{PREFIX}*/"):
        with contextlib.suppress(OSError):
            opened, locked = _locked(folder)
            if locked:
                shutil.rmtree(folder, ignore_errors=True)
            if opened is not None:
                os.close(opened)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """Make a folder that nobody takes for abandoned; returns what `os.close` gives free again beside it."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        # Before it is locked another process may see it and remove it.
        with contextlib.suppress(FileNotFoundError):
            opened, locked = _locked(folder)
            if locked is not False and folder.exists():
                return folder, opened
            if opened is not None:
                os.close(opened)


def _locked(folder: Path) -> tuple[int | None, bool | None]:
    """Lock a folder until `os.close` is called or the process ends.

    Returns:
        The open folder, and False where another process has locked it, `None` where there are no locks.
    """
    if sys.platform == "win32":
        return None, None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return opened, False
    except OSError:  # a disk that knows no locks
        return opened, None
    return opened, True
