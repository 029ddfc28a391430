"""Packages that only some functions need: what to say where one is missing."""

import importlib.util
from importlib import metadata

from qft_plugin.errors import HostError


def install_line(extra: str) -> str:
    """Return the line that installs what an extra of this package needs, and keeps the torch that is there.

    Args:
        extra: `"nncf"`, `"brevitas"`, `"export"`, or several with commas between them.
    """
    try:
        torch = f"torch=={metadata.version('torch').partition('+')[0]} "
    except metadata.PackageNotFoundError:
        torch = ""
    return f"in a checkout of qft_plugin: pip install {torch}'.[{extra}]'"


def missing(what: str, *, extra: str) -> HostError:
    """Return the error of a package that is not installed.

    Args:
        what: the package, with its version where that matters.
        extra: the extra of this package that installs it.
    """
    return HostError(f"{what} should be installed. Found none. Run, {install_line(extra)}.")


def require(*modules: str, extra: str) -> None:
    """Check that modules are there, before long work that needs them.

    Args:
        modules: their names.
        extra: the extra of this package that installs them.

    Raises:
        HostError: one is missing; it names all that are.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise missing(", ".join(absent), extra=extra)
