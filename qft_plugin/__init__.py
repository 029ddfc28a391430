"""QFT: 4-bit weights by one short label-free finetune of all degrees of freedom (arXiv 2212.02634).

Import a host to use it: `qft_plugin.nncf` registers the algorithm with `nncf.quantize`.
"""

from qft_plugin.config import EfQAT, FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.errors import (
    ConfigError,
    DataError,
    DeployabilityError,
    HostError,
    ModelError,
    ParityError,
    QFTError,
    QFTWarning,
)
from qft_plugin.report.data import Report

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
    "ParityError",
    "QFTConfig",
    "QFTError",
    "QFTWarning",
    "Report",
]
