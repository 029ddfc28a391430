"""Predictions of the float teacher: once for all images, or anew for each batch."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qft_plugin.errors import ModelError
from qft_plugin.graph.surroundings import varies
from qft_plugin.training.data import Inputs
from qft_plugin.training.loss import Network, Prediction
from qft_plugin.training.rows import Kept, KeptRows

APART: Final = 1e-3
"""Relative difference of an image's activations in two batches; sums in another order stay below 1e-5."""


@dataclass(frozen=True)
class Targets:
    """The teacher's predictions for all images.

    Attributes:
        features: the activations that are compared.
        logits: the network's output, where the loss has a use for it.
        classes: the class that it names for each image, `[images]`, on the CPU; `None` where it names none.
    """

    features: tuple[Kept, ...]
    logits: Kept | None
    classes: Tensor | None = None

    @property
    def count(self) -> int:
        """Return how many activations are compared."""
        return len(self.features)

    def rows(self, index: Tensor | slice, device: torch.device) -> Prediction:
        """Return the teacher's predictions for some images, on a device."""
        logits = None if self.logits is None else self.logits.rows(index, device)
        classes = None if self.classes is None else self.classes[index if isinstance(index, slice) else index.cpu()]
        features = tuple(kept.rows(index, device) for kept in self.features)
        return Prediction(features, logits, None if classes is None else classes.to(device))


@dataclass(frozen=True)
class Recomputed:
    """The teacher's predictions, computed anew for each batch: for networks in which images of one batch meet.

    Attributes:
        teacher: the float network.
        inputs: the images of this process.
        count: how many activations are compared.
        with_logits: whether the loss has a use for the network's output.
    """

    teacher: Network
    inputs: Inputs
    count: int
    with_logits: bool

    @torch.no_grad()
    def rows(self, index: Tensor | slice, _: torch.device) -> Prediction:
        """Return the teacher's predictions for some images, on the device of the inputs."""
        prediction = self.teacher(self.inputs.batch(index))
        return prediction if self.with_logits else Prediction(prediction.features, None, prediction.classes)


@torch.no_grad()
def teacher_predictions(teacher: Network, inputs: Inputs, *, batch_size: int, memory_limit: int) -> Targets:
    """Run the teacher once over all images and keep its predictions.

    Args:
        teacher: the float network.
        inputs: all images.
        batch_size: images per call, fewer where they are large.
        memory_limit: bytes of outputs to hold in memory; above it they are memory-mapped from a file.

    Returns:
        The predictions for all images.

    Raises:
        ModelError: the float network gives NaN or infinity.
    """
    rows: list[KeptRows] = []
    classes: list[Tensor] = []
    has_logits = False
    try:
        for number, call in enumerate(inputs.batches(inputs.at_once(batch_size))):
            prediction = teacher(call)
            outputs = prediction.tensors
            has_logits = prediction.logits is not None
            if prediction.classes is not None:
                classes.append(prediction.classes.cpu())
            if not rows:
                count = len(prediction.features)
                rows = [KeptRows(t, memory_limit // len(outputs), halve=n < count) for n, t in enumerate(outputs)]
            for row, output in zip(rows, outputs, strict=True):
                if not bool(torch.isfinite(output).all()):
                    raise ModelError(
                        f"The float model should compute finite numbers. Found NaN or infinity in batch {number}. "
                        "Check the weights and the preprocessing of the dataset."
                    )
                row.append(output)
        kept = [row.finish() for row in rows]
    except BaseException:
        for row in rows:
            row.discard()
        raise
    named = torch.cat(classes) if classes else None
    return Targets(tuple(kept[:-1] if has_logits else kept), kept[-1] if has_logits else None, named)


@torch.no_grad()
def is_random(teacher: Network, inputs: Inputs) -> bool:
    """Whether a network computes something else each time that it is called with the same images.

    Args:
        teacher: the float network.
        inputs: all images.
    """
    return varies(lambda: teacher(inputs.first()).tensors)


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool(one.numel()) and float((one - other).abs().max()) > APART * float(one.abs().max())


@torch.no_grad()
def images_meet(teacher: Network, inputs: Inputs) -> bool:
    """Whether the prediction for an image depends on the batch that the image is in.

    Args:
        teacher: the float network.
        inputs: all images.
    """
    count = inputs.fitting(min(len(inputs), 4))
    whole = teacher(inputs.batch(slice(0, count))).tensors
    if count == 1:
        return any(t.shape[:1] != (1,) for t in whole)
    try:
        halves = [teacher(inputs.batch(rows)).tensors for rows in (slice(0, count // 2), slice(count // 2, count))]
        parts = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    except RuntimeError:
        return True  # it takes no batch of another size, or its outputs have another shape then
    if any(t.shape[:1] != (count,) or t.shape != p.shape for t, p in zip(whole, parts, strict=True)):
        return True
    return any(_differ(t, p) for t, p in zip(whole, parts, strict=True))
