"""NNCF's graph of a torch model, translated to the host-free one."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from nncf.torch.function_hook import wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import Tensor, nn

from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph.channel_affine import Rescaled, channel_affine
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, LayerGraph, Op, Ref
from qft_plugin.graph.torch_model import Call, tensors_in


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm that was folded into the layer before it; the module stays as a neutral one that adds the bias.

    Attributes:
        layer: module name of the layer.
        norm: module name of the BatchNorm.
        layer_op: the layer's call in NNCF's graph.
        norm_op: the BatchNorm's call.
        bias: name of the parameter that holds the bias of both.
        replaceable: whether another module in its place would be called.
    """

    layer: str
    norm: str
    layer_op: str
    norm_op: str
    bias: str
    replaceable: bool = False


def example_of(call: Call) -> Any:
    """Turn the arguments of a call into NNCF's form of an input: a tensor, a tuple, or a dict."""
    args, kwargs = call
    if kwargs and args:
        raise DataError("Dataset: inputs should be all positional or all by keyword. Found both.")
    return kwargs or (args[0] if len(args) == 1 else args)


def trace(model: nn.Module, call: Call) -> Any:
    """Build NNCF's graph, with every tensor of the output as an output of the graph.

    NNCF registers outputs only where the model returns a tensor or a flat tuple of them, so a copy that does is traced.
    """
    model = copy_of(model)
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


def tensor_name(op: str, port: int) -> str:
    """Name the activation that an operation makes at an output port."""
    return op if port == 0 else f"{op}:{port}"


def layer_graph(graph: Any, norms: tuple[FoldedNorm, ...]) -> LayerGraph:
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
    unread = [op for op in ops if not used.union(outputs).intersection(op.outputs)]
    outputs += [name for op in unread for name in op.outputs]
    return LayerGraph(tuple(ops), shapes, tuple(inputs), tuple(dict.fromkeys(outputs)))


def _outputs(graph: Any, node: Any) -> dict[str, tuple[int, ...]]:
    """List what a node makes, with shapes.

    NNCF has edges of those outputs alone that something reads. One before them, such as the first of
    `x.chunk(2)[1]`, is named too, since the place of an output says which it is; nothing asks for its shape, and that
    of another stands in its place.
    """
    shapes = {edge.output_port_id: tuple(edge.tensor_shape) for edge in graph.get_output_edges(node)}
    some = next(iter(shapes.values()), ())
    return {tensor_name(node.node_name, port): shapes.get(port, some) for port in range(max(shapes, default=-1) + 1)}


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


def ports_of(graph: Any) -> dict[tuple[str, int], Ref | Const]:
    """Return the activation input or constant that each input port of each operation receives."""
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


def _operations(graph: Any) -> list[Any]:
    """List the calls of a traced model in the order in which they were made."""
    ends = ("nncf_model_const", "nncf_model_input", "nncf_model_output")
    return [n for n in sorted(graph.get_all_nodes(), key=lambda n: n.node_id) if n.node_type not in ends]


def counterparts(graph: Any, before: Any, model: nn.Module) -> dict[str, str]:
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
        if isinstance(weight, Const) and isinstance(model.get_submodule(weight.name.rpartition(".")[0]), Rescaled):
            first = graph.get_input_edges(node)
            found[node.node_name] = found[min(first, key=lambda e: e.input_port_id).from_node.node_name]
        else:
            found[node.node_name] = next(old).node_name
    return found
