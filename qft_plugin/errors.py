"""The exceptions and the warning that a caller of the library may want to catch, and how a warning is given."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar


class QFTError(Exception):
    """Base of every error that this library raises on purpose.

    A message has three parts: where (layer, field or host), what was found and what was expected, and what to do.
    """


class ConfigError(QFTError, ValueError):
    """A setting is out of range, of the wrong type, or contradicts another one."""


class ModelError(QFTError):
    """The model cannot be quantized as it is: it cannot be traced, holds nothing to quantize, or computes NaN."""


class DataError(QFTError, ValueError):
    """The dataset cannot be used: empty, labels beside the images, changing shapes, wrong dtype or device, NaN."""


class HostError(QFTError):
    """A package is missing, a host is too old, or was asked for something that this algorithm cannot honour."""


class DeployabilityError(QFTError):
    """The trained network cannot be expressed in the requested format."""


class ParityError(QFTError):
    """An exported file does not compute what the quantized network computes."""


class OutOfMemoryError(QFTError, MemoryError):
    """The operating system or the accelerator had no memory for a tensor; what the user has passed is as before."""


class QFTWarning(UserWarning):
    """Something was not done as asked, or is likely not what the user wants, but the result is still valid."""


_collected: ContextVar[list[str] | None] = ContextVar("qft_plugin_warnings", default=None)


def warn(message: str, *, stacklevel: int = 1) -> None:
    """Emit a `QFTWarning`, and add it to the list of the job that runs, whatever filters make of it.

    Args:
        message: what was found, what it should be, and what to do.
        stacklevel: as of `warnings.warn`: 1 is the line that calls this function.
    """
    found = _collected.get()
    if found is not None:
        found.append(message)
    warnings.warn(message, QFTWarning, stacklevel=stacklevel + 1)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the messages of all warnings of this library that this thread gives inside the block, in order."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)
