"""The distillation loop: schedule, loss, best state, and what happens when it goes wrong."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import ModelError, QFTWarning
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs, Kept
from qft_plugin.training.finetune import (
    FinetuneResult,
    Loss,
    Phase,
    Prediction,
    Step,
    Targets,
    class_divergence,
    distillation_loss,
    finetune,
    learning_rate_factor,
    normalised_l2,
    teacher_predictions,
)

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


def test_normalised_l2_is_the_loss_of_the_paper() -> None:
    """Sum of squared differences over the sum of squared teacher values, by hand: (1 + 4) / (9 + 16)."""
    assert float(normalised_l2(torch.tensor([4.0, 2.0]), torch.tensor([3.0, 4.0]))) == pytest.approx(0.2)


@given(power=st.integers(-6, 6), seed=st.integers(0, 1000))
def test_normalised_l2_has_no_unit(power: int, seed: int) -> None:
    """Scaling both networks changes nothing; equal is 0, and a student of zeros has loss 1."""
    t, s = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    loss = float(normalised_l2(s, t))
    assert float(normalised_l2(2.0**power * s, 2.0**power * t)) == loss
    assert float(normalised_l2(t, t)) == 0
    assert float(normalised_l2(torch.zeros_like(t), t)) == pytest.approx(1)


def test_normalised_l2_of_a_silent_teacher_is_finite_or_huge_but_not_nan() -> None:
    """A teacher that computes 0 everywhere gives 0 for an equal student, not NaN."""
    assert float(normalised_l2(torch.zeros(3), torch.zeros(3))) == 0


TEACHER = Prediction((torch.ones(2, 2), torch.ones(4)), torch.tensor([[0.0, math.log(3)]]))
STUDENT = Prediction((torch.ones(2, 2) * 2, torch.ones(4) * 3), torch.tensor([[0.0, 0.0]]))
"""The losses of the two features are 1 and 4; the class probabilities (1/4, 3/4) and (1/2, 1/2)."""


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1.0, 1.0), 2.5), ((3.0, 1.0), 1.75), ((0.5, 2.0), 3.4), ((2.0, 0.0), 1.0), ((0.0, 7.0), 4.0)],
)
def test_distillation_loss_is_the_weighted_mean_of_the_features(weights: tuple[float, ...], expected: float) -> None:
    """By hand: sum of weight times loss over the sum of weights, so only the ratio of the weights counts."""
    for factor in (1.0, 0.01):
        loss = Loss(tuple(factor * w for w in weights), 0.0)
        assert float(distillation_loss(STUDENT, TEACHER, loss)) == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_distillation_loss_mixes_by_a_proportion(p: float) -> None:
    """(1 - p) * features + p * divergence; by hand it is 1/4 log(1/2) + 3/4 log(3/2) for the two probabilities."""
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    found = float(distillation_loss(STUDENT, TEACHER, Loss((1.0, 1.0), p)))
    assert found == pytest.approx((1 - p) * 2.5 + p * divergence)


def test_cross_entropy_alone_needs_no_features() -> None:
    """With p = 1 nothing but the logits is looked at."""
    teacher, student = Prediction((), TEACHER.logits), Prediction((), STUDENT.logits)
    alone = float(distillation_loss(student, teacher, Loss((), 1.0)))
    assert alone == float(distillation_loss(STUDENT, TEACHER, Loss((1.0, 1.0), 1.0)))


@given(seed=st.integers(0, 1000), size=st.floats(0.1, 1e3))
def test_divergence_is_cross_entropy_less_the_teachers_entropy(seed: int, size: float) -> None:
    """Its value is 0 for an equal student and never negative; its gradient is that of the cross entropy."""
    teacher, logits = size * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(class_divergence(teacher, teacher)) == 0
    student = logits.requires_grad_()
    divergence = class_divergence(student, teacher)
    cross_entropy = functional.cross_entropy(student, teacher.softmax(1))
    entropy = functional.cross_entropy(teacher, teacher.softmax(1))
    assert float(divergence.detach()) >= 0
    torch.testing.assert_close(divergence, cross_entropy - entropy)
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (divergence, cross_entropy))
    torch.testing.assert_close(ours, theirs)


def test_a_feature_without_weight_gets_no_gradient() -> None:
    """What has weight 0 is not looked at, even where it is NaN."""
    x = torch.full((2, 2), math.nan, requires_grad=True)
    y = torch.ones(4, requires_grad=True)
    distillation_loss(Prediction((x, y), None), TEACHER, Loss((0.0, 1.0), 0.0)).backward()
    assert x.grad is None
    assert y.grad is not None


def inputs_of(x: Tensor) -> Inputs:
    return Inputs((x,), {}, (len(x),), x.device)


class Linear(nn.Module):
    """A network of one layer, as a student or as a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def __call__(self, call: Call) -> Any:
        return Prediction((self.linear(call[0][0]),), None)


