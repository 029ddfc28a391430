"""A dry run under NNCF."""

from collections.abc import Iterator
from typing import Any

import nncf
from torch import nn

from qft_plugin.config import QFTConfig
from qft_plugin.job.inspect import inspect as job_inspect
from qft_plugin.nncf._register import MARK, checked_request, opened
from qft_plugin.report.inspection import Inspection


def inspect(
    model: nn.Module,
    calibration_dataset: Any,
    config: QFTConfig | None = None,
    *,
    verbose: bool = True,
    **host: Any,
) -> Inspection:
    """Say what `nncf.quantize(..., algorithm=config)` would decide and cost; nothing is trained or written.

    It takes seconds: the model is read, placed and started on the first 64 images, without compensation, and a few
    steps are timed. Warnings of this library are collected in the result and not shown.

    Args:
        model: float torch model; it is never changed, and random numbers go on as if nothing had been drawn.
        calibration_dataset: `nncf.Dataset` of unlabeled inputs.
        config: the settings; `None` for the defaults.
        verbose: show the phases on stderr while they run.
        **host: the other arguments of `nncf.quantize`.

    Raises:
        QFTError: what `nncf.quantize` would raise before it trains, as far as the first images show it.
    """
    original = getattr(nncf.quantize, MARK, nncf.quantize)
    host.pop("callback", None)
    config, request = checked_request(original, calibration_dataset, config or QFTConfig(), host)
    items = calibration_dataset.get_length() if isinstance(calibration_dataset, nncf.Dataset) else None
    source = getattr(calibration_dataset, "_data_source", None)
    with opened(model, request, verbose=verbose) as opened_host:
        return job_inspect(opened_host, config, items=items, once=isinstance(source, Iterator))
