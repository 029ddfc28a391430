"""Where a finetune starts: equalization, the host's quantizers, MMSE scales, compensated weights, corrected biases."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from qft_plugin.config import QFTConfig
from qft_plugin.errors import ModelError, warn
from qft_plugin.graph.comparison import Comparison
from qft_plugin.graph.equalize import equalize
from qft_plugin.graph.expected_error import SeenByLayers, least_expected_error
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import MADE_INSIDE, PINNED, Const, DofMap, LayerGraph
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.placement import (
    ActivationGrid,
    Placement,
    addends,
    joined,
    merged,
    quantizer_after,
    quantizers_before,
)
from qft_plugin.graph.torch_model import Functional, repeatable
from qft_plugin.job.accumulators import check_biases
from qft_plugin.job.activation_ranges import BATCH, activation_grids
from qft_plugin.job.bias_correction import BIAS_IMAGES, correctable, corrections, output_means
from qft_plugin.job.compensation import compensated
from qft_plugin.job.health import Ranges, warn_of_images, warn_of_ranges
from qft_plugin.job.host import Host, Placed, PlacedT, Problem, Source, SourceT, Start, Steps, Student
from qft_plugin.job.understand import laid_out
from qft_plugin.report.progress import phase
from qft_plugin.tensors.mmse import doubly_scales, nearest_factor, weight_scale
from qft_plugin.training.activation_scales import Ties, shared_grids, tied_grids
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof, WeightGrid
from qft_plugin.training.solve import solve
from qft_plugin.training.student import Unfold

logger = logging.getLogger("qft_plugin")

EQUALIZE_BOTH: Final = 0.5
"""Beta of Eq. 19. Equalizing the consumers alone (1) was worse, even where every output channel has its own scale."""

EQUALIZE_ROUNDS: Final = 4
"""How often the equalized network is equalized again: a factor between two layers changes the ranges of both, and only
where they have settled do networks with the same function, but other ranges of inner channels, start alike."""

LOOKED_AT: Final = 256
"""Images that are looked at for constant activations and outliers, where compensation has seen none."""


def initialize(host: Host[SourceT, PlacedT], problem: Problem[SourceT], config: QFTConfig) -> Start[PlacedT]:
    """Choose where the finetune starts: equalization, the host's calibration, MMSE scales, compensated weights, biases.

    Args:
        host: places the quantizers and makes the student.
        problem: the result of `understand`.
        config: the settings.
    """
    with phase("equalization"):
        log_c = _equalization(problem, config)
    ranges = Ranges()
    begin = start(host, problem, config, log_c=log_c, compensate=config.compensate, ranges=ranges)
    with phase("looking at activations"):
        _look(begin, problem, ranges)
    if config.bias_correction:
        with phase("bias correction"):
            _correct_biases(begin, problem)
    check_biases(begin.dof)
    return begin


def start(
    host: Host[SourceT, PlacedT],
    problem: Problem[SourceT],
    config: QFTConfig,
    *,
    log_c: Tensor,
    compensate: bool,
    ranges: Ranges | None = None,
) -> Start[PlacedT]:
    """Fold the network, let the host place its quantizers, and make the degrees of freedom.

    Args:
        host: places the quantizers and makes the student.
        problem: the result of `understand`.
        config: the settings.
        log_c: logarithm of the initial factor of every variable, `[dof_map.size]`.
        compensate: move weights so that their rounding errors compensate each other.
        ranges: notes the activations of the network while compensation runs it.
    """
    source, dof_map, inputs = problem.source, problem.source.dof_map, problem.inputs
    tensors = {name: source.tensors[name] for name in names_of(dof_map.layers)}
    compiled = config.finetune is not None and config.finetune.compile
    with phase("calibration"):
        placed = host.place(source, fold_network(dof_map, log_c, tensors), inputs)
        if source.weight_bits is None:
            placed = placed.with_placement(_with_bits(source.graph, placed.placement, dof_map, config))
        _warn_of_computed_weights(source.graph)
        student = host.student(problem, placed, _unfolds(dof_map, problem.at, log_c), compiled=compiled)
    groups, loose = addends(source.graph, placed.placement)
    kind, tied = config.hardware.elementwise_rescale, config.hardware.ties_addends
    if tied and loose:
        warn(
            f"elementwise_rescale={kind!r} should tie all inputs of an addition. Found an input that is not quantized "
            f"in {', '.join(loose)}; these are added in float. Quantize all addends.",
            stacklevel=2,
        )
    shared = _shared(source.graph, placed.placement, dof_map, config)
    with phase("ranges of activations"):
        grids = _activation_grids(student, placed, inputs, config)
    grids = tied_grids(shared_grids(grids, shared), merged([*shared, *groups], list(grids)), kind)
    with phase("scales of weights"):
        weights = _weight_grids(source, placed, config, grids, shared)

    def dof_of(values: Mapping[str, Tensor], by_weight: Mapping[str, WeightGrid]) -> Dof:
        return Dof(
            dof_map,
            {name: laid_out(t, inputs) for name, t in values.items()},
            by_weight,
            grids,
            config=config,
            ties=Ties(addends=groups if tied else (), shared=shared),
        )

    dof = dof_of(placed.tensors, weights)
    if compensate:
        changes = compensated(student, problem, dof, placed.tensors, ranges or Ranges())
        stepped = {name: replace(weights[name], scale=weights[name].scale * m) for name, m in changes.multiples.items()}
        dof = dof_of({**placed.tensors, **changes.tensors}, {**weights, **stepped})
    return Start(placed, student, dof, log_c)


def _warn_of_computed_weights(graph: LayerGraph) -> None:
    """Name the layers that no host can quantize, because their weights are no parameters."""
    layers = [op for op in graph.ops if op.function.partition(" ")[0] in LAYERS]
    computed = [op.name for op in layers if not _is_held(op.argument(1, "weight"))]
    if computed:
        warn(
            f"The weights of layers should be parameters. Found {len(computed)} of {len(layers)} layers whose weights "
            "the forward computes, as weight standardization and parametrizations do, or whose tensors the host cannot "
            f"follow: {', '.join(computed)}. They stay in floating point. Give each of them the weight that it "
            "computes as a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations does that for "
            "parametrizations).",
            stacklevel=2,
        )


def _is_held(weight: Any) -> bool:
    return isinstance(weight, Const) and weight.name != MADE_INSIDE


def _equalization(problem: Problem[Source], config: QFTConfig) -> Tensor:
    """Choose the initial cross-layer factors, `[dof_map.size]`.

    Addends start with one scale in each channel, so that the host can place its quantizers around an addition
    that needs no factors yet.
    """
    source = problem.source
    dof_map, merged = source.dof_map.merged(source.addend_factors)
    layers = dof_map.layers
    kernels = [layer.weight for layer in layers if layer.is_kernel]
    bits = _bits(source, {name: source.tensors[name] for name in kernels}, config)
    log_c: Tensor = source.tensors[kernels[0]].new_zeros(dof_map.size)
    tensors = {name: source.tensors[name] for name in names_of(layers)}
    for _ in range(EQUALIZE_ROUNDS if config.equalize else 0):
        folded = fold_network(dof_map, log_c, tensors)
        weights = {name: folded[name] for name in kernels}
        log_c = log_c + equalize(dof_map, weights, bits, beta=EQUALIZE_BOTH).to(log_c)
    if config.equalize:
        log_c = log_c + _toward_least_error(problem, config, dof_map, fold_network(dof_map, log_c, tensors), bits)
    return torch.cat([log_c.new_zeros(1), log_c])[merged[PINNED + 1 :].to(log_c.device)]


def _toward_least_error(
    problem: Problem[Source], config: QFTConfig, dof_map: DofMap, folded: Mapping[str, Tensor], bits: Mapping[str, int]
) -> Tensor:
    """Return the factors, relative to the equalized network, with a small expected error, `[dof_map.size]`.

    Args:
        problem: the network and its images.
        config: the settings.
        dof_map: its map.
        folded: weights and biases of the equalized network by name.
        bits: bit width of each kernel that is quantized.
    """
    source, inputs, hardware = problem.source, problem.inputs, config.hardware
    one: Steps = "tensor" if hardware.rescale == "layerwise" else "channel"
    asked: Steps = "doubly" if hardware.doubly_per_channel else one
    steps = dict.fromkeys(bits, asked) if source.weight_steps is None else source.weight_steps
    # Where columns have steps of their own, factors change nothing.
    with_say = {name: number for name, number in bits.items() if steps[name] != "doubly"}
    if dof_map.size == 0 or not with_say:
        return torch.zeros(dof_map.size, device=inputs.device)
    model = Functional(source.model)
    with torch.no_grad(), repeatable(), SeenByLayers(folded) as looking:
        for args, kwargs in inputs.batches(inputs.at_once(BATCH), at_most=BATCH):
            model(folded, args, kwargs)
    return least_expected_error(
        dof_map,
        folded,
        with_say,
        looking.seen,
        per_channel={name for name in bits if steps[name] == "channel"},
        activation_bits=hardware.activation_bits,
    ).to(inputs.device)


def _bits(source: Source, weights: Mapping[str, Tensor], config: QFTConfig) -> Mapping[str, int]:
    """Return the bit width of each weight: the host's where it has fixed them, else by the settings."""
    if source.weight_bits is not None:
        return {name: bits for name, bits in source.weight_bits.items() if name in weights}
    return config.weight_bits_of({name: W.numel() for name, W in weights.items()})


