"""What the teacher computed: in order, in half the memory, and refused where it is not finite."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from students import inputs_of
from torch import nn

from qft_plugin.errors import ModelError
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.loss import Prediction
from qft_plugin.training.teacher import teacher_predictions

EXACT = 1e-6
"""float32 sums of a few hundred terms in another order."""


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
