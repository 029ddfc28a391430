"""NNCF places and calibrates its quantizers in the folded network."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, Ref
from qft_plugin.graph.operations import ADDS, LAYERS
from qft_plugin.graph.placement import ActivationGrid, Placement, WeightPlace, is_division, only_divided
from qft_plugin.graph.torch_model import tensor_of
from qft_plugin.nncf._graph import tensor_name
from qft_plugin.nncf._read import Source, port_of
from qft_plugin.nncf._request import Request
from qft_plugin.nncf._smooth import quantize_after_multiplying, smoothing
from qft_plugin.training.data import Inputs


@dataclass(frozen=True)
class Placed:
    """A model with NNCF's quantizers in it.

    Attributes:
        model: the result of `nncf.quantize` for the equalized copy.
        placement: where its quantizers are.
        tensors: its weights and biases by name, and the factors in front of additions, which are 1 and not in it yet.
        hooks: names of the hooks of each activation quantizer, by name of the quantizer.
        weight_hooks: names of the hooks of each weight quantizer, by name of the weight.
        other_hooks: likewise of constants that the offline subgraph does not know, such as embeddings.
        factors: the operation and the port that each factor in front of an addition belongs to, by name of the factor.
        in_result: the name of each operation where every module is the user's again.
        input_factors: by what SmoothQuant has multiplied what a layer reads, `[in]`, by name of the weight.
    """

    model: nn.Module
    placement: Placement
    tensors: Mapping[str, Tensor]
    hooks: Mapping[str, tuple[str, ...]]
    weight_hooks: Mapping[str, tuple[str, ...]]
    other_hooks: Mapping[str, tuple[str, ...]]
    factors: Mapping[str, tuple[str, int]]
    in_result: Mapping[str, str]
    input_factors: Mapping[str, Tensor]

    def with_placement(self, placement: Placement) -> "Placed":
        """Return the same with other grids."""
        return replace(self, placement=placement)


def place(source: Source, tensors: Mapping[str, Tensor], request: Request, inputs: Inputs) -> Placed:
    """Let NNCF place and calibrate its quantizers.

    Args:
        source: the model as it was read.
        tensors: the weights and biases that the offline subgraph knows, after equalization; quantizers of other
            weights stay NNCF's own.
        request: the user's settings for NNCF.
        inputs: the images.
    """
    model = copy.deepcopy(source.plain)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in source.addend_factors:
                tensor_of(model, name).copy_(tensor)
    quantized = request.place(model, inputs)
    quantize_after_multiplying(quantized)
    hardware = request.hardware
    _drop_quantizers_of_divisions(quantized, source)
    if hardware.activation_bits is None:
        _drop_activation_quantizers(quantized, source)
    elif request.runs_on_cpu and not hardware.quantizes_addends:
        _drop_quantizers_of_addends(quantized, source)
    names_by_module: dict[nn.Module, list[str]] = {}
    for name, hook in get_hook_storage(quantized).named_hooks(remove_duplicate=False):
        if isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)):
            names_by_module.setdefault(hook, []).append(name)
    activations: dict[str, ActivationGrid] = {}
    hooks: dict[str, tuple[str, ...]] = {}
    weights: dict[str, WeightPlace] = {}
    weight_hooks: dict[str, tuple[str, ...]] = {}
    other_hooks: dict[str, tuple[str, ...]] = {}
    untrained: dict[str, tuple[int, int]] = {}
    on_tensor: dict[str, str] = {}
    on_input: dict[tuple[str, int], str] = {}
    factors = {(addend.addition, addend.index): (addend.factor, 0) for addend in source.addends}
    for hook, names in names_by_module.items():
        kind, op, port = decode_hook_name(names[0])
        what = source.ports.get((op, port)) if kind == "pre_hooks" else None
        if isinstance(what, Const):
            # A weight that is used by several calls has a quantizer for each: one of them will stand for all.
            if what.name in tensors:
                channels = hook.scale.numel() if isinstance(hook, SymmetricQuantizer) else 0
                weight_hooks[what.name] = (*weight_hooks.get(what.name, ()), *names)
                before = weights.get(what.name, WeightPlace(per_channel=True)).per_channel
                each = channels == _out_channels(tensors, source, what)
                doubly = hardware.doubly_per_channel and before and each and is_kernel_weight(source, what)
                weights[what.name] = WeightPlace(before and each, doubly=doubly)
            elif what.name != MADE_INSIDE:
                other_hooks[what.name] = (*other_hooks.get(what.name, ()), *names)
                untrained[what.name] = _bits_and_scales(hook)
            continue
        grid = _activation_grid(hook)
        if grid is None:
            continue
        activations[names[0]], hooks[names[0]] = grid, tuple(names)
        for name in names:
            kind, op, port = decode_hook_name(name)
            if kind == "post_hooks":
                on_tensor[tensor_name(op, port)] = names[0]
            else:
                what = source.ports.get((op, port))
                if what is not None and not isinstance(what, Const):
                    on_input[factors.get((op, what.index), (op, what.index))] = names[0]
    multiplied = smoothing(quantized)
    smoothed = {(op, what.index) for op, port in multiplied if isinstance(what := source.ports.get((op, port)), Ref)}
    placement = Placement(activations, on_tensor, on_input, weights, untrained, frozenset(smoothed))
    held = {
        name: tensor if name in source.addend_factors else tensor_of(quantized, name).detach()
        for name, tensor in tensors.items()
    }
    entries = {name: (a.addition, port_of(source.ports, a)) for a, name in source.addends.items()}
    by_weight = _by_weight(source, multiplied)
    return Placed(quantized, placement, held, hooks, weight_hooks, other_hooks, entries, source.in_result, by_weight)


def _by_weight(source: Source, multiplied: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    """Return the factors in front of layers, `[in]`, by name of the weight."""
    weights = {op.name: op.argument(1, "weight") for op in source.graph.ops if op.function in LAYERS}
    return {
        weight.name: factor.flatten()
        for (op, _), factor in multiplied.items()
        if isinstance(weight := weights.get(op), Const)
    }


def _drop_quantizers_of_divisions(model: nn.Module, source: Source) -> None:
    """Remove the quantizers whose values are only read by divisions of one activation by another.

    NNCF (3.4) quantizes both inputs of a division: a divisor below half a step becomes 0, and the network's outputs NaN
    (linear attention, which divides by a sum plus 1e-15). No integer kernel divides, so nothing is lost.
    """
    storage = get_hook_storage(model)
    divisions = {op.name for op in source.graph.ops if is_division(op)}
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        if isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)):
            kind, op, port = decode_hook_name(name)
            divided = only_divided(source.graph, tensor_name(op, port)) if kind == "post_hooks" else op in divisions
            if divided:
                storage.delete_hook(name)


def _drop_quantizers_of_addends(model: nn.Module, source: Source) -> None:
    """Remove the quantizers whose values are only added to something.

    OpenVINO's CPU plugin fuses such an addition into the convolution before it, and of the quantizer in between it
    applies the clip but not the rounding (2026.4: outputs equal a clip to 1e-7, and differ from the quantizer by 3 %
    in a ResNet-20). No integer kernel needs these quantizers, so without them torch and the runtime agree.
    """
    storage = get_hook_storage(model)
    factors = {addend.factor for addend in source.addends}
    added = {op.name for op in source.graph.ops if op.function in ADDS}
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        if not isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)):
            continue
        kind, op, port = decode_hook_name(name)
        if kind == "pre_hooks":
            # Of a tensor that others read in float, or as it is before an addition in place, the reader quantizes.
            if op in added and isinstance(source.ports.get((op, port)), Ref):
                storage.delete_hook(name)
            continue
        tensor = tensor_name(op, port)
        users = [reader for reader in source.graph.ops if tensor in reader.inputs]
        only_added = all(reader.name in added or reader.name in factors for reader in users)
        if users and only_added and tensor not in source.graph.outputs:
            storage.delete_hook(name)


def _drop_activation_quantizers(model: nn.Module, source: Source) -> None:
    """Remove every quantizer that does not quantize a constant."""
    storage = get_hook_storage(model)
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        kind, op, port = decode_hook_name(name)
        on_constant = kind == "pre_hooks" and isinstance(source.ports.get((op, port)), Const)
        if isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)) and not on_constant:
            storage.delete_hook(name)


def is_kernel_weight(source: Source, weight: Const) -> bool:
    """Whether a constant is the weight of a convolution or linear layer."""
    return any(op.function in LAYERS and op.argument(1, "weight") == weight for op in source.graph.ops)


def _bits_and_scales(hook: SymmetricQuantizer | AsymmetricQuantizer) -> tuple[int, int]:
    """Return the bit width of a quantizer, and how many scales it has."""
    return int(hook.num_bits), (hook.scale if isinstance(hook, SymmetricQuantizer) else hook.input_low).numel()


def _out_channels(tensors: Mapping[str, Tensor], source: Source, weight: Const) -> int:
    for op in source.graph.ops:
        if op.argument(1, "weight") == weight:
            transposed = op.function.startswith("conv_transpose")
            return tensors[weight.name].shape[1] * op.argument(6, "groups", 1) if transposed else weight.shape[0]
    return weight.shape[0]


def _activation_grid(hook: nn.Module) -> ActivationGrid | None:
    """Read the grid of a quantizer; `None` where it differs by channel."""
    assert isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer))
    low, high, scale, zero_point = hook.get_parameters_for_torch_fq()
    if scale.numel() != 1:
        return None
    # A zero point at the end of the grid belongs to values of one sign, and stays.
    shifts = isinstance(hook, AsymmetricQuantizer) and int(low) < int(zero_point) < int(high)
    return ActivationGrid(float(scale), int(low), int(high), int(zero_point), shifts)
