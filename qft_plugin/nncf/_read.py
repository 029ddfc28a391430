"""From a torch model to the host-free description of it: NNCF's graph, with every BatchNorm folded that can be."""

import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph.batch_norms import CONVOLUTIONS, can_fold, folded_norm, makes_plain_calls, neutralize
from qft_plugin.graph.channel_affine import (
    Addend,
    Rescaled,
    addends_of,
    channel_affine,
    free_channels,
    with_addend_factors,
)
from qft_plugin.graph.channel_clip import free_bounds, replace_by_relu
from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, DofMap, LayerGraph, Op, Ref
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
from qft_plugin.training.data import Inputs

logger = logging.getLogger("qft_plugin")

HOOKS_ATTRIBUTE: Final = "__nncf_hooks"


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm that was folded into the layer before it; the module stays as a neutral one that adds the bias.

    Attributes:
        layer: module name of the layer.
        norm: module name of the BatchNorm.
        layer_op: the layer's call in NNCF's graph.
        norm_op: the BatchNorm's call.
        bias: name of the parameter that holds the bias of both.
    """

    layer: str
    norm: str
    layer_op: str
    norm_op: str
    bias: str


@dataclass(frozen=True)
class Source:
    """A model as this host read it.

    Attributes:
        teacher: untouched copy of the user's model in eval mode.
        model: copy in eval mode with its BatchNorms folded; parameter names are the user's.
        graph: what the copy computes; a folded BatchNorm is part of its layer.
        tensors: weights and biases by name.
        norms: the folded BatchNorms.
        ports: what each input port of an operation receives: one of its activation inputs, or a constant.
        addends: name of the weight of each factor in front of an addition, which `model` has as a hook.
        plain: `model` without these hooks.
        in_teacher: the name in `teacher` of each operation of `graph`.
        in_result: its name in what is returned, where every module is the user's again.
        kept: by name of a weight that NNCF has pruned, true where it is not.
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
    """Unwrap a model that NNCF has pruned, in place: weights become what its masks make of them.

    Returns:
        The model, and by name of each such weight a tensor that is true where it is kept. What NNCF has not wrapped is
        returned as it is.
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


def example_of(call: Call) -> Any:
    """Turn the arguments of a call into NNCF's form of an input: a tensor, a tuple, or a dict."""
    args, kwargs = call
    if kwargs and args:
        raise DataError("Dataset: inputs should be all positional or all by keyword. Found both.")
    return kwargs or (args[0] if len(args) == 1 else args)


