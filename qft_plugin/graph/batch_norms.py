"""Folding a BatchNorm, as it is in eval mode, into the layer before it."""

from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, LayerGraph, Op, module_of
from qft_plugin.graph.torch_model import Call, replace_modules, tensor_of
from qft_plugin.tensors.axes import Axes

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
EPS: Final = 1e-5
"""Of torch's function, where a call does not give it."""


def kind_of(layer: nn.Module) -> str:
    """Return the torch function that a convolution or linear layer calls."""
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, CONVOLUTIONS)
    return f"{'conv_transpose' if isinstance(layer, TRANSPOSED) else 'conv'}{layer.weight.dim() - 2}d"


def axes_of(layer: nn.Module) -> Axes:
    """Return the meaning of the axes of a convolution's or linear layer's weight."""
    return Axes(kind_of(layer), int(getattr(layer, "groups", 1)))


def can_fold(layer: nn.Module, norm: nn.Module, shape: Sequence[int]) -> bool:
    """Whether `norm` is an affine function of each channel that `layer` can absorb.

    A norm counts its channels along axis 1, a linear layer along the last one: on tokens they are different axes.

    Args:
        layer: what makes the activation.
        norm: what reads it.
        shape: of the activation.
    """
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or not isinstance(norm, NORMS):
        return False
    return len(shape) == layer.weight.dim() and norm.running_mean is not None and not norm.training


def makes_plain_calls(model: nn.Module, layer: nn.Module, norm: nn.Module, calls: tuple[Op, Op]) -> bool:
    """Whether a layer and the BatchNorm after it compute with their own parameters, as torch's own modules do.

    A subclass may have any forward: what it hands to torch's function is what counts.

    Args:
        model: that both are a part of.
        layer: a convolution or linear layer.
        norm: a BatchNorm with running statistics.
        calls: of the layer and of the norm.
    """
    product, normalised = calls
    own = [(product.argument(1, "weight"), layer.weight), (product.argument(2, "bias"), layer.bias)]
    names = ("running_mean", "running_var", "weight", "bias")
    own += [(normalised.argument(1 + i, name), getattr(norm, name)) for i, name in enumerate(names)]
    if normalised.argument(5, "training", False) or normalised.argument(7, "eps", EPS) != norm.eps:
        return False
    return all(_is_held(model, value, tensor) for value, tensor in own)


def _is_held(model: nn.Module, value: Any, tensor: Any) -> bool:
    """Whether an argument of a call is this tensor of the model, under any of its names, or both are missing."""
    if tensor is None or not isinstance(value, Const):
        return tensor is None and value is None
    return value.name != MADE_INSIDE and tensor_of(model, value.name) is tensor


