"""Where a file is written to, and what other libraries say of it, as errors of this one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qft_plugin.errors import DeployabilityError, QFTError


def checked_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """Check where a file is to be written, before any work.

    Raises:
        DeployabilityError: the folder does not exist, or the file has another suffix.
    """
    target = Path(path)
    if target.suffix != suffix or not target.parent.is_dir():
        raise DeployabilityError(
            f"path should be a {suffix} file in an existing folder. Found {os.fspath(path)!r}. "
            "Make the folder, or change the name."
        )
    return target


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
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise DeployabilityError(f"{expected} Found {type(error).__name__}: {said}. {remedy}") from error


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
