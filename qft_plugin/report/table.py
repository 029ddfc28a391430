"""The text of a report: what a user reads at the end of a job."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from qft_plugin.report.record import Record

BRIEF: Final = 0.05
"""Seconds below which a phase is left out."""

LISTED: Final = 5
"""How many of the layers that stayed in floating point are named."""


def summary(report: Record) -> str:
    """Say what a job did and how good its result is, one thing in a line.

    Args:
        report: a `report.data.Report`, whose `str` this is.
    """
    rows: list[tuple[str, str]] = [("images", _images(report)), ("loss", _loss(report))]
    if report.agreement is not None:
        rows.append(("agreement", _agreement(report, report.agreement)))
    rows.append(("layers", _layers(report)))
    rows += [("" if number else "stayed float", line) for number, line in enumerate(_floating(report))]
    if report.decisions:
        rows += [("" if number else "decisions", line) for number, line in enumerate(report.decisions)]
    rows.append(("warnings", str(len(report.warnings)) if report.warnings else "none"))
    if report.seconds:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items() if seconds >= BRIEF)
        rows.append(("seconds", ": ".join(filter(None, [f"{sum(report.seconds.values()):.1f}", phases]))))
    if report.peak_memory:
        rows.append(("peak memory", f"{report.peak_memory / 1e9:.2f} GB"))
    width = max(len(name) for name, _ in rows)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    head = f"{report.model}, quantized under {report.host}" + (f" ({versions})" if versions else "")
    return "\n".join([head, *(f"  {name.ljust(width)}  {text}" for name, text in rows)])


def one_line(report: Record) -> str:
    """Say the same in one short line.

    Args:
        report: a `report.data.Report`, whose `repr` this is.
    """
    words = [f"{len(report.layers)} layers"]
    if report.final_loss is not None:
        words.append(f"loss {report.start_loss:.4g} -> {report.final_loss:.4g}")
    if report.agreement is not None:
        words.append(f"agreement {percent(report.agreement)}")
    return f"Report({report.host}, {report.model[:60]}: {', '.join(words)})"


def percent(share: float) -> str:
    """Write a share, 0 to 1, in percent."""
    return f"{100 * share:.1f} %"


def _images(report: Record) -> str:
    held = f"{report.held_out} of them held out of training" if report.held_out else "none held out of training"
    return f"{report.images}, {held}"


def _loss(report: Record) -> str:
    if report.final_loss is None:
        return "not measured, nothing was trained"
    steps = f"in {len(report.losses)} steps"
    if not report.gained:
        return f"{report.final_loss:.5f} at the start; the finetune gained nothing {steps}: the start is returned"
    at = f", compared at {_named(report.compared_at)}" if report.compared_at else ""
    return f"{report.start_loss:.5f} -> {report.final_loss:.5f} {steps}{at}"


def _agreement(report: Record, agreement: float) -> str:
    before = "" if report.start_agreement is None else f"{percent(report.start_agreement)} -> "
    which = f"the {report.held_out} images" if report.held_out else "images"
    return f"{before}{percent(agreement)} of {which} get the class of the float network"


def _layers(report: Record) -> str:
    counts = Counter(layer.bits for layer in report.layers)
    parts = [f"{counts[bits]} of {bits} bits" for bits in sorted(b for b in counts if b is not None)]
    if counts[None]:
        parts.append(f"{counts[None]} in floating point")
    return f"{len(report.layers)}: {', '.join(parts)}" if parts else "none"


def _floating(report: Record) -> list[str]:
    lines = [f"{layer.name}: {layer.reason}" for layer in report.layers if layer.bits is None]
    more = len(lines) - LISTED
    return [*lines[:LISTED], *([f"and {more} more layers"] if more > 0 else [])]


def _named(names: Sequence[str]) -> str:
    more = len(names) - 2
    return ", ".join(names[:2]) + (f" and {more} more" if more > 0 else "")
