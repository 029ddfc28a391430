"""The distillation loop: every image once, the best state, and what happens when it goes wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from students import Linear, inputs_of, settings
from torch import Tensor

from qft_plugin.errors import QFTWarning
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs
from qft_plugin.training.finetune import FinetuneResult, Goal, finetune
from qft_plugin.training.loss import Loss, Prediction, normalised_l2
from qft_plugin.training.phases import Options, Phase, Step, learning_rate_factor
from qft_plugin.training.rows import Kept
from qft_plugin.training.teacher import Recomputed, Targets, teacher_predictions

EXACT = 1e-6
"""float32 sums of a few hundred terms in another order."""


def problem(count: int = 40) -> tuple[Linear, Inputs, Targets]:
    """Return an untrained student, its inputs, and the outputs of another network as the targets."""
    inputs, teacher = inputs_of(torch.randn(count, 5)), Linear()
    return Linear(), inputs, teacher_predictions(teacher, inputs, batch_size=16, memory_limit=2**20)


def run(
    student: Linear,
    inputs: Inputs,
    targets: Targets | Recomputed,
    *,
    rate: float = 0.05,
    callback: Callable[[Step], None] | None = None,
    **changes: Any,
) -> FinetuneResult:
    """Finetune with one learning rate; the config's own rates are for the caller to use."""
    groups = [{"params": list(student.parameters()), "lr": rate}, {"params": [], "lr": 1.0}]
    return finetune(
        student,
        student,
        [Phase(Loss((1.0,), 0.0), groups)],
        goal=Goal(inputs, targets, Loss((1.0,), 0.0)),
        config=settings(**changes),
        options=Options(callback=callback),
    )


def loss_of(student: Linear, inputs: Inputs, targets: Targets) -> float:
    wanted = targets.rows(slice(None), inputs.device)
    with torch.no_grad():
        return float(normalised_l2(student((inputs.args, {})).features[0], wanted.features[0]))


def test_the_student_learns_and_the_result_says_so() -> None:
    """The loss falls, and the reported losses are those of the state before and after."""
    student, inputs, targets = problem()
    before = loss_of(student, inputs, targets)
    result = run(student, inputs, targets)
    assert result.start_loss == pytest.approx(before, rel=EXACT)
    assert result.final_loss == pytest.approx(loss_of(student, inputs, targets), rel=EXACT)
    assert result.final_loss < 0.2 * result.start_loss
    assert result.steps == len(result.losses) == 40


def test_the_number_of_images_fed_is_what_counts() -> None:
    """400 images are 40 steps of 10 and 50 of 8; a batch is never larger than the dataset."""
    student, inputs, targets = problem()
    assert run(student, inputs, targets, batch_size=8).steps == 50
    assert run(student, inputs, targets, batch_size=1000).steps == 10
    with pytest.warns(QFTWarning, match="after 1 steps"):
        assert run(student, inputs, targets, images_fed=1).steps == 1


def test_every_epoch_shows_every_image_once() -> None:
    """Batches are disjoint inside an epoch, orders differ between epochs, an incomplete batch is left out."""
    seen: list[list[float]] = []

    class Watching(Linear):
        def __call__(self, call: Call) -> Any:
            if self.linear.weight.requires_grad and torch.is_grad_enabled():
                seen.append(call[0][0][:, 0].tolist())
            return super().__call__(call)

    inputs = inputs_of(torch.arange(23.0).unsqueeze(1) + torch.zeros(1, 5))
    targets = Targets((Kept(torch.ones(23, 3), None),), None)
    run(Watching(), inputs, targets, images_fed=80, batch_size=10)
    assert [len(batch) for batch in seen] == [10] * 8
    epochs = [sorted(seen[i] + seen[i + 1]) for i in range(0, 8, 2)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(batch) for batch in seen}) == 8


