"""Quantizing the layers of a model one by one, in the forward that the user wrote: for what torch.fx cannot trace."""

from typing import Any

from torch import Tensor, nn

from qft_plugin.brevitas._layers import QUANTIZED, RANGE_BATCH, RANGE_IMAGES, activation_quantizer, quantize_layers
from qft_plugin.config import QFTConfig
from qft_plugin.errors import ModelError
from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.layer_graph import Const, LayerGraph, Op, module_of, reads
from qft_plugin.graph.operations import ADDS, LAYERS
from qft_plugin.graph.record import record
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs


def swap_modules(model: nn.Module, call: Call, inputs: Inputs, config: QFTConfig) -> list[str]:
    """Give layers Brevitas' classes, and each a quantizer of its input, in place; BatchNorms are folded first.

    Layers that read one activation share its quantizer.

    Args:
        model: a float model in eval mode whose layers are torch's own.
        call: arguments to run it with.
        inputs: the images.
        config: the settings.

    Returns:
        The names of the layers.

    Raises:
        ModelError: the settings ask for quantizers that no layer has.
    """
    graph = record(model, call)
    merge_norms(model, model, graph)
    layers = called_layers(model, graph)
    names = list(layers)
    hardware = config.hardware
    added = [op.name for op in graph.ops if op.function in ADDS and len(set(op.inputs)) > 1]
    if names and added and (hardware.quantizes_addends or hardware.elementwise_rescale == "channel"):
        raise ModelError(
            f"The hardware should be one that adds in floating point. Found a HardwareSpec that asks for something in "
            f"front of {added[0]} and {len(added) - 1} other additions, in a model that torch.fx cannot trace: only "
            "layers can be given quantizers there. Leave HardwareSpec.elementwise_rescale and rescale_factor at their "
            "defaults, or build the model from the layers of brevitas.nn, then call link and finetune."
        )
    settings: dict[str, dict[str, Any]] | None = None
    if hardware.activation_bits is not None and names:
        settings = _input_quantizers(model, layers, inputs, config)
    quantize_layers(model, names, config, settings)
    return names


def called_layers(model: nn.Module, graph: LayerGraph) -> dict[str, tuple[str, ...]]:
    """List what each layer that can be quantized reads, by its name.

    A weight that something else reads too is no layer's own.

    Args:
        model: the one that was recorded.
        graph: the result of `record`.
    """
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        name = module_of(op)
        if op.function in LAYERS and _is_its_own(model, name, op):
            found.setdefault(name, []).append(op.inputs[0])
    shared = {name for name in found for op in graph.ops if module_of(op) != name and reads(op, f"{name}.weight")}
    return {name: tuple(dict.fromkeys(read)) for name, read in found.items() if name not in shared}


def _is_its_own(model: nn.Module, name: str, op: Op) -> bool:
    """Whether an operation is the call of a module that can be swapped."""
    weight = op.argument(1, "weight")
    if not name or not isinstance(weight, Const) or not op.inputs:
        return False
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return type(module) in QUANTIZED and weight.name == f"{name}.weight"


def _input_quantizers(
    model: nn.Module, layers: dict[str, tuple[str, ...]], inputs: Inputs, config: QFTConfig
) -> dict[str, dict[str, Any]]:
    """Choose what quantizes the input of each layer."""
    wanted = config.activation_bits_of([f"{name}.weight" for name in layers])
    negative = _ever_negative(model, list(layers), inputs)
    readers: dict[tuple[str, ...], list[str]] = {}
    for name, read in layers.items():
        readers.setdefault(read, []).append(name)
    settings: dict[str, dict[str, Any]] = {}
    for names in readers.values():
        quantizer = activation_quantizer(signed=any(name in negative for name in names))
        bits = max(wanted[f"{name}.weight"] for name in names)
        settings[names[0]] = {"input_quant": quantizer, "input_bit_width": bits}
        settings |= {name: {"like": names[0]} for name in names[1:]}
    return settings


def _ever_negative(model: nn.Module, names: list[str], inputs: Inputs) -> set[str]:
    """List the layers that read a negative number in one of the first images."""
    negative: set[str] = set()

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if isinstance(x, Tensor) and bool((x < 0).any()):
            negative.add(name)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        for args, kwargs in inputs.batches(RANGE_BATCH, at_most=RANGE_IMAGES):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return negative
