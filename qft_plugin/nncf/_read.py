"""From a torch model to the host-free description of it: NNCF's graph, with every BatchNorm folded that can be."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.hook_storage import decode_hook_name
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.errors import ModelError
from qft_plugin.graph.batch_norms import CONVOLUTIONS, NORMS, foldable_norms, folded_norm, neutralize, replaceable
from qft_plugin.graph.channel_affine import (
    Addend,
    Rescaled,
    addends_of,
    free_channels,
    with_addend_factors,
)
from qft_plugin.graph.channel_clip import free_bounds, replace_by_relu
from qft_plugin.graph.copies import plain_copy
from qft_plugin.graph.layer_graph import Const, DofMap, LayerGraph, Op, Ref
from qft_plugin.graph.surroundings import check_repeatable
from qft_plugin.graph.torch_model import (
    SAME,
    Call,
    check_finite,
    first_outputs,
    largest_change,
    repeatable,
    tensor_of,
    tensors_in,
)
from qft_plugin.graph.torch_model import check_model as check_torch_model
from qft_plugin.job.understand import proven_map
from qft_plugin.nncf._graph import FoldedNorm, counterparts, layer_graph, ports_of, trace
from qft_plugin.training.data import Inputs

logger = logging.getLogger("qft_plugin")

HOOKS_ATTRIBUTE: Final = "__nncf_hooks"


@dataclass(frozen=True)
class Source:
    """A model as this host read it.

    Attributes:
        teacher: copy of the user's model in eval mode; weights that torch computes anew in every call are parameters.
        model: copy in eval mode with its BatchNorms folded; parameter names are the user's.
        graph: the calls of `model`; a folded BatchNorm is part of its layer.
        tensors: weights and biases by name.
        norms: the folded BatchNorms.
        ports: the source of each input port of an operation: one of its activation inputs, or a constant.
        addends: name of the weight of each factor in front of an addition, which `model` has as a hook.
        plain: `model` without these hooks.
        in_teacher: the name in `teacher` of each operation of `graph`.
        in_result: its name in the result, where every module is the user's again.
        kept: by name of a weight that NNCF or torch has pruned, true where it is not.
        dof_map: which per-channel scales are shared, free, or pinned.
    """

    teacher: nn.Module
    model: nn.Module
    graph: LayerGraph
    tensors: Mapping[str, Tensor]
    norms: tuple[FoldedNorm, ...]
    ports: Mapping[tuple[str, int], Ref | Const]
    addends: Mapping[Addend, str]
    plain: nn.Module
    in_teacher: Mapping[str, str]
    in_result: Mapping[str, str]
    kept: Mapping[str, Tensor]
    dof_map: DofMap
    weight_bits: None = None
    """The settings choose them."""
    weight_steps: None = None
    """Likewise."""
    kept_in_float: Mapping[str, str] = field(default_factory=dict)
    """NNCF has a quantizer for every weight, unless the user's settings keep it out."""

    @property
    def addend_factors(self) -> frozenset[str]:
        """Names of the weights of the factors in front of additions."""
        return frozenset(self.addends.values())


