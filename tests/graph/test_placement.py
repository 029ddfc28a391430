"""Which quantizer stands on a layer's input and output, and which of them additions and kernels tie together."""

from dataclasses import replace

import pytest
from graphs import chain, conv_op, linear_op, unary_op

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import Const, LayerGraph, Op, Ref
from qft_plugin.graph.operations import ADDS, JOINS, KEEPS_GRID, TABLE
from qft_plugin.graph.placement import (
    ActivationGrid,
    Placement,
    addends,
    joined,
    merged,
    only_divided,
    quantizer_after,
    quantizers_before,
)

MAP = (1, 4, 2, 2)


def branched() -> LayerGraph:
    """Write down: a -> relu -> max pool -> reshape -> b -> relu6; b's activation is read by c and d."""
    return chain(
        conv_op("a", "x", shape=(4, 3)),
        unary_op("act", "relu", "a"),
        unary_op("pool", "max_pool2d", "act", 1),
        unary_op("shape", "reshape", "pool", MAP),
        conv_op("b", "shape", shape=(4, 4)),
        unary_op("act6", "relu6", "b"),
        conv_op("c", "act6", shape=(4, 4)),
        conv_op("d", "act6", shape=(4, 4)),
        unary_op("curve", "silu", "c"),
        shapes={"x": (1, 3, 2, 2)} | dict.fromkeys(["a", "act", "pool", "shape", "b", "act6", "c", "d", "curve"], MAP),
        outputs=("curve", "d"),
    )


def placed(on_tensor: dict[str, str] | None = None, on_input: dict[tuple[str, int], str] | None = None) -> Placement:
    return Placement({}, on_tensor or {}, on_input or {}, {})


@pytest.mark.parametrize(
    ("layer", "placement", "expected"),
    [
        ("b", placed({"act": "q"}), "q"),
        ("b", placed({"act": "q", "pool": "nearer"}), "nearer"),
        ("b", placed({"act": "q"}, {("b", 0): "own"}), "own"),
        ("b", placed({}, {("pool", 0): "q"}), "q"),
        ("b", placed({"a": "before relu"}), None),
        ("a", placed({"x": "input"}), "input"),
        ("a", placed(), None),
        ("c", placed({"b": "before relu6"}), None),
        ("c", placed({}, {("d", 0): "of d alone"}), None),
    ],
)
def test_quantizer_before(layer: str, placement: Placement, expected: str | None) -> None:
    """The search goes back through what keeps the grid, prefers the nearest, and stops at everything else."""
    graph = branched()
    assert quantizers_before(graph, placement, map_dof(graph).layer(f"{layer}.weight")) == (expected,)


@pytest.mark.parametrize(
    ("layer", "placement", "expected"),
    [
        ("a", placed({"act": "q"}), "q"),
        ("a", placed({"a": "at once", "act": "q"}), "at once"),
        ("a", placed({}, {("pool", 0): "q"}), "q"),
        ("b", placed({"act6": "q"}), "q"),
        ("b", placed({}, {("c", 0): "q"}), "q"),
        ("c", placed({"curve": "after silu"}), None),
        ("c", placed({}, {("curve", 0): "before silu"}), "before silu"),
        ("d", placed({"act6": "its input"}), None),
    ],
)
def test_quantizer_after(layer: str, placement: Placement, expected: str | None) -> None:
    """The search goes forward through the activation function only, and ends at the output of the network."""
    graph = branched()
    assert quantizer_after(graph, placement, map_dof(graph).layer(f"{layer}.weight")) == expected


def test_a_factor_in_front_of_a_quantizer() -> None:
    """A quantizer behind a factor for each channel is that of what reads it, and not of the layer before it."""
    graph = branched()
    placement = replace(placed({}, {("c", 0): "q"}), multiplied=frozenset({("c", 0)}))
    assert quantizers_before(graph, placement, map_dof(graph).layer("c.weight")) == ("q",)
    assert quantizer_after(graph, placement, map_dof(graph).layer("b.weight")) is None


def test_no_quantizer_is_found_through_a_join() -> None:
    """An addition makes new values: the quantizers of its inputs are not that of its reader."""
    graph = chain(
        conv_op("a", "x", shape=(4, 4)),
        Op("sum", "add", ("a", "x"), ("sum",), (Ref(0), Ref(1))),
        conv_op("b", "sum", shape=(4, 4)),
        shapes=dict.fromkeys(["x", "a", "sum", "b"], MAP),
        outputs=("b",),
    )
    placement = placed({"a": "q"}, {("sum", 1): "p"})
    assert quantizers_before(graph, placement, map_dof(graph).layer("b.weight")) == (None,)


