"""The whole job step by step: the only place that knows all of them. A host calls these in order."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.bias_correction import BIAS_IMAGES, correctable, corrections, output_means
from qft_plugin.blocks import check_blocks, split
from qft_plugin.compensate import can_compensate, compensated, input_rows
from qft_plugin.data import Call, Inputs, read_inputs
from qft_plugin.dof_map import map_dof
from qft_plugin.errors import ConfigError, ModelError, QFTWarning
from qft_plugin.finetune import FinetuneResult, Loss, Network, Phase, Prediction, Step, finetune, teacher_predictions
from qft_plugin.graph import PINNED, DofMap, Layer, LayerGraph
from qft_plugin.initialize import doubly_scales, equalize, nearest_factor, range_max, range_mse, weight_scale
from qft_plugin.model import SAME, accepts, largest_change, tensors_in
from qft_plugin.offline import (
    Dof,
    WeightGrid,
    accumulator_bits,
    fold_network,
    names_of,
    on_weight,
    solve,
    tied_grids,
)
from qft_plugin.placement import (
    ActivationGrid,
    Comparison,
    Placement,
    addends,
    comparison,
    quantizer_after,
    quantizer_before,
)
from qft_plugin.spec import FinetuneConfig, QFTConfig
from qft_plugin.student import Unfold

logger = logging.getLogger("qft_plugin")

Callback = Callable[[Step], None]

TEACHER_BATCH: Final = 64
EQUALIZE_BOTH: Final = 0.5
"""Beta of Eq. 19. Equalizing the consumers alone (1) was worse, even where every output channel has its own scale."""

EQUALIZE_ROUNDS: Final = 4
"""How often the equalized network is equalized again: a factor between two layers changes the ranges of both, and only
where they have settled do networks with the same function, but other ranges of inner channels, start alike."""

COMPENSATION_IMAGES: Final = 256
"""Images on which rounding errors compensate each other."""

RANGE_IMAGES: Final = 256
"""Images that "max" and "mse" ranges look at."""

RANGE_VALUES: Final = 1 << 20
"""Values of each activation that an "mse" range is searched on."""


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


@dataclass(frozen=True)
class Problem:
    """A network and its images, understood.

    Attributes:
        source: the network as its host read it: `model` (a float copy), `graph`, `tensors` (weights and biases by
            name), `weight_bits` (bits by name, `None` where the settings choose them), and `addend_factors` (names of
            the weights that are factors in front of an addition).
        dof_map: which per-channel scales are shared, free, or pinned.
        inputs: the images, in the fastest layout.
        at: where teacher and student are compared.
    """

    source: Any
    dof_map: DofMap
    inputs: Inputs
    at: Comparison


@dataclass(frozen=True)
class Start:
    """Everything that a finetune starts from.

    Attributes:
        placed: the host's quantizers around the folded network.
        student: the host's student.
        dof: the degrees of freedom; their cross-layer factors are relative to `log_c`.
        log_c: logarithm of the factor of every variable that is folded into the student already, `[dof_map.size]`.
    """

    placed: Any
    student: Any
    dof: Dof
    log_c: Tensor


def images(model: nn.Module, items: Iterable[Any], config: QFTConfig) -> Inputs:
    """Read and check the user's images.

    Args:
        model: a model that was checked.
        items: the dataset.
        config: the settings.
    """
    settings = config.finetune or FinetuneConfig()
    return read_inputs(
        items,
        accepts=accepts(model),
        like=next(p for p in model.parameters() if p.is_floating_point()),
        max_images=settings.max_images,
        memory_limit=settings.memory_limit,
    )


def understand(source: Any, inputs: Inputs, config: QFTConfig) -> Problem:
    """Find the degrees of freedom of a network and where it is compared.

    Args:
        source: the network as its host read it.
        inputs: the images.
        config: the settings.
    """
    dof_map = proven_map(source, inputs.batch(slice(0, min(2, len(inputs)))))
    settings = config.finetune or FinetuneConfig()
    at = _comparable(comparison(source.graph, settings.loss_at, settings.blocks), dof_map)
    if settings.cross_entropy == 1:
        at = Comparison(at.inputs[: at.blocks], outputs=False, blocks=at.blocks)  # the logits are enough
    check_blocks(source.graph, dof_map, at, classes=settings.cross_entropy > 0)
    return Problem(source, dof_map, _fastest_layout(source.model, inputs), at)


def initialize(host: ModuleType, problem: Problem, request: Any, config: QFTConfig) -> Start:
    """Choose where the finetune starts: equalization, the host's calibration, MMSE scales, compensated weights, biases.

    Args:
        host: the host's package; it has `place` and `Student`.
        problem: what `understand` returned.
        request: what the user asked the host for, passed on to it.
        config: the settings.
    """
    log_c = _equalization(problem, config)
    begin = start(host, problem, request, config, log_c=log_c, compensate=config.compensate)
    if config.bias_correction:
        _correct_biases(begin, problem)
    return begin


def start(
    host: ModuleType, problem: Problem, request: Any, config: QFTConfig, *, log_c: Tensor, compensate: bool
) -> Start:
    """Fold the network, let the host place its quantizers, and make the degrees of freedom.

    Args:
        host: the host's package.
        problem: what `understand` returned.
        request: what the user asked the host for, passed on to it.
        config: the settings.
        log_c: logarithm of the initial factor of every variable, `[dof_map.size]`.
        compensate: move weights so that their rounding errors compensate each other.
    """
    source, dof_map, inputs = problem.source, problem.dof_map, problem.inputs
    tensors = {name: source.tensors[name] for name in names_of(dof_map.layers)}
    placed = host.place(source, fold_network(dof_map, log_c, tensors), request, inputs)
    if source.weight_bits is None:
        placed = replace(placed, placement=_with_bits(source.graph, placed.placement, dof_map, config))
    compiled = config.finetune is not None and config.finetune.compile
    student = host.Student(placed, source, problem.at, _unfolds(dof_map, problem.at, log_c), compiled=compiled)
    groups, loose = addends(source.graph, placed.placement)
    kind, tied = config.hardware.elementwise_rescale, config.hardware.ties_addends
    if tied and loose:
        warnings.warn(
            f"elementwise_rescale={kind!r} should tie all inputs of an addition. Found an input that is not quantized "
            f"in {', '.join(loose)}; these are added in float. Quantize what is added.",
            QFTWarning,
            stacklevel=2,
        )
    grids = tied_grids(_activation_grids(student, placed.placement, placed.tensors, inputs, config), groups, kind)
    weights = _weight_grids(source, placed.placement, placed.tensors, dof_map, config, grids)
    values = dict(placed.tensors)
    if compensate:
        values |= _compensated(student, source.graph, dof_map, weights, values, inputs)
    dof = Dof(
        dof_map,
        {name: _laid_out(t, inputs) for name, t in values.items()},
        weights,
        grids,
        train_cross_layer=config.train_cross_layer,
        train_scales=config.train_scales,
        hardware=config.hardware,
        addends=groups if tied else (),
        rounding=config.rounding,
        sparsity=config.sparsity,
    )
    return Start(placed, student, dof, log_c)


def targets_of(teacher: Network, problem: Problem, config: QFTConfig) -> Prediction | None:
    """Run the teacher once over all images; without a finetune there is nothing to compare with.

    Args:
        teacher: the float network, compared at `problem.at`.
        problem: what `understand` returned.
        config: the settings.
    """
    settings = config.finetune
    if settings is None:
        return None
    size = max(settings.batch_size, TEACHER_BATCH)
    targets = teacher_predictions(teacher, problem.inputs, batch_size=size, memory_limit=settings.memory_limit)
    if settings.cross_entropy and targets.logits is None:
        raise ConfigError(
            "FinetuneConfig.cross_entropy should be 0 for a model that does not return one tensor [images, classes]. "
            f"Found {settings.cross_entropy}."
        )
    return replace(targets, logits=targets.logits if settings.cross_entropy else None)


def train(
    start: Start, problem: Problem, targets: Prediction | None, config: QFTConfig, *, callback: Callback | None
) -> FinetuneResult | None:
    """Finetune against the teacher's outputs; leaves the best state in `start.dof`, and warns of what would overflow.

    Args:
        start: what `initialize` returned.
        problem: what `understand` returned.
        targets: what `targets_of` returned.
        config: the settings; without a finetune in them nothing happens.
        callback: called after each finetuning step.
    """
    settings, dof = config.finetune, start.dof
    result = None
    if settings is not None and targets is not None:
        result = _finetuned(start, problem, targets, settings, callback)
    check_accumulators(dof)
    return result


def check_accumulators(dof: Dof) -> None:
    """Warn of every layer whose accumulator could overflow."""
    width = dof.hardware.accumulator_bits
    if width is None:
        return
    wide = {name: bits for name, bits in accumulator_bits(dof).items() if bits > width}
    if wide:
        warnings.warn(
            f"An accumulator of {width} bits should hold every sum. Found inputs that would overflow it: "
            f"{', '.join(f'{name} needs {bits}' for name, bits in wide.items())}. Use fewer bits for its weights "
            "(QFTConfig.layer_bits) or for what it reads (layer_activation_bits).",
            QFTWarning,
            stacklevel=3,
        )


def _finetuned(
    start: Start,
    problem: Problem,
    targets: Prediction,
    settings: FinetuneConfig,
    callback: Callback | None,
) -> FinetuneResult:
    dof = start.dof
    loss = Loss(problem.at.weights(len(targets.features)), settings.cross_entropy)
    return finetune(
        lambda call: start.student(solve(dof), call),
        dof,
        _phases(start, problem, loss, settings),
        inputs=problem.inputs,
        targets=targets,
        loss=loss,
        config=settings,
        callback=callback,
        schedule=dof.set_progress,
        penalty=dof.penalty,
    )


def _phases(start: Start, problem: Problem, loss: Loss, settings: FinetuneConfig) -> list[Phase]:
    """Choose what trains when: everything at once, or one block after the other."""
    dof, at, ends = start.dof, problem.at, problem.at.inputs[: problem.at.blocks]
    grouped = functools.partial(
        dof.parameter_groups,
        learning_rate=settings.learning_rate,
        scale_learning_rate=settings.scale_learning_rate,
    )
    if not ends:
        return [Phase(loss, grouped())]
    phases = []
    for number, block in enumerate(split(problem.source.graph, dof.map, start.placed.placement, ends)):
        factors = block.factors.to(dof.log_c.device)
        groups = grouped(layers=block.layers, quantizers=block.quantizers, factors=bool(factors.any()))
        alone = Loss(tuple(float(n == number) for n in range(len(loss.weights))), 0.0)
        if any(group["params"] for group in groups):
            phases.append(Phase(alone if number < at.blocks else loss, groups, [(dof.log_c, factors)]))
    return phases


@torch.no_grad()
def proven_map(source: Any, call: Call) -> DofMap:
    """Map the degrees of freedom, and try the map before it is used.

    Random factors are folded into the float network and its outputs compared; where they change, every scale is
    pinned. The rules of the operations were written for functions as torch defines them; a model may still do
    something that a trace does not show, and a wrong map would be a wrong network.

    Args:
        source: the network as its host read it.
        call: arguments of the network.
    """
    dof_map = map_dof(source.graph)
    if dof_map.size == 0:
        return dof_map
    generator = torch.Generator().manual_seed(0)
    tensors = {name: source.tensors[name] for name in names_of(dof_map.layers)}
    log_c = 0.5 * torch.randn(dof_map.size, generator=generator)
    folded = fold_network(dof_map, log_c, tensors)
    args, kwargs = call
    expected = list(tensors_in(source.model(*args, **kwargs)))
    found = list(tensors_in(torch.func.functional_call(source.model, folded, args, kwargs)))
    if largest_change(expected, found) <= SAME:
        return dof_map
    warnings.warn(
        "The model computes something else when the scales of its channels change, so no cross-layer factor is "
        "used. This costs accuracy, but the result is valid. Please report the model.",
        QFTWarning,
        stacklevel=2,
    )
    return dof_map.all_pinned("the model is not invariant to rescaled channels")


def _fastest_layout(model: nn.Module, inputs: Inputs) -> Inputs:
    """Choose channels-last for images on a CPU, unless the model has views that need the ordinary layout."""
    images = any(t.dim() == 4 and t.is_floating_point() for t in (*inputs.args, *inputs.kwargs.values()))
    if inputs.device.type != "cpu" or not images:
        return inputs
    candidate = inputs.laid_out(channels_last=True)
    args, kwargs = candidate.batch(slice(0, min(2, len(inputs))))
    try:
        with torch.no_grad():
            model.forward(*args, **kwargs)  # a call of an fx module prints where it failed
    except RuntimeError:
        return inputs
    return candidate


def _laid_out(t: Tensor, inputs: Inputs) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if inputs.channels_last and t.dim() == 4 else t


def _equalization(problem: Problem, config: QFTConfig) -> Tensor:
    """Choose the initial cross-layer factors, `[dof_map.size]`.

    What is added starts with one scale in each channel, so that the host can place its quantizers around an addition
    that needs no factors yet.
    """
    source = problem.source
    dof_map, merged = problem.dof_map.merged(source.addend_factors)
    layers = dof_map.layers
    kernels = [layer.weight for layer in layers if layer.is_kernel]
    bits = _bits(source, {name: source.tensors[name] for name in kernels}, config)
    log_c: Tensor = source.tensors[kernels[0]].new_zeros(dof_map.size)
    tensors = {name: source.tensors[name] for name in names_of(layers)}
    for _ in range(EQUALIZE_ROUNDS if config.equalize else 0):
        folded = fold_network(dof_map, log_c, tensors)
        weights = {name: folded[name] for name in kernels}
        log_c = log_c + equalize(dof_map, weights, bits, beta=EQUALIZE_BOTH).to(log_c)
    return torch.cat([log_c.new_zeros(1), log_c])[merged[PINNED + 1 :].to(log_c.device)]


def _bits(source: Any, weights: Mapping[str, Tensor], config: QFTConfig) -> Mapping[str, int]:
    """Return the bit width of each weight: the host's where it has fixed them, else by the settings."""
    if source.weight_bits is not None:
        return {name: bits for name, bits in source.weight_bits.items() if name in weights}
    return config.weight_bits_of({name: W.numel() for name, W in weights.items()})


