"""Fake-quantization with its native gradient."""

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from qft_plugin.tensors.grid import ZeroPoint, round_ste

IN_CACHE: Final = 1 << 20
"""Elements of an activation that are worked on at a time on a CPU: few enough for its cache, and many for one call."""


def fake_quantize_composed(
    x: Tensor,
    scale: Tensor,
    *,
    low: int,
    high: int,
    zero_point: ZeroPoint = 0,
    rectified: bool = False,
    bound: Tensor | None = None,
) -> Tensor:
    """Fake-quantize with ordinary differentiable operations: the definition that `fake_quantize` must equal.

    Eq. (1):  x_fq = scale * (clip(round(x / scale) + Z, low, high) - Z), STE on the rounding only.
    """
    y = x.to(torch.promote_types(x.dtype, scale.dtype))
    y = y.relu() if rectified or bound is not None else y
    y = y if bound is None else torch.minimum(y, bound)
    return ((torch.clamp(round_ste(y / scale) + zero_point, low, high) - zero_point) * scale).to(x.dtype)


def _flat(x: Tensor) -> Tensor:
    """View dense memory as one axis, whatever the order of the axes in it."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def same_layout(x: Tensor, like: Tensor) -> Tensor:
    """Bring `x` into the memory layout of `like`: elementwise kernels are several times slower across layouts."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


@dataclass(frozen=True)
class _Grid:
    """The numbers that a fake-quantization needs beside its tensors.

    Attributes:
        low: smallest integer, the zero point taken off.
        high: largest integer, likewise.
        lowest: below it, in steps, the data gets no gradient.
    """

    low: int
    high: int
    lowest: float


def in_cache(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors along their first axis, all alike, into views that are small enough for a CPU's cache.

    Elementwise operations are fast one after another on a part that is still in the cache, and on fresh memory slow.

    Args:
        tensors: of one length; the first one is the largest.
    """
    largest = tensors[0]
    rows = len(largest) * IN_CACHE // max(1, largest.numel())
    if largest.device.type != "cpu" or rows >= len(largest):
        return [tensors]
    return zip(*(torch.split(t, max(1, rows)) for t in tensors), strict=True)


def _parts(*read: Tensor, write: Tensor, scale: Tensor) -> Iterator[list[Tensor]]:
    """Iterate over parts of the read and the written tensors, in the precision of the scale where it is higher."""
    dtype = torch.promote_types(write.dtype, scale.dtype)
    for *parts, target in in_cache(*read, write):
        found = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
        yield [*(part.to(dtype) for part in parts), found]
        if found is not target:
            target.copy_(found)


def _forward(x: Tensor, scale: Tensor, grid: _Grid) -> Tensor:
    if scale.numel() > 1:
        return (x / scale).round_().clamp_(grid.low, grid.high).mul_(scale).to(x.dtype)
    out, step = torch.empty_like(x), scale.reshape(())
    for part, found in _parts(_flat(x), write=_flat(out), scale=scale):
        torch.div(part, step, out=found).round_().clamp_(grid.low, grid.high).mul_(step)
    return out


def _backward(g: Tensor, x: Tensor, scale: Tensor, out: Tensor, grid: _Grid, needs_scale: bool) -> tuple[Any, Any]:
    """Return the gradients of data and scale."""
    if scale.numel() > 1:
        gx = torch.ops.aten.hardtanh_backward(g, x / scale, grid.lowest, grid.high + 0.5)
        return gx, (g * out).sub_(gx * x).sum_to_size(scale.shape) / scale if needs_scale else None
    gx, total, on_cpu = torch.empty_like(x), torch.zeros_like(scale), x.device.type == "cpu"
    # Reading the scale costs nothing on a CPU; a GPU would have to be waited for.
    s = scale.item() if on_cpu else 1.0
    for part_g, part, part_out, found in _parts(_flat(g), _flat(x), _flat(out), write=_flat(gx), scale=scale):
        torch.ops.aten.hardtanh_backward.grad_input(
            part_g,
            part if on_cpu else part / scale.reshape(()),
            grid.lowest * s,
            (grid.high + 0.5) * s,
            grad_input=found,
        )
        if needs_scale:
            total += torch.dot(part_g, part_out) - torch.dot(found, part)
    return gx, total / scale if needs_scale else None


class _FakeQuantize(torch.autograd.Function):
    """Fake-quantization in four elementwise passes forwards, one pass and two dot products backwards.

    With r = round(x / s) + Z the native gradient of Eq. (1) is

        dL/dx = g                where low <= r <= high, else 0
        dL/ds = sum g * (x_fq - [low <= r <= high] * x) / s
        dL/dZ = -s * sum g     where r is outside, which are those of LSQ+ (Bhalgat et al. 2020) without extra factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, zero_point: ZeroPoint, rectified: bool
    ) -> Tensor:
        x = x if _is_dense(x) else x.contiguous()
        # A trained zero point is read once: on a GPU that waits for the device, but it is rare.
        Z = int(zero_point) if isinstance(zero_point, Tensor) else zero_point
        ctx.grid = _Grid(low - Z, high - Z, 0.0 if rectified else low - Z - 0.5)
        out = _forward(x, scale, ctx.grid)
        # An operation after this one may change the result in place (`out += identity`): then it is computed again.
        ctx.save_for_backward(x, scale)
        ctx.out, ctx.version = out.detach(), out._version
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        out = ctx.out if ctx.out._version == ctx.version else _forward(x, scale, ctx.grid)
        g = same_layout(gradients[0], x)
        gx, gs = _backward(g, x, scale, out, ctx.grid, ctx.needs_input_grad[1])
        gz = -scale * (g.sum(dtype=scale.dtype) - gx.sum(dtype=scale.dtype)) if ctx.needs_input_grad[4] else None
        return gx, None if gs is None else gs.reshape(scale.shape), None, None, gz, None


