"""Which NNCF is installed, and whether this plugin works with it."""

from importlib import metadata
from typing import Final

from qft_plugin.errors import HostError
from qft_plugin.packages import missing

OLDEST: Final = (2, 17)
"""The first version whose torch models are quantized by function hooks."""


def check_version() -> None:
    """Check that NNCF is installed and new enough.

    Raises:
        HostError: it is missing or too old.
    """
    wanted = ".".join(map(str, OLDEST))
    try:
        found = metadata.version("nncf")
    except metadata.PackageNotFoundError:
        raise missing(f"NNCF {wanted} or newer", extra="nncf") from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise HostError(f"NNCF should be at least {wanted}. Found {found}. Run: pip install 'nncf>={wanted}'.")