def _unfolds(dof_map: DofMap, at: Comparison, log_c: Tensor) -> tuple[Unfold | None, ...]:
    """Return the factors that bring each compared activation back to real units."""
    factors = torch.cat([log_c.new_zeros(1), log_c]).exp()
    unfolds: list[Unfold | None] = []
    for place in at.inputs:
        index = dof_map.channel_index[place.tensor].to(log_c.device)
        rescaled = bool((index != PINNED).any())
        unfolds.append(Unfold(index, factors[index], dof_map.channel_axes[place.tensor]) if rescaled else None)
    return tuple(unfolds)


@torch.no_grad()
def _activation_grids(student: Student, placed: Placed, inputs: Inputs, config: QFTConfig) -> dict[str, ActivationGrid]:
    """Return the grids of all activation quantizers with their initial scales."""
    grids = dict(placed.placement.activations)
    kind = config.activation_range or "mse"
    if kind == "host":
        return grids
    return activation_grids(grids, functools.partial(student.observe, placed.tensors), inputs, kind)


def _with_bits(graph: LayerGraph, placement: Placement, dof_map: DofMap, config: QFTConfig) -> Placement:
    """Give each activation quantizer its bit width: the widest that a layer after it asks for."""
    layers = [layer for layer in dof_map.layers if layer.weight in placement.weights]
    wanted = config.activation_bits_of([layer.weight for layer in layers])
    default = config.hardware.activation_bits or 8
    found: dict[str, int] = {}
    floating = []
    for layer in layers:
        names = quantizers_before(graph, placement, layer)
        found |= {name: max(found.get(name, 0), wanted[layer.weight]) for name in names if name is not None}
        if None in names and wanted[layer.weight] != default:
            floating.append(layer.weight)
    if floating:
        warn(
            "QFTConfig.layer_activation_bits should be of layers whose whole input is quantized. Found "
            f"{', '.join(floating)}, which read other values too. Look at the quantizers of the host.",
            stacklevel=2,
        )
    grids = {name: grid.with_bits(found.get(name, default)) for name, grid in placement.activations.items()}
    return replace(placement, activations=grids)