def _comparable(at: Comparison, dof_map: DofMap) -> Comparison:
    """Leave out what cannot be brought back to the teacher's units.

    Raises:
        ConfigError: the user asked for it.
    """
    for place in at.inputs:
        if place.tensor in dof_map.channel_index:
            continue
        if place.asked is not None:
            raise ConfigError(
                f"FinetuneConfig.{place.field} should name what reads an activation with one scale in each channel. "
                f"Found {place.asked!r}, whose input {place.tensor} has several. Name a module before or behind it."
            )
        logger.info("the scales of %s differ inside a channel: the network's outputs are compared", place.tensor)
        return Comparison(at.inputs[: at.blocks], outputs=True, blocks=at.blocks)
    return at


def _unfolds(dof_map: DofMap, at: Comparison, log_c: Tensor) -> tuple[Unfold | None, ...]:
    """Return what brings each compared activation back to real units."""
    factors = torch.cat([log_c.new_zeros(1), log_c]).exp()
    unfolds: list[Unfold | None] = []
    for place in at.inputs:
        index = dof_map.channel_index[place.tensor].to(log_c.device)
        rescaled = bool((index != PINNED).any())
        unfolds.append(Unfold(index, factors[index], dof_map.channel_axes[place.tensor]) if rescaled else None)
    return tuple(unfolds)


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


