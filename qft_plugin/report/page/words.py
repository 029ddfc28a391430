"""What a report says in sentences."""

import math
from collections import Counter
from typing import Final

from qft_plugin.report.page.numbers import counted, known, number, percent
from qft_plugin.report.record import Record

TOLD_AS_TIMES: Final = 1.5
"""Factor from which on a smaller loss is told by it; below, in percent."""

AGREEMENTS: Final = (
    (0.98, "good", "hardly differs from the float network"),
    (0.95, "good", "is close to the float network"),
    (0.90, "fair", "is near the float network, but look at your own metric before you use it"),
    (0.75, "poor", "differs clearly from the float network"),
    (-1.0, "poor", "has little in common with the float network"),
)
"""From which agreement on a result is called what."""

LOSSES: Final = (
    (0.03, "good", "is close to the float network"),
    (0.10, "fair", "is near the float network, but look at your own metric before you use it"),
    (0.30, "poor", "differs clearly from the float network"),
    (math.inf, "poor", "has little in common with the float network"),
)
"""Likewise up to which loss, for networks whose agreement is not known: a ResNet-20 agreed on 93 % of test images at
0.02, on 85 % at 0.10 and on 71 % at 0.30."""


def grade(report: Record) -> tuple[str, str]:
    """Say how good a result is.

    Returns:
        `"good"`, `"fair"`, `"poor"` or `"unknown"`; and the end of a sentence.
    """
    if report.agreement is not None and known(report.agreement):
        return next((mark, words) for least, mark, words in AGREEMENTS if report.agreement >= least)
    if report.final_loss is not None and known(report.final_loss):
        return next((mark, words) for most, mark, words in LOSSES if report.final_loss <= most)
    return "unknown", "has not been compared with the float network"


def verdict(report: Record) -> list[str]:
    """Say in some sentences how good a result is, by which images, and what the finetune brought."""
    return [f"The quantized network {grade(report)[1]}.", *_agreement(report), *_finetune(report), *_images(report)]


def judged(report: Record) -> int:
    """Return how many images loss and agreement were measured on."""
    return report.held_out or report.images


def _agreement(report: Record) -> list[str]:
    if report.agreement is None or not known(report.agreement):
        return []
    # The standard error of a share; at 0 and 1 it would be 0, which nobody should read.
    share = min(max(report.agreement, 1 / (judged(report) + 2)), 1 - 1 / (judged(report) + 2))
    error = math.sqrt(share * (1 - share) / max(1, judged(report)))
    before = "" if not known(report.start_agreement) else f", before the finetune {percent(report.start_agreement)}"
    return [
        f"Both name the same class for {percent(report.agreement)} of the images (standard error "
        f"{number(100 * error, 2)} points){before}."
    ]


def _finetune(report: Record) -> list[str]:
    start, final = report.start_loss, report.final_loss
    if start is None or final is None or not known(start) or not known(final):
        return ["There was no finetune."] if start is None and not report.losses else []
    if not report.gained:
        return [
            f"The finetune gained nothing: no state had a smaller loss than its start, {number(start)}, which was kept."
        ]
    if final <= 0:
        return [f"The finetune took the loss from {number(start)} to 0."]
    much = f"{number(start / final, 2)} times" if start / final >= TOLD_AS_TIMES else percent(1 - final / start)
    return [f"The finetune made the loss {much} smaller, {number(start)} to {number(final)}."]


def _images(report: Record) -> list[str]:
    if report.held_out:
        return [f"Measured on {counted(report.held_out, 'image')} of {report.images:,} that were held out of training."]
    if not report.images or grade(report)[0] == "unknown":
        return []
    if not report.losses:
        return [f"Measured on the {counted(report.images, 'image')} that the job read."]
    return [
        f"Measured on the {counted(report.images, 'image')} that were trained on: too few to hold any out, so the "
        "figures flatter."
    ]


def bits_in_words(report: Record) -> list[tuple[str, int, int]]:
    """List bits of weights with how many layers and how many weights have them, the most weights first."""
    layers: Counter[int | None] = Counter(layer.bits for layer in report.layers)
    weights: Counter[int | None] = Counter()
    for layer in report.layers:
        weights[layer.bits] += layer.weights
    ranked = sorted(layers, key=lambda bits: -weights[bits])
    return [("float" if bits is None else f"{bits} bits", layers[bits], weights[bits]) for bits in ranked]
