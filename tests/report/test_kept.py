"""The report that a model carries: it is copied with the model, and is no part of it."""

import copy

import pytest
import torch
from reports import REPORT
from torch import fx, nn

from qft_plugin.errors import ConfigError
from qft_plugin.report.kept import hand_report_on, keep_report, report_of


def plain() -> nn.Module:
    """Return a network."""
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@pytest.mark.parametrize("make", [plain, lambda: fx.symbolic_trace(plain())], ids=["module", "fx module"])
def test_a_copy_keeps_it(make: type[nn.Module]) -> None:
    """Of a module, and of one of torch.fx, whose copies lose their attributes; the state dict is as it was."""
    model = make()
    before = list(model.state_dict())
    keep_report(model, REPORT)
    assert report_of(model) is REPORT
    assert report_of(copy.deepcopy(model)) == REPORT
    assert list(model.state_dict()) == before
    assert torch.equal(model(torch.ones(1, 2)), copy.deepcopy(model)(torch.ones(1, 2)))


def test_it_is_handed_on() -> None:
    """To a model that was made of another one; where there is none, nothing is."""
    model, other = plain(), plain()
    hand_report_on(model, other)
    with pytest.raises(ConfigError):
        report_of(other)
    keep_report(model, REPORT)
    hand_report_on(model, other)
    assert report_of(other) is REPORT


@pytest.mark.parametrize("model", [plain(), "a path"])
def test_a_model_without_one_is_refused(model: nn.Module) -> None:
    """With what it is, and what to do."""
    with pytest.raises(ConfigError, match=r"has quantized in this process.*Found a .* without a report.*to_json"):
        report_of(model)
