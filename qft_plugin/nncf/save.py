"""Out of NNCF to OpenVINO."""

import inspect
import os
import warnings
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from qft_plugin.deploy.openvino import OpenVINOReport, Storage, save
from qft_plugin.distributed import once
from qft_plugin.errors import DeployabilityError
from qft_plugin.model import evaluating, in_float32, returning_tensors, tensor_of, tensors_in
from qft_plugin.nncf.read import HOOKS_ATTRIBUTE
from qft_plugin.nncf.write import without_compiler


@once
def save_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    weights: Storage = "i4",
    check: bool = True,
) -> OpenVINOReport:
    """Save a quantized model as OpenVINO IR, and prove that the file computes the same.

    Args:
        model: what `nncf.quantize` returned.
        path: of the XML file; the weights go beside it as `.bin`.
        example_input: one input, as for the model: a tensor, a tuple of tensors or a dict of tensors. The first axis
            (images) stays free in the file.
        weights: `"i4"` stores 4-bit weights in 4 bits and runs them in int8; `"i4_plain"` is for NPUs and runs in f32
            on CPUs; `"i8"` stores 8 bits.
        check: compare integers and outputs of the written file with the model's before it takes its place.

    Returns:
        Sizes, differences, and the precision that each layer runs in on this CPU.

    Raises:
        DeployabilityError: the model is not quantized by NNCF, or the path cannot be written.
        ParityError: the file differs from the model; nothing is written.
    """
    import openvino

    if HOOKS_ATTRIBUTE not in dict(model.named_children()):
        raise DeployabilityError(
            f"The model should come from nncf.quantize. Found a {type(model).__name__} without quantizers. "
            "Quantize it first; a float model is converted with openvino.convert_model."
        )
    model, example_input = in_float32(model, example_input)
    with evaluating(model), torch.no_grad(), without_compiler(), warnings.catch_warnings():
        # The trace reads the quantizers' constants as Python numbers, which is what is wanted.
        warnings.simplefilter("ignore", TracerWarning)
        integers = weight_integers(model, example_input) if check else None
        call = example_input if isinstance(example_input, (tuple, dict)) else (example_input,)
        # The file has its inputs in the order of the forward's arguments, whatever the order of the dictionary.
        names = [n for n in inspect.signature(model.forward).parameters if isinstance(call, dict) and n in call]
        inputs = [call[n] for n in names] if isinstance(call, dict) else list(call)
        result = model(**call) if isinstance(call, dict) else model(*call)
        with returning_tensors(model):
            converted = openvino.convert_model(model, example_input=example_input)
    return save(converted, path, storage=weights, integers=integers, inputs=inputs, outputs=list(tensors_in(result)))


def weight_integers(model: nn.Module, example_input: Any) -> dict[str, Tensor]:
    """Return the integers of every weight that NNCF's symmetric quantizers quantize, by name of the weight."""
    storage = get_hook_storage(model)
    graph = build_nncf_graph(model, example_input)
    integers = {}
    for name, hook in storage.named_hooks(remove_duplicate=False):
        kind, op, port = decode_hook_name(name)
        if kind != "pre_hooks" or not isinstance(hook, SymmetricQuantizer):
            continue
        constant = _constant(graph, op, port)
        if constant is not None:
            W = tensor_of(model, constant)  # a parameter or a buffer
            integers[constant] = (W / (hook.scale / hook.level_high)).round().clamp(hook.level_low, hook.level_high)
    return integers


def _constant(graph: Any, op: str, port: int) -> str | None:
    """Find the parameter that an input port reads, through the quantizer that the graph of a quantized model shows.

    An activation has parameters among its sources too, such as a class token, but none of them is what is quantized.
    """
    for edge in graph.get_input_edges(graph.get_node_by_name(op)):
        if edge.input_port_id != port:
            continue
        node = edge.from_node
        if _reads_inputs(graph, node):
            return None
        while node.node_type != "nncf_model_const":
            before = graph.get_input_edges(node)
            if not before:
                return None
            node = min(before, key=lambda e: e.input_port_id).from_node
        return str(node.node_name)
    return None


def _reads_inputs(graph: Any, node: Any) -> bool:
    """Whether a tensor depends on an input of the network."""
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node.node_type == "nncf_model_input":
            return True
        if node.node_name not in seen:
            seen.add(node.node_name)
            left += [edge.from_node for edge in graph.get_input_edges(node)]
    return False
