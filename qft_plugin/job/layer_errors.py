"""What quantization does to each layer, and by it to the network: the layers of a report, measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import Layer
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.bias_correction import Outputs
from qft_plugin.job.host import Placed, Problem, Source, Start
from qft_plugin.job.parts import Difference, Parts
from qft_plugin.report.data import LayerErrors, LayerFigures, Report
from qft_plugin.tensors.grid import largest_integer
from qft_plugin.tensors.mmse import rounding_errors
from qft_plugin.training.integers import DeployedWeight, deployed_weights
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution

BINS: Final = 64
"""Bins of the float weights, at least: each integer of 4 bits has four."""


@dataclass(frozen=True)
class Measured:
    """The errors of all quantized layers.

    Attributes:
        images: how many images they were measured on.
        errors: by name of the weight.
        figures: likewise.
    """

    images: int
    errors: Mapping[str, LayerErrors]
    figures: Mapping[str, LayerFigures]


def with_errors(report: Report, measured: Measured) -> Report:
    """Put the errors of layers into a report."""
    layers = [
        replace(layer, errors=measured.errors.get(layer.weight), figures=measured.figures.get(layer.weight))
        for layer in report.layers
    ]
    return replace(report, layers=tuple(layers), analysed=measured.images)


@torch.no_grad()
def measure(start: Start[Placed], problem: Problem[Source], config: QFTConfig) -> Measured:
    """Measure the errors of all quantized layers.

    Everything is compared with the float network that the job began with, on images that were held out of training (the
    first ones, where none were), at most 128 and in a network of much work 16. It runs on them twice for each layer:
    with this layer alone quantized and with all others; and three times more. That is about a minute for 53 layers.

    An activation quantizer that serves several layers is active with each of them alone, and left out for all of them
    where one is left out.

    Args:
        start: the result of `job.start.initialize`, trained or not.
        problem: the result of `job.understand.understand`.
        config: the settings.
    """
    parts = Parts(start, problem, config)
    images = parts.images(runs=2 * len(parts.layers) + 3)
    alone, without = (dict.fromkeys(parts.reads, Difference()) for _ in range(2))
    outputs_alone, outputs_together = (dict.fromkeys(parts.reads, _Relative()) for _ in range(2))
    clips = _Clips(start, parts)
    for call, count in parts.batches(images):
        expected, outputs = _seen(parts, parts.none(), call, parts.layers)
        clips.look(call)
        _, found = _seen(parts, parts.quantized, call, parts.layers)
        for name, values in found.items():
            outputs_together[name] += _Relative.of(values, outputs.get(name, []))
        del found
        for layer in parts.layers:
            name = layer.weight
            prediction, one = _seen(parts, parts.only(layer), call, [layer])
            outputs_alone[name] += _Relative.of(one.get(name, []), outputs.get(name, []))
            alone[name] += parts.difference(prediction, expected, images=count)
            prediction = parts.run(parts.without(layer), call)
            without[name] += parts.difference(prediction, expected, images=count)
    deployed = deployed_weights(start.dof)
    errors = {}
    for name in parts.reads:
        weight = _Relative.of([parts.quantized.tensors[name]], [parts.floating[name]])
        errors[name] = LayerErrors(
            weight=weight.value or 0.0,
            output_alone=outputs_alone[name].value,
            output_accumulated=outputs_together[name].value,
            loss_only=alone[name].loss,
            loss_without=without[name].loss,
            agreement_only=alone[name].agreement,
            agreement_without=without[name].agreement,
            clipped=clips.share(parts.reads[name]),
            dead=float((deployed[name].integers == 0).to(torch.float64).mean()),
        )
    figures = {
        layer.weight: _figures(start, problem, layer, deployed[layer.weight], parts.floating[layer.weight])
        for layer in parts.layers
    }
    return Measured(images, errors, figures)


def _seen(
    parts: Parts, solution: Solution, call: Call, layers: Sequence[Layer]
) -> tuple[Prediction, dict[str, list[Tensor]]]:
    """Run a network, and return what some layers compute in each of their calls, by name of the weight."""
    found: dict[str, list[Tensor]] = {}

    def keep(layer: Layer, y: Tensor) -> Tensor:
        found.setdefault(layer.weight, []).append(y.clone())  # what reads it may change it in place
        return y

    with Outputs(layers, solution.tensors, keep):
        prediction = parts.run(solution, call)
    return prediction, found


@dataclass(frozen=True)
class _Relative:
    """A relative error: the squares of a difference over those of what is expected, added up."""

    difference: float = 0.0
    expected: float = 0.0
    known: bool = False

    @classmethod
    def of(cls, found: Sequence[Tensor], expected: Sequence[Tensor]) -> "_Relative":
        """Compare tensors with others; nothing is known where there are none."""
        pairs = [*zip(found, expected, strict=False)]
        return cls(
            sum(float((f - e).square().sum(dtype=torch.float64)) for f, e in pairs),
            sum(float(e.square().sum(dtype=torch.float64)) for _, e in pairs),
            bool(pairs),
        )

    def __add__(self, other: "_Relative") -> "_Relative":
        return _Relative(self.difference + other.difference, self.expected + other.expected, self.known or other.known)

    @property
    def value(self) -> float | None:
        """The norm of the difference over that of what is expected; `None` where nothing is known."""
        if not self.known:
            return None
        return math.sqrt(self.difference / max(self.expected, torch.finfo(torch.float64).tiny))


class _Clips:
    """How many values of each activation are beyond the ends of its grid, in the float network."""

    def __init__(self, start: Start[Placed], parts: Parts) -> None:
        self._parts, self._grids = parts, start.dof.activations.grids
        self._beyond: dict[str, int] = {}
        self._values: dict[str, int] = {}

    def look(self, call: Call) -> None:
        """Count the values of one batch."""
        self._parts.observe(call, self._count)

    def _count(self, name: str, x: Tensor) -> None:
        grid, solution = self._grids[name], self._parts.quantized
        zero_point = solution.zero_points.get(name, grid.zero_point)
        rounded = (x / solution.activation_scales[name]).round_() + zero_point
        beyond = int(((rounded < grid.low) | (rounded > grid.high)).sum())
        self._beyond[name] = self._beyond.get(name, 0) + beyond
        self._values[name] = self._values.get(name, 0) + x.numel()

    def share(self, quantizers: Sequence[str]) -> float | None:
        """Return the share of some quantizers together, 0 to 1; `None` without any."""
        values = sum(self._values.get(name, 0) for name in quantizers)
        return sum(self._beyond.get(name, 0) for name in quantizers) / values if values else None


def _figures(
    start: Start[Placed], problem: Problem[Source], layer: Layer, deployed: DeployedWeight, W: Tensor
) -> LayerFigures:
    """Count integers and float weights for pictures.

    Args:
        start: holds the grids where training began.
        problem: holds the float weight that granularities are compared on.
        layer: the layer.
        deployed: its weight at the end.
        W: its float weight, folded like `deployed`, real units.
    """
    high, before = largest_integer(deployed.bits), start.dof.weight_grids[layer.weight].scale
    integers = (deployed.integers.round().long() + high).flatten().bincount(minlength=2 * high + 1)
    steps = W / layer.axes.on_weight(deployed.step, deployed.step_in, W)
    ends = float(-high - 1), float(high + 1)
    bins = max(BINS, 2 * high + 2)
    histogram = torch.histc(steps.clamp(*ends).flatten().cpu(), bins=bins, min=ends[0], max=ends[1])
    kernel = problem.source.tensors[layer.weight]
    return LayerFigures(
        integers=tuple(integers.tolist()),
        low=-high,
        before=tuple(int(count) for count in histogram.tolist()),
        scales_before=tuple(before.flatten().tolist()),
        scales_after=tuple(deployed.step.flatten().tolist()),
        granularity=rounding_errors(kernel, layer.axes) if layer.is_kernel else {},
    )
