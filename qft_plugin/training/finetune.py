"""The distillation loop: label-free training of all degrees of freedom against the float teacher (Sec. 3.1, Sec. 4)."""

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import ModelError, warn
from qft_plugin.training.data import Inputs
from qft_plugin.training.distributed import World, agreed
from qft_plugin.training.keeping import STATE, Saved, named, state_of, steps_of, taken
from qft_plugin.training.loss import Loss, Network, distillation_loss, whole_of
from qft_plugin.training.order import orders, strata_of
from qft_plugin.training.phases import PLAIN, Batch, Options, Phase, Step, Training, train
from qft_plugin.training.teacher import Recomputed, Targets

logger = logging.getLogger("qft_plugin")

ENOUGH_STEPS: Final = 200
"""From so many steps on a finetune that gains nothing is worth a warning. A start of compensated weights is so good
that some ten steps often do not reach it again."""

PART: Final = "finetune"
"""The name under which a training is kept."""

BEST: Final = "best/"

RUINED: Final = (2.0, 0.02)
"""Above so many times the loss at the start, and so much more, training has not only gained nothing but done harm.
Healthy networks stayed below a difference of 0.005 after 8 steps."""


@dataclass(frozen=True)
class Goal:
    """The goal of a finetune: the teacher's predictions, and the loss that compares them.

    Attributes:
        inputs: all images.
        targets: the teacher's predictions for `inputs.share`.
        loss: compares them, to decide which state is the best; a phase may make another one small.
    """

    inputs: Inputs
    targets: Targets | Recomputed
    loss: Loss


@dataclass(frozen=True)
class FinetuneResult:
    """How a finetune went.

    Attributes:
        start_loss: loss before the first step, over the images that were held out of training, or where there are
            none, the first `data.JUDGED` finetuning images.
        final_loss: loss of the state that was kept, over the same images; never larger.
        held_out: how many images were held out.
        steps: steps taken.
        losses: the loss of each step's batch, that of its phase.
        start_agreement: share of the images of `start_loss`, 0 to 1, on which the student named the class of the
            teacher before the first step; `None` where the networks name no classes.
        agreement: likewise of the state that was kept.
    """

    start_loss: float
    final_loss: float
    held_out: int
    steps: int
    losses: tuple[float, ...]
    start_agreement: float | None = None
    agreement: float | None = None

    def __repr__(self) -> str:
        """Say in one short line how it went."""
        return f"FinetuneResult(loss {self.start_loss:.4g} -> {self.final_loss:.4g} in {self.steps} steps)"


