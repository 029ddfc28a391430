"""Cross-layer factors with a small expected rounding error, from where equalization of ranges has ended.

Equalization (Eq. 19) makes ranges alike; it knows neither which inputs are large, nor that the range of one channel may
be worth more than that of another. The error of every layer can be foreseen before anything is rounded, and is a smooth
function of all factors and steps:

    J = sum over layers of  (E |(W - q(W)) x|^2 + E |W (x - q(x))|^2) / E |W x|^2

with x and W x less their means, which the biases answer for.

Departure: the paper starts from ranges alone and lets training move the factors. It then moves them after the weights
were rounded, where each move turns weights at random (docs/training.md).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qft_plugin.graph.layer_graph import DofMap, Layer
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.record import function_name
from qft_plugin.tensors.grid import largest_integer

SAMPLED: Final = 1 << 15
"""Weights of a kernel, at random places, whose errors stand for those of all."""

ITERATIONS: Final = 60
"""Of L-BFGS. On networks of 20 to 53 layers J is then within half a percent of where it ends."""

DAMPING: Final = 0.03
"""Share of the mean power that is added to that of each channel: one that few images need must not be given up."""

PEAK: Final = 8
"""The largest of several channels is taken as a norm of this power, which is smooth."""

ROUNDING: Final = 1 / 12
"""Mean squared error of a value that is rounded to the nearest integer."""


@dataclass(frozen=True)
class Seen:
    """What a layer reads and makes.

    Means are left out: a bias makes their errors good.

    Attributes:
        power: variance of each input channel, `[in]`, squared real units.
        span: what a grid must hold of each input channel, `[in]`, real units: the largest value, or where there are
            negative values in any channel twice the largest magnitude.
        output: sum of the variances of all output channels, `[]`, squared real units.
    """

    power: Tensor
    span: Tensor
    output: Tensor


class SeenByLayers(TorchFunctionMode):
    """While active, looks at what layers read and make."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Remember which tensors are weights.

        Args:
            weights: by name; the model must be called with them.
        """
        super().__init__()
        self._names = {id(W): name for name, W in weights.items()}
        self._calls: dict[str, list[Seen]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if function_name(func) in LAYERS:
            x = args[0] if args else kwargs["input"]
            W = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(id(W))
            if name is not None and x.numel():
                axis = -1 if W.dim() == 2 else 1 - W.dim()
                read, made = (t.detach().movedim(axis, 0).flatten(1).float() for t in (x, result))
                sides = 2 if bool((read < 0).any()) else 1
                seen = Seen(_variance(read), sides * read.abs().amax(1), _variance(made).sum())
                self._calls.setdefault(name, []).append(seen)
        return result

    @property
    def seen(self) -> dict[str, Seen]:
        """What was seen, by name of the weight; layers are missing that were not called with the very tensor."""
        return {
            name: Seen(
                torch.stack([call.power for call in calls]).mean(0),
                torch.stack([call.span for call in calls]).amax(0),
                torch.stack([call.output for call in calls]).mean(0),
            )
            for name, calls in self._calls.items()
        }


def _variance(rows: Tensor) -> Tensor:
    """Return the variance of each row, `[rows]`."""
    return rows.var(1, correction=0)


def least_expected_error(
    dof: DofMap,
    weights: Mapping[str, Tensor],
    bits: Mapping[str, int],
    seen: Mapping[str, Seen],
    *,
    per_channel: Collection[str],
    activation_bits: int | None,
    largest: float = 64.0,
) -> Tensor:
    """Choose cross-layer factors whose expected rounding error J is small (see the module).

    Weights are taken to be rounded at random inside their grid and clipped outside of it, with the steps that are best
    for the whole. Each output of a layer counts by its size in the network as it is given, which should be equalized:
    then nothing depends on the units of channels, which the function of the network does not show.

    Args:
        dof: the DoF map.
        weights: weight by name, real units.
        bits: bit width by name of each weight that is quantized; others have no say.
        seen: what each layer reads and makes, by name of the weight. Where a layer is missing, its input channels count
            alike, and the rounding of its input has no say.
        per_channel: names of the weights with a step for each output channel; the others have one.
        activation_bits: bit width of activations, `None` where they are not quantized.
        largest: bound on each factor and on its inverse.

    Returns:
        log c of every free variable, `[dof.size]`, relative to the network as given; zeros where nothing
        has an error.
    """
    unchanged = torch.zeros(dof.size)
    generator = torch.Generator().manual_seed(0)
    kernels = [
        _Kernel.of(la, weights[la.weight], bits[la.weight], seen.get(la.weight), la.weight in per_channel, generator)
        for la in dof.layers
        if la.weight in bits
        and bool(weights[la.weight].any())
        and (la.weight not in seen or float(seen[la.weight].output) > 0)
    ]
    if dof.size == 0 or not kernels:
        return unchanged
    log_c = unchanged.double().requires_grad_()
    log_steps = [kernel.log_step.clone().requires_grad_() for kernel in kernels]

    def log_error() -> Tensor:
        every = torch.cat([log_c.new_zeros(1), log_c])
        errors = [k.weight_error(every, log_s) for k, log_s in zip(kernels, log_steps, strict=True)]
        if activation_bits is not None:
            errors += [kernel.input_error(every, activation_bits) for kernel in kernels]
        return torch.stack(errors).sum().log()

    optimizer = torch.optim.LBFGS([log_c, *log_steps], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = log_error()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = log_c.detach().float()
    return found.clamp(-math.log(largest), math.log(largest)) if bool(torch.isfinite(found).all()) else unchanged


@dataclass(frozen=True)
class _Kernel:
    """A kernel, for its errors relative to its output.

    Attributes:
        log_step: logarithm of a step that clips nothing, `[out]` or `[1]`.
        magnitude: |w| of some weights, `[some]`.
        reads: for each, the variable of its input channel, `[some]`.
        makes: likewise of its output channel.
        row: which of the steps is its own, `[some]`.
        share: the variance of its input, over that of the output and the share of weights, `[some]`.
        high: largest integer.
        in_index: variable of each input channel, `[in]`.
        column: square of the weights of each input channel over the variance of the output, `[in]`.
        span: `Seen.span`; zeros where it is not known.
    """

    log_step: Tensor
    magnitude: Tensor
    reads: Tensor
    makes: Tensor
    row: Tensor
    share: Tensor
    high: int
    in_index: Tensor
    column: Tensor
    span: Tensor

    @staticmethod
    def of(
        layer: Layer, W: Tensor, bits: int, seen: Seen | None, per_channel: bool, generator: torch.Generator
    ) -> "_Kernel":
        """Take a sample of a kernel.

        Args:
            layer: the layer.
            W: its weight, real units.
            bits: bit width.
            seen: what it reads and makes.
            per_channel: whether each output channel has a step of its own.
            generator: chooses the places.
        """
        W, axes, high = W.detach().cpu().double(), layer.axes, largest_integer(bits)
        power = W.new_ones(len(layer.in_index)) if seen is None else seen.power.to(W)
        power = power + DAMPING * power.mean()
        columns = torch.linalg.vector_norm(axes.in_slices(W), dim=1).square()
        output = (columns * power).sum() if seen is None else seen.output.to(W)
        output = output.clamp(min=torch.finfo(W.dtype).tiny)
        outputs = len(layer.out_index)
        rows = torch.arange(outputs) if per_channel else torch.zeros(outputs, dtype=torch.int64)
        slices = axes.out_slices(W) if per_channel else W.reshape(1, -1)
        steps = torch.linalg.vector_norm(slices, ord=math.inf, dim=1) / high
        count = min(SAMPLED, W.numel())
        flat = torch.arange(count) if count == W.numel() else torch.randint(W.numel(), (count,), generator=generator)
        places = torch.unravel_index(flat, W.shape)

        def some(t: Tensor) -> Tensor:
            return t.expand_as(W)[places]

        return _Kernel(
            log_step=steps.clamp(min=torch.finfo(W.dtype).tiny).log(),
            magnitude=some(W).abs(),
            reads=some(axes.per_in(layer.in_index.cpu(), W)),
            makes=some(axes.per_out(layer.out_index.cpu(), W)),
            row=some(axes.per_out(rows, W)),
            share=some(axes.per_in(power, W)) / output * (W.numel() / count),
            high=high,
            in_index=layer.in_index.cpu(),
            column=columns / output,
            span=torch.zeros_like(power) if seen is None else seen.span.to(W),
        )

    def weight_error(self, log_c: Tensor, log_step: Tensor) -> Tensor:
        """Return the expected error of rounding and clipping the weights, `[]`.

        Args:
            log_c: logarithm of the factor of every variable, `[1 + size]`.
            log_step: of the steps, as `self.log_step`.
        """
        moved = log_c.index_select(0, self.reads) - log_c.index_select(0, self.makes)
        step = log_step.exp().index_select(0, self.row)
        clipped = (self.magnitude * moved.exp() - self.high * step).clamp(min=0)
        error = ROUNDING * step.square() + clipped.square()
        return (error * self.share * (-2 * moved).exp()).sum()

    def input_error(self, log_c: Tensor, bits: int) -> Tensor:
        """Return the expected error of rounding the input to one grid over all channels, `[]`.

        Args:
            log_c: logarithm of the factor of every variable, `[1 + size]`.
            bits: bit width of the input.
        """
        c = log_c.index_select(0, self.in_index).exp()
        step = (self.span / c).norm(PEAK) / (2**bits - 1)
        error: Tensor = ROUNDING * step.square() * (self.column * c.square()).sum()
        return error
