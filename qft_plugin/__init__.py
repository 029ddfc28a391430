"""QFT: 4-bit weights by one short label-free finetune of all degrees of freedom (arXiv 2212.02634).

Import a host to use it: `qft_plugin.nncf` registers the algorithm with `nncf.quantize`.
"""

from typing import TYPE_CHECKING, Any

from qft_plugin.config import EfQAT, FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.config_file import config_from_dict, config_to_dict, load_config, save_config
from qft_plugin.errors import (
    ConfigError,
    DataError,
    DeployabilityError,
    HostError,
    ModelError,
    OutOfMemoryError,
    ParityError,
    QFTError,
    QFTWarning,
)
from qft_plugin.report.data import Report

if TYPE_CHECKING:
    from qft_plugin.onnx_import.load import from_onnx

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "DeployabilityError",
    "EfQAT",
    "FinetuneConfig",
    "HardwareSpec",
    "HostError",
    "ModelError",
    "OutOfMemoryError",
    "ParityError",
    "QFTConfig",
    "QFTError",
    "QFTWarning",
    "Report",
    "config_from_dict",
    "config_to_dict",
    "from_onnx",
    "load_config",
    "save_config",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for, so that settings do without."""
    if name == "from_onnx":
        from qft_plugin.onnx_import.load import from_onnx

        return from_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