def check_model(model: Any) -> None:
    """Refuse what NNCF cannot quantize, before anything else is done.

    Raises:
        ModelError: it says what was found and what to pass instead.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            f"The model should be the original torch.nn.Module. Found {kind}, which has lost the "
            "modules that training needs. Pass the module that it was traced or exported from."
        )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model should be a torch.nn.Module: QFT trains it. Found {kind}. Quantize the "
            "torch model that it was converted from, and convert the result with qft_plugin.nncf.save_openvino."
        )
    if HOOKS_ATTRIBUTE in dict(model.named_children()) and any(True for _ in _other_hooks(model)):
        raise ModelError(
            "The model should be a float model. Found one that NNCF has already wrapped or quantized. "
            "Pass the model from before nncf.quantize."
        )
    if isinstance(model, nn.Sequential):
        raise ModelError(
            f"The model should be a torch.nn.Module with a forward of its own. Found {kind}: NNCF "
            "keeps its quantizers in a child module, which a Sequential would call. Make the Sequential a child of a "
            "module that calls it."
        )
    check_torch_model(model)
    check_finite(dict(model.named_parameters()))


def _other_hooks(model: nn.Module) -> Iterator[str]:
    """Yield the names of the hooks that do more than prune a parameter."""
    parameters = dict(model.named_parameters())
    for name, hook in get_hook_storage(model).named_hooks(remove_duplicate=False):
        kind, op, _ = decode_hook_name(name)
        if kind != "post_hooks" or op not in parameters or "pruning" not in type(hook).__module__.split("."):
            yield name


def _without_masks(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Unwrap a model that NNCF has pruned, in place: weights become those that its masks leave.

    Returns:
        The model, and by name of each such weight a tensor that is true where it is kept. A model that NNCF has not
        wrapped is returned as it is.
    """
    if HOOKS_ATTRIBUTE not in dict(model.named_children()):
        return model, {}
    kept: dict[str, Tensor] = {}
    for name, hook in get_hook_storage(model).named_hooks(remove_duplicate=False):
        _, parameter, _ = decode_hook_name(name)
        tensor = tensor_of(model, parameter)
        mask = hook(torch.ones_like(tensor)) != 0
        tensor.data.copy_(hook(tensor.data))
        kept[parameter] = kept.get(parameter, True) & mask
    wrapped: Any = model.forward
    del model.__dict__["forward"], model.__dict__["_replicate_for_data_parallel"]
    delattr(model, HOOKS_ATTRIBUTE)
    if getattr(wrapped.orig_forward, "__func__", None) is not type(model).forward:
        model.__dict__["forward"] = wrapped.orig_forward
    return model, kept


@torch.no_grad()
def read(model: nn.Module, inputs: Inputs, config: QFTConfig | None = None) -> Source:
    """Describe a model; it is copied, never changed.

    Args:
        model: a float torch model that passed `check_model`.
        inputs: the images; the first ones are used to trace the model.
        config: the settings, for ReLU6 and functions that no scale passes through.

    Raises:
        DataError: the model cannot be run on the first images.
        ModelError: the model cannot be traced, or gives NaN.
    """
    config = config or QFTConfig()
    plain = plain_copy(model)
    teacher, masks = _without_masks(plain.model)
    kept = {**plain.kept, **masks}
    call = inputs.first()
    outputs = first_outputs(teacher, call)
    check_repeatable(teacher, call, outputs)
    copied = copy.deepcopy(teacher)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    untouched = None
    if config.bounded == "relu":
        untouched = trace(copied, call)
        replace_by_relu(copied)
        outputs = first_outputs(copied, call)
    # OpenVINO moves a factor in front of a layer that reads floats into its weights, before their integers are made.
    rescales = config.hardware.activation_bits is not None
    if rescales:
        free_bounds(copied, call)
    traced = trace(copied, call)
    ports = ports_of(traced)
    norms = _fold_norms(copied, layer_graph(traced, ()), ports, call)
    in_result = counterparts(traced, traced, copied)
    in_teacher = in_result if untouched is None else counterparts(traced, untouched, copied)
    if rescales:
        # The BatchNorms left are no part of a layer: the network that results is traced again.
        explicit = config.hardware.activation_scale == "explicit"
        left = {name for name, _ in copied.named_modules()} - {norm.norm for norm in norms}
        if free_channels(copied, call, norms=True, barriers=explicit, only=left):
            before, traced = traced, trace(copied, call)
            ports = ports_of(traced)
            # NNCF counts the calls of a module whose name it does not know with all others of the function.
            new = counterparts(traced, before, copied)
            in_result = {name: in_result[old] for name, old in new.items()}
            in_teacher = {name: in_teacher[old] for name, old in new.items()}
            now = {old: name for name, old in new.items()}
            norms = tuple(replace(n, layer_op=now[n.layer_op], norm_op=now[n.norm_op]) for n in norms)
    graph = layer_graph(traced, norms)
    with repeatable():
        change = largest_change(outputs, list(tensors_in(copied(*call[0], **call[1]))))
    if not change <= SAME:
        raise ModelError(
            f"Folding the BatchNorms should not change the model. Found a relative difference of {change:.3g} in its "
            "outputs. The model probably shares or modifies them."
        )
    rescaled, addends = copied, {}
    if rescales and config.hardware.elementwise_rescale == "channel":
        wrapped = wrap_model(copy.deepcopy(copied))
        found = add_factors(wrapped, addends_of(graph), ports)
        with repeatable():
            same = largest_change(outputs, list(tensors_in(wrapped(*call[0], **call[1])))) <= SAME
        if same:
            rescaled, addends, graph = wrapped, found, with_addend_factors(graph, found)
        else:
            logger.warning("addends have no scales of their own: the model adds in place and goes on with the old name")
    named = [*rescaled.named_parameters(remove_duplicate=False), *rescaled.named_buffers(remove_duplicate=False)]
    tensors = {name: t.detach() for name, t in named}
    dof_map = proven_map(rescaled, graph, tensors, call)
    return Source(
        teacher, rescaled, graph, tensors, norms, ports, addends, copied, in_teacher, in_result, kept, dof_map
    )


