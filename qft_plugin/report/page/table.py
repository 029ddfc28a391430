"""The table of layers."""

import math
from dataclasses import dataclass
from typing import Final

from qft_plugin.report.page import numbers
from qft_plugin.report.record import Layer


@dataclass(frozen=True)
class Cell:
    """A cell of the table of layers.

    Attributes:
        words: what it says.
        value: what it is sorted by; empty where that is not known.
    """

    words: str
    value: str


COLUMNS: Final = (
    ("weights", "how many weights it has"),
    ("bits", "of the weight"),
    ("act. bits", "of its input"),
    ("scales", "how many steps its weight has"),
)
MEASURED: Final = (
    ("weight error", "relative error of the weight"),
    ("output error alone", "relative error of its output where it alone is quantized"),
    ("output error in network", "relative error of its output in the quantized network"),
    ("loss only it", "loss of the network where it alone is quantized"),
    ("loss all but it", "loss of the network where all layers but this one are quantized"),
    ("agreement only it", "share of images of the same class where it alone is quantized"),
    ("agreement all but it", "share of images of the same class where all layers but this one are quantized"),
    ("clipped", "share of the values of its input beyond the ends of their grid"),
    ("dead", "share of its weights whose integer is 0"),
)


def bits_of(layer: Layer) -> str:
    """Write the bits of a weight; `"float"` where it has none."""
    return "float" if layer.bits is None else str(layer.bits)


def cells(layer: Layer) -> list[Cell]:
    """List the cells of `COLUMNS`."""
    return [
        Cell(numbers.count(layer.weights), str(layer.weights)),
        Cell(bits_of(layer), str(32 if layer.bits is None else layer.bits)),
        Cell(
            "float" if layer.activation_bits is None else str(layer.activation_bits), str(layer.activation_bits or 32)
        ),
        Cell(numbers.count(layer.scales), str(layer.scales)),
    ]


def error_cells(layer: Layer) -> list[Cell]:
    """List the cells of `MEASURED`; dashes where nothing was measured."""
    e = layer.errors
    if e is None:
        return [Cell(numbers.DASH, "") for _ in MEASURED]
    plain = (e.weight, e.output_alone, e.output_accumulated, e.loss_only, e.loss_without)
    shares = (e.agreement_only, e.agreement_without, e.clipped, e.dead)
    return [
        *(Cell(numbers.number(v), _key(v)) for v in plain),
        *(Cell(numbers.percent(v), _key(v)) for v in shares),
    ]


def _key(value: float | None) -> str:
    """Write a number as JavaScript reads it."""
    if value is None or math.isnan(value):
        return ""
    return "Infinity" if value == math.inf else f"{value:.4g}"