def joins() -> LayerGraph:
    """Write down a block of GoogLeNet: cat([relu(a(x)), max_pool(x)], 1), doubled by another cat, padded, read by c."""
    shapes = dict.fromkeys(["x", "a", "act", "pool"], MAP) | {"cat": (1, 8, 2, 2)}
    shapes |= {"twice": (1, 16, 2, 2), "pad": (1, 16, 4, 4), "c": (1, 4, 4, 4)}
    return chain(
        conv_op("a", "x", shape=(4, 4)),
        unary_op("act", "relu", "a"),
        unary_op("pool", "max_pool2d", "x", 1),
        Op("cat", "cat", ("act", "pool"), ("cat",), ([Ref(0), Ref(1)], 1)),
        Op("twice", "cat", ("cat", "cat"), ("twice",), ([Ref(0), Ref(1)], 1)),
        unary_op("pad", "pad", "twice", [1, 1, 1, 1]),
        conv_op("c", "pad", shape=(4, 16)),
        shapes=shapes,
        outputs=("c",),
    )


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (placed({"act": "q", "pool": "p"}), ("q", "p")),
        (placed({"act": "q", "x": "image"}), ("q", "image")),
        (placed({"act": "q", "pool": "q"}), ("q",)),
        (placed({"act": "q"}), ("q", None)),
        (placed({"cat": "after"}), ("after",)),
        (placed({"act": "q", "pool": "p"}, {("twice", 0): "left"}), ("left", "q", "p")),
        (placed(), (None,)),
    ],
)
def test_all_parts_of_a_concatenation_have_their_quantizers(
    placement: Placement, expected: tuple[str | None, ...]
) -> None:
    """A layer after a concatenation reads what quantizes its parts, each once; one that all share is the layer's."""
    layer = map_dof(joins()).layer("c.weight")
    assert quantizers_before(joins(), placement, layer) == expected


def test_the_output_of_a_layer_may_be_quantized_after_a_concatenation() -> None:
    """Rounding changes places with a concatenation, a pool and a pad, where nothing else reads what is before it."""
    layer = map_dof(joins()).layer("a.weight")
    assert quantizer_after(joins(), placed({"cat": "q"}), layer) == "q"
    assert quantizer_after(joins(), placed({"twice": "q"}), layer) is None  # two parts of it read the tensor


def test_a_value_that_is_padded_is_quantized_if_it_is_zero() -> None:
    """A quantizer is not found after a padding with another number, nor after a constant that is indexed."""
    for value, expected in ((None, "q"), (0.0, "q"), (0.1, None)):
        graph = chain(
            unary_op("pad", "pad", "x", [1, 1], "constant", value),
            linear_op("c", "pad", shape=(4, 6)),
            shapes={"x": (1, 4), "pad": (1, 6), "c": (1, 4)},
            outputs=("c",),
        )
        assert quantizers_before(graph, placed({"x": "q"}), map_dof(graph).layer("c.weight")) == (expected,)
    graph = chain(
        Op("row", "__getitem__", ("x",), ("row",), (Const("table", (9, 4)), Ref(0))),
        linear_op("c", "row", shape=(4, 4)),
        shapes={"x": (1,), "row": (1, 4), "c": (1, 4)},
        outputs=("c",),
    )
    assert quantizers_before(graph, placed({"x": "q"}), map_dof(graph).layer("c.weight")) == (None,)


def test_what_moves_elements_keeps_their_grid() -> None:
    """Every function that is executed on shadows is looked through, and so is each that only picks values."""
    moves = {name for name, row in TABLE.items() if row.moves is not None}
    assert moves <= KEEPS_GRID
    assert moves >= JOINS
    assert not KEEPS_GRID & (ADDS | {"mean", "sum", "relu", "avg_pool2d", "interpolate"})


def test_what_only_divisions_read_is_found() -> None:
    """Operands are found through what moves their values, unless something else reads them, or they leave."""

    def graph(*last: Op) -> LayerGraph:
        return chain(
            conv_op("a", "x", shape=(4, 4)),
            unary_op("sum", "__getitem__", "a", (slice(None), slice(0, 1))),
            unary_op("rest", "__getitem__", "a", (slice(None), slice(1, 4))),
            Op("div", "__truediv__", ("rest", "sum"), ("div",), (Ref(0), Ref(1))),
            unary_op("half", "div", "div", 2.0),
            *last,
            shapes=dict.fromkeys(["x", "a", "rest", "div", "half", *(op.name for op in last)], MAP)
            | {"sum": (1, 1, 2, 2)},
            outputs=("half", *(op.name for op in last)),
        )

    assert all(only_divided(graph(), name) for name in ("a", "sum", "rest"))
    assert not any(only_divided(graph(), name) for name in ("x", "div", "half"))
    other = graph(unary_op("other", "relu", "sum"))
    assert [only_divided(other, name) for name in ("a", "sum", "rest")] == [False, False, True]
    left = replace(graph(), outputs=("half", "rest"))
    assert [only_divided(left, name) for name in ("a", "sum", "rest")] == [False, True, False]


