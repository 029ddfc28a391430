"""What linked layers share survives what torch does to a model: state dicts, copies, assigned weights, float64."""

import copy

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.config
import torch
from brevitas_models import (
    activation_scalings,
    assert_same_state,
    build,
    every_model,
    images,
    integers,
    linked,
    relative,
    run,
    scramble,
    shared_log_c,
    state_of,
    weight_scalings,
)
from torch import nn

from qft_plugin.brevitas import (
    QFTInt4Weight,
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    link,
)

pytestmark = pytest.mark.core

EXACT_64 = 1e-12
"""Relative L2 difference of outputs whose scales were computed another way in float64."""


@every_model
@pytest.mark.parametrize("weight", [QFTInt4Weight, QFTInt4WeightPerTensorFloat], ids=["channel", "tensor"])
def test_the_state_goes_into_a_fresh_linked_model(name, weight):
    """A trained state dict in a fresh linked model, whatever its values were, gives the same outputs bit by bit."""
    model, x = linked(name, weight=weight)
    scramble(model)
    expected = run(model, x)
    fresh, other = linked(name, weight=weight)
    scramble(fresh)
    assert not torch.equal(run(fresh, x), expected)
    fresh.load_state_dict(model.state_dict())
    assert_same_state(fresh, state_of(model))
    assert torch.equal(run(fresh, x), expected)
    link(fresh, other)
    assert torch.equal(run(fresh, x), expected)


def test_doubly_per_channel_state():
    """The left scales of a doubly per-channel weight are in the state dict and survive linking and loading."""
    model, x = linked("residual", weight=QFTInt4WeightDoublyPerChannelFloat)
    scramble(model)
    fresh, _ = linked("residual", weight=QFTInt4WeightDoublyPerChannelFloat)
    fresh.load_state_dict(model.state_dict())
    assert sum(n.endswith("log_L") for n in model.state_dict()) == len(weight_scalings(model))
    assert torch.equal(run(fresh, x), run(model, x))


def test_a_linked_state_in_an_unlinked_model():
    """Loading what was linked into what was not says to link first."""
    model, _ = linked("residual")
    with pytest.raises(RuntimeError, match=r"comes from a linked model.*link\(model, example_input\)"):
        build("residual").load_state_dict(model.state_dict())


def test_an_unlinked_state_in_a_linked_model():
    """Loading what was not linked into what was names what is missing."""
    plain = build("residual")
    run(plain, images("residual"))
    with pytest.raises(RuntimeError, match="log_c"):
        linked("residual")[0].load_state_dict(plain.state_dict())


@pytest.mark.parametrize("changed", ["copy", "original"])
@pytest.mark.parametrize("name", ["residual", "on_layers", "shared_activation", "added", "foreign"])
def test_a_copy_is_on_its_own(name, changed):
    """After a deepcopy, loading into one of the two models changes it alone, and it computes what was loaded."""
    model, x = linked(name)
    scramble(model)
    source = copy.deepcopy(model)
    scramble(source)
    wanted, state = run(source, x), state_of(source)
    copied = copy.deepcopy(model)
    target, other = (copied, model) if changed == "copy" else (model, copied)
    before, expected = state_of(other), run(other, x)
    target.load_state_dict(state)
    assert_same_state(target, state)
    assert torch.equal(run(target, x), wanted)
    assert_same_state(other, before)
    assert torch.equal(run(other, x), expected)
    assert not {id(p) for p in target.parameters()} & {id(p) for p in other.parameters()}
    # And what is trained afterwards is what is used.
    with torch.no_grad():
        for scaling in weight_scalings(target).values():
            scaling.log_F.add_(0.5)
    assert not torch.equal(run(target, x), wanted)
    assert torch.equal(run(other, x), expected)
    link(target, x)
    assert {id(s.factors) for s in weight_scalings(target).values() if s.linked} == {
        id(s.factors) for s in activation_scalings(target).values() if s.linked
    }


def test_a_copy_of_an_unlinked_model_is_on_its_own():
    """The same before linking: the copy builds its quantizers for its own layers, and links on its own."""
    model, x = build("residual"), images("residual")
    expected = run(model, x)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    link(copied, x)
    scramble(copied)
    assert not any(s.linked for s in weight_scalings(model).values())
    assert torch.equal(run(model, x), expected)
    assert not torch.equal(run(copied, x), expected)


@pytest.mark.parametrize("on_copy", [False, True], ids=["original", "copy"])
def test_assigned_weights(on_copy):
    """Assigning a weight rebuilds the quantizer with the scales and links that it had, in a copy too."""
    original, x = linked("residual")
    scramble(original)
    model = copy.deepcopy(original) if on_copy else original
    scales = {n: model.get_submodule(n).weight_quant.scale().clone() for n in weight_scalings(model)}
    before = state_of(original)
    expected = run(model, x)
    model.c2.weight = nn.Parameter(model.c2.weight.detach().clone())
    assert torch.equal(run(model, x), expected)
    model.c2.weight = nn.Parameter(model.c2.weight.detach() * 0.5)
    assert all(torch.equal(model.get_submodule(n).weight_quant.scale(), s) for n, s in scales.items())
    assert not torch.equal(run(model, x), expected)
    if on_copy:
        assert_same_state(original, before)
    link(model, x)
    with torch.no_grad():
        shared_log_c(model).add_(0.3)
    assert not torch.equal(model.c2.weight_quant.scale(), scales["c2"])


def test_double_precision():
    """A linked model moves to float64 as a whole; there its function differs by float32 rounding alone."""
    model, x = linked("residual")
    scramble(model)
    whole = {n: integers(model.get_submodule(n)) for n in weight_scalings(model)}
    scales = {n: model.get_submodule(n).weight_quant.scale().clone() for n in whole}
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for name in whole:
        assert torch.allclose(model.get_submodule(name).weight_quant.scale(), scales[name].double(), rtol=1e-6)
        assert (integers(model.get_submodule(name)) != whole[name]).double().mean() < 0.01
    before = run(model, x.double())
    assert before.dtype == torch.float64
    link(model, x.double())
    assert torch.equal(run(model, x.double()), before)


def test_linking_in_double_precision():
    """Linked in float64, the function stays to float64 rounding."""
    model, x = build("residual").double(), images("residual").double()
    before = run(model, x)
    link(model, x)
    assert relative(run(model, x), before) < EXACT_64


@pytest.mark.parametrize("linked_before", [False, True], ids=["unlinked", "linked"])
def test_a_float_checkpoint(linked_before, monkeypatch):
    """With Brevitas' IGNORE_MISSING_KEYS float weights load, and weight scales are chosen anew from them."""
    monkeypatch.setattr(brevitas.config, "IGNORE_MISSING_KEYS", True)
    model, x = build("residual"), images("residual")
    run(model, x)
    if linked_before:
        link(model, x)
    steps = {n: model.get_submodule(n).weight_quant.scale().clone() for n in weight_scalings(model)}
    ranges = {n: s.log_s.item() for n, s in activation_scalings(model).items()}
    floats = {n: 8 * t for n, t in model.state_dict().items() if n.endswith((".weight", ".bias"))}
    model.load_state_dict(floats)
    run(model, x)
    for name, step in steps.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, floats[f"{name}.weight"])
        assert torch.allclose(layer.weight_quant.scale(), 8 * step, rtol=1e-4)
    assert {n: s.log_s.item() for n, s in activation_scalings(model).items()} == ranges
