"""Cross-layer equalization: Eq. 19 to 21, with the symmetries that it must have."""

import math

import numpy as np
import pytest
import reference
import torch
from graphs import chain, conv_op, linear_op, mapped, parameters_of, two_linear, unary_op
from hypothesis import given
from hypothesis import strategies as st
from models import chained, image
from torch import Tensor

from qft_plugin.graph import equalize as module
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.equalize import equalization_factor, equalize
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.layer_graph import DofMap, Op, Ref
from qft_plugin.tensors.mmse import ppq

EXACT = 1e-12
"""float64 sums in another order."""

FLOAT32 = 1e-6
"""The factors are returned as float32 logarithms: half a unit in the last place of numbers up to 8."""


@given(seed=st.integers(0, 10**6), beta=st.floats(0, 1))
def test_equalization_factor_is_equation_19(seed: int, beta: float) -> None:
    """The vector form is the loop of the reference."""
    p, q = np.random.default_rng(seed).uniform(0.1, 3, (2, 5))
    found = equalization_factor(torch.from_numpy(p), torch.from_numpy(q), beta=beta)
    np.testing.assert_allclose(found.numpy(), reference.equalization_factor(p, q, beta), rtol=EXACT)


def toy(width: int = 6) -> DofMap:
    """Map Eq. 17's toy case: two linear layers with a ReLU between them."""
    return two_linear(4, width, 3)


def balanced(width: int = 6) -> dict[str, Tensor]:
    """Return weights whose inner channels all have MMSE scale 1 on both sides."""
    A, B = torch.randn(width, 4).double(), torch.randn(3, width).double()
    return {"a.weight": A / ppq(A, high=7).unsqueeze(1), "b.weight": B / ppq(B.T.contiguous(), high=7)}


BITS = {"a.weight": 4, "b.weight": 4}


def test_equalization_undoes_a_skew() -> None:
    """Eq. 17's toy case: inner channels skewed by random factors come back balanced, up to one common factor."""
    dof, weights = toy(), balanced()
    D = torch.exp(torch.randn(6, dtype=torch.float64))
    skewed = {"a.weight": weights["a.weight"] * D.unsqueeze(1), "b.weight": weights["b.weight"] / D}
    folded = fold_network(dof, equalize(dof, skewed, BITS, beta=0.5).double(), skewed)
    ratio_a, ratio_b = folded["a.weight"] / weights["a.weight"], folded["b.weight"] / weights["b.weight"]
    common = torch.full_like(ratio_a, float(ratio_a[0, 0]))
    torch.testing.assert_close(ratio_a, common, rtol=10 * FLOAT32, atol=0)
    torch.testing.assert_close(ratio_b, 1 / common[0, 0].expand_as(ratio_b), rtol=10 * FLOAT32, atol=0)


def test_equalization_makes_both_sides_equally_fine() -> None:
    """Afterwards a channel's MMSE scale is in the same proportion on its producer's and its consumer's side."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4).double(), "b.weight": torch.randn(3, 6).double()}
    weights["a.weight"] *= torch.exp(torch.randn(6, 1))
    folded = fold_network(dof, equalize(dof, weights, BITS, beta=0.5).double(), weights)
    producer = ppq(folded["a.weight"], high=7)
    consumer = ppq(folded["b.weight"].T.contiguous(), high=7)
    ratio = producer / consumer
    torch.testing.assert_close(ratio, ratio[0].expand(6), rtol=10 * FLOAT32, atol=0)
    assert float(producer.std()) > 0.01


def test_equalization_of_the_consumers_alone() -> None:
    """With beta = 1 all input slices of the consumer become equally large and the producer has no say."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4).double(), "b.weight": torch.randn(3, 6).double()}
    log_c = equalize(dof, weights, BITS, beta=1.0)
    folded = fold_network(dof, log_c.double(), weights)
    consumer = ppq(folded["b.weight"].T.contiguous(), high=7)
    torch.testing.assert_close(consumer, consumer[0].expand(6), rtol=10 * FLOAT32, atol=0)
    other = weights | {"a.weight": weights["a.weight"] * torch.rand(6, 1)}
    torch.testing.assert_close(equalize(dof, other, BITS, beta=1.0), log_c)


def test_sign_of_the_equalization() -> None:
    """A channel that is large in the consumer gets C > 1, log c = -log C < 0: range moves to the producer."""
    dof, weights = toy(), balanced()
    weights["b.weight"][:, 2] *= 16
    log_c = equalize(dof, weights, BITS, beta=0.5)
    channel = dof.layer("a.weight").out_index - 1
    others = log_c[channel[[0, 1, 3, 4, 5]]]
    assert float(log_c[channel[2]] - others.mean()) == pytest.approx(-math.log(4), abs=10 * FLOAT32)
    folded = fold_network(dof, log_c.double(), weights)
    gain = folded["a.weight"][2].abs().sum() / folded["a.weight"][0].abs().sum()
    assert float(gain) > float(weights["a.weight"][2].abs().sum() / weights["a.weight"][0].abs().sum())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_equalization_is_equivariant_to_channel_order(beta: float) -> None:
    """Permuting the inner channels permutes the factors."""
    dof, order = toy(), torch.randperm(6)
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    moved = {"a.weight": weights["a.weight"][order], "b.weight": weights["b.weight"][:, order]}
    log_c, log_c_moved = (equalize(dof, w, BITS, beta=beta) for w in (weights, moved))
    channel = dof.layer("a.weight").out_index - 1
    torch.testing.assert_close(log_c_moved[channel], log_c[channel][order])


