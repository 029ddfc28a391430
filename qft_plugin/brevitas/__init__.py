"""Brevitas as a host: quantizers for its layers whose scales are trained together.

from qft_plugin.brevitas import QFTInt4Weight, QFTUint8Act, link, initialize, finetune, fold
"""

from qft_plugin.brevitas._version import check_version

check_version()

from qft_plugin.brevitas._inspect import inspect  # noqa: E402  (only after the check that Brevitas is there)
from qft_plugin.brevitas._link import dof_map_of, link  # noqa: E402
from qft_plugin.brevitas._quantizers import (  # noqa: E402
    QFTInt4Weight,
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    QFTInt8Act,
    QFTInt8ActPerTensorFloat,
    QFTShiftedUint8Act,
    QFTShiftedUint8ActPerTensorFloat,
    QFTUint8Act,
    QFTUint8ActPerTensorFloat,
)
from qft_plugin.brevitas._run import finetune, initialize, quantize  # noqa: E402
from qft_plugin.brevitas._save import save_qcdq, save_qonnx  # noqa: E402
from qft_plugin.brevitas._write import fold  # noqa: E402
from qft_plugin.graph.channel_affine import Rescaled  # noqa: E402
from qft_plugin.report.inspection import Inspection  # noqa: E402
from qft_plugin.report.kept import report_of  # noqa: E402
from qft_plugin.training.phases import Step  # noqa: E402

__all__ = [
    "Inspection",
    "QFTInt4Weight",
    "QFTInt4WeightDoublyPerChannelFloat",
    "QFTInt4WeightPerChannelFloat",
    "QFTInt4WeightPerTensorFloat",
    "QFTInt8Act",
    "QFTInt8ActPerTensorFloat",
    "QFTShiftedUint8Act",
    "QFTShiftedUint8ActPerTensorFloat",
    "QFTUint8Act",
    "QFTUint8ActPerTensorFloat",
    "Rescaled",
    "Step",
    "check_version",
    "dof_map_of",
    "finetune",
    "fold",
    "initialize",
    "inspect",
    "link",
    "quantize",
    "report_of",
    "save_qcdq",
    "save_qonnx",
]
