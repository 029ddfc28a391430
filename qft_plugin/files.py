"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside the target, on the same disk; the folder is removed at the end.

    What should stay is moved to its place by the caller.

    Args:
        target: where the file will be.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".qft_") as folder:
        yield Path(folder) / target.name


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
        os.replace(draft, target)
