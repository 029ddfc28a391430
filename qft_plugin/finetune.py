"""The distillation loop: label-free training of all degrees of freedom against the float teacher (Sec. 3.1, Sec. 4)."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.data import Call, Inputs, Rows
from qft_plugin.errors import ModelError, QFTWarning
from qft_plugin.spec import FinetuneConfig

logger = logging.getLogger("qft_plugin")

EVALUATION_IMAGES = 512
"""The state to return is chosen by the loss on this many of the finetuning images."""


@dataclass(frozen=True)
class Prediction:
    """What a network computed for one batch.

    Attributes:
        features: the activations that teacher and student are compared at, real units.
        logits: the network's output where it is a single tensor, for the cross entropy.
    """

    features: tuple[Tensor, ...]
    logits: Tensor | None


class Network(Protocol):
    """A teacher or a student: from the arguments of one call to a prediction."""

    def __call__(self, call: Call, /) -> Prediction:
        """Run the network on one batch."""
        ...


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step.

    Attributes:
        number: of this step, from 1.
        total: how many steps there will be.
        loss: of this step's batch.
        learning_rate: of the weights, in this step.
    """

    number: int
    total: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class FinetuneResult:
    """How a finetune went.

    Attributes:
        start_loss: loss before the first step, over `EVALUATION_IMAGES` finetuning images.
        final_loss: loss of the state that was kept, over the same images; never larger.
        steps: steps taken.
        losses: the loss of each step's batch.
    """

    start_loss: float
    final_loss: float
    steps: int
    losses: tuple[float, ...]


@torch.no_grad()
def teacher_predictions(teacher: Network, inputs: Inputs, *, batch_size: int, memory_limit: int) -> Prediction:
    """Run the teacher once over all images and keep what the student is compared with.

    Args:
        teacher: the float network.
        inputs: all images.
        batch_size: images per call.
        memory_limit: bytes of outputs to hold in memory; above it they are memory-mapped from a file.

    Returns:
        The predictions for all images, each `[images, ...]`.

    Raises:
        ModelError: the float network gives NaN or infinity.
    """
    rows: list[Rows] = []
    has_logits = False
    try:
        for number, call in enumerate(inputs.batches(batch_size)):
            prediction = teacher(call)
            outputs = [*prediction.features, *([] if prediction.logits is None else [prediction.logits])]
            has_logits = prediction.logits is not None
            rows = rows or [Rows(memory_limit) for _ in outputs]
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
    return Prediction(tuple(kept[:-1] if has_logits else kept), kept[-1] if has_logits else None)


def normalised_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of Sec. 4:  sum (student - teacher)^2 / sum teacher^2,  `[]`."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)


def distillation_loss(student: Prediction, teacher: Prediction, *, cross_entropy: float) -> Tensor:
    """Return the mean normalised L2 over the compared features, plus a proportion of cross entropy on the logits."""
    terms = [normalised_l2(s, t) for s, t in zip(student.features, teacher.features, strict=True)]
    loss = torch.stack(terms).mean()
    if cross_entropy and student.logits is not None and teacher.logits is not None:
        loss = loss + cross_entropy * functional.cross_entropy(student.logits, teacher.logits.softmax(1))
    return loss


def learning_rate_factor(step: int, total: int, restarts: int) -> float:
    """Return the cosine schedule's factor: `restarts` cycles of equal length, each starting at half the one before.

    Args:
        step: number of the step, from 0.
        total: number of all steps.
        restarts: number of cycles.
    """
    position = step * restarts / total
    cycle = min(int(position), restarts - 1)
    return 0.5**cycle * 0.5 * (1 + math.cos(math.pi * (position - cycle)))


