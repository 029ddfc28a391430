"""The distillation loop: label-free training of all degrees of freedom against the float teacher (Sec. 3.1, Sec. 4)."""

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import ModelError, QFTWarning
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs, Kept, KeptRows
from qft_plugin.training.distributed import World, agreed, orders, strata_of
from qft_plugin.training.efqat import PartialTraining

logger = logging.getLogger("qft_plugin")

EVALUATION_IMAGES: Final = 512
"""The state to return is chosen by the loss on this many of the finetuning images."""

APART: Final = 1e-3
"""Relative difference of an image's activations in two batches; sums in another order stay below 1e-5."""

ENOUGH_STEPS: Final = 200
"""From so many steps on a finetune that gains nothing is worth a warning. A start of compensated weights is so good
that some ten steps often do not reach it again."""

RUINED: Final = (2.0, 0.02)
"""Above so many times the loss at the start, and so much more, training has not only gained nothing but done harm.
Healthy networks stayed below a difference of 0.005 after 8 steps."""


@dataclass(frozen=True)
class Prediction:
    """What a network computed for one batch.

    Attributes:
        features: the activations that teacher and student are compared at, real units.
        logits: the network's output where it is a single tensor, for the cross entropy.
    """

    features: tuple[Tensor, ...]
    logits: Tensor | None

    def to(self, dtype: torch.dtype) -> "Prediction":
        """Return the same in another precision."""
        return Prediction(
            tuple(t.to(dtype) for t in self.features), None if self.logits is None else self.logits.to(dtype)
        )


@dataclass(frozen=True)
class Targets:
    """What the teacher computed for all images.

    Attributes:
        features: the activations that are compared.
        logits: the network's output, where the loss has a use for it.
    """

    features: tuple[Kept, ...]
    logits: Kept | None

    @property
    def count(self) -> int:
        """Return how many activations are compared."""
        return len(self.features)

    def rows(self, index: Tensor | slice, device: torch.device) -> Prediction:
        """Return what the teacher computed for some images, on a device."""
        logits = None if self.logits is None else self.logits.rows(index, device)
        return Prediction(tuple(kept.rows(index, device) for kept in self.features), logits)


@dataclass(frozen=True)
class Recomputed:
    """What the teacher computes for a batch, anew each time: for networks in which images of one batch meet.

    Attributes:
        teacher: the float network.
        inputs: what this process trains on.
        count: how many activations are compared.
        with_logits: whether the loss has a use for the network's output.
    """

    teacher: "Network"
    inputs: Inputs
    count: int
    with_logits: bool

    @torch.no_grad()
    def rows(self, index: Tensor | slice, _: torch.device) -> Prediction:
        """Return what the teacher computes for some images, on the device of the inputs."""
        prediction = self.teacher(self.inputs.batch(index))
        return prediction if self.with_logits else Prediction(prediction.features, None)


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
        losses: the loss of each step's batch, that of its phase.
    """

    start_loss: float
    final_loss: float
    steps: int
    losses: tuple[float, ...]


@torch.no_grad()
def teacher_predictions(teacher: Network, inputs: Inputs, *, batch_size: int, memory_limit: int) -> Targets:
    """Run the teacher once over all images and keep what the student is compared with.

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
    has_logits = False
    try:
        for number, call in enumerate(inputs.batches(inputs.at_once(batch_size))):
            prediction = teacher(call)
            outputs = _tensors(prediction)
            has_logits = prediction.logits is not None
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
    return Targets(tuple(kept[:-1] if has_logits else kept), kept[-1] if has_logits else None)


@torch.no_grad()
def is_random(teacher: Network, inputs: Inputs) -> bool:
    """Whether a network computes something else each time that it is called with the same images.

    Args:
        teacher: the float network.
        inputs: all images.
    """
    first, again = (_tensors(teacher(inputs.first())) for _ in range(2))
    return any(_differ(a, b) for a, b in zip(first, again, strict=True))


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool(one.numel()) and float((one - other).abs().max()) > APART * float(one.abs().max())


