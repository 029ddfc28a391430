"""Which layers are worth 7 bits: what the rounding of each costs the network, and choices by cost and size."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import Layer
from qft_plugin.job.host import Placed, Problem, Source, Start
from qft_plugin.job.parts import Parts
from qft_plugin.tensors.grid import largest_integer, to_integer
from qft_plugin.tensors.mmse import doubly_scales, weight_scale
from qft_plugin.training.dof import WeightGrid

WIDE: Final = 7
"""Bits that layers are raised to: the most that no CPU overflows with (`QFTConfig.small_layer_bits`)."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may be raised to 7 bits.

    Attributes:
        weight: name of its weight.
        size: how many weights it has.
        bits: what it has now.
        gain: by how much the cost of the network becomes smaller.
    """

    weight: str
    size: int
    bits: int
    gain: float

    @property
    def extra(self) -> int:
        """How many bits it takes, of all its weights together."""
        return self.size * (WIDE - self.bits)


@dataclass(frozen=True)
class Analysis:
    """What the rounding of each layer costs the network.

    Attributes:
        images: how many images it was measured on.
        bits: of each quantized weight by the settings, by its name.
        sizes: how many weights each of them has.
        candidates: the layers that may be raised, worst for their size first.
        rest: the cost that remains with all of them raised: of 7 bits, of activations, of what the user has fixed.
    """

    images: int
    bits: Mapping[str, int]
    sizes: Mapping[str, int]
    candidates: tuple[Candidate, ...]
    rest: float

    def average(self, raised: Sequence[Candidate]) -> float:
        """Return the mean bit width over all quantized weights with some layers raised."""
        used = sum(bits * self.sizes[name] for name, bits in self.bits.items())
        return (used + sum(c.extra for c in raised)) / sum(self.sizes.values())


def by_worth(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Sort layers by what a bit for all of their weights gains; of equal ones the smaller first."""
    return tuple(sorted(candidates, key=lambda c: (-c.gain / c.extra, c.extra)))


def within(analysis: Analysis, average_bits: float) -> list[Candidate]:
    """Choose the layers to raise so that the mean bit width stays below a limit: in order, each that still fits.

    Args:
        analysis: the layers.
        average_bits: the limit.
    """
    room = (average_bits - analysis.average(())) * sum(analysis.sizes.values())
    found = []
    for candidate in analysis.candidates:
        if candidate.extra <= room * (1 + 1e-9):
            found.append(candidate)
            room -= candidate.extra
    return found


def enough(analysis: Analysis, share: float) -> int:
    """Return how many layers, the first ones, to raise so that only a share of the cost remains; all if none do.

    Costs of layers roughly add up.

    Args:
        analysis: the layers.
        share: from 0 to 1.
    """
    gains = [c.gain for c in analysis.candidates]
    whole = analysis.rest + sum(gains)
    for count in range(len(gains)):
        if analysis.rest + sum(gains[count:]) <= share * whole:
            return count
    return len(gains)


def between(candidates: Sequence[Candidate], low: int, high: int) -> int:
    """Return the number of layers, from `low` + 1 to `high` - 1, that takes about the mean of what these two take.

    Args:
        candidates: the layers in order.
        low: a number of layers, the first ones.
        high: likewise, at least `low` + 2.
    """
    middle = (extra_of(candidates, low) + extra_of(candidates, high)) / 2
    return min(range(low + 1, high), key=lambda count: abs(extra_of(candidates, count) - middle))


def extra_of(candidates: Sequence[Candidate], count: int) -> int:
    """Return how many bits the first `count` layers take."""
    return sum(c.extra for c in candidates[:count])


@torch.no_grad()
def analyse(start: Start[Placed], problem: Problem[Source], config: QFTConfig) -> Analysis:
    """Measure what the rounding of each layer costs: at its bit width, and at 7 bits.

    The cost is the divergence of the class probabilities from those of the float network, or the loss where the network
    names no classes. Each layer is rounded to the nearest in the float network; the network runs twice for each, and
    twice more.

    Args:
        start: the result of `job.start.initialize`, untrained.
        problem: the result of `job.understand.understand`.
        config: the settings: `layer_bits` are not changed.
    """
    parts, grids = Parts(start, problem, config), start.dof.weight_grids
    kernels = [layer for layer in parts.layers if layer.is_kernel]
    free = {layer.weight for layer in kernels if grids[layer.weight].bits < WIDE and not _is_fixed(layer, config)}
    images = parts.images(runs=2 * len(kernels) + 2)
    rounded = {
        (layer.weight, bits): _rounded(parts.floating[layer.weight], layer, grids[layer.weight], bits)
        for layer in kernels
        for bits in {grids[layer.weight].bits, WIDE}
        if bits != WIDE or layer.weight in free or grids[layer.weight].bits == WIDE
    }
    costs, rest = dict.fromkeys(rounded, 0.0), 0.0
    for call, count in parts.batches(images):
        floating = parts.none()
        expected = parts.run(floating, call)
        activations = parts.of((), parts.quantized.activation_scales)
        rest += parts.cost(parts.run(activations, call), expected) * count / images
        for key, W in rounded.items():
            found = parts.run(parts.exchanged(floating, key[0], W), call)
            costs[key] += parts.cost(found, expected) * count / images
    candidates = []
    for layer in kernels:
        name, bits = layer.weight, grids[layer.weight].bits
        if name in free:
            gain = max(0.0, costs[name, bits] - costs[name, WIDE])
            candidates.append(Candidate(name, parts.floating[name].numel(), bits, gain))
        rest += costs[name, WIDE if name in free else bits]
    return Analysis(
        images,
        {layer.weight: grids[layer.weight].bits for layer in parts.layers},
        {layer.weight: parts.floating[layer.weight].numel() for layer in parts.layers},
        by_worth(candidates),
        rest,
    )


def _is_fixed(layer: Layer, config: QFTConfig) -> bool:
    return any(fnmatch.filter([layer.weight], pattern) for pattern in config.layer_bits)


def _rounded(W: Tensor, layer: Layer, grid: WeightGrid, bits: int) -> Tensor:
    """Round a weight to the nearest, with scales of the granularity that its quantizer has."""
    if grid.scale_in is not None:
        S, T = doubly_scales(W, layer.axes, bits=bits)
    else:
        S, T = weight_scale(W, layer.axes, bits=bits, per_channel=grid.scale.dim() > 0), None
    step, high = layer.axes.on_weight(S, T, W), largest_integer(bits)
    return to_integer(W, step, low=-high, high=high) * step
