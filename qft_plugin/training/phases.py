"""The training itself, phase by phase: its parameters, its optimizer, its learning rates, and its steps."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.config import FinetuneConfig
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.distributed import World
from qft_plugin.training.efqat import PartialTraining
from qft_plugin.training.keeping import FORGETFUL, Keeper, Saved, steps_of, take_moments
from qft_plugin.training.loss import Loss, Network, Prediction, Whole, distillation_loss


@dataclass(frozen=True)
class Step:
    """The report of one step to a callback.

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
class Phase:
    """A part of the training, with an optimizer and cosine cycles of its own.

    Attributes:
        loss: the loss that is minimised.
        groups: parameter groups for the optimizer, each with its `lr`; all other parameters stay as they are.
        masks: parameters of which a part trains, each with a mask of its shape that is True there.
    """

    loss: Loss
    groups: Sequence[dict[str, Any]]
    masks: Sequence[tuple[nn.Parameter, Tensor]] = ()


@dataclass(frozen=True)
class Batch:
    """The share of one step that a process computes.

    Attributes:
        call: its images.
        wanted: the teacher's predictions for them.
        whole: the batch of all processes; `None` where there is one.
    """

    call: Call
    wanted: Prediction
    whole: Whole | None


@dataclass(frozen=True)
class Options:
    """Optional parts of a finetune beside its settings.

    Attributes:
        callback: called after each step.
        schedule: told the position of the training before each step, from 0 to below 1, and 1 before each comparison
            of states and at the end.
        penalty: added to the loss of each step with `config.rounding_weight`, but not to losses that are compared or
            reported.
        partial: chooses which rows of the kernels train, where not all do; the rows are in the first group of the one
            phase that there is then.
        not_finite: says where, if the student computes something at the start that is not finite.
        keeper: keeps the training now and then.
        resumed: what it has kept of an earlier run of the same training, whose state `state` has already.
    """

    callback: Callable[[Step], None] | None = None
    schedule: Callable[[float], None] = lambda _: None
    penalty: Callable[[], Tensor | None] = lambda: None
    partial: PartialTraining | None = None
    not_finite: Callable[[], Exception] | None = None
    keeper: Keeper = FORGETFUL
    resumed: Saved | None = None


PLAIN: Final = Options()
"""A finetune with nothing beside its settings."""


@dataclass(frozen=True)
class Training:
    """The state and settings that all phases of a training share.

    Attributes:
        student: the fake-quantized network, a function of `state`.
        state: holds everything that is trained.
        batches: one for each step, over all phases.
        batch_size: images of a step, over all processes.
        total: how many steps there will be.
        look: called at the end of each cosine cycle.
        keep: called between two steps, with the optimizer.
        world: the processes that train together.
        config: the settings.
        options: its optional parts.
    """

    student: Network
    state: nn.Module
    batches: Iterator[Batch]
    batch_size: int
    total: int
    look: Callable[[], None]
    keep: Callable[[torch.optim.Optimizer], None]
    world: World
    config: FinetuneConfig
    options: Options


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


def train(training: Training, phases: Sequence[Phase]) -> Generator[tuple[float, float]]:
    """Train phase by phase, each with an equal share of the steps.

    The whole network runs forward in every phase; the backward pass ends where nothing trains.

    Args:
        training: the state and settings that all phases share.
        phases: the phases in their order.

    Yields:
        Loss and learning rate of each step that is left.
    """
    taken = steps_of(training.options.resumed)
    for number, phase in enumerate(phases):
        first, end = (training.total * n // len(phases) for n in (number, number + 1))
        if taken < end:
            with _only(_trained(phase.groups), training.state):
                yield from _steps(training, phase, range(max(taken - first, 0), end - first))


@contextlib.contextmanager
def _only(trained: Sequence[Tensor], state: nn.Module) -> Iterator[None]:
    """Ask for gradients of the parameters of a phase only, so that nothing before it costs a backward pass."""
    known = {id(p) for p in trained}
    others = [p for p in state.parameters() if p.requires_grad and id(p) not in known]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _steps(training: Training, phase: Phase, left: range) -> Generator[tuple[float, float]]:
    """Train the steps of one phase that are left; yields loss and learning rate of each."""
    world, cycles, partial, count = training.world, training.config.restarts, training.options.partial, left.stop
    objective = world.replicated(_Objective(training, phase))
    optimizer = torch.optim.Adam([dict(g) for g in phase.groups], fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    if training.options.resumed is not None and left.start:
        take_moments(training.state, partial, optimizer, training.options.resumed)
    cycle_ends = {math.ceil(count * (i + 1) / cycles) for i in range(cycles)}
    for step, batch in zip(left, training.batches, strict=False):
        if partial is not None:
            partial.refresh(step * training.batch_size, optimizer)
        factor = learning_rate_factor(step, count, cycles)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = _step(objective, optimizer, batch, phase.masks, world)
        yield world.total(loss).item() / world.size, rates[0] * factor
        if step + 1 in cycle_ends:
            training.look()
        training.keep(optimizer)


def _step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    masks: Sequence[tuple[nn.Parameter, Tensor]],
    world: World,
) -> Tensor:
    """Train one step; returns the loss of this process."""
    optimizer.zero_grad(set_to_none=True)
    whole, loss = objective(batch)
    if whole.requires_grad:  # else no parameter of this phase reaches the loss
        whole.backward()
    world.average_gradients(_trained(optimizer.param_groups))
    for parameter, mask in masks:
        if parameter.grad is not None:
            parameter.grad.mul_(mask)
    optimizer.step()
    return loss  # type: ignore[no-any-return]


class _Objective(nn.Module):
    """The objective of a step, as a module that holds the parameters that train.

    Of several processes, each has its share of the loss times their number: the mean of the gradients is then that of
    the whole batch's loss, and the penalty, which is the same for all, counts once.
    """

    def __init__(self, training: Training, phase: Phase) -> None:
        super().__init__()
        # The parameters that train alone: buffers, as large as the weights, are constants.
        self.trained = nn.ParameterList(p for p in _trained(phase.groups) if isinstance(p, nn.Parameter))
        self._training, self._loss = training, phase.loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the objective and, without a graph, the loss in it."""
        training = self._training  # no module itself, so torch does not look in it for more parameters
        loss = distillation_loss(training.student(batch.call), batch.wanted, self._loss, whole=batch.whole)
        loss = loss if training.world.size == 1 else training.world.size * loss
        penalty = training.options.penalty()
        return loss if penalty is None else loss + training.config.rounding_weight * penalty, loss.detach()


def _trained(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]
