"""Which degrees of freedom belong to which block of a network."""

import pytest
import torch
from graphs import chain, conv_op, unary_op

from qft_plugin.errors import ConfigError
from qft_plugin.graph.comparison import comparison
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import LayerGraph, Op, Ref
from qft_plugin.graph.placement import Placement
from qft_plugin.training.blocks import check_blocks, split, upstream

MAP = (1, 4, 2, 2)


def branched() -> LayerGraph:
    """Write down: a -> act1 -> b -> act2 -> c -> add(act1) -> d -> act3 -> e, with an own head h on act2."""
    return chain(
        conv_op("a", "x", shape=(4, 3)),
        unary_op("act1", "relu", "a"),
        conv_op("b", "act1", shape=(4, 4)),
        unary_op("act2", "relu", "b"),
        conv_op("h", "act2", shape=(4, 4)),
        conv_op("c", "act2", shape=(4, 4)),
        Op("sum", "add", ("c", "act1"), ("sum",), (Ref(0), Ref(1))),
        conv_op("d", "sum", shape=(4, 4)),
        unary_op("act3", "relu", "d"),
        conv_op("e", "act3", shape=(4, 4)),
        shapes={"x": (1, 3, 2, 2)} | dict.fromkeys(["a", "act1", "b", "act2", "h", "c", "sum", "d", "act3", "e"], MAP),
        outputs=("h", "e"),
    )


PLACEMENT = Placement(
    {},
    {"x": "image", "act1": "q1", "act2": "q2", "sum": "qsum", "act3": "q3"},
    {("h", 0): "own", ("e", 0): "late", ("d", 0): "at the end"},
    {},
)


def layers_of(*ends: str) -> list[set[str]]:
    """Return the layers of each block by the names of their calls."""
    graph = branched()
    blocks = split(graph, map_dof(graph), PLACEMENT, comparison(graph, None, ends).inputs[: len(ends)])
    return [{name.removesuffix(".weight") for name in block.layers} for block in blocks]


def test_everything_upstream() -> None:
    """A tensor, what it is computed from, and nothing else."""
    assert upstream(branched(), ["c"]) == {"c", "act2", "b", "act1", "a", "x"}
    assert upstream(branched(), []) == set()


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (("c",), [{"a", "b"}, {"c", "h", "d", "e"}]),
        (("b", "d"), [{"a"}, {"b", "c"}, {"d", "h", "e"}]),
        (("d", "e"), [{"a", "b", "c"}, {"d"}, {"h", "e"}]),
        (("h",), [{"a", "b"}, {"h", "c", "d", "e"}]),
    ],
)
def test_layers_belong_to_the_first_block_that_needs_them(ends: tuple[str, ...], expected: list[set[str]]) -> None:
    """A layer is in the block whose end is the first to be computed from it; side branches are in the last block."""
    assert layers_of(*ends) == expected


def test_quantizers_belong_to_the_block_that_uses_them_first() -> None:
    """The quantizer of the compared tensor is in the block before it, that of a side branch is not."""
    graph = branched()
    ends = comparison(graph, None, ("c", "d")).inputs[:2]
    blocks = split(graph, map_dof(graph), PLACEMENT, ends)
    assert [set(block.quantizers) for block in blocks] == [
        {"image", "q1", "q2"},
        {"qsum", "at the end"},
        {"q3", "own", "late"},
    ]


def test_factors_belong_to_a_block_with_all_their_layers() -> None:
    """Of the factors between b and its readers, and between layers of one block, only the latter train."""
    graph = branched()
    dof_map = map_dof(graph)
    blocks = split(graph, dof_map, PLACEMENT, comparison(graph, None, ("c",)).inputs[:1])
    variables = {layer.weight: set(layer.in_index.tolist()) | set(layer.out_index.tolist()) for layer in dof_map.layers}
    assert any(bool(block.factors.any()) for block in blocks)
    for variable in range(1, dof_map.size + 1):
        holders = {name for name, found in variables.items() if variable in found}
        expected = [holders <= block.layers for block in blocks]
        assert [bool(block.factors[variable - 1]) for block in blocks] == expected
    assert not any(torch.stack([b.factors for b in blocks]).sum(0) > 1)


def test_a_layer_that_is_called_in_two_blocks_is_in_the_first() -> None:
    """One weight cannot train in one block and rest in another: the first call decides."""
    graph = chain(
        conv_op("a", "x", shape=(4, 4), call="first"),
        unary_op("act", "relu", "first"),
        conv_op("a", "act", shape=(4, 4), call="second"),
        conv_op("b", "second", shape=(4, 4)),
        shapes=dict.fromkeys(["x", "first", "act", "second", "b"], MAP),
        outputs=("b",),
    )
    blocks = split(graph, map_dof(graph), Placement({}, {}, {}, {}), comparison(graph, None, ("act",)).inputs[:1])
    assert [set(block.layers) for block in blocks] == [{"a.weight"}, {"b.weight"}]


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (("d", "c"), "between 'd' and 'c'"),
        (("a",), "between the input and 'a'"),
        (("act2", "c"), "between 'act2' and 'c'"),
        (("c", "h"), "between 'c' and 'h'"),
        (("b", "act2"), None),
    ],
)
def test_ends_without_a_layer_between_them_are_refused(ends: tuple[str, ...], words: str | None) -> None:
    """Ends in the wrong order, twice at one tensor, or at the input, are named in the error."""
    graph = branched()
    at = comparison(graph, None, ends)
    if words is None:
        check_blocks(graph, map_dof(graph), at, classes=False)
        return
    with pytest.raises(ConfigError, match=f"FinetuneConfig.blocks.*{words}"):
        check_blocks(graph, map_dof(graph), at, classes=False)


def test_the_last_block_needs_a_layer_before_the_loss() -> None:
    """Where the loss is taken at the end of the last block nothing is left to train, except for class probabilities."""
    graph = branched()
    at = comparison(graph, "e", ("d", "e"))
    with pytest.raises(ConfigError, match="between 'e' and where the loss is taken"):
        check_blocks(graph, map_dof(graph), at, classes=False)
    check_blocks(graph, map_dof(graph), at, classes=True)


def test_an_end_that_matches_nothing_is_an_error() -> None:
    """The message names the setting that the name stands in."""
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.blocks.*'body'"):
        comparison(branched(), None, ("c", "body"))