def finetune(
    student: Network,
    state: nn.Module,
    phases: Sequence[Phase],
    *,
    goal: Goal,
    config: FinetuneConfig,
    options: Options = PLAIN,
) -> FinetuneResult:
    """Train the student to agree with the teacher, and leave the best state in it.

    The state at the end of every cosine cycle is compared with the best one so far, at first the starting point, by
    the loss on images that are held out of training (`Inputs.trained_on`); the best is what stays. A later phase starts
    from where the one before it ended.

    Where several processes train together, each step's batch is divided among them, and losses, gradients and states
    are those of the whole batch in every one of them.

    Args:
        student: the fake-quantized network, a function of `state`.
        state: holds everything that is trained; ends in the best state seen.
        phases: the phases in their order, usually one.
        goal: the teacher's predictions, and the loss that compares them.
        config: the settings.
        options: optional parts.

    Raises:
        ModelError: the loss at the start is not finite.
    """
    world, saved = goal.inputs.world, options.resumed
    batch_size = _batch_size(goal.inputs, config)
    total = max(len(phases), round(config.images_fed / batch_size))
    first = steps_of(saved)
    order = orders(goal.inputs.trained_on, batch_size, strata=strata_of(batch_size, world.size), seed=config.seed)
    left = enumerate(itertools.islice(order, first, None), start=first)
    batches = _batches(goal, left, batch_size, at=lambda step: options.schedule(step / total))

    def evaluate() -> Judged:
        options.schedule(1.0)
        if options.partial is not None:
            options.partial.settle()
        return _evaluate(student, goal, batch_size=config.batch_size)

    world.share_state(state)
    best = _Best(state, evaluate, saved)
    losses: list[float] = [] if saved is None else list(saved.facts["losses"])
    _check_start(best.start.loss, options)
    logger.info("finetune: %d steps of %d images, loss %.5f at the start", total, batch_size, best.start.loss)
    if first:
        logger.info("finetune: goes on after step %d of an earlier run", first)

    def kept(optimizer: torch.optim.Optimizer) -> Saved:
        choices = 0 if options.partial is None else options.partial.choices
        facts = {"steps": len(losses), "losses": losses, "choices": choices, "best": best.facts()}
        return Saved(facts, {**state_of(state, options.partial, optimizer), **named(BEST, best.state)})

    training = Training(
        student,
        state,
        batches=batches,
        batch_size=batch_size,
        total=total,
        look=best.look,
        keep=lambda optimizer: options.keeper.tick(PART, lambda: kept(optimizer)),
        world=world,
        config=config,
        options=options,
    )
    with options.keeper.interruptible():
        _follow(train(training, phases), losses, total, world, options.callback)
    if config.learning_rate or config.scale_learning_rate:
        _warn_of_no_gain(best, losses, config)
    options.schedule(1.0)
    state.load_state_dict(best.state)
    world.share_state(state)
    if first < total:
        ended = {"steps": total, "losses": losses, "choices": 0, "best": best.facts()}
        options.keeper.save(PART, Saved(ended, {**named(STATE, best.state), **named(BEST, best.state)}))
    logger.info("finetune: loss %.5f after %d steps", best.judged.loss, len(losses))
    held_out, start, end = goal.inputs.total - goal.inputs.trained_on, best.start, best.judged
    return FinetuneResult(start.loss, end.loss, held_out, len(losses), tuple(losses), start.agreement, end.agreement)


def _batch_size(inputs: Inputs, config: FinetuneConfig) -> int:
    """Return how many images a step has, over all processes."""
    size = min(config.batch_size, inputs.trained_on)
    return size if inputs.largest is None else min(size, inputs.largest * inputs.world.size)


def _batches(
    goal: Goal, steps: Iterator[tuple[int, Tensor]], batch_size: int, *, at: Callable[[int], None]
) -> Iterator[Batch]:
    """Yield the batch of each step, after telling the number of the step."""
    inputs, world = goal.inputs, goal.inputs.world
    for step, index in steps:
        at(step)
        rows = world.rows(index)
        wanted = goal.targets.rows(rows, inputs.device)
        yield Batch(inputs.share.batch(rows), wanted, whole_of(wanted, images=batch_size, world=world))


@dataclass(frozen=True)
class Judged:
    """How good a state is.

    Attributes:
        loss: the mean loss.
        agreement: share of images, 0 to 1, on which the student names the class of the teacher; `None` without classes.
    """

    loss: float
    agreement: float | None


@torch.no_grad()
def _evaluate(student: Network, goal: Goal, *, batch_size: int) -> Judged:
    """Judge a state by the images that are held out of training, or where there are none, by the first ones."""
    inputs, world, share = goal.inputs, goal.inputs.world, goal.inputs.share
    first, end = inputs.judged_on
    size = max(batch_size, share.at_once(64)) if inputs.largest is None else inputs.largest * world.size
    total, agreement = 0.0, Agreement()
    for start in range(first, end, size):
        stop = min(start + size, end)
        part = world.row_range(start, stop)
        wanted = goal.targets.rows(part, inputs.device)
        whole = whole_of(wanted, images=stop - start, world=world)
        if part.start < part.stop:  # a last batch may have no image of this process
            found = student(share.batch(part))
            total += float(distillation_loss(found, wanted, goal.loss, whole=whole)) * (stop - start)
            agreement.add(found.classes, wanted.classes)
    return Judged(world.total_of(total) / (end - first), agreement.of_all(world))