def _with_bits(graph: LayerGraph, placement: Placement, dof_map: DofMap, config: QFTConfig) -> Placement:
    """Give each activation quantizer its bit width: the widest that a layer behind it asks for."""
    layers = [layer for layer in dof_map.layers if layer.weight in placement.weights]
    wanted = config.activation_bits_of([layer.weight for layer in layers])
    found: dict[str, int] = {}
    for layer in layers:
        for call in range(len(layer.calls)):
            name = quantizer_before(graph, placement, layer, call=call)
            if name is not None:
                found[name] = max(found.get(name, 0), wanted[layer.weight])
    default = config.hardware.activation_bits or 8
    grids = {name: grid.with_bits(found.get(name, default)) for name, grid in placement.activations.items()}
    return replace(placement, activations=grids)


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
        step = on_weight(grid.scale, grid.scale_in, W, layer).expand_as(W).reshape(rows.shape).double()
        try:
            moved = compensated(rows, step, moments[layer.weight], high=2 ** (grid.bits - 1) - 1)
        except RuntimeError as error:  # the moment matrix is not positive definite
            logger.warning("%s starts from rounding to nearest: %s", layer.weight, error)
            continue
        result[layer.weight] = moved.reshape(W.shape).to(W)
    return result


@torch.no_grad()
def _correct_biases(start: Start, problem: Problem) -> None:
    """Let each layer's mean output be that of the float network, in folded units; changes `start.dof`."""
    dof, student, tensors = start.dof, start.student, start.placed.tensors
    layers = correctable(dof.map.layers, dof.weight_grids)
    call = problem.inputs.batch(slice(0, BIAS_IMAGES))
    means = output_means(layers, tensors, lambda: student.watch(tensors, call, {}))
    solution = solve(dof)
    # One run is not worth compiling for, and would use up some of the variants that torch compiles of a function.
    with torch.compiler.set_stance("force_eager"):
        changes = corrections(layers, solution.tensors, lambda: student(solution, call), means)
    for weight, change in changes.items():
        dof.shift_bias(weight, change)