def _orders(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the images of each step: every epoch in a new order, a last incomplete batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            # Sorted, so that reading from a mapped file moves forwards; the order inside a batch does not matter.
            yield order[start : start + batch_size].sort().values


def _targets(targets: Prediction, index: Tensor | slice, device: torch.device) -> Prediction:
    logits = None if targets.logits is None else targets.logits[index].to(device)
    return Prediction(tuple(t[index].to(device) for t in targets.features), logits)


@torch.no_grad()
def _evaluate(student: Network, inputs: Inputs, targets: Prediction, config: FinetuneConfig) -> float:
    size = max(config.batch_size, 64)
    losses = []
    count = min(len(inputs), EVALUATION_IMAGES)
    for number, call in enumerate(inputs.batches(size, at_most=count)):
        part = slice(number * size, min((number + 1) * size, count))
        wanted = _targets(targets, part, inputs.device)
        loss = distillation_loss(student(call), wanted, cross_entropy=config.cross_entropy)
        losses.append(float(loss) * (part.stop - part.start))
    return sum(losses) / count


def finetune(
    student: Network,
    state: nn.Module,
    groups: list[dict[str, Any]],
    *,
    inputs: Inputs,
    targets: Prediction,
    config: FinetuneConfig,
    callback: Callable[[Step], None] | None = None,
    schedule: Callable[[float], None] | None = None,
    penalty: Callable[[], Tensor | None] | None = None,
) -> FinetuneResult:
    """Train the student to compute what the teacher computed, and leave the best state in it.

    The state at the end of every cosine cycle is compared with the best one so far, at first the starting point, by
    the loss on (at most 512 of) the finetuning images; the best is what stays.

    Args:
        student: the fake-quantized network, a function of `state`.
        state: holds everything that is trained; ends in the best state seen.
        groups: parameter groups for the optimizer, each with its `lr`.
        inputs: all images.
        targets: what the teacher computed for them.
        config: the settings.
        callback: called after each step.
        schedule: told the position of the training before each step, from 0 to below 1, and 1 before each comparison
            of states and at the end.
        penalty: added to the loss of each step with `config.rounding_weight`, but not to what is compared or reported.
    """
    at = schedule or (lambda _: None)
    batch_size = min(config.batch_size, len(inputs))
    total = max(1, round(config.images_fed / batch_size))
    optimizer = torch.optim.Adam([dict(g) for g in groups if g["params"]], fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    cycle_ends = {math.ceil(total * (i + 1) / config.restarts) for i in range(config.restarts)}
    at(1.0)
    start_loss = best_loss = _evaluate(student, inputs, targets, config)
    best_state = copy.deepcopy(state.state_dict())
    losses: list[float] = []
    logger.info("finetune: %d steps of %d images, loss %.5f at the start", total, batch_size, start_loss)
    for step, index in zip(range(total), _orders(len(inputs), batch_size, config.seed), strict=False):
        factor = learning_rate_factor(step, total, config.restarts)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        at(step / total)
        optimizer.zero_grad(set_to_none=True)
        wanted = _targets(targets, index, inputs.device)
        loss = distillation_loss(student(inputs.batch(index)), wanted, cross_entropy=config.cross_entropy)
        extra = None if penalty is None else penalty()
        (loss if extra is None else loss + config.rounding_weight * extra).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            warnings.warn(
                f"Finetune: the loss became {losses[-1]} in step {step + 1} of {total}; the best state before is kept. "
                "Lower FinetuneConfig.learning_rate or scale_learning_rate.",
                QFTWarning,
                stacklevel=2,
            )
            break
        if callback is not None:
            callback(Step(step + 1, total, losses[-1], rates[0] * factor))
        if step + 1 in cycle_ends:
            at(1.0)
            now = _evaluate(student, inputs, targets, config)
            if now < best_loss:
                best_loss, best_state = now, copy.deepcopy(state.state_dict())
    at(1.0)
    state.load_state_dict(best_state)
    logger.info("finetune: loss %.5f after %d steps", best_loss, len(losses))
    return FinetuneResult(start_loss, best_loss, len(losses), tuple(losses))