class Agreement:
    """On how many images two networks name the same class."""

    def __init__(self) -> None:
        """Start with none."""
        self._same, self._images = 0, 0

    def add(self, one: Tensor | None, other: Tensor | None) -> None:
        """Add the classes that two networks name for the same images, each `[images]`; `None` for no classes."""
        if one is not None and other is not None and one.shape == other.shape:
            self._same += int((one == other).sum())
            self._images += len(one)

    def of_all(self, world: World) -> float | None:
        """Return the share over the images of all processes, 0 to 1; `None` where no class was named."""
        same, images = world.total_of(self._same), world.total_of(self._images)
        return same / images if images else None


class _Best:
    """The best state so far.

    Attributes:
        start: how good the state before the first step is.
        judged: how good the best state is.
        later: the losses of the states after the start that were compared.
        state: the best one.
    """

    def __init__(self, state: nn.Module, evaluate: Callable[[], Judged], saved: Saved | None) -> None:
        self._evaluate, self._module = evaluate, state
        if saved is None:
            self.start = self.judged = evaluate()
            self.later: list[float] = []
            self.state = copy.deepcopy(state.state_dict())
        else:
            facts = saved.facts["best"]
            self.start, self.judged, self.later = Judged(*facts["start"]), Judged(*facts["judged"]), facts["later"]
            self.state = taken(BEST, saved.tensors)

    def facts(self) -> dict[str, Any]:
        """Return all but the state, as JSON holds it."""
        return {"start": astuple(self.start), "judged": astuple(self.judged), "later": self.later}

    def look(self) -> None:
        """Keep the state as it is now if it is better."""
        now = self._evaluate()
        self.later.append(now.loss)
        if now.loss < self.judged.loss:
            self.judged, self.state = now, copy.deepcopy(self._module.state_dict())


def _check_start(loss: float, options: Options) -> None:
    if not math.isfinite(loss):
        reason = ModelError(
            f"The loss should be finite before the first step. Found {loss}. Look for numbers in the student "
            "that are not finite, or too large to be squared."
        )
        raise reason if options.not_finite is None else options.not_finite()


def _follow(
    steps: Generator[tuple[float, float]],
    losses: list[float],
    total: int,
    world: World,
    callback: Callable[[Step], None] | None,
) -> None:
    """Take all steps that are left, or those before a loss that is not finite, and report each; adds to the losses."""
    with contextlib.closing(steps):
        for number, (found, rate) in enumerate(steps, start=len(losses) + 1):
            losses.append(found)
            if not math.isfinite(found):
                warn(
                    f"Finetune: the loss became {found} in step {number} of {total}; the best state before is kept. "
                    "Lower FinetuneConfig.learning_rate or scale_learning_rate.",
                    stacklevel=3,
                )
                break
            with agreed(world):  # the first process alone may have a callback
                if callback is not None:
                    callback(Step(number, total, found, rate))


def _warn_of_no_gain(best: _Best, losses: Sequence[float], config: FinetuneConfig) -> None:
    """Warn where the start is returned after a training that should have changed it."""
    start_loss = best.start.loss
    if best.judged.loss < start_loss or not best.later or not math.isfinite(losses[-1]):
        return  # where a loss is not finite, that was said
    factor, more = RUINED
    ruined = not any(later <= factor * start_loss + more for later in best.later)
    if ruined or len(losses) >= ENOUGH_STEPS:
        warn(
            f"Finetune: training should lower the loss. Found {start_loss:.3g} at the start and "
            f"{min(best.later):.3g} after {len(losses)} steps: the start is returned. Lower "
            f"FinetuneConfig.learning_rate ({config.learning_rate:g}) and scale_learning_rate "
            f"({config.scale_learning_rate:g}), or return the start at once with finetune=None.",
            stacklevel=3,
        )
