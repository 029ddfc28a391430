"""Which layers are raised: arithmetic by hand, and what rounding costs in a small network."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parts import looked
from test_run import batches, network, settings
from torch import Tensor, nn

from qft_plugin.config import HardwareSpec, QFTConfig
from qft_plugin.job.parts import Parts
from qft_plugin.job.raising import WIDE, Analysis, Candidate, analyse, between, by_worth, enough, extra_of, within
from qft_plugin.tensors.mmse import weight_scale
from qft_plugin.training.loss import class_divergence


def analysis_of(candidates: list[Candidate], *, fixed: int = 0, rest: float = 0.0) -> Analysis:
    """Return an analysis in which there are weights of 7 bits beside the candidates."""
    sizes = {c.weight: c.size for c in candidates} | ({"fixed": fixed} if fixed else {})
    bits = {c.weight: c.bits for c in candidates} | ({"fixed": 7} if fixed else {})
    return Analysis(64, bits, sizes, by_worth(candidates), rest)


THREE = [Candidate("large", 1000, 4, 0.5), Candidate("small", 10, 4, 0.1), Candidate("middle", 100, 4, 0.2)]
"""Gains for each weight: 0.0005, 0.01, 0.002."""


def test_worst_for_their_size_first() -> None:
    """A small layer with a small gain is before a large one with a large gain; of equal ones the smaller is first."""
    assert [c.weight for c in by_worth(THREE)] == ["small", "middle", "large"]
    useless = [Candidate("b", 20, 4, 0.0), Candidate("a", 10, 4, 0.0)]
    assert [c.weight for c in by_worth(useless)] == ["a", "b"]
    assert [c.weight for c in by_worth([Candidate("a", 10, 2, 0.5), Candidate("b", 10, 6, 0.25)])] == ["b", "a"]


@pytest.mark.parametrize(
    ("limit", "raised"),
    [
        (4, []),
        (4 + 29 / 1110, []),
        (4 + 30 / 1110, ["small"]),
        (4 + 329 / 1110, ["small"]),
        (4 + 330 / 1110, ["small", "middle"]),
        (6.99, ["small", "middle"]),
        (7, ["small", "middle", "large"]),
    ],
)
def test_layers_that_fit_by_hand(limit: float, raised: list[str]) -> None:
    """1,110 weights: 10 more of 7 bits take 30 bits more, 100 take 300, 1,000 take 3,000."""
    assert [c.weight for c in within(analysis_of(THREE), limit)] == raised


def test_a_layer_that_is_too_large_is_left_out_for_smaller_ones() -> None:
    """The worst one does not fit, the next one does."""
    layers = [Candidate("large", 1000, 4, 9.0), Candidate("small", 10, 4, 0.01)]
    assert [c.weight for c in within(analysis_of(layers), 4.1)] == ["small"]


def test_weights_of_other_layers_count() -> None:
    """As many weights with 7 bits make 5.5 bits of 4; the budget is over all of them."""
    analysis = analysis_of(THREE, fixed=1110)
    assert analysis.average(()) == 5.5
    assert analysis.average(within(analysis, 6.9)) == 5.5 + 330 / 2220


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(2, 6), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(0, 10**5),
)
def test_the_mean_bit_width_is_never_above_the_limit(
    layers: list[tuple[int, int, float]], share: float, fixed: int
) -> None:
    """Whatever the layers are; and nothing that would fit is left out."""
    candidates = [Candidate(f"{i}", size, bits, gain) for i, (size, bits, gain) in enumerate(layers)]
    analysis = analysis_of(candidates, fixed=fixed)
    limit = analysis.average(()) + share * (WIDE - analysis.average(()))
    raised = within(analysis, limit)
    assert analysis.average(raised) <= limit * (1 + 1e-6)
    for other in set(candidates) - set(raised):
        assert analysis.average([*raised, other]) > limit * (1 - 1e-6)


@pytest.mark.parametrize(
    ("share", "rest", "count"),
    [(1, 0, 0), (0.9, 0, 1), (0.874, 0, 2), (0.625, 0, 2), (0.62, 0, 3), (0, 0, 3), (0.1, 0.2, 3), (0.9, 0.2, 1)],
)
def test_as_many_as_the_cost_asks_for(share: float, rest: float, count: int) -> None:
    """Of costs 0.1, 0.2 and 0.5, and what remains; where even that is too much, all."""
    assert enough(analysis_of(THREE, rest=rest), share) == count


def test_half_of_the_bits_between() -> None:
    """Between none and all of 3,330 bits: 330 are nearer to the half than 30."""
    order = by_worth(THREE)
    assert [extra_of(order, count) for count in range(4)] == [0, 30, 330, 3330]
    assert between(order, 0, 3) == 2
    assert between(order, 0, 2) == 1


def analysed(config: QFTConfig, model: nn.Module | None = None) -> tuple[Analysis, Parts, list[Tensor]]:
    items = batches()
    start, problem = looked(model or network(), items, replace(config, finetune=None))
    return analyse(start, problem, config), Parts(start, problem, config), items


def test_costs_by_hand() -> None:
    """The gain of a layer is the divergence of the float network with its weight on 3 bits, less that on 7."""
    analysis, parts, items = analysed(settings(weight_bits=3))
    x, (_, layer, _) = torch.cat(items), parts.layers
    W, costs = parts.floating[layer.weight], []
    with torch.no_grad():
        expected = parts.run(parts.none(), ((x,), {})).logits
        for bits, high in ((3, 3), (7, 63)):
            S = weight_scale(W, layer.axes, bits=bits, per_channel=True).view(-1, 1, 1, 1)
            rounded = parts.exchanged(parts.none(), layer.weight, (W / S).round().clamp(-high, high) * S)
            found = parts.run(rounded, ((x,), {})).logits
            assert found is not None
            assert expected is not None
            costs.append(float(class_divergence(found, expected)))
    (candidate,) = [c for c in analysis.candidates if c.weight == layer.weight]
    assert candidate == Candidate(layer.weight, 576, 3, pytest.approx(costs[0] - costs[1], rel=1e-6))
    assert costs[0] > 100 * costs[1]
    assert {c.weight for c in analysis.candidates} == {"0.weight", "2.weight", "6.weight"}
    assert 0 < analysis.rest < sum(c.gain for c in analysis.candidates)


def test_what_the_user_has_fixed_is_no_candidate() -> None:
    """By name, by pattern, or because it has 8 bits; what it costs remains."""
    fixed = {"0.weight": 3, "2.*": 8}
    analysis, _, _ = analysed(settings(layer_bits=fixed))
    assert [c.weight for c in analysis.candidates] == ["6.weight"]
    assert analysis.bits == {"0.weight": 3, "2.weight": 8, "6.weight": 4}
    assert analysis.sizes == {"0.weight": 216, "2.weight": 576, "6.weight": 32}
    free, _, _ = analysed(settings(layer_bits={"0.weight": 3}))
    assert analysis.rest > 0.5 * (free.rest - free.candidates[0].gain)
    nothing = analysed(settings(weight_bits=8))[0]
    assert nothing.candidates == ()
    assert nothing.rest < 0.1 * analysis.rest


def test_one_scale_or_one_for_each_channel() -> None:
    """Where an output channel is far larger, rounding costs much more with one scale for all of them."""
    model, costs = network(), []
    with torch.no_grad():
        model[2].weight[0] *= 8  # type: ignore[index]
    for rescale in ("layerwise", "channelwise"):
        config = settings(equalize=False, hardware=HardwareSpec(rescale=rescale))  # type: ignore[arg-type]
        analysis, _, _ = analysed(config, model)
        costs += [c.gain for c in analysis.candidates if c.weight == "2.weight"]
    assert costs[0] > 2 * costs[1]
