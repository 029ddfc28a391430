"""What a job is expected to take: seconds, memory, and the size of its file. Simple models of what is measured."""

import time
from dataclasses import dataclass
from typing import Final

import torch

from qft_plugin.config import FinetuneConfig, QFTConfig
from qft_plugin.graph.layer_graph import Layer, LayerGraph
from qft_plugin.job.activation_ranges import BATCH, RANGE_IMAGES
from qft_plugin.job.compensation import COMPENSATION_IMAGES, FEW, LIVE, ONE_CALL
from qft_plugin.job.gptq_inputs import can_compensate, rows_wanted
from qft_plugin.job.host import Placed, Source, Start
from qft_plugin.job.planned import constants_of
from qft_plugin.report.inspection import Cost, Memory
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof
from qft_plugin.training.loss import Prediction

CPU: Final = torch.device("cpu")

PASSES: Final = 4
"""Runs of the network over the images of a start: signs or NNCF's statistics, ranges, their search, health."""

MOMENTS: Final = 7.5
"""What compensation takes of a layer, in products of all its rows with themselves: three of these, the search of the
step, and the rounding."""

PER_OPERATION: Final = {"nncf": 500, "brevitas": 150}
"""Bytes of a file for each operation of the network, beside its constants. With what a quantizer takes this is within a
fifth of eight files of each host, of 10 to 300 KB."""

PER_QUANTIZER: Final = {"nncf": 2_900, "brevitas": 700}
"""Likewise for each quantizer of a weight or an activation."""


@dataclass(frozen=True)
class Measured:
    """What a dry run has measured, in seconds.

    Attributes:
        reading: of its images.
        start: reading the model and starting, without compensation.
        forward: one run of the folded network.
        forward_images: images of that run.
        teacher: one batch of the teacher; 0 without a finetune.
        teacher_images: images of that batch.
        step: one step of the size that the job would have; 0 without a finetune.
    """

    reading: float
    start: float
    forward: float
    forward_images: int
    teacher: float = 0.0
    teacher_images: int = 0
    step: float = 0.0


@dataclass(frozen=True)
class Scale:
    """How large the job would be.

    Attributes:
        images: how many it would read.
        known: whether the dataset has a length.
        seen: how many images were looked at.
    """

    images: int
    known: bool
    seen: int


def trained_on(images: int) -> int:
    """Return how many of so many images are trained on, the others being held out."""
    return Inputs((torch.empty(images, 0),), {}, (), CPU).trained_on


def batch_size_of(settings: FinetuneConfig, images: int, inputs: Inputs) -> int:
    """Return how many images a step would have with so many images in all."""
    size = min(settings.batch_size, trained_on(images))
    return size if inputs.largest is None else min(size, inputs.largest * inputs.world.size)


def steps_of(settings: FinetuneConfig, images: int, inputs: Inputs) -> int:
    """Return how many steps a finetune would have."""
    size = batch_size_of(settings, images, inputs)
    return max(1 + len(settings.blocks), round(settings.images_fed / size))


def cost_of(
    measured: Measured, scale: Scale, start: Start[Placed], source: Source, *, inputs: Inputs, config: QFTConfig
) -> Cost:
    """Estimate the seconds of a job.

    Args:
        measured: the times that are scaled up.
        scale: how large the job would be.
        start: a start without compensation.
        source: the network as it was read.
        inputs: the images that were looked at.
        config: the settings.
    """
    each = measured.forward / measured.forward_images
    more = max(0, min(RANGE_IMAGES, scale.images) - scale.seen)
    begun = measured.start + measured.reading * scale.images / scale.seen + PASSES * more * each
    settings, teacher = config.finetune, 0.0
    steps, finetune = 0, 0.0
    if settings is not None:
        steps = steps_of(settings, scale.images, inputs)
        teacher = measured.teacher * scale.images / measured.teacher_images
        held_out = scale.images - trained_on(scale.images) or min(scale.images, 512)
        looks = (1 + settings.restarts * (1 + len(settings.blocks))) * held_out * each
        finetune = steps * measured.step + looks
    return Cost(
        images=scale.images,
        images_known=scale.known,
        images_seen=scale.seen,
        steps=steps,
        teacher_batch_images=measured.teacher_images,
        teacher_batch_seconds=measured.teacher,
        step_seconds=measured.step,
        start_seconds=begun,
        compensation_seconds=_compensation(source, start.dof, scale, inputs, each) if config.compensate else 0.0,
        teacher_seconds=teacher,
        finetune_seconds=finetune,
    )