@torch.no_grad()
def read(model: nn.Module, inputs: Inputs, config: QFTConfig | None = None) -> Source:
    """Describe a model; it is copied, never changed.

    Args:
        model: a float torch model that passed `check_model`.
        inputs: the images; the first ones are used to trace the model.
        config: what to do with ReLU6 and with functions that no scale passes through.

    Raises:
        DataError: the model cannot be run on the first images.
        ModelError: the model cannot be traced, or gives NaN.
    """
    config = config or QFTConfig()
    teacher, kept = _without_masks(copy.deepcopy(model).eval())
    call = inputs.first()
    outputs = first_outputs(teacher, call)
    copied = copy.deepcopy(teacher)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    untouched = None
    if config.bounded == "relu":
        untouched = _trace(copied, call)
        replace_by_relu(copied)
        outputs = first_outputs(copied, call)
    # OpenVINO moves a factor in front of a layer that reads floats into its weights, before their integers are made.
    rescales = config.hardware.activation_bits is not None
    if rescales:
        free_bounds(copied, call)
    traced = _trace(copied, call)
    norms = _fold_norms(copied, traced)
    in_result = _counterparts(traced, traced, copied)
    in_teacher = in_result if untouched is None else _counterparts(traced, untouched, copied)
    if rescales:
        # What is left is no part of a layer: the network that it becomes is traced again.
        explicit = config.hardware.activation_scale == "explicit"
        left = {name for name, _ in copied.named_modules()} - {norm.norm for norm in norms}
        if free_channels(copied, call, norms=True, barriers=explicit, only=left):
            before, traced = traced, _trace(copied, call)
            # NNCF counts the calls of a module whose name it does not know with all others of the function.
            new = _counterparts(traced, before, copied)
            in_result = {name: in_result[old] for name, old in new.items()}
            in_teacher = {name: in_teacher[old] for name, old in new.items()}
            now = {old: name for name, old in new.items()}
            norms = tuple(replace(n, layer_op=now[n.layer_op], norm_op=now[n.norm_op]) for n in norms)
    graph = _layer_graph(traced, norms)
    with repeatable():
        change = largest_change(outputs, list(tensors_in(copied(*call[0], **call[1]))))
    if not change <= SAME:
        raise ModelError(
            f"Folding the BatchNorms should not change the model. Found a relative difference of {change:.3g} in its "
            "outputs. The model probably shares or modifies them."
        )
    ports, rescaled, addends = _ports(traced), copied, {}
    if rescales and config.hardware.elementwise_rescale == "channel":
        wrapped = wrap_model(copy.deepcopy(copied))
        found = add_factors(wrapped, addends_of(graph), ports)
        with repeatable():
            same = largest_change(outputs, list(tensors_in(wrapped(*call[0], **call[1])))) <= SAME
        if same:
            rescaled, addends, graph = wrapped, found, with_addend_factors(graph, found)
        else:
            logger.warning(
                "what is added has no scale of its own: the model adds in place and goes on with the old name"
            )
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
    """Multiply what a wrapped model adds by factors of 1, in place, behind all other hooks of the addition's input.

    Args:
        model: wrapped by NNCF.
        addends: what to multiply.
        ports: see `Source`.
        ops: what the operations are called in `model`; `None` where they have their names of `ports`.

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


def _trace(model: nn.Module, call: Call) -> Any:
    """Build NNCF's graph, with every tensor of the output as an output of the graph.

    NNCF registers outputs only where the model returns a tensor or a flat tuple of them, so a copy that does is traced.
    """
    model = copy.deepcopy(model)
    forward = model.forward

    @functools.wraps(forward)  # NNCF names the inputs by the signature
    def flat(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_in(forward(*args, **kwargs)))

    model.__dict__["forward"] = flat
    try:
        # Up to 2.19 only a wrapped model can be traced.
        return build_nncf_graph(wrap_model(model), example_of(call))
    except Exception as error:
        raise ModelError(
            f"The model could not be traced by NNCF. Found {type(error).__name__}: {error}. "
            "Check that nncf.quantize without algorithm works on it."
        ) from error


def _operations(graph: Any) -> list[Any]:
    """List the calls of a traced model in the order in which they were made."""
    ends = ("nncf_model_const", "nncf_model_input", "nncf_model_output")
    return [n for n in sorted(graph.get_all_nodes(), key=lambda n: n.node_id) if n.node_type not in ends]


def _counterparts(graph: Any, before: Any, model: nn.Module) -> dict[str, str]:
    """Name every call of a model as it was called before modules of it were replaced by others that make one call each.

    A `Rescaled` makes two, of which the second has no counterpart: it gets that of the first.

    Args:
        graph: of the model.
        before: of the model as it was.
        model: the model.
    """
    old = iter(_operations(before))
    found: dict[str, str] = {}
    for node in _operations(graph):
        weight = _op(node, (), None, graph).argument(1, "weight") if node.node_type == channel_affine.__name__ else None
        if isinstance(weight, Const) and isinstance(_module_of(model, weight.name), Rescaled):
            first = graph.get_input_edges(node)
            found[node.node_name] = found[min(first, key=lambda e: e.input_port_id).from_node.node_name]
        else:
            found[node.node_name] = next(old).node_name
    return found


def _module_of(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _consumers(graph: Any) -> dict[str, list[Any]]:
    users: dict[str, list[Any]] = {}
    for node in graph.get_all_nodes():
        for edge in graph.get_input_edges(node):
            users.setdefault(edge.from_node.node_name, []).append(node)
    return users


def _fold_norms(model: nn.Module, graph: Any) -> tuple[FoldedNorm, ...]:
    """Fold every BatchNorm that alone follows a layer, and leave a neutral one in its place.

    The module stays, so that the names in the state dict are those of the user's model: with mean 0, variance
    1 - eps and weight 1 it only adds its bias, which becomes the bias of the layer.
    """
    users = _consumers(graph)
    folded = []
    for node in graph.get_all_nodes():
        if node.node_type != "batch_norm":
            continue
        found = _foldable(model, graph, node, users)
        if found is not None:
            _fold(model, found)
            folded.append(found)
    return tuple(folded)


def _foldable(model: nn.Module, graph: Any, node: Any, users: Mapping[str, list[Any]]) -> FoldedNorm | None:
    incoming = graph.get_input_edges(node)
    before = next((e.from_node for e in incoming if e.input_port_id == 0), None)
    if before is None or before.layer_attributes is None or len(users.get(before.node_name, ())) != 1:
        return None
    calls = _op(before, (), None, graph), _op(node, (), None, graph)
    weight, mean = calls[0].argument(1, "weight"), calls[1].argument(1, "running_mean")
    if not isinstance(weight, Const) or not isinstance(mean, Const):
        return None
    constants = [v.name for op in calls for v in (*op.args, *(op.kwargs or {}).values()) if isinstance(v, Const)]
    if any(len(users[name]) != 1 for name in constants):
        return None
    layer, norm = _module_of(model, weight.name), _module_of(model, mean.name)
    shape = next(e.tensor_shape for e in incoming if e.input_port_id == 0)
    if not can_fold(layer, norm, shape) or not makes_plain_calls(model, layer, norm, calls):
        return None
    bias = calls[1].argument(4, "bias") or calls[0].argument(2, "bias")
    if bias is None:
        return None
    layer_name, norm_name = weight.name.rpartition(".")[0], mean.name.rpartition(".")[0]
    return FoldedNorm(layer_name, norm_name, before.node_name, node.node_name, bias.name)


def _fold(model: nn.Module, found: FoldedNorm) -> None:
    layer, norm = model.get_submodule(found.layer), model.get_submodule(found.norm)
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    W, shift = folded_norm(layer, norm)
    if layer.bias is not None:
        layer.bias.zero_()
    layer.weight.copy_(W)
    neutralize(norm)
    tensor_of(model, found.bias).copy_(shift)


def tensor_name(op: str, port: int) -> str:
    """Name the activation that an operation makes at an output port."""
    return op if port == 0 else f"{op}:{port}"


def _layer_graph(graph: Any, norms: tuple[FoldedNorm, ...]) -> LayerGraph:
    """Translate NNCF's graph; a folded BatchNorm disappears and its layer makes its output."""
    norm_of = {n.layer_op: n for n in norms}
    norm_ops = {n.norm_op for n in norms}
    ops: list[Op] = []
    shapes: dict[str, tuple[int, ...]] = {}
    inputs: list[str] = []
    outputs: list[str] = []
    for node in graph.topological_sort():
        if node.node_type == "nncf_model_const" or node.node_name in norm_ops:
            continue
        if node.node_type == "nncf_model_output":
            outputs += [name for _, _, name in _sources(graph, node)]
            continue
        norm = norm_of.get(node.node_name)
        made_by = graph.get_node_by_name(norm.norm_op) if norm else node
        made = _outputs(graph, made_by)
        shapes.update(made)
        if node.node_type == "nncf_model_input":
            inputs += made
            continue
        ops.append(_op(node, tuple(made), norm, graph))
    used = {name for op in ops for name in op.inputs}
    # A tensor that nothing reads leaves the network as far as can be seen.
    outputs += [name for op in ops for name in op.outputs if name not in used and name not in outputs]
    return LayerGraph(tuple(ops), shapes, tuple(inputs), tuple(dict.fromkeys(outputs)))


