"""Files that appear whole and only where their proof holds."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qft_plugin.errors import DeployabilityError


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
def draft_of(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside the target, on the same disk; the folder is removed at the end.

    What should stay is moved to its place by the caller.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".qft_") as folder:
        yield Path(folder) / target.name
