"""What is kept of long work, so that the same job can go on with it later; and a training as such a thing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.training.efqat import PartialTraining


@dataclass(frozen=True)
class Saved:
    """What is kept of one part of a job.

    Attributes:
        facts: numbers and words, as JSON holds them.
        tensors: by name.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Keeper:
    """Keeps nothing; `job.checkpoint.Checkpoint` keeps files."""

    def identify(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Say which job this is, before the first part of it.

        Args:
            identity: returns what makes the job this one, as JSON holds it.
        """

    def inner(self, name: str) -> "Keeper":
        """Return the keeper of one of several jobs inside this one."""
        del name
        return self

    def saved(self, part: str) -> Saved | None:
        """Return what an earlier run of the same job has left of a part of it; `None` for nothing."""
        del part
        return None

    def save(self, part: str, made: Saved) -> None:
        """Keep this, in the place of what was kept of the part before."""

    def tick(self, part: str, make: Callable[[], Saved]) -> None:
        """Keep what `make` returns if it is time for it; called where the work is between two steps."""

    def interruptible(self) -> AbstractContextManager[None]:
        """Let interruptions inside the block wait for the next `tick`, which keeps the work before it ends."""
        return nullcontext()


FORGETFUL: Final = Keeper()

STATE: Final = "state/"
HELD: Final = "held/"
ADAM: Final = "adam/"


def taken(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with a prefix in front of their names."""
    return {prefix + name: t for name, t in tensors.items()}


def steps_of(training: Saved | None) -> int:
    """Return how many steps of a training are done."""
    return 0 if training is None else int(training.facts["steps"])


def state_of(state: nn.Module, partial: PartialTraining | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors that a step of a training changes.

    Args:
        state: everything that is trained.
        partial: chooses the rows of its kernels that train; `None` where all do.
        optimizer: an Adam of its parameters.
    """
    tensors = named(STATE, state.state_dict())
    for name, held in ({} if partial is None else partial.held()).items():
        parts = {"integers": held.integers, "trained": held.trained, "rows": held.rows}
        tensors |= named(f"{HELD}{name}/", parts)
    for name, parameter in _trained(state, partial).items():
        tensors |= named(f"{ADAM}{name}/", optimizer.state.get(parameter, {}))
    return tensors


def take_state(state: nn.Module, partial: PartialTraining | None, saved: Saved) -> None:
    """Give everything that is trained the values of an earlier run; the optimizer is made after it.

    Args:
        state: everything that is trained.
        partial: chooses the rows of its kernels that train; `None` where all do.
        saved: its tensors are those of `state_of`, and the fact `choices` says how often the rows were chosen anew.
    """
    state.load_state_dict(taken(STATE, saved.tensors))
    if partial is not None:
        parts = {name: taken(f"{HELD}{name}/", saved.tensors) for name in partial.held()}
        # At the end of a training nothing is held any more.
        partial.take({name: part for name, part in parts.items() if part}, saved.facts["choices"])


def take_moments(
    state: nn.Module, partial: PartialTraining | None, optimizer: torch.optim.Optimizer, saved: Saved
) -> None:
    """Give a new Adam the moments of an earlier run.

    Args:
        state: everything that is trained.
        partial: as in `state_of`.
        optimizer: an Adam of its parameters.
        saved: its tensors are those of `state_of`.
    """
    for name, parameter in _trained(state, partial).items():
        for key, value in taken(f"{ADAM}{name}/", saved.tensors).items():
            # The fused Adam walks through memory: moments have the format of what they belong to.
            moment = value.shape == parameter.shape
            like = torch.zeros_like(parameter) if moment else torch.empty_like(value, device=parameter.device)
            optimizer.state[parameter][key] = like.detach().copy_(value)


def _trained(state: nn.Module, partial: PartialTraining | None) -> dict[str, Tensor]:
    rows = {} if partial is None else {f"{HELD}{name}": held.rows for name, held in partial.held().items()}
    return {**dict(state.named_parameters()), **rows}