CENTRED, SIGNED = ActivationGrid(0.1, 0, 255), ActivationGrid(0.1, -128, 127)
SHIFTING, ALSO = (ActivationGrid(0.1, 0, 255, zero, shifts=True) for zero in (30, 99))
NARROWER, AT_END = ActivationGrid(0.1, 0, 15, 3, shifts=True), ActivationGrid(0.1, 0, 255, 255)


@pytest.mark.parametrize(
    ("grids", "share"),
    [
        ((CENTRED, CENTRED), True),
        ((CENTRED, SIGNED), True),
        ((SHIFTING, ALSO), True),
        ((SHIFTING, NARROWER), False),
        ((SHIFTING, CENTRED), False),
        ((CENTRED, AT_END), False),
    ],
)
def test_what_a_kernel_reads_together_has_one_scale_where_it_can(
    grids: tuple[ActivationGrid, ActivationGrid], share: bool
) -> None:
    """Quantizers of the parts form a group if their integers can have one meaning."""
    layers = map_dof(joins()).layers
    placement = Placement(dict(zip(["p", "q"], grids, strict=True)), {"act": "q", "pool": "p"}, {}, {})
    assert joined(joins(), placement, layers) == ((("p", "q"),) if share else ())
    assert joined(joins(), Placement({"q": CENTRED}, {"act": "q"}, {}, {}), layers) == ()


def test_groups_with_a_member_in_common_are_one() -> None:
    """The order in a group is the given one, and single names are no group."""
    assert merged([["c", "a"], ["d"], ["e", "d"], ["a", "b"]], "abcde") == (("d", "e"), ("a", "b", "c"))


def add(name: str, *inputs: str, function: str = "add") -> Op:
    """Return an addition written by hand."""
    return Op(name, function, inputs, (name,), tuple(Ref(i) for i in range(len(inputs))))


def residuals() -> LayerGraph:
    """Write down: a + b -> s1 -> relu -> r1; pool(r1) + c(r1) -> s2; s2 + 1 -> plus; d - e -> s3; plus + plus -> s4."""
    return chain(
        conv_op("a", "x", shape=(4, 4)),
        conv_op("b", "x", shape=(4, 4)),
        add("s1", "a", "b"),
        unary_op("r1", "relu", "s1"),
        conv_op("c", "r1", shape=(4, 4)),
        unary_op("pool", "max_pool2d", "r1", 1),
        add("s2", "pool", "c", function="__iadd__"),
        add("plus", "s2"),
        conv_op("d", "plus", shape=(4, 4)),
        conv_op("e", "plus", shape=(4, 4)),
        add("s3", "d", "e", function="sub"),
        add("s4", "plus", "plus"),
        shapes=dict.fromkeys(["x", "a", "b", "s1", "r1", "c", "pool", "s2", "plus", "d", "e", "s3", "s4"], MAP),
        outputs=("s3", "s4"),
    )


def quantized(*tensors: str, on_input: dict[tuple[str, int], str] | None = None) -> Placement:
    """Return a placement with a quantizer on each tensor, named after it, and perhaps on single inputs."""
    names = [f"q_{name}" for name in tensors]
    grids = dict.fromkeys([*names, *(on_input or {}).values()], ActivationGrid(0.1, 0, 255))
    return Placement(grids, dict(zip(tensors, names, strict=True)), on_input or {}, {})


@pytest.mark.parametrize(
    ("placement", "groups", "loose"),
    [
        (quantized("a", "b", "r1", "c", "s2", "d", "e"), {"a b", "r1 c", "d e"}, "s4"),
        (quantized("a", "b", "r1", "c", "d", "e", "plus"), {"a b", "r1 c", "d e"}, ""),
        (quantized("a", "b", "pool", "c", "d", "plus"), {"a b", "pool c"}, "s3"),
        (quantized("a", "c", "d", "e"), {"d e"}, "s1 s2 s4"),
        (quantized(), set(), "s1 s2 s3 s4"),
    ],
)
def test_addends(placement: Placement, groups: set[str], loose: str) -> None:
    """What one addition reads is a group, found through what keeps the grid; one that adds floats is named."""
    found, found_loose = addends(residuals(), placement)
    assert {" ".join(name.removeprefix("q_") for name in group) for group in found} == groups
    assert " ".join(found_loose) == loose


