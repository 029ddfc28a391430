"""Parts that the students of all hosts share."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.graph.layer_graph import on_axis
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import by_channel, fake_quantize, fake_quantize_composed, has_channels
from qft_plugin.tensors.grid import ZeroPoint
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution

logger = logging.getLogger("qft_plugin")

FakeQuantize = Callable[..., Tensor]


@dataclass(frozen=True)
class Unfold:
    """The factors that bring a compared activation of a folded network back to the teacher's units.

    Attributes:
        index: variable of each channel, `[channels]`.
        start: the factor that the start has folded into it already, `[channels]`.
        axis: of the activation, that its channels are on.
    """

    index: Tensor
    start: Tensor
    axis: int


class FakeQuantizer(nn.Module):
    """Stands in for an activation quantizer while the student trains; the scale is put in before each call.

    Attributes:
        scale: real per step; without one, values pass unchanged.
        zero_point: the integer of the real 0.
        watcher: is shown its input while there is no scale.
        starts_at_zero: whether the smallest number of the grid is 0, so that its clip is a ReLU.
    """

    def __init__(self, grid: ActivationGrid | None = None, function: FakeQuantize = fake_quantize) -> None:
        """Set the grid, now or later; until a scale is set, values pass unchanged."""
        super().__init__()
        self.scale: Tensor | None = None
        self.zero_point: ZeroPoint = 0
        self.watcher: Callable[[Tensor], None] | None = None
        self._read: dict[int, tuple[Any, ...]] = {}
        if grid is not None:
            self.set_grid(grid, function)

    def set_grid(self, grid: ActivationGrid, function: FakeQuantize) -> None:
        """Set the integers that values are quantized to."""
        self.run = functools.partial(function, low=grid.low, high=grid.high)
        self.zero_point = grid.zero_point
        self.starts_at_zero = grid.zero_point == grid.low and not grid.shifts

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize one activation."""
        bound = self._read.pop(id(x), None)
        if self.scale is None:
            x = x.clone() if bound is None else self.rectified(x, *bound)  # a later operation may be in place
            if self.watcher is not None:
                self.watcher(x)
            return x
        if bound is not None:
            return self.rectified(x, *bound)
        # Function modes (the hooks of NNCF are one) have no business inside a quantizer, and would cost time.
        with torch._C.DisableTorchFunction():
            return self.run(x, self.scale, zero_point=self.zero_point)

    def rectified(self, x: Tensor, bound: Tensor | None = None, axis: int = -1) -> Tensor:
        """Fake-quantize  max(x, 0),  or  min(max(x, 0), bound),  on a grid that starts at zero.

        Without a scale the result is not quantized.

        Args:
            x: the input of the ReLU.
            bound: `[channels]`.
            axis: of the channels, counted from the last one (-1).
        """
        with torch._C.DisableTorchFunction():
            if self.scale is None:
                positive = x.clamp(min=0)
                return positive if bound is None else torch.minimum(positive, on_axis(bound, axis))
            if bound is None:
                return self.run(x, self.scale, zero_point=self.zero_point, rectified=True)
            return self.run(x, self.scale, zero_point=self.zero_point, bound=on_axis(bound, axis))

    def after(self, x: Tensor, *bound: Any) -> Tensor:
        """Stand in for a ReLU, or a bounded one, whose result this quantizer alone reads: it computes both when called.

        Args:
            x: the input of the ReLU.
            bound: the bound of each channel, `[channels]`, and their axis; nothing for a ReLU.

        Returns:
            `x` itself.
        """
        self._read[id(x)] = bound
        return x

    def forget(self) -> None:
        """Forget the inputs of earlier ReLUs."""
        self._read.clear()


def copies_for_gradients() -> contextlib.AbstractContextManager[object]:
    """Keep copies for the gradients of operations in this context, so that later ones may work in place."""
    return torch.autograd.graph.saved_tensors_hooks(_copied, lambda t: t)


def _copied(t: Tensor) -> Tensor:
    # A leaf, or the result of the offline subgraph that is no activation, changes in place as little as any parameter.
    return t if t.is_leaf and t.requires_grad else t.detach().clone()


