"""From a float model to one of Brevitas' layers with this plugin's quantizers."""

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any, Final

import brevitas.nn as qnn
import torch
from torch import Tensor, fx, nn

from qft_plugin.brevitas._by_module import called_layers, swap_modules
from qft_plugin.brevitas._layers import RANGE_BATCH, RANGE_IMAGES, activation_quantizer, quantize_layers
from qft_plugin.brevitas._plain import make_plain
from qft_plugin.brevitas._read import why_float
from qft_plugin.brevitas._twin import make_twin
from qft_plugin.config import QFTConfig
from qft_plugin.errors import ModelError
from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.channel_affine import Rescaled, free_axes
from qft_plugin.graph.channel_clip import replace_by_relu
from qft_plugin.graph.copies import plain_copy
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import Layer, LayerGraph, module_of
from qft_plugin.graph.operations import GRID_MODULES, KEEPS_GRID, LAYERS, TRACED_ADDS
from qft_plugin.graph.record import function_name, record
from qft_plugin.graph.surroundings import check_repeatable
from qft_plugin.graph.torch_model import SAME, Call, first_outputs, largest_change, not_called, tensors_in
from qft_plugin.training.data import Inputs

logger = logging.getLogger("qft_plugin")

TRACING: Final = threading.Lock()


class _NotFollowedError(Exception):
    """The graph that torch.fx has made of a model is missing, or that of another one."""