def test_equalization_ignores_the_unit_of_a_layer() -> None:
    """Multiplying a whole layer by a constant changes no factor: scales are relative to their own tensor."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    scaled = {"a.weight": weights["a.weight"] * 8, "b.weight": weights["b.weight"] / 4}
    assert torch.equal(equalize(dof, scaled, BITS, beta=0.5), equalize(dof, weights, BITS, beta=0.5))


def test_equalization_is_bounded() -> None:
    """However skewed the weights, no factor leaves [1 / largest, largest]; zero slices have no say."""
    dof, weights = toy(), balanced()
    weights["a.weight"][0] *= 1e6
    weights["b.weight"][:, 1] *= 1e6
    weights["a.weight"][2] = 0
    log_c = equalize(dof, weights, BITS, beta=0.5, largest=8.0)
    assert bool(torch.isfinite(log_c).all())
    assert float(log_c.abs().max()) == pytest.approx(math.log(8), rel=FLOAT32)


def fan_out() -> DofMap:
    """Map two producers whose sum is read by two consumers."""
    shape = (1, 4, 2, 2)
    return map_dof(
        chain(
            conv_op("a", "x", shape=(4, 3)),
            conv_op("b", "x", shape=(4, 3)),
            Op("sum", "add", ("a", "b"), ("sum",), (Ref(0), Ref(1))),
            conv_op("c", "sum", shape=(2, 4)),
            conv_op("d", "sum", shape=(5, 4)),
            shapes={"x": (1, 3, 2, 2), "a": shape, "b": shape, "sum": shape, "c": (1, 2, 2, 2), "d": (1, 5, 2, 2)},
            outputs=("c", "d"),
        )
    )


@pytest.mark.parametrize("quantized", ["abcd", "ac", "ad"])
def test_shared_edges_take_the_weighted_mean(quantized: str) -> None:
    """Eq. 20 and 21: each side is the geometric mean over its layers, weighed by elements; float layers have no say."""
    dof = fan_out()
    shapes = {"a": (4, 3), "b": (4, 3), "c": (2, 4), "d": (5, 4)}
    weights = {f"{k}.weight": torch.randn(*v, 1, 1).double() for k, v in shapes.items()}
    bits = {f"{k}.weight": 4 for k in quantized}
    found = equalize(dof, weights, bits, beta=0.5)
    for m, variable in enumerate((dof.layer("a.weight").out_index - 1).tolist()):
        sides = []
        for names, axis in (("ab", 0), ("cd", 1)):
            slices = []
            for name in names:
                if name in quantized:
                    W = weights[f"{name}.weight"].squeeze()
                    piece = W[m] if axis == 0 else W[:, m]
                    whole = float(ppq(W.reshape(1, -1), high=7))
                    slices.append((float(ppq(piece.reshape(1, -1), high=7)), whole, piece.numel()))
            sides.append(np.array([math.exp(reference.channel_logarithms(slices))]))
        C = reference.equalization_factor(*sides, 0.5)
        assert float(found[variable]) == pytest.approx(-math.log(float(C[0])), abs=FLOAT32)


def test_equalized_real_network_computes_the_same() -> None:
    """The chosen factors fold into a real network without changing its outputs."""
    model, x = chained("residual", "depthwise", "concat"), image()
    dof, tensors = mapped(model, x), parameters_of(model)
    log_c = equalize(dof, tensors, dict.fromkeys((la.weight for la in dof.layers), 4), beta=0.5)
    assert float(log_c.abs().max()) > 0.1
    after = torch.func.functional_call(model, fold_network(dof, log_c.double(), tensors), x)
    torch.testing.assert_close(after, model(x), rtol=1e3 * EXACT, atol=1e3 * EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_equalization_on_an_accelerator() -> None:
    """Weights on an accelerator get the factors that they get on the CPU."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    there = {k: v.cuda() for k, v in weights.items()}
    found = equalize(dof, there, BITS, beta=0.5).cpu()
    torch.testing.assert_close(found, equalize(dof, weights, BITS, beta=0.5), rtol=10 * FLOAT32, atol=10 * FLOAT32)


def test_large_layers_are_estimated_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors from a sixteenth of each weight and a quarter of each slice are close, and are the same every time.

    Every seventh input is ten times as large, so a part that is evenly spaced could see all of these, or none.
    """
    torch.manual_seed(0)
    width = 1022
    dof = map_dof(
        chain(
            linear_op("a", "x", shape=(width, width)),
            unary_op("act", "relu", "a"),
            linear_op("b", "act", shape=(width, width)),
            shapes=dict.fromkeys(("x", "a", "act", "b"), (2, width)),
            outputs=("b",),
        )
    )
    columns = torch.ones(width)
    columns[::7] = 10
    weights = {name: torch.randn(width, width) * columns * (1 + 4 * torch.rand(width, 1)) for name in BITS}
    exact = equalize(dof, weights, BITS, beta=0.5)
    monkeypatch.setattr(module, "OF_WEIGHT", width * width // 16)
    monkeypatch.setattr(module, "OF_SLICE", width // 4)
    found = equalize(dof, weights, BITS, beta=0.5)
    assert not torch.equal(found, exact)
    assert (found - exact).abs().mean() < 0.1
    assert exact.std() > 0.3
    assert torch.equal(found, equalize(dof, weights, BITS, beta=0.5))
