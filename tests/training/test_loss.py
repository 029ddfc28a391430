"""The loss: by hand, without units, of features and of class probabilities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from qft_plugin.training.loss import Loss, Prediction, class_divergence, distillation_loss, normalised_l2

EXACT = 1e-6
"""float32 sums of a few hundred terms in another order."""


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