def test_the_state_is_chosen_on_images_that_are_not_trained_on() -> None:
    """One image of eight, at the end, is never in a step; the losses that are compared and reported are theirs."""
    seen: set[float] = set()

    class Watching(Linear):
        def __call__(self, call: Call) -> Any:
            if torch.is_grad_enabled():
                seen.update(call[0][0][:, 0].tolist())
            return super().__call__(call)

    x = torch.randn(160, 5)
    x[:, 0] = torch.arange(160.0) / 100
    inputs, student = inputs_of(x), Watching()
    targets = teacher_predictions(Linear(), inputs, batch_size=16, memory_limit=2**20)
    last = targets.rows(slice(140, None), inputs.device).features[0]
    held_out, end = inputs_of(x[140:]), Targets((Kept(last, None),), None)
    before = loss_of(student, held_out, end)
    result = run(student, inputs, targets, images_fed=1400, batch_size=10)
    assert seen == set(x[:140, 0].tolist())
    assert result.held_out == 20
    assert result.start_loss == pytest.approx(before, rel=EXACT)
    assert result.final_loss == pytest.approx(loss_of(student, held_out, end), rel=EXACT)


@pytest.mark.parametrize(("total", "trained_on"), [(1, 1), (127, 127), (128, 112), (1_000, 875), (8_192, 7_680)])
def test_images_are_held_out_where_there_are_enough(total: int, trained_on: int) -> None:
    """Of few images all are needed, and of many a part is enough."""
    assert inputs_of(torch.zeros(total, 1)).trained_on == trained_on


def test_student_and_teacher_see_the_same_images() -> None:
    """With the teacher as the student every batch has loss 0: rows of inputs and targets belong together."""
    student, inputs, _ = problem(37)
    targets = teacher_predictions(student, inputs, batch_size=5, memory_limit=0)
    result = run(student, inputs, targets, rate=0.0)
    assert max(result.losses) < EXACT
    assert result.start_loss < EXACT


def test_a_seed_makes_it_reproducible() -> None:
    """The same seed gives the same losses and state bit for bit, another seed other batches."""
    student, inputs, targets = problem()
    start = {k: v.clone() for k, v in student.state_dict().items()}
    results, states = [], []
    for seed in (3, 3, 4):
        student.load_state_dict(start)
        torch.rand(seed)  # the global generator has no say
        results.append(run(student, inputs, targets, seed=seed))
        states.append({k: v.clone() for k, v in student.state_dict().items()})
    assert results[0] == results[1] != results[2]
    assert all(torch.equal(states[0][k], states[1][k]) for k in start)


def test_callback_is_told_every_step() -> None:
    """The callback is called once a step with number, total, loss and the rate of the first group."""
    student, inputs, targets = problem()
    steps: list[Step] = []
    result = run(student, inputs, targets, callback=steps.append)
    assert [s.number for s in steps] == list(range(1, 41))
    assert {s.total for s in steps} == {40}
    assert tuple(s.loss for s in steps) == result.losses
    assert [s.learning_rate for s in steps] == pytest.approx([0.05 * learning_rate_factor(i, 40, 2) for i in range(40)])


def test_a_callback_may_stop_the_finetune() -> None:
    """An exception of the callback comes through to the caller."""
    student, inputs, targets = problem()

    def stop(step: Step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, inputs, targets, callback=stop)