@torch.no_grad()
def swap(model: nn.Module, call: Call, inputs: Inputs, config: QFTConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy of a float model with quantized layers and a quantizer on the input of each.

    The graph of torch.fx shows everything that reads a quantized activation. A model that it cannot trace, or of which
    it would make another one, keeps its own forward, and the layers in it get a quantizer of their input each.

    Args:
        model: the float model.
        call: arguments to trace it with.
        inputs: the images.
        config: the settings.

    Returns:
        The copy, and by name of each weight that torch has pruned, true where it is not.

    Raises:
        ModelError: the model holds nothing to quantize, or would compute something else with quantizers in it.
    """
    plain = plain_copy(model)
    copied = plain.model
    expected = first_outputs(copied, call)
    check_repeatable(copied, call, expected)
    if config.bounded == "relu":
        replace_by_relu(copied)
        expected = first_outputs(copied, call)
    make_plain(copied, call)
    graph = record(copied, call)
    try:
        swapped, names = _swapped_in_graph(copy.deepcopy(copied), call, inputs, config, expected)
    except _NotFollowedError as reason:
        logger.info("the layers are quantized one by one in the model's own forward: %s", reason)
        swapped = copied
        names = swap_modules(swapped, call, inputs, config)
        lost = not_called(make_twin(swapped), names, call)
        if lost:
            raise ModelError(
                "Layers should be called as the modules of the model that they are. Found that the forward calls "
                f"{', '.join(lost)} by a name of its own, such as one in a list, where no quantized layer can take the "
                "place of it. Keep them in a torch.nn.ModuleList or under one name of a module."
            ) from reason
        change = _change(swapped, call, expected) if names else 0.0
        if not change <= SAME:
            raise ModelError(
                "Without rounding, the swapped model should compute what the float model computes. Found a relative "
                f"difference of {change:.3g}. It may have a forward hook that changes what a layer computes, change an "
                "activation in place and go on with the old name, or ask for the type of a layer: move what the hook "
                "does into the forward, or build the model from the layers of brevitas.nn, then call link and finetune."
            ) from reason
    kept = _kept_in_float(graph, names)
    if not names:
        raise ModelError(
            "The model should call at least one convolution or linear layer as a module with a weight of its own. "
            f"Found {', '.join(kept) or 'none'}."
        )
    if kept:
        logger.warning("left in floating point: %s", ", ".join(kept))
    # Brevitas makes its parameters in torch's default dtype.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return swapped.to(dtype).eval(), plain.kept


def _swapped_in_graph(
    model: nn.Module, call: Call, inputs: Inputs, config: QFTConfig, expected: list[Tensor]
) -> tuple[nn.Module, list[str]]:
    """Swap the layers in the graph of a model, which is changed; returns it and the names of the layers.

    Raises:
        _NotFollowedError: torch.fx does not make the same network of the model.
    """
    graph_model = _traced(model, call, expected)
    graph = record(graph_model, call)
    merge_norms(graph_model, graph_model, graph)
    own = called_layers(graph_model, graph)
    layers = [n for n in graph_model.graph.nodes if n.op == "call_module" and n.target in own]
    names = list(dict.fromkeys(str(node.target) for node in layers))
    if names and config.hardware.activation_bits is not None:
        _quantize_activations(graph_model, layers, call, inputs, config)
    graph_model.delete_all_unused_submodules()
    graph_model.recompile()
    quantize_layers(graph_model, names, config)
    change = _change(graph_model, call, expected) if names else 0.0
    if not change <= SAME:
        raise _NotFollowedError(f"with quantizers in its graph the model differs by {change:.3g}")
    return graph_model, names


def _change(swapped: nn.Module, call: Call, expected: list[Tensor]) -> float:
    """Return how much a model without rounding differs from the float one."""
    return largest_change(expected, first_outputs(make_twin(swapped), call))


def _traced(model: nn.Module, call: Call, expected: list[Tensor]) -> fx.GraphModule:
    """Trace a model with torch.fx, and see whether the graph computes the same.

    Raises:
        _NotFollowedError: it does not, or cannot be made or run.
    """
    try:
        traced = _graph_of(model).eval()
        # Not by a call of the module, which prints where it failed.
        found = list(tensors_in(traced.forward(*call[0], **call[1])))
    except Exception as error:  # a forward may use anything that torch.fx cannot follow
        raise _NotFollowedError(f"torch.fx finds {type(error).__name__}: {error}") from error
    # A question for the type of an activation has another answer while it is traced, and a branch is then another one.
    same = len(found) == len(expected) and all(a.shape == b.shape for a, b in zip(expected, found, strict=True))
    if not same or not largest_change(expected, found) <= SAME:
        raise _NotFollowedError("the graph of torch.fx computes something else")
    return traced


class _Tracer(fx.Tracer):
    """Follows its own thread: torch.fx changes how the modules of the whole process are called while it traces."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _graph_of(model: nn.Module) -> fx.GraphModule:
    with TRACING:  # what one thread has changed, another would put back to something else
        tracer = _Tracer()
        graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def _quantize_activations(
    model: fx.GraphModule, layers: list[fx.Node], call: Call, inputs: Inputs, config: QFTConfig
) -> None:
    """Put a quantizer on everything that a layer reads, and what the hardware has in front of additions."""
    signs = _Signs(model)
    for args, kwargs in inputs.batches(inputs.at_once(RANGE_BATCH), at_most=RANGE_IMAGES):
        signs.run(*_positional(model, args, kwargs))
    wanted = config.activation_bits_of([f"{node.target}.weight" for node in layers])
    bits: dict[fx.Node, int] = {}
    for node in layers:
        source = _quantized_node(model, node.all_input_nodes[0])
        bits[source] = max(bits.get(source, 0), wanted[f"{node.target}.weight"])
    for node in _additions(model) if config.hardware.quantizes_addends else ():
        for before in node.all_input_nodes if node in signs.floating else ():
            bits.setdefault(_quantized_node(model, before), config.hardware.activation_bits or 8)
    rescaled = _rescalable(model, signs, call) if config.hardware.elementwise_rescale == "channel" else {}
    for number, (node, width) in enumerate(bits.items()):
        _quantize_activation(model, node, number, signed=node in signs.negative, bits=width)
    _insert_factors(model, rescaled)


def _additions(model: fx.GraphModule) -> list[fx.Node]:
    """List the elementwise additions of two activations."""
    return [
        node
        for node in model.graph.nodes
        if len(node.all_input_nodes) > 1
        and node.op in ("call_function", "call_method")
        and (function_name(node.target) if node.op == "call_function" else str(node.target).rstrip("_")) in TRACED_ADDS
    ]


Place = tuple[str, int]
"""Name of the node of an addition, and which of its inputs it is."""


def _rescalable(model: fx.GraphModule, signs: "_Signs", call: Call) -> dict[Place, tuple[int, int]]:
    """List what a factor for each channel in front of an addition frees, with the number of channels and their axis."""
    shapes: dict[Place, tuple[int, ...]] = {}
    for node in _additions(model):
        read = {signs.floating.get(before) for before in node.all_input_nodes}
        if node.users and read == {signs.floating.get(node)} != {None}:  # without users it is in place
            shapes |= {(node.name, index): signs.floating[node] for index in range(len(node.all_input_nodes))}

    def sized(axes: Mapping[Place, int]) -> dict[Place, tuple[int, int]]:
        return {place: (shapes[place][axis], axis) for place, axis in axes.items()}

    def layers_with(axes: Mapping[Place, int]) -> dict[Place, Layer]:
        tried = copy.deepcopy(model)
        names = _insert_factors(tried, sized(axes))
        dof_map = map_dof(record(tried, call))
        return {place: dof_map.layer(f"{name}.weight") for place, name in names.items()}

    return sized(free_axes(shapes, layers_with)) if shapes else {}


def _insert_factors(model: fx.GraphModule, channels: Mapping[Place, tuple[int, int]]) -> dict[Place, str]:
    """Put factors in front of additions, in place.

    Args:
        model: the model.
        channels: number of channels and their axis, of each addend.

    Returns:
        The name of the module of each.
    """
    nodes = {node.name: node for node in model.graph.nodes}
    like = next(p for p in model.parameters() if p.is_floating_point())
    names: dict[Place, str] = {}
    for (addition, index), (size, axis) in channels.items():
        node = nodes[addition]
        before = node.all_input_nodes[index]
        free = (name for n in itertools.count() if not hasattr(model, name := f"addend_{n}"))
        names[addition, index] = name = next(free)
        model.add_submodule(name, Rescaled(nn.Identity(), size, axis=axis, like=like))
        with model.graph.inserting_before(node):
            node.replace_input_with(before, model.graph.call_module(name, (before,)))
    model.recompile()
    return names


def _kept_in_float(graph: LayerGraph, names: Container[str]) -> list[str]:
    """Describe the convolutions and linear layers that are not among those that are quantized."""
    kept = dict.fromkeys(
        f"{module_of(op) or op.name} ({why_float(graph, op)})"
        for op in graph.ops
        if op.function in LAYERS and module_of(op) not in names
    )
    return list(kept)


def _positional(model: fx.GraphModule, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Any]:
    """Put arguments into the order of the graph's inputs; those that are left out keep their defaults."""
    inputs = [n for n in model.graph.nodes if n.op == "placeholder"][len(args) :]
    return [*args, *(kwargs.get(str(n.target), n.args[0] if n.args else None) for n in inputs)]


class _Signs(fx.Interpreter):
    """Runs a model and remembers the shapes of floating-point values, and which values were ever negative."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.negative: set[fx.Node] = set()
        self.floating: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.floating[node] = tuple(result.shape)
            if bool((result < 0).any()):
                self.negative.add(node)
        return result


def _quantized_node(model: fx.GraphModule, node: Any) -> fx.Node:
    """Look back from the input of a layer through what only moves values: there the quantizer stands."""
    while isinstance(node, fx.Node) and node.args and isinstance(node.args[0], fx.Node):
        if node.op == "call_module":
            function = GRID_MODULES.get(type(model.get_submodule(str(node.target))), "")
        else:
            function = function_name(node.target) if node.op == "call_function" else str(node.target)
        if function not in KEEPS_GRID:
            break
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _quantize_activation(model: fx.GraphModule, node: fx.Node, number: int, *, signed: bool, bits: int) -> None:
    """Quantize what a node makes, for all that read it; a ReLU becomes Brevitas' own."""
    quantizer = activation_quantizer(signed=signed)
    name = f"quantizer_{number}"
    readers = list(node.users)
    with model.graph.inserting_after(node):
        if _is_relu(model, node):
            model.add_submodule(name, qnn.QuantReLU(act_quant=quantizer, bit_width=bits))
            quantized = model.graph.call_module(name, (node.all_input_nodes[0],))
        else:
            model.add_submodule(name, qnn.QuantIdentity(act_quant=quantizer, bit_width=bits))
            quantized = model.graph.call_module(name, (node,))
    for reader in readers:
        reader.replace_input_with(node, quantized)
    if not node.users:
        model.graph.erase_node(node)


def _is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    name = function_name(node.target) if node.op == "call_function" else str(node.target)
    return node.op in ("call_function", "call_method") and name.rstrip("_") == "relu"