def _bounded_forward(x: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    out, step, high = torch.empty_like(x), scale.reshape(()), top.reshape(-1, 1)
    low = torch.zeros_like(high)
    for part, found in _parts(by_channel(x, top), write=by_channel(out, top), scale=scale):
        torch.div(part, step, out=found).round_().clamp_(low, high).mul_(step)
    return out


class _BoundedFakeQuantize(torch.autograd.Function):
    """Fake-quantization of  y = min(max(x, 0), b)  on a grid from 0, without ever computing y.

    With r = round(y / s), and the rounding straight through,

        dL/dx = g                where 0 < x < b and r <= high, else 0
        dL/db = sum g            where x >= b, in channels whose b the grid reaches
        dL/ds = sum g * (y_fq - [r <= high] * y) / s
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, high: int, bound: Tensor) -> Tensor:
        x = x if has_channels(x, bound) else x.contiguous()
        top = (bound / scale.reshape(())).round_().clamp_(max=high)
        out = _bounded_forward(x, scale, top)
        ctx.save_for_backward(x, scale, bound, top)
        ctx.out, ctx.version = out.detach(), out._version
        ctx.end = high + 0.5
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale, bound, top = ctx.saved_tensors
        out = ctx.out if ctx.out._version == ctx.version else _bounded_forward(x, scale, top)
        g = same_layout(gradients[0], x)
        end, bounds = ctx.end * scale.reshape(()), bound.flatten()
        last = torch.minimum(bounds, end).unsqueeze(1)
        gx, above, total = torch.empty_like(x), torch.zeros_like(bounds), torch.zeros_like(end)
        read = (by_channel(t, bound) for t in (g, x, out))
        for part_g, part, part_out, found in _parts(*read, write=by_channel(gx, bound), scale=scale):
            # Without booleans, which are slow.
            torch.sub(last, part, out=found)
            torch.ops.aten.threshold_backward.grad_input(part_g, found, 0, grad_input=found)
            above += part_g.sum((0, 2)) - found.sum((0, 2))
            torch.ops.aten.threshold_backward.grad_input(found, part, 0, grad_input=found)
            total += torch.dot(_flat(part_g), _flat(part_out)) - torch.dot(_flat(found), _flat(part))
        above = torch.where(bounds < end, above, 0)
        total -= torch.dot(above, bounds)
        return gx, (total / scale).reshape(scale.shape), None, above.reshape(bound.shape)


def by_channel(x: Tensor, bound: Tensor) -> Tensor:
    """View an activation as `[before, channels, after]`, with nothing after them where the channels are last in memory.

    Args:
        x: its memory is in the order of its axes, or that with the channels last: `has_channels` holds.
        bound: broadcasts against `x`; its first axis has the channels, the others are 1.
    """
    axis = x.dim() - bound.dim()
    last = x.movedim(axis, -1)
    if last.is_contiguous():
        return last.reshape(-1, bound.shape[0], 1)
    return x.reshape(math.prod(x.shape[:axis]), bound.shape[0], -1)


def has_channels(x: Tensor, bound: Tensor) -> bool:
    """Whether `by_channel` is a view of `x`."""
    return x.is_contiguous() or x.movedim(x.dim() - bound.dim(), -1).is_contiguous()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    low: int,
    high: int,
    zero_point: ZeroPoint = 0,
    rectified: bool = False,
    bound: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize, in float, with the native gradient for the data and for the scale.

    Eq. (1):  x_fq = scale * (clip(round(x / scale) + Z, low, high) - Z)

    The gradient passes straight through the rounding and not at all where the clip is active (exactly at a tie on the
    edge of the grid, where rounding decides, it is 0).

    Args:
        x: any floating-point tensor, real units; where the scale has a higher precision, that is used inside.
        scale: real per step, greater than 0; broadcasts against `x` (a scalar is fastest).
        low: smallest integer of the grid.
        high: largest integer of the grid.
        zero_point: the integer that stands for the real 0; a tensor gets a gradient, and then the scale is a scalar.
        rectified: fake-quantize max(x, 0), on a grid that starts at the real 0 (`zero_point == low`). Its clip is a
            ReLU already, so that only the gradient differs: it is 0 for x <= 0.
        bound: fake-quantize min(max(x, 0), bound), on such a grid and with a scalar scale. Greater than 0, real units;
            its first axis has the channels, the others are 1, and it broadcasts against `x`.

    Returns:
        Tensor of the shape of `x` on the grid, real units.
    """
    if bound is not None:
        bounded: Tensor = _BoundedFakeQuantize.apply(x, scale, high - zero_point, bound)  # type: ignore[no-untyped-call]
        return bounded
    out: Tensor = _FakeQuantize.apply(x, scale, low, high, zero_point, rectified)  # type: ignore[no-untyped-call]
    return out


class _FoldedFakeQuantize(torch.autograd.Function):
    """Fold factors into a kernel and fake-quantize it, keeping nothing of the size of the kernel for the backward pass.

    With V = W * prod units and the gradients of `_FakeQuantize` for V and the step,

        dL/dW = dL/dV * prod units        dL/dunit = sum dL/dV * V / unit
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, step: Tensor, low: int, high: int, *units: Tensor) -> Tensor:
        ctx.save_for_backward(W, step, *units)
        ctx.range = low, high
        return _product(W, units).div_(step).round_().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        W, step, *units = ctx.saved_tensors
        low, high = ctx.range
        _, of_step, _, _, *of_units = ctx.needs_input_grad
        g, V = same_layout(gradients[0], W), _product(W, units)
        out = V / step
        gV = torch.ops.aten.hardtanh_backward(g, out, low - 0.5, high + 0.5)
        product = V.mul_(gV)
        g_units = [
            product.sum_to_size(unit.shape) / unit if of_unit else None
            for unit, of_unit in zip(units, of_units, strict=True)
        ]
        g_step = None
        if of_step:
            difference = out.round_().clamp_(low, high).mul_(step).mul_(g).sub_(product)
            g_step = difference.sum_to_size(step.shape) / step
        for unit in units:
            gV.mul_(unit)
        return gV, g_step, None, None, *g_units


def multiplied(W: Tensor, units: Iterable[Tensor]) -> Tensor:
    """Multiply a tensor by others, always in the same order, so that integers agree to the last bit."""
    return functools.reduce(operator.mul, units, W)


def _product(W: Tensor, units: Sequence[Tensor]) -> Tensor:
    """Do the same in one new tensor, without gradients."""
    V = W * units[0]
    for unit in units[1:]:
        V.mul_(unit)
    return V


def fake_quantize_folded(W: Tensor, units: Sequence[Tensor], step: Tensor, *, low: int, high: int) -> Tensor:
    """Fake-quantize  W * units[0] * units[1] ...;  equal to `fake_quantize` of the product, with less memory.

    Args:
        W: a kernel, dense in memory.
        units: at least one; each broadcasts against `W` and is not 0.
        step: real per step, greater than 0; broadcasts against `W`.
        low: smallest integer of the grid.
        high: largest integer of the grid.

    Returns:
        Tensor of the shape of `W` on the grid, real units.
    """
    out: Tensor = _FoldedFakeQuantize.apply(W, step, low, high, *units)  # type: ignore[no-untyped-call]
    return out