def test_an_absurd_learning_rate_never_makes_it_worse() -> None:
    """Where the loss explodes but stays finite, the start is kept and reported, and what to lower is said."""
    student, inputs, targets = problem()
    start = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.warns(QFTWarning, match="training should lower the loss"):
        result = run(student, inputs, targets, rate=1e4, images_fed=40)
    assert max(result.losses) > 1e3
    assert result.final_loss == result.start_loss
    assert all(torch.equal(v, start[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_with_a_warning(value: float) -> None:
    """The finetune stops at once, warns with the step and what to lower, and keeps the best state before."""
    student, inputs, targets = problem()
    start = {k: v.clone() for k, v in student.state_dict().items()}

    class Exploding(Linear):
        calls = 0

        def __call__(self, call: Call) -> Any:
            self.calls += torch.is_grad_enabled()
            prediction = super().__call__(call)
            factor = value if self.calls == 3 else 1.0
            return Prediction((prediction.features[0] * factor,), None)

    exploding = Exploding()
    exploding.load_state_dict(start)
    with pytest.warns(QFTWarning, match=r"step 3 of 40.*learning_rate"):
        result = run(exploding, inputs, targets)
    assert result.steps == 3
    assert result.final_loss == result.start_loss
    assert all(torch.equal(v, start[k]) for k, v in exploding.state_dict().items())


def test_weights_that_explode_end_it_with_a_warning() -> None:
    """An infinite learning rate makes NaN weights; what is left is the start."""
    student, inputs, targets = problem()
    start = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.warns(QFTWarning, match="step 2 of 40"):
        result = run(student, inputs, targets, rate=math.inf)
    assert result.final_loss == result.start_loss
    assert all(torch.equal(v, start[k]) for k, v in student.state_dict().items())


def test_the_best_cycle_is_kept() -> None:
    """A state that was good at the end of the first cycle survives a second one that ruins it."""
    student, inputs, targets = problem()
    best: dict[str, Tensor] = {}

    def ruin(step: Step) -> None:
        if step.number == 20:  # the end of the first of two cycles
            best.update({k: v.clone() for k, v in student.state_dict().items()})
        if step.number == 30:
            with torch.no_grad():
                for p in student.parameters():
                    p.add_(100)

    result = run(student, inputs, targets, callback=ruin)
    assert result.steps == 40
    assert result.final_loss < 0.7 * result.start_loss
    assert result.final_loss == pytest.approx(loss_of(student, inputs, targets), rel=EXACT)
    assert all(torch.equal(v, best[k]) for k, v in student.state_dict().items())


def test_every_group_trains_at_its_own_rate() -> None:
    """A group with rate 0 stays as it is while another one moves, and the caller's groups are not changed."""
    student, inputs, targets = problem()
    bias, weight = student.linear.bias.detach().clone(), student.linear.weight.detach().clone()
    groups = [{"params": [student.linear.weight], "lr": 0.05}, {"params": [student.linear.bias], "lr": 0.0}]
    loss = Loss((1.0,), 0.0)
    phases = [Phase(loss, groups)]
    finetune(student, student, phases, goal=Goal(inputs, targets, loss), config=settings())
    assert torch.equal(student.linear.bias, bias)
    assert not torch.equal(student.linear.weight, weight)
    assert [g["lr"] for g in groups] == [0.05, 0.0]


def test_the_loss_that_decides_is_that_of_the_first_images() -> None:
    """Batches of unequal size are averaged by image: the evaluated loss is that of the whole set."""
    student, inputs, targets = problem(70)  # one batch of 64 and one of 6
    result = run(student, inputs, targets, rate=0.0, images_fed=1)
    with torch.no_grad():
        wanted = [targets.rows(part, inputs.device).features[0] for part in (slice(0, 64), slice(64, 70))]
        found = [student(((part,), {})).features[0] for part in (inputs.args[0][:64], inputs.args[0][64:])]
    losses = [float(normalised_l2(f, w)) for f, w in zip(found, wanted, strict=True)]
    assert result.start_loss == pytest.approx((64 * losses[0] + 6 * losses[1]) / 70, rel=EXACT)


class Classes(Linear):
    """Names one of three classes."""

    def __call__(self, call: Call) -> Prediction:
        """Return the logits, which are what is compared too."""
        y = self.linear(call[0][0])
        return Prediction((y,), y)


@pytest.mark.parametrize("recomputed", [False, True])
def test_agreement_is_counted_where_the_state_is_judged(recomputed: bool) -> None:
    """On the images that are held out: the share of which student and teacher name one class."""
    x = torch.randn(160, 5)
    inputs, teacher, student = inputs_of(x), Classes(), Classes()
    found = teacher_predictions(teacher, inputs, batch_size=16, memory_limit=2**20)
    targets = Recomputed(teacher, inputs, 1, False) if recomputed else replace(found, logits=None)
    held = x[140:]
    with torch.no_grad():
        before = (student.linear(held).argmax(1) == teacher.linear(held).argmax(1)).double().mean()
    result = run(student, inputs, targets)
    with torch.no_grad():
        after = (student.linear(held).argmax(1) == teacher.linear(held).argmax(1)).double().mean()
    assert result.start_agreement == pytest.approx(float(before))
    assert result.agreement == pytest.approx(float(after))
    assert float(after) > float(before)
