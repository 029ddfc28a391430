"""The exceptions and the warning that a caller of the library may want to catch."""


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
    """The host framework is missing, too old, or was asked for something that this algorithm cannot honour."""


class DeployabilityError(QFTError):
    """The trained network cannot be expressed in the requested format."""


class ParityError(QFTError):
    """An exported file does not compute what the quantized network computes."""


class QFTWarning(UserWarning):
    """Something was not done as asked, or is likely not what the user wants, but the result is still valid."""
