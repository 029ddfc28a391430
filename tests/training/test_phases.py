"""The schedule, and phases that each train what is their own."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from students import Two, inputs_of, settings
from torch import Tensor, nn

from qft_plugin.training.finetune import FinetuneResult, Goal, finetune
from qft_plugin.training.loss import Loss
from qft_plugin.training.phases import Options, Phase, Step, learning_rate_factor
from qft_plugin.training.teacher import teacher_predictions

EXACT = 1e-6
"""float32 sums of a few hundred terms in another order."""


def test_schedule_by_hand() -> None:
    """Two cosine cycles of four steps: 1, cos^2(pi/8), 1/2, sin^2(pi/8), and then half of all that."""
    cycle = [1, math.cos(math.pi / 8) ** 2, 0.5, math.sin(math.pi / 8) ** 2]
    found = [learning_rate_factor(step, 8, 2) for step in range(8)]
    assert found == pytest.approx(cycle + [f / 2 for f in cycle])


@given(total=st.integers(1, 300), restarts=st.integers(1, 6))
def test_schedule_in_general(total: int, restarts: int) -> None:
    """It starts at 1, is positive, falls inside a cycle, and never exceeds half the cycle before."""
    factors = [learning_rate_factor(step, total, restarts) for step in range(total)]
    assert factors[0] == 1
    assert all(f > 0 for f in factors)
    for step in range(1, total):
        cycle, before = (s * restarts // total for s in (step, step - 1))
        assert factors[step] <= 0.5**cycle * (1 + EXACT)
        assert cycle != before or factors[step] < factors[step - 1]


def in_two_phases(
    student: Two, *, masks: Any = (), callback: Callable[[Step], None] | None = None, **changes: Any
) -> FinetuneResult:
    """Train the first layer against the hidden activation, then the second against the output."""
    inputs, teacher = inputs_of(torch.randn(40, 5)), Two()
    targets = teacher_predictions(teacher, inputs, batch_size=16, memory_limit=2**20)
    first, second = ([{"params": list(layer.parameters()), "lr": 0.05}] for layer in (student.first, student.second))
    output = Loss((0.0, 1.0), 0.0)
    phases = [Phase(Loss((1.0, 0.0), 0.0), first, masks), Phase(output, second)]
    config = settings(**changes)
    goal, options = Goal(inputs, targets, output), Options(callback=callback)
    return finetune(student, student, phases, goal=goal, config=config, options=options)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def test_each_phase_trains_its_own_layer_only() -> None:
    """In the first half of the steps one layer moves and the other has no gradient, in the second the other moves."""
    student, states, gradients = Two(), [], []

    def watch(step: Step) -> None:
        states.append(snapshot(student))
        gradients.append((student.first.weight.requires_grad, student.second.weight.requires_grad))

    states.append(snapshot(student))
    result = in_two_phases(student, callback=watch)
    assert result.steps == 40
    assert gradients == [(True, False)] * 20 + [(False, True)] * 20
    for step in range(1, 41):
        moved = {n.split(".")[0] for n, t in states[step].items() if not torch.equal(t, states[step - 1][n])}
        assert moved == {"first" if step <= 20 else "second"}
    assert all(p.requires_grad for p in student.parameters())


def test_each_phase_has_its_own_cycles() -> None:
    """Two phases of 20 steps, each with the same two cosine cycles; an odd step goes to the later phase."""
    steps: list[Step] = []
    in_two_phases(Two(), callback=steps.append)
    one = [0.05 * learning_rate_factor(i, 20, 2) for i in range(20)]
    assert [s.learning_rate for s in steps] == pytest.approx([*one, *one])
    assert [s.number for s in steps] == list(range(1, 41))
    steps.clear()
    assert in_two_phases(Two(), images_fed=50, restarts=1, callback=steps.append).steps == 5
    expected = [*(0.05 * learning_rate_factor(i, 2, 1) for i in range(2))]
    assert [s.learning_rate for s in steps[:2]] == pytest.approx(expected)
    assert in_two_phases(Two(), images_fed=1).steps == 2  # one for each phase


def test_what_counts_is_the_final_loss() -> None:
    """The reported losses and the kept state are those of the last phase's loss, also after a bad last phase."""
    student = Two()
    result = in_two_phases(student)
    assert result.final_loss < 0.5 * result.start_loss
    student, kept = Two(), {}

    def ruin(step: Step) -> None:
        if step.number == 20:
            kept.update(snapshot(student))
        if step.number == 30:
            with torch.no_grad():
                student.second.weight.add_(100)

    ruined = in_two_phases(student, callback=ruin, restarts=1)
    assert ruined.final_loss <= ruined.start_loss
    if ruined.final_loss < ruined.start_loss:
        assert all(torch.equal(t, kept[n]) for n, t in student.state_dict().items())


def test_an_interrupted_phase_gives_its_gradients_back() -> None:
    """Where a callback stops the finetune in the first phase, all parameters ask for gradients as before."""
    student = Two()

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_two_phases(student, callback=stop)
    assert all(p.requires_grad for p in student.parameters())


def test_a_mask_keeps_a_part_of_a_parameter() -> None:
    """Where the mask is False not a bit changes, everywhere else it trains."""
    student = Two()
    mask = torch.rand(4, 5) < 0.5
    before = student.first.weight.detach().clone()
    in_two_phases(student, masks=[(student.first.weight, mask)])
    assert torch.equal(student.first.weight[~mask], before[~mask])
    assert not bool((student.first.weight[mask] == before[mask]).any())