def _compensation(source: Source, dof: Dof, scale: Scale, inputs: Inputs, each: float) -> float:
    """Estimate the seconds of compensation: two runs of the network, and for each layer products of its inputs.

    Args:
        source: the network as it was read.
        dof: the degrees of freedom.
        scale: how large the job would be.
        inputs: the images that were looked at.
        each: seconds of the network for one image.
    """
    images = min(COMPENSATION_IMAGES, trained_on(scale.images))
    at_once = compensated_at_once(source.graph, scale, inputs)
    images = at_once if at_once >= FEW else images
    seen = inputs.fitting(min(2, len(inputs)))
    products = 0.0
    for layer in (d.layer for d in dof.quantized()):
        if can_compensate(layer):
            products += _products(layer, source, images, seen)
    return 2 * images * each + MOMENTS * products * _seconds_of_product()


def _products(layer: Layer, source: Source, images: int, seen: int) -> float:
    """Count the products of a layer's rows with themselves."""
    columns = source.tensors[layer.weight][0].numel()
    out = torch.Size(source.graph.shapes[layer.outputs[0]]).numel()
    channels = source.tensors[layer.weight].shape[0]
    rows = min(rows_wanted(columns), images * out / (channels * seen))
    return layer.groups * rows * columns**2


def _seconds_of_product(rows: int = 4_096, columns: int = 576) -> float:
    """Measure the seconds of one multiplication and addition in a product of matrices."""
    x, best = torch.ones(rows, columns), float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        x.T @ x
        best = min(best, time.perf_counter() - begin)
    return best / (rows * columns**2)


def _bytes_at_once(graph: LayerGraph, inputs: Inputs) -> float:
    """Return the activations, bytes, that compensation holds for one image."""
    recorded = inputs.fitting(min(2, len(inputs)))
    return 4 * LIVE * max(torch.Size(shape).numel() for shape in graph.shapes.values()) / recorded


def compensated_at_once(graph: LayerGraph, scale: Scale, inputs: Inputs) -> int:
    """Return how many images one call of compensation would have."""
    seen = min(COMPENSATION_IMAGES, trained_on(scale.images))
    return inputs.fitting(max(1, min(seen, int(ONE_CALL / _bytes_at_once(graph, inputs)))))


def memory_of(
    scale: Scale, prediction: Prediction | None, kept: int, source: Source, *, inputs: Inputs, config: QFTConfig
) -> Memory:
    """Estimate the memory of a job.

    Args:
        scale: how large the job would be.
        prediction: of the teacher for `inputs.first()`; `None` without one.
        kept: bytes of what one step holds.
        source: the network as it was read.
        inputs: the images that were looked at.
        config: the settings.
    """
    limit = (config.finetune or FinetuneConfig()).memory_limit
    each = [t[:1].numel() * t.element_size() for t in (*inputs.args, *inputs.kwargs.values())]
    teacher, on_disk = 0, False
    if prediction is not None:
        outputs, count = prediction.tensors, len(prediction.features)
        # Features in float32 are kept in half precision; see `training.rows.KeptRows`.
        halves = [n < count and t.dtype == torch.float32 for n, t in enumerate(outputs)]
        sizes = [
            t.numel() // len(t) * (2 if half else t.element_size())
            for t, half in zip(outputs, halves, strict=True)
            if t.dim() and len(t)
        ]
        teacher = scale.images * sum(sizes)
        on_disk = any(scale.images * s > limit // len(outputs) for s in sizes)
    at_once = compensated_at_once(source.graph, scale, inputs)
    at_once = at_once if at_once >= FEW else inputs.at_once(BATCH)
    return Memory(
        images=scale.images * sum(each),
        teacher=teacher,
        step=kept,
        compensation=int(at_once * _bytes_at_once(source.graph, inputs)) if config.compensate else 0,
        images_on_disk=any(scale.images * s > limit for s in each),
        teacher_on_disk=on_disk,
    )


def file_bytes(source: Source, start: Start[Placed], host: str) -> int:
    """Estimate the size of the file: constants, and what an operation and a quantizer take in it.

    Args:
        source: the network as it was read.
        start: its quantizers.
        host: `"nncf"`, whose files hold weights of up to 4 bits in half a byte, or `"brevitas"`.
    """
    total = 0.0
    for name in constants_of(source.graph):
        grid, tensor = start.dof.weight_grids.get(name), source.tensors.get(name)
        if grid is not None and tensor is not None:
            half = host == "nncf" and grid.bits <= 4
            scales = grid.scale.numel() + (0 if grid.scale_in is None else grid.scale_in.numel())
            total += tensor.numel() * (0.5 if half else 1) + 4 * scales
        elif tensor is not None:
            total += 4 * tensor.numel()
    quantizers = len(start.dof.weight_grids) + len(start.placed.placement.activations)
    return int(total) + PER_OPERATION[host] * len(source.graph.ops) + PER_QUANTIZER[host] * quantizers
