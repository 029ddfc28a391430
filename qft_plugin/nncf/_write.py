"""From trained degrees of freedom back to a model with NNCF's standard quantizers."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
from nncf.torch.quantization.layers import AsymmetricQuantizer, PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from qft_plugin.graph.batch_norms import set_affine
from qft_plugin.graph.channel_affine import ChannelAffine, Rescaled
from qft_plugin.graph.channel_clip import ChannelHardtanh
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.layer_graph import PINNED, on_axis
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.graph.torch_model import replace_modules, tensor_of
from qft_plugin.nncf._attach import rename_hooks
from qft_plugin.nncf._place import Placed
from qft_plugin.nncf._smooth import SQMultiply
from qft_plugin.tensors.grid import largest_integer
from qft_plugin.training.dof import Dof
from qft_plugin.training.integers import DeployedWeight
from qft_plugin.training.solve import solve


@torch.no_grad()
def write(placed: Placed, dof: Dof, deployed: Mapping[str, DeployedWeight]) -> nn.Module:
    """Put the trained tensors and NNCF's own quantizers into the model that NNCF made.

    The weights are snapped onto their grid, so that every runtime finds the student's integers, whatever it does with
    ties and with the most negative integer, which NNCF's export cannot exclude.

    Args:
        placed: the model with NNCF's quantizers; it is changed and returned.
        dof: the trained degrees of freedom.
        deployed: the integers and steps of all quantized weights by name.

    Returns:
        The model, in eval mode.
    """
    model: nn.Module = placed.model
    solution = solve(dof)
    storage = get_hook_storage(model)
    for name, tensor in solution.tensors.items():
        if name not in placed.factors:
            tensor_of(model, name).copy_(tensor)
            continue
        layer = dof.map.layer(name)
        if bool((torch.cat([layer.in_index, layer.out_index]) != PINNED).any()):
            storage.register_pre_function_hook(*placed.factors[name], _multiply(on_axis(tensor, layer.axis)))
    for weight, found in deployed.items():
        left = None
        if found.step_in is not None:
            # NNCF's quantizer has one scale for each output channel: the other factor is multiplied after it.
            W = tensor_of(model, weight)
            left = dof.map.layer(weight).axes.per_in(found.step_in, W)
            W.div_(left)
        for name in placed.weight_hooks[weight]:
            old = storage.get_submodule(name)
            storage.set_submodule(name, _weight_quantizer(old, found))
            if left is not None:
                _, op, port = decode_hook_name(name)
                storage.register_pre_function_hook(op, port, _multiply(left))
    with without_compiler():
        for constant, names in placed.other_hooks.items():
            W = tensor_of(model, constant)
            W.copy_(storage.get_submodule(names[0])(W))
    for quantizer, names in placed.hooks.items():
        grid, scale = placed.placement.activations[quantizer], solution.activation_scales[quantizer]
        zero_point = solution.zero_points.get(quantizer, grid.zero_point)
        module = _activation_quantizer(storage.get_submodule(names[0]), grid)
        _set_scale(module, replace(grid, zero_point=int(zero_point)), scale)
        for name in names:
            storage.set_submodule(name, module)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    _restore_modules(model, dof, placed)
    model.eval()
    return model


def _restore_modules(model: nn.Module, dof: Dof, placed: Placed) -> None:
    """Put back the modules that others stood for, so that the model keeps its modules and names.

    A ReLU6 stands between two factors:  min(max(x', low / c), high / c)  is  clip(x' * c, low, high) / c.  A function
    that no scale passes through has one after it, and a BatchNorm absorbs them.

    Args:
        model: the model.
        dof: the trained degrees of freedom.
        placed: where everything is.
    """
    storage = get_hook_storage(model)
    for layer in dof.map.layers:
        if layer.kind not in ("hardtanh", "channel_affine") or layer.weight in placed.factors:
            continue
        path = layer.weight.rpartition(".")[0]
        module, free = model.get_submodule(path), bool((layer.out_index != PINNED).any())
        if isinstance(module, ChannelHardtanh):
            replace_modules(model, {module: module.original})
            c = on_axis(module.factor(), module.axis)
            for op in layer.calls if free else ():
                storage.register_pre_function_hook(op, 0, _multiply(c))
                _multiply_after(storage, op, 1 / c)
        elif isinstance(module, Rescaled):
            replace_modules(model, {module: module.function})
            for op, inside in zip(layer.calls, layer.inputs, strict=True):
                rename_hooks(storage, {op: inside})
                if free:
                    _multiply_after(storage, inside, on_axis(module.weight, module.axis))
        else:
            assert isinstance(module, ChannelAffine)
            set_affine(module.original, module.weight, module.bias)
            replace_modules(model, {module: module.original})
    rename_hooks(storage, placed.in_result)


def _hooks_of(storage: Any, op: str) -> list[tuple[str, str, int, nn.Module]]:
    """List the hooks of an operation: name, kind, port and module."""
    hooks = storage.named_hooks(remove_duplicate=False)
    found = [(name, *decode_hook_name(name), hook) for name, hook in hooks]
    return [(name, kind, port, hook) for name, kind, where, port, hook in found if where == op]


def _multiply_after(storage: Any, op: str, factor: Tensor) -> None:
    """Multiply what an operation makes, before anything else that hooks do with it."""
    later = [(name, hook) for name, kind, port, hook in _hooks_of(storage, op) if (kind, port) == ("post_hooks", 0)]
    for name, _ in later:
        storage.delete_hook(name)
    for hook in [_multiply(factor), *(hook for _, hook in later)]:
        storage.register_post_function_hook(op, 0, hook)


def _multiply(factor: Tensor) -> nn.Module:
    """Return NNCF's own multiplication by a constant, which its config and state dict bring back."""
    module: nn.Module = SQMultiply(tuple(factor.shape))
    module.to(factor.device)
    module.scale = factor.detach().clone()
    module.requires_grad_(False)  # the two around a ReLU6, or in front of an addition, belong together
    return module


def _weight_quantizer(old: Any, deployed: DeployedWeight) -> nn.Module:
    """Make a standard symmetric quantizer of the trained width and scale, with the scale shape that NNCF chose."""
    return _symmetric(old, bits=deployed.bits, step=deployed.step)


def _symmetric(old: Any, *, bits: int, step: Tensor) -> nn.Module:
    state = {**old.get_config(), "num_bits": bits, "narrow_range": True, "half_range": False}
    if old.scale.numel() == 1:
        # NNCF's own shape for a depthwise transposed convolution, [1, 1, 1, 1], is exported as a scale for each channel
        # of axis 0, of which there are more: torch refuses it (3.4).
        state["scale_shape"] = (1,)
    quantizer: Any = SymmetricQuantizer(PTQuantizerSpec.from_state(state))
    quantizer.to(step.device)
    quantizer.signed = True
    high = largest_integer(bits)
    scale = (step * high).expand(quantizer.scale.numel()) if step.dim() == 0 else step * high
    quantizer.scale.data.copy_(scale.reshape(quantizer.scale.shape))
    module: nn.Module = quantizer
    return module


@torch.no_grad()
def widened(model: nn.Module) -> nn.Module:
    """Return a copy whose weights have 8-bit quantizers with the steps, and so the integers, of their fewer bits.

    For what knows 8 bits only, at the price of a file of twice the size: `nncf.strip` to torch's own quantizers, and
    `openvino.save_model` of what `openvino.convert_model` made, which reads 4-bit weights back as floats.

    Args:
        model: the result of `nncf.quantize(..., algorithm="qft")`, or a copy of it that was loaded from its config.
    """
    model = copy_of(model)
    storage = get_hook_storage(model)
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        # Only quantizers of weights have a narrow range.
        if isinstance(hook, SymmetricQuantizer) and hook.narrow_range and hook.num_bits < 8:
            storage.set_submodule(name, _symmetric(hook, bits=8, step=hook.scale / hook.level_high))
    return model


def _activation_quantizer(old: Any, grid: ActivationGrid) -> nn.Module:
    """Return a quantizer of the grid's bit width: the old one where it has it."""
    bits = (grid.high - grid.low).bit_length()
    module: Any = old
    if old.num_bits != bits:
        module = type(old)(PTQuantizerSpec.from_state({**old.get_config(), "num_bits": bits}))
        module.load_state_dict({k: v for k, v in old.state_dict().items() if "num_bits" not in k}, strict=False)
        if isinstance(old, SymmetricQuantizer):
            module.signed = old.signed
        module.to(next(old.parameters()).device)
    found: nn.Module = module
    return found


def _set_scale(module: nn.Module, grid: ActivationGrid, scale: Tensor) -> None:
    """Give a standard activation quantizer its trained scale."""
    if isinstance(module, SymmetricQuantizer):
        # NNCF stores the largest real value.
        module.scale.data.fill_(scale * grid.high)
    else:
        assert isinstance(module, AsymmetricQuantizer)
        module.input_low.data.fill_(scale * (grid.low - grid.zero_point))
        module.input_range.data.fill_(scale * (grid.high - grid.low))


CHANGING: Final = threading.Lock()
"""Held while what NNCF runs on is changed, which is the same for all threads."""


class _TorchOperations:
    """The one function of NNCF's C++ extension that a forward needs, in plain torch operations.

    Attributes:
        users: the threads that run on it now.
    """

    users: Final[list[int]] = []

    @staticmethod
    def Quantize_forward(x: Tensor, low: Tensor, extent: Tensor, levels: int) -> Tensor:  # noqa: N802  (NNCF's name)
        scale = extent / (levels - 1)
        zero_point = torch.round(-low / scale)
        return (torch.clamp(torch.round(x / scale) + zero_point, 0, levels - 1) - zero_point) * scale


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Run NNCF's quantizers on torch operations for a while, unless its C++ extension is loaded already.

    NNCF compiles the extension at the first call of a quantizer, which takes about a minute, needs a compiler and
    stops after 60 s leaving a lock behind (seen in 2.17 to 3.4). For a single export that is not worth it.
    """
    namespace, users = QuantizedFunctionsCPU, _TorchOperations.users
    with CHANGING:
        # Private, but the same in 2.17.0 to 3.4.0; where it is gone, NNCF simply compiles.
        found = getattr(namespace, "_loaded_namespace", _TorchOperations)
        own = found is None or (found is _TorchOperations and users != [])
        if own:
            namespace._loaded_namespace = _TorchOperations
            users.append(threading.get_ident())
    try:
        yield
    finally:
        with CHANGING:
            if own:
                users.pop()
                if not users:  # else another thread is still here
                    namespace._loaded_namespace = None
