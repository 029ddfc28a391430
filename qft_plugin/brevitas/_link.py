"""Sharing the degrees of freedom between the layers of a Brevitas model."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qft_plugin.brevitas._quantizers import adopt, take_plain_inputs
from qft_plugin.brevitas._read import (
    Source,
    check,
    check_unshared,
    fold_norms,
    read,
    runnable_twin,
)
from qft_plugin.brevitas._scalings import ActivationScaling, CrossLayerFactors, Neighbours, WeightScaling
from qft_plugin.brevitas._twin import weight_scaling
from qft_plugin.brevitas._version import check_version
from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph.layer_graph import PINNED, DofMap
from qft_plugin.graph.placement import Placement, quantizer_after, quantizers_before
from qft_plugin.graph.record import record
from qft_plugin.graph.surroundings import check_repeatable, undisturbed
from qft_plugin.graph.torch_model import Call, accepts, conversion_to, evaluating, first_outputs
from qft_plugin.training.data import as_call

logger = logging.getLogger("qft_plugin")


@undisturbed()
def link(model: nn.Module, example_input: Any, *, explicit: bool = False) -> DofMap:
    """Share the degrees of freedom between the layers of a model, in place.

    Every quantized activation gets a scale per channel, S_a = s * c, and every weight a scale that is computed from
    those of the activations around it (Eq. 2). Quantizers that have seen nothing yet see the example input. BatchNorms
    that alone follow a layer are folded into it first, and leave an `Identity`. A second call changes nothing.

    Args:
        model: layers of `brevitas.nn` with quantizers of this package.
        example_input: one input, as for the model: a tensor, a tuple of tensors or a dict of tensors.
        explicit: give what SiLU, GELU and their like make a scale per channel too; `fold` puts a factor for each
            channel after them (see `HardwareSpec.activation_scale`).

    Returns:
        The DoF map; printed, it names each edge that is not free and why.

    Raises:
        ModelError: the model has no quantizer of this package, quantizes a bias, or cannot be traced.
        DataError: the model cannot be run on the example.
        HostError: Brevitas is missing, too old, or runs in its TorchScript mode.
    """
    check_version()
    check(model)
    call = as_call(example_input, accepts=accepts(model))
    _check_dtype(model, call)
    link_on(model, call, explicit=explicit)
    return dof_map_of(model)


def _check_dtype(model: nn.Module, call: Call) -> None:
    """Refuse images that are bytes, or floats of another kind than the model's: what torch says of them misleads.

    Raises:
        DataError: it says how to convert them.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    for t in (*call[0], *call[1].values()):
        if t.dtype == torch.uint8 or (t.is_floating_point() and t.dtype != like.dtype):
            raise DataError(
                f"example_input should be of the model's dtype {like.dtype}. Found {t.dtype}. {conversion_to(like, t)}"
            )


def dof_map_of(model: nn.Module) -> DofMap:
    """Return the DoF map of a linked model.

    Raises:
        ModelError: it is not linked.
    """
    factors = shared_factors(model)
    if factors is None:
        raise ModelError(
            f"The model should be linked. Found a {type(model).__qualname__} that is not. "
            "Call qft_plugin.brevitas.link(model, example_input) first."
        )
    return factors.dof_map


def shared_factors(model: nn.Module) -> CrossLayerFactors | None:
    """Return the cross-layer factors of a linked model, `None` where it is not linked."""
    scalings = (weight_scaling(module) for module in model.modules())
    return next((s.factors for s in scalings if s is not None and s.linked), None)