def problem(count: int = 40) -> tuple[Linear, Inputs, Targets]:
    """Return an untrained student, its inputs, and the outputs of another network as the targets."""
    inputs, teacher = inputs_of(torch.randn(count, 5)), Linear()
    return Linear(), inputs, teacher_predictions(teacher, inputs, batch_size=16, memory_limit=2**20)


def settings(**changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {"images_fed": 400, "batch_size": 10, "restarts": 2, "seed": 3}
    return FinetuneConfig(**(values | changes))


def run(
    student: Linear,
    inputs: Inputs,
    targets: Targets,
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
        inputs=inputs,
        targets=targets,
        loss=Loss((1.0,), 0.0),
        config=settings(**changes),
        callback=callback,
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
    finetune(student, student, phases, inputs=inputs, targets=targets, loss=loss, config=settings())
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


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("limit", [0, 2**20])
def test_teacher_predictions_are_those_of_one_large_batch(logits: bool, limit: int) -> None:
    """Whatever the batch size and the memory limit, features and logits come in order and without a graph."""
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)

    def teacher(call: Call) -> Prediction:
        hidden = first(call[0][0])
        return Prediction((hidden, hidden.relu()), second(hidden) if logits else None)

    inputs = inputs_of(torch.randn(11, 4))
    found = teacher_predictions(teacher, inputs, batch_size=3, memory_limit=limit).rows(slice(None), inputs.device)
    expected = teacher((inputs.args, {}))
    assert len(found.features) == 2
    for f, e in zip(found.features, expected.features, strict=True):
        assert f.dtype == e.dtype
        # 11 bits, of the largest number of each image.
        bound = e.detach().abs().amax(1, keepdim=True) * 2**-12
        assert bool(((f - e.detach()).abs() <= bound * (1 + EXACT)).all())
    assert (found.logits is not None) == logits
    if found.logits is not None and expected.logits is not None:
        torch.testing.assert_close(found.logits, expected.logits.detach())
    assert not any(t.requires_grad for t in found.features)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_half_precision_has_room_for_every_size(size: float) -> None:
    """Images with large and small activations beside each other lose as little, and one of zeros nothing."""
    x = torch.randn(6, 4, 3) * torch.tensor([1, 1e-3, 1e4, 1, 0, 1]).view(-1, 1, 1) * size
    targets = teacher_predictions(
        lambda call: Prediction((call[0][0],), None), inputs_of(x), batch_size=4, memory_limit=0
    )
    assert targets.features[0].values.dtype == torch.float16
    (found,) = targets.rows(torch.tensor([5, 2, 4, 1]), x.device).features
    wanted = x[[5, 2, 4, 1]]
    assert bool(((found - wanted).abs() <= 2**-11 * wanted.abs().amax((1, 2), keepdim=True)).all())


def test_a_teacher_may_have_nothing_to_compare() -> None:
    """With the class probabilities alone in the loss, a network without classes is refused later, by its setting."""
    targets = teacher_predictions(
        lambda _: Prediction((), None), inputs_of(torch.randn(5, 4)), batch_size=2, memory_limit=0
    )
    assert targets.features == ()
    assert targets.logits is None


def test_double_precision_is_kept() -> None:
    """What is not in float32 is not rounded."""
    x = torch.randn(5, 4, dtype=torch.float64)
    targets = teacher_predictions(
        lambda call: Prediction((call[0][0],), call[0][0]), inputs_of(x), batch_size=4, memory_limit=2**20
    )
    found = targets.rows(slice(1, 3), x.device)
    assert torch.equal(found.features[0], x[1:3])
    assert found.logits is not None
    assert torch.equal(found.logits, x[1:3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_not_finite_is_refused(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is named, and files that were begun go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.zeros(6, 4)
    x[5, 0] = value
    with pytest.raises(ModelError, match=r"finite.*batch 2"):
        teacher_predictions(lambda call: Prediction((call[0][0],), None), inputs_of(x), batch_size=2, memory_limit=0)
    assert not list(tmp_path.iterdir())


class Two(nn.Module):
    """Two layers, compared behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def __call__(self, call: Call) -> Any:
        hidden = self.first(call[0][0])
        return Prediction((hidden, self.second(hidden)), None)


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
    return finetune(
        student, student, phases, inputs=inputs, targets=targets, loss=output, config=config, callback=callback
    )


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
