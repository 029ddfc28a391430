"""The whole job as one function: the only place that knows all steps."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.compensate import can_compensate, compensated, input_rows
from qft_plugin.data import Inputs, read_inputs
from qft_plugin.dof_map import map_dof
from qft_plugin.errors import ConfigError, ModelError, QFTWarning
from qft_plugin.finetune import FinetuneResult, Network, Prediction, Step, finetune, teacher_predictions
from qft_plugin.graph import PINNED, DofMap, Layer, LayerGraph
from qft_plugin.initialize import equalize, range_max, range_mse, weight_scale
from qft_plugin.offline import Dof, WeightGrid, fold_network, names_of, solve
from qft_plugin.placement import (
    ActivationGrid,
    ComparedInput,
    Placement,
    backbone_output,
    quantizer_after,
    quantizer_before,
)
from qft_plugin.spec import FinetuneConfig, QFTConfig

logger = logging.getLogger("qft_plugin")

Callback = Callable[[Step], None]

TEACHER_BATCH: Final = 64
EQUALIZE_BOTH: Final = 0.5
"""Beta of Eq. 19. Equalizing the consumers alone (1) was worse, even where every output channel has its own scale."""

COMPENSATION_IMAGES: Final = 256
"""Images on which rounding errors compensate each other."""

RANGE_IMAGES: Final = 256
"""Images that "max" and "mse" ranges look at."""

RANGE_VALUES: Final = 1 << 20
"""Values of each activation that an "mse" range is searched on."""

FOLD_TOLERANCE: Final = 1e-3
"""Largest relative change of the outputs by folding; float32 rounding stays below 1e-5 in networks of 100 layers."""


@dataclass(frozen=True)
class Job:
    """The result of one quantization.

    Attributes:
        model: the quantized model, the host's own kind.
        dof_map: which per-channel scales were shared, free, or pinned.
        result: how the finetune went; `None` where none was asked for.
    """

    model: nn.Module
    dof_map: DofMap
    result: FinetuneResult | None


def quantize(host: ModuleType, model: nn.Module, request: Any, config: QFTConfig, *, callback: Callback | None) -> Job:
    """Quantize a float model with a host.

    Args:
        host: the host's package; it has `check_version`, `check_model`, `read`, `teacher`, `place`, `Student`, `write`.
        model: the user's float model; it is never changed.
        request: the host's form of the dataset together with the user's settings for the host; `items()` iterates
            over the dataset.
        config: the settings of the algorithm.
        callback: called after each finetuning step.
    """
    host.check_version()
    host.check_model(model)
    settings = config.finetune or FinetuneConfig()
    inputs = read_inputs(
        request.items(),
        accepts=host.accepts(model),
        like=next(p for p in model.parameters() if p.is_floating_point()),
        max_images=settings.max_images,
        memory_limit=settings.memory_limit,
    )
    source = host.read(model, inputs)
    dof_map = _proven(map_dof(source.graph), source, inputs, host)
    at = backbone_output(source.graph, settings.loss_at)
    if at is not None and at.tensor not in dof_map.channel_index:
        logger.info("the scales of %s differ inside a channel: the network's outputs are compared", at.tensor)
        at = None
    inputs = _fastest_layout(source.teacher, inputs)
    targets = _targets(host.teacher(source, at), inputs, config)

    tensors = {name: source.tensors[name] for name in names_of(dof_map.layers)}
    log_c = _equalization(dof_map, tensors, config)
    placed = host.place(source, fold_network(dof_map, log_c, tensors), request, inputs)
    student = host.Student(placed, source, at, _unfold(dof_map, at, log_c), compiled=settings.compile)
    grids = _activation_grids(student, placed.placement, placed.tensors, inputs, config)
    weights = _weight_grids(source.graph, placed.placement, placed.tensors, dof_map, config)
    start = dict(placed.tensors)
    if config.compensate:
        start |= _compensated(student, source.graph, dof_map, weights, start, inputs)
    dof = Dof(
        dof_map,
        {name: _laid_out(t, inputs) for name, t in start.items()},
        weights,
        grids,
        train_cross_layer=config.train_cross_layer,
    )
    result = None
    if config.finetune is not None:
        groups = dof.parameter_groups(
            learning_rate=settings.learning_rate, scale_learning_rate=settings.scale_learning_rate
        )
        result = finetune(
            lambda call: student(solve(dof), call),
            dof,
            groups,
            inputs=inputs,
            targets=targets,
            config=settings,
            callback=callback,
        )
    return Job(host.write(placed, dof), dof_map, result)


@torch.no_grad()
def _proven(dof_map: DofMap, source: Any, inputs: Inputs, host: ModuleType) -> DofMap:
    """Fold random factors into the float network and compare its outputs; where they change, pin every scale.

    The rules of the operations were written for functions as torch defines them; a model may still do something that
    a trace does not show. A wrong map would be a wrong network, so it is tried before it is used.
    """
    if dof_map.size == 0:
        return dof_map
    generator = torch.Generator().manual_seed(0)
    tensors = {name: source.tensors[name] for name in names_of(dof_map.layers)}
    log_c = 0.5 * torch.randn(dof_map.size, generator=generator)
    folded = fold_network(dof_map, log_c.to(inputs.device), tensors)
    args, kwargs = inputs.batch(slice(0, min(2, len(inputs))))
    expected = list(host.tensors_in(source.model(*args, **kwargs)))
    found = list(host.tensors_in(torch.func.functional_call(source.model, folded, args, kwargs)))
    for e, f in zip(expected, found, strict=True):
        if e.is_floating_point() and float((e - f).abs().max()) > FOLD_TOLERANCE * max(float(e.abs().max()), 1e-6):
            warnings.warn(
                "The model computes something else when the scales of its channels change, so no cross-layer factor is "
                "used. This costs accuracy, but the result is valid. Please report the model.",
                QFTWarning,
                stacklevel=2,
            )
            return dof_map.all_pinned("the model is not invariant to rescaled channels")
    return dof_map


def _fastest_layout(teacher: nn.Module, inputs: Inputs) -> Inputs:
    """Choose channels-last for images on a CPU, unless the model has views that need the ordinary layout."""
    images = any(t.dim() == 4 and t.is_floating_point() for t in (*inputs.args, *inputs.kwargs.values()))
    if inputs.device.type != "cpu" or not images:
        return inputs
    candidate = inputs.laid_out(channels_last=True)
    args, kwargs = candidate.batch(slice(0, min(2, len(inputs))))
    try:
        with torch.no_grad():
            teacher(*args, **kwargs)
    except RuntimeError:
        return inputs
    return candidate


def _laid_out(t: Tensor, inputs: Inputs) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if inputs.channels_last and t.dim() == 4 else t


def _targets(teacher: Network, inputs: Inputs, config: QFTConfig) -> Prediction:
    """Run the teacher once over all images; without a finetune there is nothing to compare with."""
    if config.finetune is None:
        return Prediction((), None)
    settings = config.finetune
    size = max(settings.batch_size, TEACHER_BATCH)
    targets = teacher_predictions(teacher, inputs, batch_size=size, memory_limit=settings.memory_limit)
    if settings.cross_entropy and targets.logits is None:
        raise ConfigError(
            "FinetuneConfig.cross_entropy should be 0 for a model that does not return one tensor [images, classes]. "
            f"Found {settings.cross_entropy}."
        )
    return replace(targets, logits=targets.logits if settings.cross_entropy else None)


def _equalization(dof_map: DofMap, tensors: Mapping[str, Tensor], config: QFTConfig) -> Tensor:
    """Choose the initial cross-layer factors, `[dof_map.size]`."""
    like = next(iter(tensors.values()))
    if not config.equalize:
        return like.new_zeros(dof_map.size)
    weights = {layer.weight: tensors[layer.weight] for layer in dof_map.layers if layer.kind != "layer_norm"}
    bits = config.weight_bits_of({name: W.numel() for name, W in weights.items()})
    return equalize(dof_map, weights, bits, beta=EQUALIZE_BOTH).to(like)


def _unfold(dof_map: DofMap, at: ComparedInput | None, log_c: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what brings the compared activation back to real units: its variables and their initial factors."""
    if at is None:
        return None
    index = dof_map.channel_index[at.tensor].to(log_c.device)
    if not bool((index != PINNED).any()):
        return None
    return index, torch.cat([log_c.new_zeros(1), log_c]).exp()[index]