def affine_of(norm: nn.Module, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm in eval mode as a factor and a shift of each channel, both `[channels]`.

    Args:
        norm: it has running statistics.
        dtype: of the result; `None` for that of the statistics. All is computed in float64.
    """
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = dtype or norm.running_var.dtype
    return factor.detach().to(dtype), shift.detach().to(dtype)


def set_affine(norm: nn.Module, factor: Tensor, shift: Tensor) -> None:
    """Make a BatchNorm in eval mode multiply and shift by so much, in place; both `[channels]`."""
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.copy_(neutral_variance(norm.eps, norm.running_var))
    for name, value in (("weight", factor), ("bias", shift)):
        if getattr(norm, name) is None:
            norm.register_parameter(name, nn.Parameter(value.detach().clone()))
        else:
            getattr(norm, name).data.copy_(value)


def neutral_variance(eps: float, like: Tensor) -> Tensor:
    """Find a variance for which variance + eps is 1 exactly in the model's dtype, so that the norm divides by 1."""
    variance = torch.ones_like(like) - eps
    for _ in range(4):
        variance = variance + (1 - (variance + eps))
    return variance


def folded_norm(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer that computes what `layer` and `norm` compute together.

    In float64, so that the folded network differs from the float one by one rounding only.

    Args:
        layer: a convolution or linear layer.
        norm: a BatchNorm with running statistics.

    Returns:
        Weight, of the shape of the layer's, and bias, `[out]`; both float64.
    """
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    factor, shift = affine_of(norm, dtype=torch.float64)
    if layer.bias is not None:
        shift = shift + layer.bias.double() * factor
    W = layer.weight.double()
    return W * axes_of(layer).per_out(factor, W), shift


@torch.no_grad()
def merge_norms(model: nn.Module, twin: nn.Module, graph: LayerGraph) -> list[str]:
    """Fold every BatchNorm that alone follows a layer into it, in place.

    An `Identity` takes its place. A subclass may do more in its forward, such as an activation function, and a forward
    may hand the tensors of a norm to the function itself: these stay, with statistics and parameters that change
    nothing. So does one that Python holds outside of the tree of modules too, where nothing takes its place.

    Args:
        model: the model to change.
        twin: a float copy with the same names; the same model where it is a float one.
        graph: the result of `record` for the twin.

    Returns:
        The names of the layers that changed.
    """
    changed = []
    for layer_name, norm_name, (_, op) in foldable_norms(twin, graph):
        layer, norm = model.get_submodule(layer_name), twin.get_submodule(norm_name)
        left = model.get_submodule(norm_name)
        stays = type(left) not in NORMS or _is_taken_apart(model, norm_name) or module_of(op) != norm_name
        if stays and _is_neutral(norm):
            continue  # it was merged before
        assert isinstance(layer.weight, Tensor)
        W, shift = folded_norm(layer, norm)
        layer.weight.copy_(W)
        if layer.bias is None:
            layer.bias = nn.Parameter(shift.to(layer.weight))
        else:
            assert isinstance(layer.bias, Tensor)
            layer.bias.copy_(shift)
        neutralize(left)
        if not stays:
            replace_modules(model, {left: nn.Identity()})
        changed.append(layer_name)
    return changed


def _is_taken_apart(model: nn.Module, name: str) -> bool:
    """Whether a traced graph reads the tensors of a module itself, as it does for a subclass that it looks into."""
    if not isinstance(model, torch.fx.GraphModule):
        return False
    return any(node.op == "get_attr" and str(node.target).startswith(f"{name}.") for node in model.graph.nodes)


class _Called(nn.Identity):
    """Passes values on, and notes that it was called."""

    was_called = False

    def forward(self, x: Tensor) -> Tensor:
        self.was_called = True
        return x


def replaceable(model: nn.Module, names: Collection[str], call: Call) -> frozenset[str]:
    """Find the modules in whose place another one would be called.

    It would not where Python holds a module outside of the tree too, or where a forward reads its tensors.

    Args:
        model: a model; it is run, and left as it was.
        names: of modules of it with one input.
        call: arguments to run it with.

    Returns:
        Those of the names; none where the model does not run with others in their place.
    """
    there = {name: model.get_submodule(name) for name in names}
    others = {module: _Called() for module in there.values()}
    replace_modules(model, others)
    try:
        model(*call[0], **call[1])
    except AttributeError:  # it reads something that only a norm has
        return frozenset()
    finally:
        replace_modules(model, {other: module for module, other in others.items()})
    return frozenset(name for name, module in there.items() if others[module].was_called)


def neutralize(norm: nn.Module) -> None:
    """Make a BatchNorm in eval mode compute what it is given, in place; it gets no parameters that it has not."""
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.copy_(neutral_variance(norm.eps, norm.running_var))
    if norm.weight is not None:
        norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()


def _is_neutral(norm: nn.Module) -> bool:
    """Whether a BatchNorm computes what it is given already, to the last bit, as `neutralize` leaves one."""
    factor, shift = affine_of(norm)
    return bool(((factor - 1).abs() <= torch.finfo(factor.dtype).eps).all() and (shift == 0).all())


def foldable_norms(model: nn.Module, graph: LayerGraph) -> list[tuple[str, str, tuple[Op, Op]]]:
    """List every BatchNorm that alone follows a layer and can be folded into it, by the names of their modules.

    Args:
        model: a float model in eval mode.
        graph: what it computes.

    Returns:
        The names of layer and BatchNorm, and their calls.
    """
    found = []
    for layer_name, norm_name, calls in _norms_after_layers(graph):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if can_fold(layer, norm, graph.shapes[calls[1].inputs[0]]) and makes_plain_calls(model, layer, norm, calls):
            found.append((layer_name, norm_name, calls))
    return found


def _norms_after_layers(graph: LayerGraph) -> list[tuple[str, str, tuple[Op, Op]]]:
    """List layer and BatchNorm of each pair of which nothing else uses a part, by the names of their modules.

    The third is their calls.
    """
    makers = {name: op for op in graph.ops for name in op.outputs}
    pairs = []
    for op in graph.ops:
        if op.function != "batch_norm" or not op.inputs or op.inputs[0] not in makers:
            continue
        before = makers[op.inputs[0]]
        weight, mean = before.argument(1, "weight"), op.argument(1, "running_mean")
        readers = [o for o in graph.ops if op.inputs[0] in o.inputs]
        if not isinstance(weight, Const) or not isinstance(mean, Const) or len(readers) != 1:
            continue
        uses = [o for o in graph.ops if weight in (*o.args, *(o.kwargs or {}).values())]
        norms = [o for o in graph.ops if o.argument(1, "running_mean") == mean]
        if len(uses) == len(norms) == 1 and op.inputs[0] not in graph.outputs:
            pairs.append((weight.name.rpartition(".")[0], mean.name.rpartition(".")[0], (before, op)))
    return pairs