def _outputs(graph: Any, node: Any) -> dict[str, tuple[int, ...]]:
    made = {}
    for edge in sorted(graph.get_output_edges(node), key=lambda e: e.output_port_id):
        made[tensor_name(node.node_name, edge.output_port_id)] = tuple(edge.tensor_shape)
    return made


def _sources(graph: Any, node: Any) -> list[tuple[int, Ref | Const, str]]:
    """List the input ports of a node in order: port, what it receives, and from where."""
    edges = [
        (port, edge)
        for edge in graph.get_input_edges(node)
        for port in {edge.input_port_id, *(getattr(edge, "parallel_input_port_ids", None) or ())}
    ]
    found: list[tuple[int, Ref | Const, str]] = []
    activations = 0
    for port, edge in sorted(edges, key=lambda item: item[0]):
        name = edge.from_node.node_name
        if edge.from_node.node_type == "nncf_model_const":
            found.append((port, Const(name, tuple(edge.tensor_shape)), name))
        else:
            found.append((port, Ref(activations), tensor_name(name, edge.output_port_id)))
            activations += 1
    return found


def _ports(graph: Any) -> dict[tuple[str, int], Ref | Const]:
    return {(n.node_name, port): what for n in graph.get_all_nodes() for port, what, _ in _sources(graph, n)}


def _op(node: Any, outputs: tuple[str, ...], norm: FoldedNorm | None, graph: Any) -> Op:
    """Translate one call; its tensor arguments become references to activations and constants."""
    sources = _sources(graph, node)
    activations = tuple(name for _, what, name in sources if isinstance(what, Ref))
    references = [what for _, what, _ in sources]
    attributes = node.layer_attributes
    function = _function_name(node.node_type)
    replaced = _Replacer(references)
    args = tuple(replaced(v) for v in attributes.op_args)
    kwargs = {k: replaced(v) for k, v in attributes.op_kwargs.items()}
    if replaced.missing or replaced.left:
        # NNCF did not see where some tensor came from (made inside the forward): no rule applies to the call.
        return Op(node.node_name, f"{function} of {MADE_INSIDE}", activations, outputs)
    if function == "batch_norm" and len(args) == 9:
        # NNCF looks into the function of torch.nn.functional: x, mean, variance, weight, bias, training, momentum, eps.
        args = (args[0], *args[3:5], *args[1:3], *args[5:8])
    if norm is not None:
        bias = Const(norm.bias, tuple(graph.get_node_by_name(norm.bias).layer_attributes.shape))
        args = (*args[:2], bias, *args[3:])
        kwargs.pop("bias", None)
    return Op(node.node_name, function, activations, outputs, args, kwargs)


def _function_name(node_type: str) -> str:
    """Drop the mark of an in-place operation; dunder names keep their underscores."""
    return node_type if node_type.endswith("__") else node_type.rstrip("_")


class _Replacer:
    """Replaces NNCF's tensor descriptions in arguments, in order, by references."""

    def __init__(self, references: list[Ref | Const]) -> None:
        self.left = list(references)
        self.missing = False

    def __call__(self, value: Any) -> Any:
        if type(value).__name__ == "TensorMeta":
            if not self.left:
                self.missing = True
                return None
            return self.left.pop(0)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(self(v) for v in value)
        return value