def set_grids(quantizers: Mapping[str, FakeQuantizer], solution: Solution) -> None:
    """Give every quantizer its scale and its zero point.

    Args:
        quantizers: those of the network, by name.
        solution: the result of the offline subgraph; a quantizer without a scale in it passes values on.
    """
    for name, quantizer in quantizers.items():
        quantizer.scale = solution.activation_scales.get(name)
        quantizer.forget()  # leftovers of an interrupted run
    for name, zero_point in solution.zero_points.items():
        quantizers[name].zero_point = zero_point


Watcher = Callable[[str, Tensor], None]
"""Called with the name of a quantizer and the input that it would have had."""


@contextlib.contextmanager
def looked_at(quantizers: Mapping[str, FakeQuantizer], watcher: Watcher) -> Iterator[None]:
    """Let quantizers pass values unchanged, and show the input of each.

    The inputs are not kept, so that the activations of the whole network are never held at once.

    Args:
        quantizers: those of the network, by name.
        watcher: called at each call of a quantizer; the input may change after it has returned.
    """
    for name, module in quantizers.items():
        module.scale, module.watcher = None, functools.partial(watcher, name)
    try:
        yield
    finally:
        for module in quantizers.values():
            module.watcher = None


VARIANTS: Final = 64
"""Variants of the compiled fake-quantization that torch may keep, where its version lets us say so."""

QUANTIZER_OP: Final = "clone"
"""The operation that a recorded model shows in the place of a `FakeQuantizer` without a scale."""


def unfolded(prediction: Prediction, unfolds: Sequence[Unfold | None], factors: Tensor) -> Prediction:
    """Bring the compared activations of a folded network, x / c, back to the teacher's units.

    Args:
        prediction: of the folded network.
        unfolds: of each of the first features, `None` where no channel of it is rescaled; what comes after these
            features is in the teacher's units already.
        factors: trained cross-layer factor of every variable, `[1 + size]`.
    """
    features = list(prediction.features)
    for number, unfold in enumerate(unfolds):
        if unfold is not None:
            x, c = features[number], unfold.start * factors.index_select(0, unfold.index)
            features[number] = x * c.view(-1, *(1,) * (x.dim() - 1 - unfold.axis))
    return Prediction(tuple(features), prediction.logits)


@functools.cache
def compiled_fake_quantize() -> FakeQuantize:
    """Fuse the fake-quantization, or return the built-in function where the compiler does not work."""
    try:
        # A variant for each kind of grid, gradient and layout: above the limit, torch would run the operations singly.
        known = signature(torch.compile).parameters
        limit: dict[str, Any] = {"recompile_limit": VARIANTS} if "recompile_limit" in known else {}
        compiled: FakeQuantize = torch.compile(fake_quantize_composed, dynamic=True, **limit)
        fused = functools.partial(_fused, compiled)
        x = torch.ones(2, 3, requires_grad=True)
        torch.autograd.grad(fused(x, torch.ones(()), low=0, high=255, zero_point=0).sum(), x)
    except Exception as error:  # any of the compiler's own errors, or a missing C++ compiler
        logger.warning("torch.compile does not work here (%s); the built-in fake-quantization is used", error)
        return fake_quantize
    return fused


def _fused(function: FakeQuantize, x: Tensor, scale: Tensor, *, bound: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Call a compiled fake-quantization in the order of memory: one loop, and few variants for all shapes."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    in_order = x.permute(order)
    viewed = in_order.is_contiguous() if bound is None else has_channels(x, bound)
    if not viewed or not torch.is_grad_enabled():
        return fake_quantize(x, scale, bound=bound, **kwargs)
    view = in_order.reshape(-1) if bound is None else by_channel(x, bound)
    given = {} if bound is None else {"bound": bound.reshape(-1, 1)}
    flat = function(view, scale, **given, **kwargs)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return flat.view(in_order.shape).permute(back)


def prediction_of(outputs: list[Tensor], compared: Sequence[Tensor], *, with_outputs: bool) -> Prediction:
    """Collect the activations and outputs that are compared.

    Args:
        outputs: all tensors that the network returned.
        compared: activations.
        with_outputs: compare the outputs in floating point too.
    """
    outputs = [t for t in outputs if t.is_floating_point()]
    logits = outputs[0] if len(outputs) == 1 and outputs[0].dim() == 2 else None
    return Prediction((*compared, *(outputs if with_outputs else ())), logits)