@torch.no_grad()
def link_on(model: nn.Module, call: Call, *, explicit: bool = False) -> Source:
    """Do what `link` does on a model that was checked; returns its description."""
    check_unshared(model)
    adopt(model)
    _wake(model, call)  # a clear error where the example does not fit
    twin = runnable_twin(model, call)
    graph = record(twin, call)
    folded = fold_norms(model, twin, graph)
    with evaluating(model):
        check_repeatable(model, call, _wake(model, call))
    if folded:
        twin = runnable_twin(model, call)
    before = shared_factors(model)
    explicit = explicit or (before is not None and before.explicit)
    source = read(model, twin, call, graph=None if folded else graph, explicit=explicit)
    for scaling in source.activations.values():
        if not scaling.ready:  # 0 everywhere on the example, as after a dead ReLU
            scaling.start(torch.ones_like(scaling.log_s) / scaling.high)
    _check_trained(source, source.dof_map)
    _share(source, source.dof_map)
    factors = shared_factors(model)
    assert factors is not None
    factors.explicit = explicit
    if before is not None:
        factors.bias_bits = before.bias_bits
    for name, weight in source.weights.items():
        if weight.in_index is not None:
            take_plain_inputs(model.get_submodule(name.rpartition(".")[0]))
    return source


def _check_trained(source: Source, dof_map: DofMap) -> None:
    """Say which weights no degree of freedom reaches; refuse a model where that is all of them.

    Raises:
        ModelError: nothing would be trained.
    """
    reached = {layer.weight for layer in dof_map.layers}
    left = sorted(name for name in source.weights if name not in reached)
    why = (
        "Such a layer is not called, has an input_quant or output_quant of another kind, a forward of its own, or "
        "padding_type 'same' with strides."
    )
    if len(left) == len(source.weights):
        raise ModelError(
            f"At least one weight of a QFT quantizer should be trainable. Found none among {', '.join(left)}. {why} "
            "Use the activation quantizers of qft_plugin.brevitas around it."
        )
    if left:
        logger.warning("not trained: %s. %s", ", ".join(left), why)


def _wake(model: nn.Module, call: Call) -> list[Tensor]:
    """Run the model once in eval mode, so that every quantizer has a scale; modes stay as they were."""
    with evaluating(model):
        return first_outputs(model, call)


def _share(source: Source, dof_map: DofMap) -> None:
    """Hand out shared factors; those of channels that were linked before keep their values.

    The factors belong to the first weight of the network, so that a state dict holds them once.
    """
    links = _activation_links(source, dof_map) + _weight_links(source, dof_map)
    if all(scaling.is_linked(*link) for scaling, link in links):
        return
    first = next(scaling for scaling, _ in links if isinstance(scaling, WeightScaling))
    log_c = first.log_F.new_zeros(dof_map.size)
    for scaling, link in links:
        for old, new in zip(scaling.log_factors(), link, strict=False):
            if old is not None and isinstance(new, Tensor) and old.shape == new.shape:
                free = new != PINNED
                log_c[new[free] - 1] = old[free]
    factors = CrossLayerFactors(log_c, dof_map)
    for scaling, link in links:
        scaling.shared = factors if scaling is first else None
        scaling.link(factors, *link)


Link = tuple[ActivationScaling | WeightScaling, tuple[Any, ...]]


def _activation_links(source: Source, dof_map: DofMap) -> list[Link]:
    """List for each activation quantizer the variables of its channels and the shape that puts them on their axis."""
    links: list[Link] = []
    for tensor, vector in dof_map.vectors.items():
        shape = [1] * len(source.graph.shapes[tensor])
        shape[vector.axis] = -1
        links.append((source.activations[source.on_tensor[tensor]], (_free(vector.index), tuple(shape))))
    return links


def _weight_links(source: Source, dof_map: DofMap) -> list[Link]:
    """List for each weight quantizer the variables of its channels and the quantizers of its edges."""
    placement = Placement({}, source.on_tensor, {}, {})
    links: list[Link] = []
    for layer in dof_map.layers:
        if layer.weight in source.weights:
            names = quantizers_before(source.graph, placement, layer)
            after = quantizer_after(source.graph, placement, layer)
            neighbours = Neighbours(
                tuple(None if name is None else source.activations[name] for name in names),
                None if after is None else source.activations[after],
            )
            indices = _free(layer.in_index), _free(layer.out_index)
            links.append((source.weights[layer.weight], (*indices, neighbours)))
    return links


def _free(index: Tensor) -> Tensor | None:
    """Return the variables of channels, `None` where all are pinned."""
    return index if bool((index != PINNED).any()) else None