@torch.no_grad()
def images_meet(teacher: Network, inputs: Inputs) -> bool:
    """Whether what a network computes for an image depends on the batch that the image is in.

    Args:
        teacher: the float network.
        inputs: all images.
    """
    count = inputs.fitting(min(len(inputs), 4))
    whole = _tensors(teacher(inputs.batch(slice(0, count))))
    if count == 1:
        return any(t.shape[:1] != (1,) for t in whole)
    try:
        halves = [_tensors(teacher(inputs.batch(rows))) for rows in (slice(0, count // 2), slice(count // 2, count))]
        parts = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    except RuntimeError:
        return True  # it takes no batch of another size, or its outputs have another shape then
    if any(t.shape[:1] != (count,) or t.shape != p.shape for t, p in zip(whole, parts, strict=True)):
        return True
    return any(_differ(t, p) for t, p in zip(whole, parts, strict=True))


def _tensors(prediction: Prediction) -> list[Tensor]:
    return [*prediction.features, *([] if prediction.logits is None else [prediction.logits])]


def normalised_l2(student: Tensor, teacher: Tensor, *, squares: Tensor | None = None) -> Tensor:
    """Return the loss of Sec. 4:  sum (student - teacher)^2 / sum teacher^2,  `[]`.

    Args:
        student: what the student computed.
        teacher: what the teacher computed.
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
    """What counts how much in the difference of two networks.

    Attributes:
        weights: of each compared feature; with a weight of 0 it costs nothing.
        cross_entropy: proportion p of the divergence of the class probabilities, from 0 to 1.
    """

    weights: tuple[float, ...]
    cross_entropy: float


@dataclass(frozen=True)
class Whole:
    """What the loss of a part of a batch is divided by, so that the losses of all parts add up to that of the batch.

    Attributes:
        squares: sum of the squares of each of the teacher's features over the whole batch, `[features]`.
        images: of the whole batch.
    """

    squares: Tensor
    images: int


def whole_of(targets: Prediction, *, images: int, world: World) -> Whole | None:
    """Return what the parts of a batch, one in each process, have together; `None` where there is one process.

    Args:
        targets: what the teacher computed for the part of this process.
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
        student: what the student computed; with p > 0 it has logits.
        teacher: what the teacher computed for the same images, likewise.
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


@dataclass(frozen=True)
class Phase:
    """A part of the training, with an optimizer and cosine cycles of its own.

    Attributes:
        loss: what is made small.
        groups: parameter groups for the optimizer, each with its `lr`; all other parameters stay as they are.
        masks: parameters of which a part trains, each with a mask of its shape that is True there.
    """

    loss: Loss
    groups: Sequence[dict[str, Any]]
    masks: Sequence[tuple[nn.Parameter, Tensor]] = ()


@torch.no_grad()
def _evaluate(student: Network, inputs: Inputs, targets: Targets | Recomputed, loss: Loss, *, batch_size: int) -> float:
    world, share = inputs.world, inputs.share
    count = min(inputs.total, EVALUATION_IMAGES)
    size = max(batch_size, share.at_once(64)) if inputs.largest is None else inputs.largest * world.size
    total = 0.0
    for start in range(0, count, size):
        stop = min(start + size, count)
        part = world.row_range(start, stop)
        wanted = targets.rows(part, inputs.device)
        whole = whole_of(wanted, images=stop - start, world=world)
        if part.start < part.stop:  # a last batch may have no image of this process
            total += float(distillation_loss(student(share.batch(part)), wanted, loss, whole=whole)) * (stop - start)
    return world.total_of(total) / count


class _Best:
    """The best state so far."""

    def __init__(self, state: nn.Module, evaluate: Callable[[], float]) -> None:
        self._evaluate, self._module = evaluate, state
        self.loss = evaluate()
        self.later: list[float] = []
        self.state = copy.deepcopy(state.state_dict())

    def look(self) -> None:
        """Keep the state as it is now if it is better."""
        now = self._evaluate()
        self.later.append(now)
        if now < self.loss:
            self.loss, self.state = now, copy.deepcopy(self._module.state_dict())


def _warn_of_no_gain(start_loss: float, best: _Best, losses: Sequence[float], config: FinetuneConfig) -> None:
    """Warn where the start is returned after a training that should have changed it."""
    if best.loss < start_loss or not best.later or not math.isfinite(losses[-1]):
        return  # where a loss is not finite, that was said
    factor, more = RUINED
    ruined = not any(later <= factor * start_loss + more for later in best.later)
    if ruined or len(losses) >= ENOUGH_STEPS:
        warnings.warn(
            f"Finetune: training should lower the loss. Found {start_loss:.3g} at the start and "
            f"{min(best.later):.3g} after {len(losses)} steps: the start is returned. Lower "
            f"FinetuneConfig.learning_rate ({config.learning_rate:g}) and scale_learning_rate "
            f"({config.scale_learning_rate:g}), or return the start at once with finetune=None.",
            QFTWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _training(state: nn.Module, phase: Phase) -> Iterator[None]:
    """Ask for gradients of what trains in a phase only, so that nothing before it costs a backward pass."""
    trained = {id(p) for p in _trained(phase.groups)}
    others = [p for p in state.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Batch:
    """What a process computes in one step.

    Attributes:
        call: its images.
        wanted: what the teacher computed for them.
        whole: the batch of all processes; `None` where there is one.
    """

    call: Call
    wanted: Prediction
    whole: Whole | None


class _Objective(nn.Module):
    """What a step makes small, as a module that holds the parameters that train.

    Of several processes, each has its share of the loss times their number: the mean of the gradients is then that of
    the whole batch's loss, and the penalty, which is the same for all, counts once.
    """

    def __init__(self, student: Network, phase: Phase, extra: Callable[[], Tensor | None], *, size: int) -> None:
        super().__init__()
        # What trains and nothing else: buffers, as large as the weights, are constants.
        self.trained = nn.ParameterList(p for p in _trained(phase.groups) if isinstance(p, nn.Parameter))
        self._student = (student,)  # in a tuple, where torch does not look for more parameters
        self._loss, self._extra, self._size = phase.loss, extra, size

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is made small and, without a graph, the loss in it."""
        (student,) = self._student
        loss = distillation_loss(student(batch.call), batch.wanted, self._loss, whole=batch.whole)
        loss = loss if self._size == 1 else self._size * loss
        added = self._extra()
        return loss if added is None else loss + added, loss.detach()


def _trained(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def _steps(
    student: Network,
    phase: Phase,
    batches: Iterator[Batch],
    best: _Best,
    extra: Callable[[], Tensor | None],
    refresh: Callable[[int, torch.optim.Optimizer], None],
    *,
    world: World,
    count: int,
    cycles: int,
) -> Generator[tuple[float, float]]:
    """Train one phase; yields loss and learning rate of each step."""
    objective = world.replicated(_Objective(student, phase, extra, size=world.size))
    optimizer = torch.optim.Adam([dict(g) for g in phase.groups], fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    cycle_ends = {math.ceil(count * (i + 1) / cycles) for i in range(cycles)}
    for step, batch in zip(range(count), batches, strict=False):
        refresh(step, optimizer)
        factor = learning_rate_factor(step, count, cycles)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        whole, loss = objective(batch)
        if whole.requires_grad:  # else nothing that trains reaches what is compared
            whole.backward()
        world.average_gradients(_trained(optimizer.param_groups))
        for parameter, mask in phase.masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        yield world.total(loss).item() / world.size, rates[0] * factor
        if step + 1 in cycle_ends:
            best.look()


def _all_steps(
    student: Network,
    state: nn.Module,
    phases: Sequence[Phase],
    batches: Iterator[Batch],
    best: _Best,
    extra: Callable[[], Tensor | None],
    refresh: Callable[[int, torch.optim.Optimizer], None],
    *,
    world: World,
    total: int,
    cycles: int,
) -> Generator[tuple[float, float]]:
    """Train phase by phase, each with an equal share of the steps."""
    for number, phase in enumerate(phases):
        count = total * (number + 1) // len(phases) - total * number // len(phases)
        with _training(state, phase):
            yield from _steps(student, phase, batches, best, extra, refresh, world=world, count=count, cycles=cycles)


def finetune(
    student: Network,
    state: nn.Module,
    phases: Sequence[Phase],
    *,
    inputs: Inputs,
    targets: Targets | Recomputed,
    loss: Loss,
    config: FinetuneConfig,
    callback: Callable[[Step], None] | None = None,
    schedule: Callable[[float], None] | None = None,
    penalty: Callable[[], Tensor | None] | None = None,
    partial: PartialTraining | None = None,
    not_finite: Callable[[], Exception] | None = None,
) -> FinetuneResult:
    """Train the student to compute what the teacher computed, and leave the best state in it.

    The state at the end of every cosine cycle is compared with the best one so far, at first the starting point, by
    the loss on (at most 512 of) the finetuning images; the best is what stays. A later phase starts from where the one
    before it ended. The whole network runs forward in every phase; the backward pass ends where nothing trains.

    Where several processes train together, each step's batch is divided among them, and losses, gradients and states
    are those of the whole batch in every one of them.

    Args:
        student: the fake-quantized network, a function of `state`.
        state: holds everything that is trained; ends in the best state seen.
        phases: what is trained one after the other, usually one phase.
        inputs: all images.
        targets: what the teacher computed for `inputs.share`.
        loss: decides which state is the best.
        config: the settings.
        callback: called after each step.
        schedule: told the position of the training before each step, from 0 to below 1, and 1 before each comparison
            of states and at the end.
        penalty: added to the loss of each step with `config.rounding_weight`, but not to what is compared or reported.
        partial: chooses which rows of the kernels train, where not all do; the rows are in the first group of the one
            phase that there is then.
        not_finite: says where, if the student computes something at the start that is not finite.

    Raises:
        ModelError: the loss at the start is not finite.
    """
    at = schedule or (lambda _: None)
    world, share = inputs.world, inputs.share
    batch_size = min(config.batch_size, inputs.total)
    if inputs.largest is not None:
        batch_size = min(batch_size, inputs.largest * world.size)
    strata = strata_of(batch_size, world.size)
    total = max(len(phases), round(config.images_fed / batch_size))

    def evaluate() -> float:
        at(1.0)
        if partial is not None:
            partial.settle()
        return _evaluate(student, inputs, targets, loss, batch_size=config.batch_size)

    def batches() -> Iterator[Batch]:
        for step, index in enumerate(orders(inputs.total, batch_size, strata=strata, seed=config.seed)):
            at(step / total)
            rows = world.rows(index)
            wanted = targets.rows(rows, inputs.device)
            yield Batch(share.batch(rows), wanted, whole_of(wanted, images=batch_size, world=world))

    def extra() -> Tensor | None:
        found = None if penalty is None else penalty()
        return None if found is None else config.rounding_weight * found

    def refresh(step: int, optimizer: torch.optim.Optimizer) -> None:
        if partial is not None:
            partial.refresh(step * batch_size, optimizer)

    world.share_state(state)
    best = _Best(state, evaluate)
    start_loss = best.loss
    if not math.isfinite(start_loss):
        reason = ModelError(
            f"The loss should be finite before the first step. Found {start_loss}. Look for what is not finite in the "
            "student, or too large to be squared."
        )
        raise reason if not_finite is None else not_finite()
    losses: list[float] = []
    logger.info("finetune: %d steps of %d images, loss %.5f at the start", total, batch_size, start_loss)
    steps = _all_steps(
        student, state, phases, batches(), best, extra, refresh, world=world, total=total, cycles=config.restarts
    )
    with contextlib.closing(steps):
        for number, (found, rate) in enumerate(steps, start=1):
            losses.append(found)
            if not math.isfinite(found):
                warnings.warn(
                    f"Finetune: the loss became {found} in step {number} of {total}; the best state before is kept. "
                    "Lower FinetuneConfig.learning_rate or scale_learning_rate.",
                    QFTWarning,
                    stacklevel=2,
                )
                break
            with agreed(world):  # the first process alone may have a callback
                if callback is not None:
                    callback(Step(number, total, found, rate))
    if config.learning_rate or config.scale_learning_rate:
        _warn_of_no_gain(start_loss, best, losses, config)
    at(1.0)
    state.load_state_dict(best.state)
    world.share_state(state)
    logger.info("finetune: loss %.5f after %d steps", best.loss, len(losses))
    return FinetuneResult(start_loss, best.loss, len(losses), tuple(losses))