def test_a_chain_of_residuals_is_one_group() -> None:
    """A quantizer that several additions read ties all that is added there, in the order of the model."""
    names = ["x", "a", "s1", "b", "s2", "c", "s3"]
    graph = chain(
        conv_op("a", "x", shape=(4, 4)),
        add("s1", "x", "a"),
        conv_op("b", "s1", shape=(4, 4)),
        add("s2", "s1", "b"),
        conv_op("c", "s2", shape=(4, 4)),
        add("s3", "c", "s2"),
        shapes=dict.fromkeys(names, MAP),
        outputs=("s3",),
    )
    apart = addends(graph, quantized(*names))
    assert apart == ((("q_x", "q_a"), ("q_s1", "q_b"), ("q_s2", "q_c")), ())
    # One quantizer after all additions, as where a module is called several times.
    shared = Placement(
        dict.fromkeys(["q_x", "q_a", "q_s", "q_b", "q_c"], ActivationGrid(0.1, 0, 255)),
        {"x": "q_s", "a": "q_a", "s1": "q_s", "b": "q_b", "s2": "q_s", "c": "q_c"},
        {},
        {},
    )
    assert addends(graph, shared) == ((("q_a", "q_s", "q_b", "q_c"),), ())


def test_addends_that_are_quantized_for_the_addition_alone() -> None:
    """A quantizer on one input of an operation counts, and one tensor added to itself needs no tie."""
    inputs = {("s1", 0): "left", ("s1", 1): "right"}
    found, loose = addends(residuals(), quantized("plus", on_input=inputs))
    assert found == (("left", "right"),)
    assert loose == ("s2", "s3")


def test_groups_that_meet_are_merged() -> None:
    """Two groups that a later addition joins become one."""
    graph = chain(
        conv_op("a", "x", shape=(4, 4)),
        conv_op("b", "x", shape=(4, 4)),
        conv_op("c", "x", shape=(4, 4)),
        conv_op("d", "x", shape=(4, 4)),
        add("s1", "a", "b"),
        add("s2", "c", "d"),
        add("s3", "b", "c"),
        shapes=dict.fromkeys(["x", "a", "b", "c", "d", "s1", "s2", "s3"], MAP),
        outputs=("s1", "s2", "s3"),
    )
    assert addends(graph, quantized("a", "b", "c", "d")) == ((("q_a", "q_b", "q_c", "q_d"),), ())


SYMMETRIC, NARROW, UNSIGNED = (
    ActivationGrid(0.1, -128, 127),
    ActivationGrid(0.1, -127, 127),
    ActivationGrid(0.1, 0, 255),
)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "grid",
    [
        SYMMETRIC,
        NARROW,
        UNSIGNED,
        ActivationGrid(0.1, 0, 255, 117, shifts=True),
        ActivationGrid(0.1, -128, 127, -31, shifts=True),
        ActivationGrid(0.1, 0, 255, 255),
        ActivationGrid(0.1, -128, 127, -128),
        ActivationGrid(0.1, 0, 15, 3, shifts=True),
    ],
)
def test_a_grid_of_other_bits_covers_the_same_range(grid: ActivationGrid, bits: int) -> None:
    """Sign and narrowness stay, it has so many bits, and its ends move by less than its step."""
    found = grid.with_bits(bits)
    narrow = grid.low + grid.high == 0
    assert found.high - found.low == 2**bits - 1 - narrow
    assert (found.low < 0) == (grid.low < 0)
    assert (found.low + found.high == 0) == narrow
    assert found.shifts == grid.shifts
    assert found.low <= found.zero_point <= found.high
    assert found.scale * (found.high - found.low) == pytest.approx(grid.scale * (grid.high - grid.low))
    for end, before in (("low", grid.low), ("high", grid.high)):
        moved = found.scale * (getattr(found, end) - found.zero_point) - grid.scale * (before - grid.zero_point)
        # Signed grids have one integer more below 0 than above: half of it is lost to narrower ones.
        assert abs(moved) <= found.scale / 2 * (1 + 1e-9) + (0 if grid.low == 0 else grid.scale / 2)
    if grid.zero_point in (grid.low, grid.high):
        assert found.zero_point == (found.low if grid.zero_point == grid.low else found.high)


@pytest.mark.parametrize("grid", [SYMMETRIC, NARROW, UNSIGNED, ActivationGrid(0.1, 0, 255, 117, shifts=True)])
def test_a_grid_of_its_own_bits_stays(grid: ActivationGrid) -> None:
    """The same width gives the same grid, and there and back is the same up to the rounding of the zero point."""
    assert grid.with_bits(8) is grid
    back = grid.with_bits(4).with_bits(8)
    assert (back.low, back.high, back.shifts) == (grid.low, grid.high, grid.shifts)
    assert back.scale == pytest.approx(grid.scale)
    assert abs(back.zero_point - grid.zero_point) <= 17