def _shared(graph: LayerGraph, placement: Placement, dof_map: DofMap, config: QFTConfig) -> tuple[tuple[str, ...], ...]:
    """List groups of activation quantizers that have one scale, where the hardware has integer accumulators.

    A kernel that reads a concatenation, or that is called several times, adds products of all their integers.
    """
    if not config.hardware.needs_accumulators:
        return ()
    kernels = [layer for layer in dof_map.layers if layer.weight in placement.weights and layer.is_kernel]
    shared = joined(graph, placement, kernels)
    problems = []
    for layer in kernels:
        names = quantizers_before(graph, placement, layer)
        if _one_of(names, shared) is None:
            why = "reads values that are not quantized" if None in names else "reads several zero points"
            problems.append(f"{layer.weight} {why}")
    if problems:
        hardware = config.hardware
        settings = {
            "bias_bits": hardware.bias_bits,
            "accumulator_bits": hardware.accumulator_bits,
            "rescale_factor": None if hardware.rescale_factor == "float" else hardware.rescale_factor,
        }
        asked = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        warn(
            f"HardwareSpec({asked}) should hold for every quantized layer, whose accumulator then needs one scale. "
            f"Found layers without: {'; '.join(problems)}. Their biases and rescale factors stay in float, and their "
            "accumulators are not looked at. Quantize all that they read.",
            stacklevel=3,
        )
    return shared