@torch.no_grad()
def _activation_grids(
    student: Any, placement: Placement, tensors: Mapping[str, Tensor], inputs: Inputs, config: QFTConfig
) -> dict[str, ActivationGrid]:
    """Return the grids of all activation quantizers with their initial scales."""
    grids = dict(placement.activations)
    if config.activation_range == "host":
        return grids
    choose = range_max if config.activation_range == "max" else range_mse
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[Tensor]] = {}
    per_batch = RANGE_VALUES * TEACHER_BATCH // min(RANGE_IMAGES, len(inputs))
    for call in inputs.batches(TEACHER_BATCH, at_most=RANGE_IMAGES):
        for name, x in student.observe(tensors, call).items():
            flat = x.flatten()
            if config.activation_range == "mse" and flat.numel() > per_batch:
                flat = flat[torch.randint(flat.numel(), (per_batch,), generator=generator).to(flat.device)]
            elif config.activation_range == "max":
                flat = torch.stack([flat.amin(), flat.amax()])
            seen.setdefault(name, []).append(flat)
    for name, parts in seen.items():
        grid = grids[name]
        scale = choose(torch.cat(parts), low=grid.low - grid.zero_point, high=grid.high - grid.zero_point)
        grids[name] = replace(grid, scale=float(scale))
    return grids


