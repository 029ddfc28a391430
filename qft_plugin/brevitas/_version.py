"""Which Brevitas is installed, and whether this plugin works with it."""

import os
import re
from importlib import metadata
from typing import Final

from qft_plugin.errors import HostError
from qft_plugin.packages import missing

OLDEST: Final = (0, 13, 1)
"""The first version that runs on torch 2.13, which has no named tensors any more."""


def check_version() -> None:
    """Check that Brevitas is installed, new enough, and not in its TorchScript mode.

    Raises:
        HostError: it is missing, too old, or `BREVITAS_JIT=1` is set.
    """
    wanted = ".".join(map(str, OLDEST))
    try:
        found = metadata.version("brevitas")
    except metadata.PackageNotFoundError:
        raise missing(f"Brevitas {wanted} or newer", extra="brevitas") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if numbers < OLDEST:
        raise HostError(f"Brevitas should be at least {wanted}. Found {found}. Run: pip install 'brevitas>={wanted}'.")
    if os.environ.get("BREVITAS_JIT", "0").lower() in ("1", "y", "yes", "t", "true", "on"):
        raise HostError(
            "Brevitas should run without TorchScript: scales that several layers share cannot be scripted. Found "
            "BREVITAS_JIT=1. Unset it; on torch 2.13 it is slower than without."
        )