def _weight_grids(
    source: Any,
    placement: Placement,
    tensors: Mapping[str, Tensor],
    dof_map: DofMap,
    config: QFTConfig,
    activations: Mapping[str, ActivationGrid],
) -> dict[str, WeightGrid]:
    """Choose the bit width and the initial scales of every weight that the host quantized."""
    layers = [layer for layer in dof_map.layers if layer.weight in placement.weights]
    if not layers:
        raise ModelError(
            "At least one layer should be quantized. Found none. Look at what keeps them out, under NNCF ignored_scope "
            "and target_device."
        )
    bits = _bits(source, {layer.weight: tensors[layer.weight] for layer in layers}, config)
    grids = {}
    for layer in layers:
        place = placement.weights[layer.weight]
        # No kernel multiplies by the weight of a normalisation in 4 bits, and it is small: 8 bits.
        width = 8 if layer.kind == "layer_norm" else bits[layer.weight]
        W, scale, scale_in = tensors[layer.weight], place.scale, place.scale_in
        if scale is None and place.doubly:
            scale, scale_in = doubly_scales(W, layer, bits=width)
        elif scale is None:
            per_channel = config.hardware.rescale == "channelwise" and place.per_channel
            scale = weight_scale(W, layer, bits=width, per_channel=per_channel)
        s_in, s_out = (find(source.graph, placement, layer) for find in (quantizer_before, quantizer_after))
        if s_in is not None and s_out is not None:
            F_unit = activations[s_out].scale / activations[s_in].scale
            kind = config.hardware.rescale_factor
            F = nearest_factor(W, layer, scale / F_unit, unit=F_unit, kind=kind, bits=width, scale_in=scale_in)
            scale = F * F_unit
        grids[layer.weight] = WeightGrid(bits=width, scale=scale, s_in=s_in, s_out=s_out, scale_in=scale_in)
    return grids