def add_factors(
    model: nn.Module,
    addends: Iterable[Addend],
    ports: Mapping[tuple[str, int], Ref | Const],
    ops: Mapping[str, str] | None = None,
) -> dict[Addend, str]:
    """Multiply the addends of a wrapped model by factors of 1, in place, after all other hooks of the addition's input.

    Args:
        model: wrapped by NNCF.
        addends: those to multiply.
        ports: see `Source`.
        ops: names of the operations in `model`; `None` where these are those of `ports`.

    Returns:
        The name of the factors of each addend among the buffers of the model.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    modules = {a: Rescaled(nn.Identity(), a.channels, axis=a.axis, like=like) for a in addends}
    for addend, module in modules.items():
        port = port_of(ports, addend)
        op = addend.addition if ops is None else ops[addend.addition]
        get_hook_storage(model).register_pre_function_hook(op, port, module)
    names = {id(module): name for name, module in model.named_modules()}
    return {addend: f"{names[id(module)]}.weight" for addend, module in modules.items()}


def port_of(ports: Mapping[tuple[str, int], Ref | Const], addend: Addend) -> int:
    """Return the port of its addition that an addend enters by."""
    return next(port for (op, port), what in ports.items() if (op, what) == (addend.addition, Ref(addend.index)))


def _fold_norms(
    model: nn.Module, graph: LayerGraph, ports: Mapping[tuple[str, int], Ref | Const], call: Call
) -> tuple[FoldedNorm, ...]:
    """Fold every BatchNorm that alone follows a layer, and leave a neutral one in its place.

    The module stays, so that the names in the state dict are those of the user's model: with mean 0, variance
    1 - eps and weight 1 it only adds its bias, which becomes the bias of the layer.
    """
    uses = Counter(what.name for what in ports.values() if isinstance(what, Const))
    folded = []
    for layer_name, norm_name, calls in foldable_norms(model, graph):
        bias = calls[1].argument(4, "bias") or calls[0].argument(2, "bias")
        # The module that stays is changed: nothing else may read its tensors.
        if bias is None or any(uses[name] != 1 for op in calls for name in _constants(op)):
            continue
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
        W, shift = folded_norm(layer, norm)
        if layer.bias is not None:
            layer.bias.zero_()
        layer.weight.copy_(W)
        neutralize(norm)
        tensor_of(model, bias.name).copy_(shift)
        folded.append(FoldedNorm(layer_name, norm_name, calls[0].name, calls[1].name, bias.name))
    # A subclass stays: its forward may do more than what torch's own does, such as an activation function.
    plain = [f.norm for f in folded if type(model.get_submodule(f.norm)) in NORMS]
    others = replaceable(model, plain, call) if plain else frozenset()
    return tuple(replace(f, replaceable=f.norm in others) for f in folded)


def _constants(op: Op) -> list[str]:
    return [value.name for value in (*op.args, *(op.kwargs or {}).values()) if isinstance(value, Const)]
