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

IN_USE: Final = ".in_use"
"""A file in a folder that one process uses alone, locked as long as it does."""


@contextlib.contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside the target, on the same disk; the folder is removed at the end.

    What should stay is moved to its place by `put`. Folders that killed processes have left there are removed first.

    Args:
        target: where the file will be; of a symbolic link, the file that it leads to.
    """
    parent = target.resolve().parent
    remove_abandoned(parent)
    with _locked_folder(parent) as folder:
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
def used_alone(folder: Path) -> Iterator[bool]:
    """Tell whether no other process is inside such a block with the same folder; where locks are unknown, it is so.

    Args:
        folder: it is there; a file in it is locked, which is removed at the end.
    """
    mark = folder / IN_USE
    while True:
        opened = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
        locked = _lock(opened)
        if locked is not True or _is_at(opened, mark):
            break
        os.close(opened)  # whoever had it has removed it
    try:
        yield locked is not False
    finally:
        if locked is not False and sys.platform != "win32":
            mark.unlink(missing_ok=True)
        os.close(opened)


def remove_abandoned(parent: Path) -> None:
    """Remove the drafts that processes have left in a folder which were killed."""
    for folder in parent.glob(f"{PREFIX}*/"):
        with contextlib.suppress(OSError), _open(folder) as opened:
            if opened is not None and _lock(opened):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is here for this folder, and keep them waiting."""
    with _open(folder) as opened:
        if opened is not None:
            _lock(opened, wait=True)
        yield


@contextlib.contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that nobody takes for abandoned, and remove it at the end."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(_open(folder))
            except FileNotFoundError:  # before it is locked another process may take it for abandoned
                continue
            if opened is None or (_lock(opened) is not False and _is_at(opened, folder)):
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                yield folder
                return


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int | None]:
    """Open a folder, to lock it; `None` on a system where that cannot be."""
    if sys.platform == "win32":
        yield None
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def _lock(opened: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or the process ends.

    Returns:
        False where another one has locked it, `None` on a system or a disk that knows no locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(opened: int, path: Path) -> bool:
    """Whether an open file or folder is the one at a path."""
    return path.exists() and os.path.samestat(os.fstat(opened), path.stat())