@torch.no_grad()
def _compensated(
    student: Any,
    graph: LayerGraph,
    dof_map: DofMap,
    grids: Mapping[str, WeightGrid],
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
) -> dict[str, Tensor]:
    """Let the rounding errors of each layer compensate each other on the images; returns the weights that change."""
    layers = [layer for layer in dof_map.layers if layer.weight in grids and can_compensate(layer)]
    ops = {op.name: op for op in graph.ops}
    moments: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def watcher(layer: Layer) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            rows = input_rows(x, ops[layer.calls[0]], layer, tensors[layer.weight], generator=generator)
            moments[layer.weight] = moments.get(layer.weight, 0) + (rows.transpose(1, 2) @ rows).double()

        return add

    watchers = {layer.calls[0]: watcher(layer) for layer in layers}
    for call in inputs.batches(TEACHER_BATCH, at_most=COMPENSATION_IMAGES):
        student.watch(tensors, call, watchers)
    result = {}
    for layer in layers:
        W, grid = tensors[layer.weight], grids[layer.weight]
        rows = W.reshape(layer.groups, W.shape[0] // layer.groups, -1).double()
        step = grid.scale.to(rows)
        step = step.reshape(layer.groups, -1, 1) if step.dim() else step
        try:
            moved = compensated(rows, step, moments[layer.weight], high=2 ** (grid.bits - 1) - 1)
        except RuntimeError as error:  # the moment matrix is not positive definite
            logger.warning("%s starts from rounding to nearest: %s", layer.weight, error)
            continue
        result[layer.weight] = moved.reshape(W.shape).to(W)
    return result


def _weight_grids(
    graph: LayerGraph, placement: Placement, tensors: Mapping[str, Tensor], dof_map: DofMap, config: QFTConfig
) -> dict[str, WeightGrid]:
    """Choose the bit width and the initial scale of every weight that the host quantized."""
    layers = [layer for layer in dof_map.layers if layer.weight in placement.weights]
    if not layers:
        raise ModelError("At least one layer should be quantized. Found none: look at ignored_scope and target_device.")
    bits = config.weight_bits_of({layer.weight: tensors[layer.weight].numel() for layer in layers})
    # No kernel multiplies by the weight of a normalisation in 4 bits, and it is small: it keeps NNCF's 8.
    bits |= {layer.weight: 8 for layer in layers if layer.kind == "layer_norm"}
    grids = {}
    for layer in layers:
        per_channel = config.hardware.rescale == "channelwise" and placement.weights[layer.weight]
        grids[layer.weight] = WeightGrid(
            bits=bits[layer.weight],
            scale=weight_scale(tensors[layer.weight], layer, bits=bits[layer.weight], per_channel=per_channel),
            s_in=quantizer_before(graph, placement, layer),
            s_out=quantizer_after(graph, placement, layer),
        )
    return grids
