"""From a Brevitas model to the host-free description of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qft_plugin.brevitas._scalings import ActivationScaling, WeightScaling
from qft_plugin.brevitas._twin import PLAIN, activation_scaling, make_twin, quantizes_bias, weight_scaling
from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.channel_affine import Rescaled, free_channels
from qft_plugin.graph.channel_clip import free_bounds
from qft_plugin.graph.folding import names_of
from qft_plugin.graph.layer_graph import Const, DofMap, LayerGraph, Op, module_of, reads
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.record import record
from qft_plugin.graph.torch_model import Call, check_finite, check_model, first_outputs
from qft_plugin.job.host import Steps
from qft_plugin.job.understand import proven_map
from qft_plugin.training.student import QUANTIZER_OP, FakeQuantizer


@dataclass(frozen=True)
class Source:
    """A model as this host read it.

    Attributes:
        linked: the Brevitas model, which holds the degrees of freedom and is changed when they are written.
        model: float twin of the Brevitas model, in eval mode; its parameters have the same names.
        graph: what the twin computes; a quantizer is an operation that passes values on.
        tensors: weights and biases by name.
        weight_bits: bit width of each weight that a quantizer of this plugin quantizes, by name.
        activations: trained state of each activation quantizer, by the name of its module.
        on_tensor: which of them made a tensor.
        weights: trained state of each weight quantizer, by name of the weight.
        addend_factors: names of the factors in front of additions.
        dof_map: which per-channel scales are shared, free, or pinned.
        kept: by name of a weight that is pruned, true where it is not.
    """

    linked: nn.Module
    model: nn.Module
    graph: LayerGraph
    tensors: Mapping[str, Tensor]
    weight_bits: Mapping[str, int]
    activations: Mapping[str, ActivationScaling]
    on_tensor: Mapping[str, str]
    weights: Mapping[str, WeightScaling]
    addend_factors: frozenset[str]
    dof_map: DofMap
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weight_steps(self) -> Mapping[str, Steps]:
        """Granularity of each weight that a quantizer of this plugin quantizes, by name."""
        return {
            name: "doubly" if scaling.log_L is not None else "channel" if scaling.per_channel else "tensor"
            for name, scaling in self.weights.items()
        }

    @property
    def kept_in_float(self) -> Mapping[str, str]:
        """Why layers whose weight is a parameter have no quantizer, by name of the weight."""
        found = {}
        for op in self.graph.ops:
            weight = op.argument(1, "weight")
            if op.function not in LAYERS or not isinstance(weight, Const) or weight.name in self.weights:
                continue
            found[weight.name] = why_float(self.graph, op)
        return found

    def again(self) -> "Source":
        """Return the description of the model as it is after degrees of freedom were written into it."""
        names = names_of([layer for layer in self.dof_map.layers if layer.weight in self.weights])
        written = {name: self.linked.get_parameter(name).detach() for name in names}
        return replace(self, tensors={**self.tensors, **written})


def why_float(graph: LayerGraph, op: Op) -> str:
    """Say why a convolution or linear layer has no quantizer of its weight.

    Args:
        graph: the calls of the model.
        op: a call of that layer.
    """
    weight = op.argument(1, "weight")
    if not isinstance(weight, Const):
        return f"{op.function} with a weight that is computed in the forward"
    other = next((o for o in graph.ops if reads(o, weight.name) and module_of(o) != module_of(op)), None)
    if other is not None:
        return f"its weight, {weight.name}, is used elsewhere too, by {other.name}"
    if weight.name == f"{module_of(op)}.weight":
        return "its module has no weight quantizer of this package"
    return f"{op.function} is called as a function"


def check(model: nn.Module) -> None:
    """Refuse a model without a quantizer of this plugin, or with values that cannot be trained.

    Raises:
        ModelError: it says what was found and what to do.
    """
    check_model(model)
    if made_in_inference_mode(model):
        raise ModelError(
            f"The model should have been made outside torch.inference_mode: it is trained in place. Found parameters "
            f"or buffers of {type(model).__qualname__} that were made inside. Pass copy.deepcopy(model), made outside."
        )
    if not any(weight_scaling(m) is not None for m in model.modules()):
        raise ModelError(
            f"The model should have a layer with a weight quantizer of qft_plugin.brevitas. Found none in "
            f"{type(model).__qualname__}. Pass weight_quant=QFTInt4Weight to its layers, or use quantize."
        )
    _check_biases(model)
    tensors = {n: p for m in model.modules() if isinstance(m, PLAIN) for n, p in m.named_parameters(recurse=False)}
    check_finite(tensors)


def _check_biases(model: nn.Module) -> None:
    """Refuse quantizers of biases, which would round in another scale than the accumulator's while that trains.

    Raises:
        ModelError: it names the layers, their quantizers, and what to use instead.
    """
    found = {}
    for name, layer in model.named_modules():
        if weight_scaling(layer) is not None and quantizes_bias(layer):
            found[name or type(layer).__name__] = layer.bias_quant.quant_injector
    if found:
        names, its = ", ".join(found), "its bias" if len(found) == 1 else "their biases"
        kinds = " and ".join(sorted({getattr(q, "__name__", "a quantizer") for q in found.values()}))
        bits = max((q.bit_width for q in found.values() if "bit_width" in q), default=32)
        raise ModelError(
            f"Layer{'s' * (len(found) > 1)} {names}: {its} should not be quantized while the scales are trained. Found "
            f"bias_quant={kinds}. Build with bias_quant=None. For biases that are integers in the accumulator's scale, "
            f"train with QFTConfig(hardware=HardwareSpec(bias_bits={bits})): fold gives them a quantizer then. Or pass "
            f"bias_bits={bits} to fold alone, which rounds them without training."
        )


def made_in_inference_mode(model: nn.Module) -> bool:
    """Whether a model has tensors that can neither be trained nor changed."""
    return any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


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
    try:
        free_bounds(twin, call, only=names_of_modules(model))
        first_outputs(twin, call)
    except DataError as error:
        # The model itself ran on these arguments: what it cannot take are plain tensors inside.
        raise ModelError(
            f"The model should run on plain tensors too. {error} Its forward may use an attribute of a QuantTensor: "
            "leave return_quant_tensor off while it is trained."
        ) from error
    return twin


def names_of_modules(model: nn.Module) -> set[str]:
    """List the names of a model's modules: a twin has others too, in the place of Brevitas' own."""
    return {name for name, _ in model.named_modules()}


def read(
    model: nn.Module, twin: nn.Module, call: Call, *, graph: LayerGraph | None = None, explicit: bool = False
) -> Source:
    """Describe a model, which is not changed.

    Args:
        model: a Brevitas model that passed `check`.
        twin: the result of `runnable_twin` for it; it becomes a part of the description.
        call: arguments to trace it with.
        graph: the result of `record` for the twin; `None` where it was not recorded yet.
        explicit: free the scales after functions that no scale passes through.
    """
    if free_channels(twin, call, norms=True, barriers=explicit, only=names_of_modules(model)) or graph is None:
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
    named = [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers()]
    tensors = {name: t.detach() for name, t in named}
    graph = replace(graph, vectors=tuple(group for group in groups.values() if len(graph.shapes[group[0]]) > 1))
    return Source(
        model,
        twin,
        graph,
        tensors,
        {name: scaling.bits for name, scaling in weights.items()},
        activations,
        on_tensor,
        weights,
        frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Rescaled)),
        proven_map(twin, graph, tensors, call),
    )


@torch.no_grad()
def fold_norms(model: nn.Module, twin: nn.Module, graph: LayerGraph) -> bool:
    """Fold every BatchNorm that alone follows a layer into it, in place; scales of these layers start anew.

    Args:
        model: the model to change.
        twin: a float copy with the same names.
        graph: the result of `record` for the twin.

    Returns:
        Whether there was one.
    """
    folded = merge_norms(model, twin, graph)
    for name in folded:
        scaling = weight_scaling(model.get_submodule(name))
        if scaling is not None:
            scaling.ready = False
    return bool(folded)
