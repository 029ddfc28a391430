"""A cheaper backward pass for kernels of which a part trains (EfQAT, arXiv 2411.11038).

The integers q of a frozen channel are constants, its step trains:  W[o] = q[o] * step[o].  The layer is linear in W, so
the gradient of the step needs no gradient of the weight (Euler):

    dL/dlog step[o] = sum_i dL/dW[o, i] W[o, i] = <g[o], y[o] - bias[o]>

with y the layer's output and g its gradient. Of the weight's gradient only the rows that train are left.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.fake_quantize import in_cache, same_layout

NARROW: Final = 32
"""Output channels: a CPU's convolution computes 16 together, so that of fewer than this a part costs as much as all."""

FEW: Final = 128
"""Products for each output: with fewer (depthwise and narrow 1x1 convolutions) a CPU computes the gradient of the whole
kernel, from which that of the steps follows, in the time that <g, y> alone takes."""

MOST: Final = 0.75
"""Share of a kernel from which on slicing costs more than it saves."""


@dataclass(frozen=True)
class PartialWeight:
    """A kernel that the online graph computes with, of which a part trains.

    Attributes:
        used: the whole kernel, an ordinary differentiable tensor, real units; calls are recognized by this object.
        rows: the channels of it that train, `[rows, in/groups, *k]`, real units.
        index: which these are, in rising order, `[rows]`.
        touched: the groups that these are in, in rising order, `[groups that train]`.
        gain: ones of the shape of the step, `[]` or `[out]`, with the gradient of the logarithm of the step.
    """

    used: Tensor
    rows: Tensor
    index: Tensor
    touched: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Linear:
    """A linear layer, `x [..., in]`, `W [out, in]`."""

    axes: Axes
    axis: int = -1

    def run(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, `[..., out]`."""
        return functional.linear(x, W, bias)

    def input_gradient(self, g: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """Return dL/dx."""
        return g @ W

    def weight_gradient(self, g: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """Return dL/dW."""
        return g.flatten(0, -2).T @ x.flatten(0, -2)

    def row_gradient(self, g: Tensor, x: Tensor, W: Tensor, index: Tensor, touched: Tensor) -> Tensor:
        """Return the rows of dL/dW that train."""
        return self.weight_gradient(_last(g, index), x, W)

    def whole_is_faster(self, g: Tensor, x: Tensor, W: Tensor, index: Tensor, touched: Tensor) -> bool:
        """Whether the gradient of the whole kernel costs less than that of its rows."""
        return len(index) > MOST * g.shape[-1]


@dataclass(frozen=True)
class Convolution:
    """A convolution of images or sequences with a batch axis; each setting has one number for each axis of space."""

    axes: Axes
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    axis: int = 1

    def run(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, `[N, out, *space]`."""
        settings = (self.stride, self.padding, self.dilation, self.axes.transposed, self.output_padding)
        return torch.convolution(x, W, bias, *settings, self.axes.groups)

    def _backward(self, g: Tensor, x: Tensor, W: Tensor, groups: int, *, of_input: bool) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            g,
            x,
            W,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.axes.transposed,
            self.output_padding,
            groups,
            [of_input, not of_input, False],
        )
        gradient: Tensor = found[0 if of_input else 1]
        return gradient

    def input_gradient(self, g: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """Return dL/dx."""
        return self._backward(g, x, W, self.axes.groups, of_input=True)

    def weight_gradient(self, g: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """Return dL/dW, `[out, in/groups, *k]`."""
        return self.axes.by_output(self._backward(g, x, W, self.axes.groups, of_input=False))

    def row_gradient(self, g: Tensor, x: Tensor, W: Tensor, index: Tensor, touched: Tensor) -> Tensor:
        """Return the rows of dL/dW that train; in a grouped kernel, those of the groups that they are in."""
        # Of the kernel only the shape counts here: a slice will do.
        groups, transposed = self.axes.groups, self.axes.transposed
        if groups == 1:
            rows = W.narrow(1 if transposed else 0, 0, len(index))
            return self.axes.by_output(self._backward(_channels(g, index), x, rows, 1, of_input=False))
        ins, outs = x.shape[1] // groups, g.shape[1] // groups
        count = len(touched)
        rows = W.narrow(0, 0, count * (ins if transposed else outs))
        gradient = self._backward(
            _channels(g, _members(touched, outs)), _channels(x, _members(touched, ins)), rows, count, of_input=False
        )
        group = torch.div(index, outs, rounding_mode="floor")
        places = torch.searchsorted(touched, group) * outs + index % outs
        return replace(self.axes, groups=count).by_output(gradient).index_select(0, places)

    def whole_is_faster(self, g: Tensor, x: Tensor, W: Tensor, index: Tensor, touched: Tensor) -> bool:
        """Whether the gradient of the whole kernel costs less than that of its rows."""
        out = g.shape[1]
        if g.device.type == "cpu" and (out < NARROW or W.numel() < FEW * out):
            return True
        return len(index) > MOST * out if self.axes.groups == 1 else len(touched) > MOST * self.axes.groups


def _members(groups: Tensor, size: int) -> Tensor:
    """Return the channels of groups of a size."""
    return (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _channels(x: Tensor, index: Tensor) -> Tensor:
    """Select channels, axis 1, in the memory format of `x`."""
    return _last(x.movedim(1, -1), index).movedim(-1, 1) if _channels_last(x) else x.index_select(1, index)


def _last(x: Tensor, index: Tensor) -> Tensor:
    """Select along the last axis; with two axes, several times faster than with more, and `gather` is the fastest."""
    rows = x.flatten(0, -2)
    return rows.gather(1, index.expand(len(rows), -1)).reshape(*x.shape[:-1], len(index))


Operation = Linear | Convolution


class _PartialKernel(torch.autograd.Function):
    """A layer with the gradients of its input, rows of its kernel, its bias, and the log step of all other rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        gain: Tensor,
        index: Tensor,
        touched: Tensor,
        operation: Operation,
    ) -> Tensor:
        out = operation.run(x, W, bias)
        ctx.save_for_backward(x, W, bias, index, touched)
        ctx.operation, ctx.rows, ctx.gain = operation, rows.detach(), gain.detach()
        # A later operation may change the output in place (`out += identity`): then it is of no use any more.
        ctx.out, ctx.version = out.detach() if ctx.needs_input_grad[4] else None, out._version
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, W, bias, index, touched = ctx.saved_tensors
        operation, g = ctx.operation, gradients[0]
        of_input, _, of_bias, of_rows, of_gain, *_ = ctx.needs_input_grad
        gx = operation.input_gradient(g, x, W) if of_input else None
        of_rows = of_rows and len(index) > 0
        changed = of_gain and ctx.out._version != ctx.version
        whole, log_step, rows, sums = None, None, None, None
        if changed or (of_rows and operation.whole_is_faster(g, x, W, index, touched)):
            whole = operation.weight_gradient(g, x, W)
        if of_gain and whole is None:
            sums, products = _channel_sums(g, same_layout(ctx.out, g), operation=operation, dtype=ctx.gain.dtype)
            log_step = products if bias is None else products - sums * bias
        elif of_bias:
            (sums,) = _channel_sums(g, operation=operation, dtype=ctx.gain.dtype)
        if of_gain and whole is not None:
            log_step = (whole * operation.axes.by_output(W)).flatten(1).sum(1, dtype=ctx.gain.dtype)
        if log_step is not None:
            frozen = log_step.index_fill(0, index, 0)
            log_step = frozen if ctx.gain.dim() else frozen.sum()
        if of_rows:
            found = operation.row_gradient(g, x, W, index, touched) if whole is None else whole.index_select(0, index)
            rows = found.to(ctx.rows.dtype)
        bias_gradient = sums.to(bias.dtype) if of_bias and sums is not None else None
        return gx, None, bias_gradient, rows, log_step, None, None, None


def _channel_sums(g: Tensor, *others: Tensor, operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """Sum an activation, and its products with others, over everything but the channels.

    Args:
        g: `[..., channels]` of a linear layer, `[N, channels, *space]` of a convolution.
        others: like `g`, in its memory layout.
        operation: the layer.
        dtype: in which is added.

    Returns:
        The sum of `g`, and of its product with each other one, each `[channels]`.
    """
    tensors, axis = [g, *others], operation.axis
    if axis == -1 or _channels_last(g):
        tensors, axis = [t.movedim(axis, -1).flatten(0, -2) for t in tensors], 1
    summed = [n for n in range(tensors[0].dim()) if n != axis]
    sums = [torch.zeros(tensors[0].shape[axis], dtype=dtype, device=g.device) for _ in tensors]
    for parts in in_cache(*tensors):
        first, *factors = (part.to(dtype) for part in parts)
        for total, values in zip(sums, [first, *(first * factor for factor in factors)], strict=True):
            total += values.sum(summed)
    return sums


SIMPLE: Final = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED: Final = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

FUNCTIONS: Final[Mapping[Callable[..., Any], tuple[str, tuple[str, ...]]]] = {
    functional.linear: ("linear", SIMPLE[:3]),
    functional.conv1d: ("conv1d", SIMPLE),
    functional.conv2d: ("conv2d", SIMPLE),
    functional.conv3d: ("conv3d", SIMPLE),
    functional.conv_transpose1d: ("conv_transpose1d", TRANSPOSED),
    functional.conv_transpose2d: ("conv_transpose2d", TRANSPOSED),
    functional.conv_transpose3d: ("conv_transpose3d", TRANSPOSED),
}
"""Kind and names of the arguments of each torch function that multiplies by a kernel."""


def _operation(kind: str, arguments: Mapping[str, Any], *, axes: int, like: Tensor) -> Operation | None:
    """Read the settings of a call; `None` where they are unusual.

    Args:
        kind: the torch function.
        arguments: of the call, by name.
        axes: of space.
        like: the input.
    """
    if kind == "linear":
        return Linear(Axes(kind)) if like.dim() > 1 else None
    padding = arguments.get("padding", 0)
    dilation = _each(arguments.get("dilation", 1), axes)
    if padding == "valid":
        padding = 0
    elif padding == "same" and dilation is not None:
        # Symmetric where the total, dilation * (k - 1), is even along each axis; torch refuses it with a stride.
        totals = [d * (k - 1) for d, k in zip(dilation, arguments["weight"].shape[2:], strict=True)]
        padding = None if any(t % 2 for t in totals) else tuple(t // 2 for t in totals)
    padding, stride = _each(padding, axes), _each(arguments.get("stride", 1), axes)
    output_padding = _each(arguments.get("output_padding", 0), axes)
    if like.dim() != axes + 2 or None in (padding, dilation, stride, output_padding):
        return None
    assert padding is not None
    assert dilation is not None
    assert stride is not None
    assert output_padding is not None
    return Convolution(Axes(kind, arguments.get("groups", 1)), stride, padding, dilation, output_padding)


def _each(value: Any, axes: int) -> tuple[int, ...] | None:
    """Return one whole number for each axis, `None` where others were found."""
    values = (value,) if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, int) for v in values):
        return None
    return tuple(values) * axes if len(values) == 1 else tuple(values) if len(values) == axes else None


class PartialBackward(TorchFunctionMode):
    """While it is active, layers that multiply by one of some kernels have the cheaper backward pass.

    A call is recognized by the object that is its weight. Calls with settings that are not understood, and all other
    uses of a kernel, run as they are: it is an ordinary differentiable tensor.
    """

    def __init__(self, weights: Iterable[PartialWeight]) -> None:
        """Take the kernels of which a part trains."""
        super().__init__()
        self._weights = {id(weight.used): weight for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one torch function."""
        kwargs = kwargs or {}
        if func in FUNCTIONS and torch.is_grad_enabled():
            kind, names = FUNCTIONS[func]
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            weight = self._weights.get(id(arguments.get("weight")))
            if weight is not None:
                x = arguments["input"]
                operation = _operation(kind, arguments, axes=weight.used.dim() - 2, like=x)
                if operation is not None:
                    return _run(operation, x, weight, arguments.get("bias"))
        elif args and _writes(func, args, kwargs):
            _keep_output(args[0])
        return func(*args, **kwargs)


def _run(operation: Operation, x: Tensor, weight: PartialWeight, bias: Tensor | None) -> Tensor:
    """Run one layer; under autocast in its precision, as torch would."""
    W = weight.used.detach()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W, bias = x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _PartialKernel.apply(x, W, bias, weight.rows, weight.gain, weight.index, weight.touched, operation)  # type: ignore[no-untyped-call]
    return out


def _writes(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may change its first argument."""
    name = getattr(function, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    return in_place or bool(kwargs.get("inplace")) or any(a is True for a in args[1:])


def _keep_output(x: Any) -> None:
    """Copy what a backward pass needs of a layer's output, before an operation changes the output in place.

    Nothing depends on it: an output that was changed unseen (through a view) costs the gradient of the whole weight.
    """
    node: Any = getattr(x, "grad_fn", None)
    ours = getattr(node, "_forward_cls", None) is _PartialKernel
    if ours and node.out is not None and node.out._version == node.version:
        node.out = node.out.clone()
        node.version = node.out._version
