"""From a Brevitas model to the host-free description of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qft_plugin.bounded import BOUNDED, free_bounds
from qft_plugin.brevitas.scalings import ActivationScaling, WeightScaling
from qft_plugin.brevitas.twin import PLAIN, activation_scaling, make_twin, weight_scaling
from qft_plugin.data import Call
from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph import Const, LayerGraph
from qft_plugin.model import check_finite, check_model, first_outputs
from qft_plugin.norms import can_fold, folded_norm
from qft_plugin.record import record
from qft_plugin.student import QUANTIZER_OP, FakeQuantizer


@dataclass(frozen=True)
class Source:
    """A model as this host read it.

    Attributes:
        model: float twin of the Brevitas model, in eval mode; its parameters have the same names.
        graph: what the twin computes; a quantizer is an operation that passes values on.
        tensors: weights and biases by name.
        weight_bits: bit width of each weight that a quantizer of this plugin quantizes, by name.
        activations: trained state of each activation quantizer, by the name of its module.
        on_tensor: which of them made a tensor.
        weights: trained state of each weight quantizer, by name of the weight.
    """

    model: nn.Module
    graph: LayerGraph
    tensors: Mapping[str, Tensor]
    weight_bits: Mapping[str, int]
    activations: Mapping[str, ActivationScaling]
    on_tensor: Mapping[str, str]
    weights: Mapping[str, WeightScaling]


def check(model: nn.Module) -> None:
    """Refuse a model without a quantizer of this plugin, or with values that cannot be trained.

    Raises:
        ModelError: it says what was found and what to do.
    """
    check_model(model)
    if not any(weight_scaling(m) is not None for m in model.modules()):
        raise ModelError(
            f"The model should have a layer with a weight quantizer of qft_plugin.brevitas. Found none in "
            f"{type(model).__qualname__}. Pass weight_quant=QFTInt4Weight to its layers, or use quantize."
        )
    tensors = {n: p for m in model.modules() if isinstance(m, PLAIN) for n, p in m.named_parameters(recurse=False)}
    check_finite(tensors)


def check_unshared(model: nn.Module) -> None:
    """Refuse one weight, or one weight quantizer, in two layers: it would have the scales of both.

    Raises:
        ModelError: it names the layers.
    """
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        scaling = weight_scaling(module)
        if scaling is None:
            continue
        for what, value in (("weight", module.weight), ("weight quantizer", scaling)):
            other = first.setdefault(id(value), name)
            if other != name:
                raise ModelError(
                    f"Layers {other} and {name}: each should have a {what} of its own. Found the same object in both. "
                    "Call one layer twice, or give each its own."
                )


def runnable_twin(model: nn.Module, call: Call) -> nn.Module:
    """Return the float twin of a model that has run on these arguments itself.

    Raises:
        ModelError: it cannot be run on plain tensors, or quantizes a bias.
    """
    twin = make_twin(model)
    kept = {name for name, module in model.named_modules() if type(module) in BOUNDED}
    try:
        free_bounds(twin, call, only=kept)
        first_outputs(twin, call)
    except DataError as error:
        # The model itself ran on these arguments: what it cannot take are plain tensors inside.
        raise ModelError(
            f"The model should run on plain tensors too. {error} Its forward may use an attribute of a QuantTensor: "
            "leave return_quant_tensor off while it is trained."
        ) from error
    return twin


def read(model: nn.Module, call: Call) -> Source:
    """Describe a model; it is copied, never changed.

    Args:
        model: a Brevitas model that passed `check`.
        call: arguments to trace it with.

    Raises:
        ModelError: it cannot be run on plain tensors, or quantizes a bias.
    """
    twin = runnable_twin(model, call)
    graph = record(twin, call)
    stand_ins = {name.replace(".", "/"): name for name, m in twin.named_modules() if isinstance(m, FakeQuantizer)}
    on_tensor: dict[str, str] = {}
    for op in graph.ops:
        path, function, _ = ("/" + op.name).rsplit("/", 2)
        name = stand_ins.get(path.lstrip("/"))
        if name is not None and function == QUANTIZER_OP:
            on_tensor[op.outputs[0]] = name
    groups = {name: tuple(t for t, n in on_tensor.items() if n == name) for name in dict.fromkeys(on_tensor.values())}
    activations = {}
    for name in groups:
        found = activation_scaling(model.get_submodule(name))
        assert found is not None
        activations[name] = found
    weights = {
        f"{name}.weight".lstrip("."): scaling
        for name, module in model.named_modules()
        if (scaling := weight_scaling(module)) is not None
    }
    tensors = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers())}
    return Source(
        twin,
        replace(graph, vectors=tuple(group for group in groups.values() if len(graph.shapes[group[0]]) > 1)),
        {name: t.detach() for name, t in tensors.items()},
        {name: scaling.bits for name, scaling in weights.items()},
        activations,
        on_tensor,
        weights,
    )


@torch.no_grad()
def merge_norms(model: nn.Module, twin: nn.Module, graph: LayerGraph) -> None:
    """Fold every BatchNorm that alone follows a layer into it, in place; an `Identity` takes its place.

    Args:
        model: the model to change.
        twin: a float copy with the same names; the same model where it is a float one.
        graph: what `record` returned for the twin.
    """
    for layer_name, norm_name, between in _norms_behind_layers(graph):
        layer, norm = model.get_submodule(layer_name), twin.get_submodule(norm_name)
        if not can_fold(layer, norm, graph.shapes[between]):
            continue
        assert isinstance(layer.weight, Tensor)
        W, shift = folded_norm(layer, norm)
        layer.weight.copy_(W)
        if layer.bias is None:
            layer.bias = nn.Parameter(shift.to(layer.weight))
        else:
            assert isinstance(layer.bias, Tensor)
            layer.bias.copy_(shift)
        scaling = weight_scaling(layer)
        if scaling is not None:
            scaling.ready = False
        model.set_submodule(norm_name, nn.Identity())


def _norms_behind_layers(graph: LayerGraph) -> list[tuple[str, str, str]]:
    """List layer and BatchNorm of each pair of which nothing else uses a part, by the names of their modules.

    The third name is that of the activation between them.
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
            pairs.append((weight.name.rpartition(".")[0], mean.name.rpartition(".")[0], op.inputs[0]))
    return pairs
