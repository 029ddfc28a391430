"""NNCF as a host: importing this package adds `algorithm="qft"` to `nncf.quantize`.

import nncf, qft_plugin.nncf
q = nncf.quantize(model, nncf.Dataset(loader, lambda batch: batch[0]), algorithm="qft")
"""

from qft_plugin.nncf._version import check_version

check_version()

from qft_plugin.deploy.openvino import set_weight_storage  # noqa: E402  (only after the check that NNCF is there)
from qft_plugin.graph.channel_clip import replace_by_relu  # noqa: E402
from qft_plugin.nncf._inspect import inspect  # noqa: E402
from qft_plugin.nncf._register import quantize, register, unregister  # noqa: E402
from qft_plugin.nncf._save import save_openvino  # noqa: E402
from qft_plugin.nncf._write import widened, without_compiler  # noqa: E402
from qft_plugin.report.inspection import Inspection  # noqa: E402
from qft_plugin.report.kept import report_of  # noqa: E402
from qft_plugin.training.phases import Step  # noqa: E402

register()

__all__ = [
    "Inspection",
    "Step",
    "check_version",
    "inspect",
    "quantize",
    "register",
    "replace_by_relu",
    "report_of",
    "save_openvino",
    "set_weight_storage",
    "unregister",
    "widened",
    "without_compiler",
]
