"""The report of a job, kept with the model that the job returned."""

from typing import Any, Final

from torch import fx, nn

from qft_plugin.errors import ConfigError
from qft_plugin.report.data import Report

KEPT: Final = "_qft_report"
"""Attribute of a quantized model; it is no part of its state dict."""


def keep_report(model: nn.Module, report: Report) -> None:
    """Keep a report with a model, in the place of an earlier one.

    Args:
        model: the model; it gets an attribute.
        report: of the job that made it.
    """
    _attributes(model)[KEPT] = report


def hand_report_on(model: nn.Module, other: nn.Module) -> None:
    """Keep the report of one model with another one, which was made from it."""
    report = _attributes(model).get(KEPT)
    if report is not None:
        keep_report(other, report)


def report_of(model: nn.Module) -> Report:
    """Return the report of the job that made a quantized model.

    Args:
        model: what this package has returned or trained, or a copy of it. A report is no part of the state dict: a
            model that was loaded from a file has none.

    Raises:
        ConfigError: it has none.
    """
    report = _attributes(model).get(KEPT) if isinstance(model, nn.Module) else None
    if not isinstance(report, Report):
        raise ConfigError(
            f"The model should be one that qft_plugin has quantized in this process, or a copy of it. Found a "
            f"{type(model).__qualname__} without a report. Pass the model that quantize has returned; to keep a report "
            "with a file of the model, write Report.to_json() beside it."
        )
    return report


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Return where copies of a model keep what is no part of it: a copy of an fx module loses its attributes."""
    found: dict[str, Any] = model.meta if isinstance(model, fx.GraphModule) else model.__dict__
    return found
