"""Warnings about images and activations: constant ones, ones that dominate, and where a NaN begins."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from qft_plugin.errors import DataError, ModelError, QFTError, warn
from qft_plugin.graph.layer_graph import LayerGraph
from qft_plugin.graph.placement import Placement
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.host import Student, Watchers
from qft_plugin.training.data import Inputs
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution
from qft_plugin.training.student import QUANTIZER_OP
from qft_plugin.training.teacher import Targets

logger = logging.getLogger("qft_plugin")

DOMINATES: Final = 16.0
"""From this ratio of the largest value of one image to that of the next on, a range that holds both leaves the others
4 of 8 bits at most. The ratio is 1.2 among the images of ResNet-20 and MobileNetV2; with one image made larger, the
start of ResNet-20 agreed with float on 93.5 % of test images without, 92.4 at a ratio of 7, 90.6 at 13, 84.4 at 53."""

FEW: Final = 8
"""With fewer images none is unusual."""

LISTED: Final = 3
"""How many of the activations that a warning is about it names."""


def extremes(x: Tensor, images: int) -> Tensor:
    """Return the smallest and the largest value of each image, `[images, 2]`.

    Args:
        x: an activation. Where its first axis does not hold the images, each in equally many rows, every image gets
            the extremes of all.
        images: of the batch.
    """
    if x.dim() == 0 or x.shape[0] % images:
        return torch.stack(x.aminmax()).expand(images, 2)
    size = x.numel() // images
    rows_are_dense = torch.ops.aten.is_non_overlapping_and_dense(x) and x.stride(0) * x.shape[0] == x.numel()
    # The order inside an image does not matter, and a view costs nothing.
    rows = x.as_strided((images, size), (size, 1), x.storage_offset()) if rows_are_dense else x.reshape(images, size)
    # One after the other: `aminmax` along an axis takes eight times as long.
    return torch.stack([rows.amin(1), rows.amax(1)], dim=1)


class Ranges:
    """The smallest and the largest value of each quantized activation in each image, collected while others run."""

    def __init__(self) -> None:
        """Start empty."""
        self._batches: list[tuple[int, dict[str, Tensor]]] = []
        self._elements: dict[str, int] = {}

    def run(
        self,
        student: Student,
        tensors: Mapping[str, Tensor],
        call: Call,
        watchers: Watchers,
    ) -> None:
        """Run the student as `watch` does, and note the extremes of the input of each quantizer."""
        args, kwargs = call
        images = len(next(iter([*args, *kwargs.values()])))
        found: dict[str, Tensor] = {}

        def look(name: str, x: Tensor) -> None:
            if not x.is_floating_point() or not x.numel():
                return
            now, before = extremes(x.detach(), images), found.get(name)
            if before is not None:  # a quantizer that is called several times
                now = torch.stack([torch.minimum(now[:, 0], before[:, 0]), torch.maximum(now[:, 1], before[:, 1])], 1)
            found[name] = now
            self._elements[name] = max(self._elements.get(name, 0), x.numel() // images)

        with student.looked_at(look):
            student.watch(tensors, call, watchers)
        self._batches.append((images, found))

    @property
    def images(self) -> int:
        """How many images have been seen."""
        return sum(images for images, _ in self._batches)

    def of(self, name: str) -> Tensor:
        """Return the extremes of one activation, `[images, 2]`."""
        return torch.cat([found[name] for _, found in self._batches])

    @property
    def names(self) -> list[str]:
        """The quantizers that every run has called."""
        first = self._batches[0][1] if self._batches else {}
        return [name for name in first if all(name in found for _, found in self._batches)]

    def constant(self) -> dict[str, float | None]:
        """Find the activations that have one value in each image: the value, or `None` where it differs by image."""
        result: dict[str, float | None] = {}
        for name in self.names:
            low, high = self.of(name).unbind(1)
            same = bool((low == low[0]).all())
            if bool((low == high).all()) and (same or self._elements[name] > 1):
                result[name] = float(low[0]) if same else None
        return result

    def dominated(self) -> dict[str, tuple[int, float]]:
        """Find the activations of which one image is far larger than all others: the image, and the ratio."""
        return {name: found for name in self.names if (found := dominant(self.of(name).abs().amax(1))) is not None}


def dominant(peaks: Tensor) -> tuple[int, float] | None:
    """Find the image whose largest value is far above that of every other one, and its ratio to the next.

    Where all others are 0, they are exact in any range: such an image does no harm.

    Args:
        peaks: largest magnitude of each image, `[images]`.
    """
    if len(peaks) < FEW:
        return None
    (largest, following), (image, _) = peaks.double().topk(2)
    return (int(image), float(largest / following)) if 0 < DOMINATES * following <= largest else None


def warn_of_ranges(
    ranges: Ranges,
    student: Student,
    tensors: Mapping[str, Tensor],
    graph: LayerGraph,
    placement: Placement,
    inputs: Inputs,
) -> None:
    """Warn of activations that are constant, and of images that dominate the range of an activation.

    One that is 0 everywhere although the images vary is a dead part of the network: that is logged.

    Args:
        ranges: of the first images.
        student: the host's student.
        tensors: weights and biases by name, of the same network.
        graph: the network.
        placement: its quantizers.
        inputs: the images.
    """
    constant = ranges.constant()
    if _images_vary(inputs, ranges.images):
        dead = [name for name, value in constant.items() if value == 0]
        constant = {name: value for name, value in constant.items() if value != 0}
        if dead:
            # After a ReLU that no image wakes, as in a pruned network, or in one with random weights.
            logger.warning(
                "0 in all of the first %d images, so that no range could be chosen: %s",
                ranges.images,
                _listed([_words(graph, placement, name) for name in dead]),
            )
    if constant:
        values = set(constant.values())
        only = next(iter(values)) if len(values) == 1 else None
        value = "one value in each image" if only is None else f"{only + 0.0:.4g} everywhere"  # -0 is 0
        warn(
            f"An activation should vary over an image. Found {value} in all of the first {ranges.images} images in "
            f"{_listed([_words(graph, placement, name) for name in constant])}: a range that is chosen on these will "
            "not fit others. Look at the images and their preprocessing; where the network is made so, keep this "
            "activation in float.",
            stacklevel=2,
        )
    for image, names in _confirmed(ranges, student, tensors, inputs).items():
        ratio = max(names.values())
        warn(
            f"{inputs.item_of(image)} should be like the others. Found {ratio:.3g} times the largest value of any "
            f"other of the first {ranges.images} images in {_listed([_words(graph, placement, n) for n in names])}. A "
            "range that holds it leaves few steps for the others. Look at this image and leave it out if it is broken.",
            stacklevel=2,
        )


def _images_vary(inputs: Inputs, count: int) -> bool:
    """Whether some input of the network has more than one value in some image."""
    for rows in (*inputs.args, *inputs.kwargs.values()):
        if not rows.is_floating_point():
            return True
        low, high = extremes(rows[:count], min(count, len(rows))).unbind(1)
        if bool((low != high).any()):
            return True
    return False


@torch.no_grad()
def _confirmed(
    ranges: Ranges, student: Student, tensors: Mapping[str, Tensor], inputs: Inputs
) -> dict[int, dict[str, float]]:
    """Return the images that dominate and the ratio of each activation, in their order in the network.

    The first axis of an activation may hold something else than the images. A suspicion is tried: with
    another image in its place, the large values should be gone.
    """
    suspected: dict[int, dict[str, float]] = {}
    for name, (image, ratio) in ranges.dominated().items():
        suspected.setdefault(image, {})[name] = ratio
    result = {}
    for image, names in suspected.items():
        before = Ranges()
        other = 0 if image else 1
        for index in (image, other):
            before.run(student, tensors, inputs.batch(slice(index, index + 1)), {})
        peaks = {name: before.of(name).abs().amax(1) for name in names if name in before.names}
        found = {name: names[name] for name, (own, others) in peaks.items() if own >= DOMINATES * others}
        if found:
            result[image] = found
    return result


def warn_of_images(inputs: Inputs) -> None:
    """Warn where all images are the same.

    Args:
        inputs: the images.
    """
    tensors = [*inputs.args, *inputs.kwargs.values()]
    count = len(inputs)
    if count > 1 and all(bool((t[1:2] == t[:1]).all()) and bool((t == t[:1]).all()) for t in tensors):
        warn(
            f"Dataset: images should differ. Found {count} times the same one, which says nothing about others. Look "
            "at how they are read.",
            stacklevel=2,
        )


def check_squares(targets: Targets, weights: Sequence[float], inputs: Inputs) -> None:
    """Refuse an image that the loss cannot hold.

    Args:
        targets: the teacher's predictions for the images of this process.
        weights: of each of its features in the loss.
        inputs: the images.

    Raises:
        DataError: it names the image.
    """
    for kept, weight in zip(targets.features, weights, strict=True):
        peaks = kept.peaks()
        row = int(peaks.argmax())
        square = kept.rows(slice(row, row + 1), inputs.device).square().sum()
        if weight and not bool(torch.isfinite(square)):
            raise DataError(
                f"{inputs.item_of(inputs.own_image(row))} should be of a size that the loss can square. Found that the "
                f"float network computes {float(peaks[row]):.3g} for it where networks are compared, and "
                f"{float(peaks.median()):.3g} for half of all images. Look at this image and leave it out if it is "
                "broken."
            )


def warn_of_targets(targets: Targets, weights: Sequence[float], inputs: Inputs) -> None:
    """Warn of an image that counts more in the loss than all others, refuse images for which all is 0.

    Every process calls this.

    Args:
        targets: the teacher's predictions for the images of this process.
        weights: of each of its features in the loss.
        inputs: the images.

    Raises:
        ModelError: there is nothing to train for.
    """
    world, largest = inputs.world, []
    for kept, weight in zip(targets.features, weights, strict=True):
        if not weight:
            continue
        peaks = torch.zeros(inputs.total, dtype=torch.float64, device=inputs.device)
        peaks[world.rank :: world.size] = kept.peaks().to(peaks)
        peaks = world.total(peaks)
        largest.append(float(peaks.max()))
        found = dominant(peaks)
        if found is not None:
            image, ratio = found
            warn(
                f"{inputs.item_of(image)} should be like the others. Found {ratio:.3g} times the largest value of any "
                "other where the networks are compared: in its batches the finetune trains for this one. Look at this "
                "image and leave it out if it is broken.",
                stacklevel=2,
            )
    if largest and max(largest) <= torch.finfo(torch.float32).tiny:
        raise ModelError(
            f"The float model should compute something where the networks are compared. Found 0 for each of the "
            f"{inputs.total} images, as with weights that were never loaded, or behind a ReLU that no image wakes. "
            "Look at the weights and the preprocessing, or name another place in FinetuneConfig.loss_at."
        )


@torch.no_grad()
def not_finite(
    student: Student, graph: LayerGraph, placement: Placement, solution: Solution, calls: Iterable[Call]
) -> QFTError:
    """Say where the quantized network, of which something is not finite, computes that first.

    Args:
        student: the host's student.
        graph: the network.
        placement: its quantizers.
        solution: the result of the offline subgraph.
        calls: batches, in one of which it was found.
    """
    found: list[str] = []

    def watcher(op: str) -> Callable[[Tensor], None]:
        def look(x: Tensor) -> None:
            if not found and x.is_floating_point() and not bool(torch.isfinite(x).all()):
                found.append(op)

        return look

    makers = {name: op for op in graph.ops for name in op.outputs}
    reads = {op.name: op.inputs[0] for op in graph.ops if op.inputs}
    for call in calls:
        student.trace(solution, call, {op: watcher(op) for op in reads})
        if found or not is_finite(student(solution, call)):
            break
    else:
        return ModelError(
            "The loss should be finite before training. Found NaN or infinity, although both networks compute finite "
            "numbers: squares of their differences overflow. Look at the images, and at QFTConfig's settings."
        )
    where = "the output of the network"
    if found:
        maker = makers.get(reads[found[0]])
        while maker is not None and maker.function == QUANTIZER_OP and maker.outputs[0] in placement.on_tensor:
            maker = makers.get(maker.inputs[0])  # a recorded model shows its quantizers as operations
        where = f"what {_op(found[0])} reads" + ("" if maker is None else f", made by {_op(maker.name)}")
    return ModelError(
        f"The quantized network should compute finite numbers before it is trained. Found NaN or infinity, first in "
        f"{where}, although the float network is finite there: rounding or clipping of earlier activations leads "
        "to it, such as a divisor that becomes 0. Keep these operations in float (under NNCF with ignored_scope), or "
        'give their inputs a wider range, for example with QFTConfig(activation_range="max").'
    )


def is_finite(prediction: Prediction) -> bool:
    """Whether everything that is compared is finite."""
    return all(bool(torch.isfinite(t).all()) for t in prediction.tensors)


def _words(graph: LayerGraph, placement: Placement, name: str) -> str:
    """Describe the input of a quantizer by the first operation that reads its output."""
    on_tensor = [tensor for tensor, quantizer in placement.on_tensor.items() if quantizer == name]
    for op in graph.ops:
        for index, tensor in enumerate(op.inputs):
            if tensor in on_tensor or placement.on_input.get((op.name, index)) == name:
                return f"what {_op(op.name)} reads"
    return f"what the quantizer {name} reads"


def _op(name: str) -> str:
    return repr(name.lstrip("/"))


def _listed(words: Sequence[str]) -> str:
    """List the first few of several things, without repetition."""
    once = list(dict.fromkeys(words))
    more = len(once) - LISTED
    text = ", ".join(once[:LISTED])
    return f"{text} and {more} more activations" if more > 0 else text
