"""Predictions of two networks, and the loss of the distillation that compares them (Sec. 4)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qft_plugin.graph.torch_model import Call
from qft_plugin.training.distributed import World


@dataclass(frozen=True)
class Prediction:
    """The compared activations and outputs of a network for one batch.

    Attributes:
        features: the activations that teacher and student are compared at, real units.
        logits: the network's output where it is a single tensor, for the cross entropy.
        kept_classes: the classes of logits that were not kept, `[images]`.
    """

    features: tuple[Tensor, ...]
    logits: Tensor | None
    kept_classes: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is compared: the features, and the logits where there are any."""
        return (*self.features, *(() if self.logits is None else (self.logits,)))

    @property
    def classes(self) -> Tensor | None:
        """The class that the network names for each image, `[images]`; `None` where it names none."""
        return self.kept_classes if self.logits is None else classes_of(self.logits)

    def to(self, dtype: torch.dtype) -> "Prediction":
        """Return the same in another precision."""
        return Prediction(
            tuple(t.to(dtype) for t in self.features), None if self.logits is None else self.logits.to(dtype)
        )


def classes_of(logits: Tensor) -> Tensor | None:
    """Return the class of each image, `[images]`; `None` where the logits are not `[images, classes]`."""
    return logits.argmax(1) if logits.dim() == 2 and logits.shape[1] > 1 else None


class Network(Protocol):
    """A teacher or a student: from the arguments of one call to a prediction."""

    def __call__(self, call: Call, /) -> Prediction:
        """Run the network on one batch."""
        ...


def normalised_l2(student: Tensor, teacher: Tensor, *, squares: Tensor | None = None) -> Tensor:
    """Return the loss of Sec. 4:  sum (student - teacher)^2 / sum teacher^2,  `[]`.

    Args:
        student: an activation of the student.
        teacher: the same activation of the teacher.
        squares: sum teacher^2, `[]`, where these are a part of the batch; `None` where they are all of it.
    """
    squares = teacher.square().sum() if squares is None else squares
    return (student - teacher).square().sum() / squares.clamp(min=torch.finfo(teacher.dtype).tiny)


def class_divergence(student: Tensor, teacher: Tensor, *, images: int | None = None) -> Tensor:
    """Compare class probabilities:  KL(teacher || student) = CE(teacher, student) - CE(teacher, teacher).

    Departure: the paper mixes in the cross entropy itself. The teacher's own entropy is taken off it, which changes no
    gradient, so that a perfect student has loss 0 and losses of different networks can be compared.

    Args:
        student: logits, `[images, classes]`.
        teacher: logits, `[images, classes]`.
        images: how many the batch has, where these are a part of it; `None` where they are all of it.

    Returns:
        The mean over the images of the batch, `[]`, at least 0.
    """
    total = functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    return total / (len(student) if images is None else images)


@dataclass(frozen=True)
class Loss:
    """The weights of the parts in the difference of two networks.

    Attributes:
        weights: of each compared feature; with a weight of 0 it costs nothing.
        cross_entropy: proportion p of the divergence of the class probabilities, from 0 to 1.
    """

    weights: tuple[float, ...]
    cross_entropy: float


@dataclass(frozen=True)
class Whole:
    """The divisors of the loss of a part of a batch, so that the losses of all parts add up to that of the batch.

    Attributes:
        squares: sum of the squares of each of the teacher's features over the whole batch, `[features]`.
        images: of the whole batch.
    """

    squares: Tensor
    images: int


def whole_of(targets: Prediction, *, images: int, world: World) -> Whole | None:
    """Return the divisors for a batch whose parts are in several processes; `None` where there is one process.

    Args:
        targets: the teacher's predictions for the part of this process.
        images: of the whole batch.
        world: the processes that train together.
    """
    if world.size == 1:
        return None
    squares = [t.square().sum() for t in targets.features]
    # With the logits alone in the loss there is no feature.
    return Whole(world.total(torch.stack(squares)) if squares else torch.empty(0), images)


def distillation_loss(student: Prediction, teacher: Prediction, loss: Loss, *, whole: Whole | None = None) -> Tensor:
    """Compare two networks:  (1 - p) * sum_k w_k L_k / sum_k w_k  +  p * KL(teacher || student).

    L_k is the normalised L2 of Sec. 4, which has no unit, so that features of any size and kind can be added. The
    divergence is that of the class probabilities, mixed in by a proportion (Fig. 6).

    Args:
        student: the student's predictions; with p > 0 they have logits.
        teacher: the teacher's predictions for the same images, likewise.
        loss: the weights w and the proportion p.
        whole: the batch that these images are a part of; `None` where they are all of it.

    Returns:
        `[]`; of a part, its share of the loss of the whole batch.
    """
    p, parts = loss.cross_entropy, []
    if p < 1:
        squares = [None] * len(teacher.features) if whole is None else whole.squares.unbind()
        features = zip(loss.weights, student.features, teacher.features, squares, strict=True)
        terms = [w * normalised_l2(s, t, squares=norm) for w, s, t, norm in features if w]
        parts.append((1 - p) * torch.stack(terms).sum() / sum(loss.weights))
    if p > 0:
        assert student.logits is not None
        assert teacher.logits is not None
        images = None if whole is None else whole.images
        parts.append(p * class_divergence(student.logits, teacher.logits, images=images))
    return torch.stack(parts).sum()
