"""ReLU6 and other functions with bounds, exact where the scale differs by channel: each channel has bounds of its own.

With x' = x / c the function  min(max(x, low), high)  becomes  c * min(max(x', low / c), high / c):  it is homogeneous
as soon as its bounds are scaled with the channel, so that bounds absorb any cross-layer factor, as a bias does.
"""

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from qft_plugin.graph.batch_norms import NORMS
from qft_plugin.graph.layer_graph import channel_axis, on_axis
from qft_plugin.graph.operations import BOUNDED_MODULES
from qft_plugin.graph.torch_model import Call, largest_change, repeatable, replace_modules, tensors_in
from qft_plugin.tensors.fake_quantize import same_layout


class _Clip(torch.autograd.Function):
    """Clip with bounds that get gradients.

    The masks are those of ReLU's own backward: kernels that work on booleans are three to five times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, from_zero: bool) -> Tensor:
        ctx.save_for_backward(x, low, high)
        ctx.from_zero = from_zero
        return torch.clamp(x, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, low, high = ctx.saved_tensors
        g = same_layout(gradients[0], x)
        below_high = torch.ops.aten.threshold_backward(g, high - x, 0)
        gx = torch.ops.aten.threshold_backward(below_high, x if ctx.from_zero else x - low, 0)
        _, needs_low, needs_high, _ = ctx.needs_input_grad
        dims = tuple(d - x.dim() for d in range(x.dim()) if d - x.dim() != -low.dim())
        g_low = g_high = None
        if needs_high:
            g_high = (g - below_high if not dims else g.sum(dims) - below_high.sum(dims)).view(high.shape)
        if needs_low and not ctx.from_zero:
            g_low = (below_high - gx if not dims else below_high.sum(dims) - gx.sum(dims)).view(low.shape)
        return gx, g_low, g_high, None


@wrap_torch_function(lambda x, low, high, *_: (x, low, high))
def hardtanh(x: Tensor, low: Tensor, high: Tensor, axis: int, from_zero: bool) -> Tensor:
    """Clip every channel to bounds of its own; a recorder sees one call with the name of torch's function.

    Args:
        x: an activation.
        low: `[channels]`, in the units of `x`.
        high: `[channels]`, greater than `low`.
        axis: of the channels, counted from the last one (-1).
        from_zero: whether `low` is 0 everywhere, which runtimes fuse better.
    """
    low, high = on_axis(low, axis), on_axis(high, axis)
    if torch.is_grad_enabled() and (x.requires_grad or high.requires_grad):
        out: Tensor = _Clip.apply(x, low, high, from_zero)  # type: ignore[no-untyped-call]
        return out
    return torch.minimum(x.relu() if from_zero else torch.maximum(x, low), high)


def relu_operands(name: str, args: Sequence[Any]) -> tuple[Tensor] | tuple[Tensor, Tensor, int] | None:
    """Return the operands of a ReLU, or of `hardtanh` from 0: a quantizer with a grid from 0 can do it as well.

    Args:
        name: of the function.
        args: of the call.

    Returns:
        The input of a ReLU; or the input of `hardtanh`, the bound of each channel, and their axis. `None` for another
        function.
    """
    if name == "relu" and args:
        return (args[0],)
    if name == hardtanh.__name__ and len(args) == 5 and args[4] is True:
        return args[0], args[2], args[3]
    return None


class ChannelHardtanh(nn.Module):
    """Hardtanh with bounds for each channel.

    Attributes:
        low: `[channels]`, real units.
        high: `[channels]`, real units.
        original: the module that it stands for.
    """

    low: Tensor
    high: Tensor
    original: nn.Hardtanh

    def __init__(self, function: nn.Hardtanh, channels: int, *, axis: int, like: Tensor) -> None:
        """Start with the bounds of `function` in every channel.

        Args:
            function: a ReLU6 or Hardtanh.
            channels: of its input.
            axis: of the channels, counted from the last one (-1).
            like: decides device and dtype.
        """
        super().__init__()
        self.register_buffer("low", like.new_full((channels,), float(function.min_val)))
        self.register_buffer("high", like.new_full((channels,), float(function.max_val)))
        self.axis, self.from_zero = axis, function.min_val == 0
        self.__dict__["original"] = function  # what it stands for is no part of it

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch's own modules give it)
        """Clip an activation."""
        return hardtanh(input, self.low, self.high, self.axis, self.from_zero)

    def factor(self) -> Tensor:
        """Return the factor that has made the bounds of each channel of the original ones, `[channels]`."""
        o = self.original
        return o.max_val / self.high if o.max_val else o.min_val / self.low

    def extra_repr(self) -> str:
        """Show the smallest and the largest bound."""
        return f"{float(self.low.amin()):g}..{float(self.high.amax()):g}, channels={self.high.numel()}"


@torch.no_grad()
def free_bounds(model: nn.Module, call: Call, *, only: Container[str] | None = None) -> None:
    """Put bounds for each channel into the place of every ReLU6 and Hardtanh module, in place.

    A module that is called with different numbers of channels, or never, stays as it is; so does a subclass, one that
    works in place on what something else reads later, and what a forward calls as a function.

    Args:
        model: a float network that may be changed; its function does not.
        call: arguments to run it with.
        only: names of the modules to replace; `None` for all.
    """
    found = [m for name, m in model.named_modules() if type(m) in BOUNDED_MODULES and (only is None or name in only)]
    if not found:
        return
    like = next(p for p in model.parameters() if p.is_floating_point())
    replaced: dict[nn.Module, nn.Module] = {}
    for module, (axis, channels) in channels_read(model, call, found).items():
        assert isinstance(module, nn.Hardtanh)
        replaced[module] = ChannelHardtanh(module, channels, axis=axis, like=like)
    with repeatable():
        before = list(tensors_in(model(*call[0], **call[1])))
    replace_modules(model, replaced)
    with repeatable():
        after = list(tensors_in(model(*call[0], **call[1])))
    if largest_change(before, after) > 0:
        # Something else has read a tensor that was changed in place.
        changers = {new: old for old, new in replaced.items() if getattr(old, "inplace", False)}
        replace_modules(model, changers)


@torch.no_grad()
def channels_read(model: nn.Module, call: Call, modules: Sequence[nn.Module]) -> dict[nn.Module, tuple[int, int]]:
    """Find the axis, counted from the last one, and the number of the channels that elementwise modules read.

    Args:
        model: the model that calls them.
        call: arguments to run it with.
        modules: those to look at.

    Returns:
        By module, for those that are called with one number of channels only.
    """
    shapes: dict[nn.Module, set[tuple[int, int]]] = {}
    sequences = any(isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)) for m in model.modules())

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        first = isinstance(module, NORMS) or (x.dim() == 3 and sequences)
        axis = 1 if first else channel_axis(tuple(x.shape))
        shapes.setdefault(module, set()).add((axis - x.dim(), x.shape[axis]))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        model(*call[0], **call[1])
        # Once more with one image: axes that change with their number are no channels.
        args, kwargs = call
        model(*(t[:1] for t in args), **{name: t[:1] for name, t in kwargs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {module: shape.pop() for module, shape in shapes.items() if len(shape) == 1}


def replace_by_relu(model: nn.Module) -> None:
    """Put a ReLU into the place of every ReLU6 and of every other Hardtanh module whose lower bound is 0, in place.

    Departure: the network computes something else where an activation exceeds the bound.
    """
    found = [m for m in model.modules() if isinstance(m, nn.Hardtanh) and type(m) in BOUNDED_MODULES and m.min_val == 0]
    replace_modules(model, {module: nn.ReLU(inplace=module.inplace) for module in found})
