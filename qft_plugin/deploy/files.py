"""Where a file is written to, and what other libraries say of it, as errors of this one."""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch import nn

from qft_plugin.errors import DeployabilityError, QFTError

DISK: Final = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO])
"""What the operating system says of a disk that is full, and of a place that cannot be written to."""


CONVERTING: Final = threading.Lock()
"""Torch traces one model at a time: it keeps the names of the modules of a trace for the whole process."""


def check_module(model: object) -> None:
    """Check that what is to be saved is a model.

    Raises:
        DeployabilityError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise DeployabilityError(
            f"model should be the quantized torch.nn.Module. Found {type(model).__name__}. Pass what quantize "
            "returned, of a Job its model."
        )


def checked_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """Check where a file is to be written, before any work.

    Raises:
        DeployabilityError: it is no path, the folder does not exist or cannot be written to, or the file has another
            suffix or is a folder.
    """
    target = Path(path) if isinstance(path, (str, os.PathLike)) else None
    if target is None or target.suffix != suffix or not target.parent.is_dir():
        found = path if target is None else os.fspath(target)
        raise DeployabilityError(
            f"path should be a {suffix} file in an existing folder. Found {found!r:.200}. Make the folder, or change "
            "the name."
        )
    for place in (target, target.with_suffix(".bin")) if suffix == ".xml" else (target,):
        if place.is_dir():
            raise DeployabilityError(f"path should be free, or a file. Found a folder at {place}. Change the name.")
    try:
        with tempfile.TemporaryFile(dir=target.resolve().parent):
            pass
    except OSError as error:
        raise _full(target, error) from error
    return target


@contextlib.contextmanager
def written_to(target: Path) -> Iterator[None]:
    """Say of a full disk, or of a folder that cannot be written to, what it is and what to do.

    Args:
        target: where the file goes.

    Raises:
        DeployabilityError: the operating system could not write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise _full(target, error) from error


def _full(target: Path, error: OSError) -> DeployabilityError:
    return DeployabilityError(
        f"{target} should be written. Found {type(error).__name__}: {error.strerror}, {room_in(target)}. What was "
        "there before is as it was. Make room, change the rights, or name another folder."
    )


def room_in(target: Path) -> str:
    """Say how much room is left where a file goes."""
    folder = target.resolve().parent
    return f"with {shutil.disk_usage(folder).free / 2**20:,.0f} MiB free in {folder}"


@contextlib.contextmanager
def refused(expected: str, remedy: str) -> Iterator[None]:
    """Raise what another library raises, of whatever kind, as an error of this one.

    Args:
        expected: a sentence that says what should have worked.
        remedy: one that says what to do.

    Raises:
        DeployabilityError: something else was raised.
    """
    try:
        yield
    except QFTError:
        raise
    except OSError as error:
        if error.errno in DISK:
            raise  # said by `written_to`
        raise _refusal(expected, error, remedy) from error
    except Exception as error:
        raise _refusal(expected, error, remedy) from error


def _refusal(expected: str, error: Exception, remedy: str) -> DeployabilityError:
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return DeployabilityError(f"{expected} Found {type(error).__name__}: {said}. {remedy}")


def runs(runtime: str) -> contextlib.AbstractContextManager[None]:
    """Raise what a runtime raises when it loads or runs a file as an error of this library.

    Args:
        runtime: who runs it.
    """
    return refused(
        f"{runtime} should load and run the file.",
        "Replace the operation that it names, or save in another format. With check=False the file is written without "
        "being run.",
    )