def _one_of(names: Sequence[str | None], shared: Sequence[Sequence[str]]) -> str | None:
    """Return one of several quantizers if all have one scale, else `None`."""
    one = len(names) == 1 or any(set(names) <= set(group) for group in shared)
    return names[0] if one else None


@torch.no_grad()
def _look(start: Start[Placed], problem: Problem[Source], ranges: Ranges) -> None:
    """Warn of constant activations and dominant images among the first ones, which compensation has seen, if it ran."""
    inputs, placed = problem.inputs, start.placed
    warn_of_images(inputs)
    if not placed.placement.activations:
        return
    if not ranges.images:
        for call in inputs.batches(inputs.at_once(BATCH), at_most=LOOKED_AT):
            ranges.run(start.student, placed.tensors, call, {})
    warn_of_ranges(ranges, start.student, placed.tensors, problem.source.graph, placed.placement, inputs)


@torch.no_grad()
def _correct_biases(start: Start[Placed], problem: Problem[Source]) -> None:
    """Let each layer's mean output be that of the float network, in folded units; changes `start.dof`."""
    dof, student, tensors = start.dof, start.student, start.placed.tensors
    layers = correctable(dof.map.layers, dof.weight_grids)
    call = problem.inputs.first(BIAS_IMAGES)
    means = output_means(layers, tensors, lambda: student.watch(tensors, call, {}))
    solution = solve(dof)
    # One run is not worth compiling for, and would use up some of the variants that torch compiles of a function.
    with torch.compiler.set_stance("force_eager"):
        changes = corrections(layers, solution.tensors, lambda: student(solution, call), means)
    for weight, change in changes.items():
        dof.shift_bias(weight, change)


def _weight_grids(
    source: Source,
    placed: Placed,
    config: QFTConfig,
    activations: Mapping[str, ActivationGrid],
    shared: Sequence[Sequence[str]],
) -> dict[str, WeightGrid]:
    """Choose the bit width and the initial scales of every weight that the host quantized."""
    placement, tensors = placed.placement, placed.tensors
    layers = [layer for layer in source.dof_map.layers if layer.weight in placement.weights]
    if not layers:
        raise ModelError(
            "At least one layer should be quantized. Found none. Look at the settings that keep layers out, under "
            "NNCF ignored_scope and target_device."
        )
    bits = _bits(source, {layer.weight: tensors[layer.weight] for layer in layers}, config)
    grids = {}
    for layer in layers:
        place = placement.weights[layer.weight]
        # No kernel multiplies by the weight of a normalisation in 4 bits, and it is small: 8 bits.
        width = 8 if layer.kind == "layer_norm" else bits[layer.weight]
        W, scale, scale_in = tensors[layer.weight], place.scale, place.scale_in
        if scale is None and place.doubly:
            scale, scale_in = doubly_scales(W, layer.axes, bits=width)
        elif scale is None:
            per_channel = config.hardware.rescale == "channelwise" and place.per_channel
            scale = weight_scale(W, layer.axes, bits=width, per_channel=per_channel)
        s_in = _one_of(quantizers_before(source.graph, placement, layer), shared)
        s_out = quantizer_after(source.graph, placement, layer)
        if s_in is not None and s_out is not None:
            F_unit = activations[s_out].scale / activations[s_in].scale
            kind = config.hardware.rescale_factor
            right = W if scale_in is None else W / layer.axes.per_in(scale_in, W)
            F = nearest_factor(right, layer.axes, scale / F_unit, unit=F_unit, kind=kind, bits=width)
            scale = F * F_unit
        kept = source.kept.get(layer.weight)
        grids[layer.weight] = WeightGrid(width, scale, s_in, s_out, scale_in=scale_in, kept=kept)
    return grids
