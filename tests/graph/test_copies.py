"""Copies of a model, and plain parameters in the place of what torch computes in front of a call."""

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from qft_plugin.errors import ModelError
from qft_plugin.graph.copies import copy_of, plain_copy


def old_weight_norm(layer: nn.Module) -> None:
    """Put torch's older hook on a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces that it will go
        nn.utils.weight_norm(layer)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    "pruned_twice": lambda layer: [
        prune.random_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call]
        for _ in range(2)
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plain_copy_computes_the_same(name: str) -> None:
    """Its weights are parameters, and the model keeps its parametrization, hooks and classes."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(3, 6)
    CHANGES[name](model[0])
    model(x)
    model.eval()
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    plain = plain_copy(model)
    assert sorted(plain.model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert not parametrize.is_parametrized(plain.model)
    assert torch.equal(plain.model(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        plain.model.get_parameter("0.weight").zero_()
    assert torch.equal(model(x), expected)
    if "pruned" in name:
        assert torch.equal(plain.kept["0.weight"], model[0].weight_mask != 0)
    else:
        assert plain.kept == {}


def test_a_copy_has_the_values_of_tensors_with_a_history() -> None:
    """Wherever an attribute has them; none of the model's own is shared."""
    model = nn.Linear(2, 2)
    model.last = {"features": [model(torch.ones(1, 2))]}
    found = copy_of(model).last["features"][0]
    assert torch.equal(found, model.last["features"][0])
    assert found.is_leaf
    assert found.data_ptr() != model.last["features"][0].data_ptr()


def test_what_cannot_be_copied() -> None:
    """It is named in the words of Python."""
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"copy\.deepcopy can copy.*cannot pickle '_thread.lock'"):
        copy_of(model)
