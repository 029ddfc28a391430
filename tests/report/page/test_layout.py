"""Where the boxes of a graph are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.report.page.layout import GAP, LANE, apart, layout

RESIDUAL = [[], [0], [1], [2, 0], [3]]
INCEPTION = [[], [0], [0], [2], [0], [1, 3, 4]]


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    """Draw a graph whose boxes read earlier ones."""
    count = draw(st.integers(1, 14))
    return [draw(st.lists(st.integers(0, n - 1), max_size=3)) if n else [] for n in range(count)]


@given(inputs=graphs())
def test_boxes_are_below_what_they_read_and_apart(inputs: list[list[int]]) -> None:
    """No two places of a row overlap, every edge goes one row down, and all is inside the width."""
    widths = [50.0 + 10 * (n % 3) for n in range(len(inputs))]
    placed = layout(inputs, widths)
    for box, reads in enumerate(inputs):
        assert all(placed.row[k] < placed.row[box] for k in reads)
    wide = {p: widths[p[0]] if placed.row[p[0]] == p[1] else LANE for p in placed.x}
    for row in {r for _, r in placed.x}:
        places = sorted((p for p in placed.x if p[1] == row), key=placed.x.__getitem__)
        for a, b in itertools.pairwise(places):
            assert placed.x[b] - placed.x[a] >= (wide[a] + wide[b]) / 2 + GAP - 1e-6
    assert all(lower[1] == upper[1] + 1 for upper, lower in placed.edges)
    assert min(placed.x[p] - wide[p] / 2 for p in wide) >= -1e-6
    assert max(placed.x[p] + wide[p] / 2 for p in wide) <= placed.width + 1e-6


@given(inputs=graphs())
def test_every_edge_can_be_followed(inputs: list[list[int]]) -> None:
    """From each box one comes to all that it reads, upwards along the edges, and to nothing else."""
    placed = layout(inputs, [50.0] * len(inputs))
    above: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for upper, lower in placed.edges:
        above.setdefault(lower, []).append(upper)
    for box, reads in enumerate(inputs):
        found, todo = set(), list(above.get((box, placed.row[box]), []))
        while todo:
            place = todo.pop()
            if placed.row[place[0]] == place[1]:
                found.add(place[0])
            else:
                todo += above[place]
        assert found == set(reads)


def test_a_residual_block_stays_in_line() -> None:
    """Its boxes are below each other, and the edge that skips them passes on the right."""
    placed = layout(RESIDUAL, [100.0] * 5)
    xs = [placed.x[n, placed.row[n]] for n in range(5)]
    assert xs == pytest.approx([xs[0]] * 5, abs=1.0)
    assert placed.x[0, 1] > xs[0] + 50


def test_lopsided_blocks_do_not_drift() -> None:
    """Each block of attention ends where it began, however much its inside leans to one side."""
    inputs: list[list[int]] = [[]]
    ends = [0]
    for _ in range(20):
        x = ends[-1]
        n = len(inputs)
        # q, k and v; a product of two of them, one with the third, and the addition.
        inputs += [[x], [x], [x], [n, n + 1], [n + 3, n + 2], [n + 4, x]]
        ends.append(n + 5)
    placed = layout(inputs, [100.0] * len(inputs))
    xs = [placed.x[k, placed.row[k]] for k in ends]
    assert xs == pytest.approx([xs[0]] * len(xs), abs=1.0)
    assert placed.width < 500


def test_branches_are_side_by_side() -> None:
    """Boxes that read the same stand in one row, their reader below the middle."""
    placed = layout(INCEPTION, [100.0] * 6)
    assert [placed.row[n] for n in (1, 2, 4)] == [1, 1, 1]
    assert len({placed.x[n, 1] for n in (1, 2, 4)}) == 3
    assert placed.width >= 3 * 100 + 2 * GAP


def test_apart_is_least_squares() -> None:
    """Boxes that want the same place are spread around it, others stay where they want to be."""
    assert apart([0, 0], [10, 10], [1, 1]) == pytest.approx([-(10 + GAP) / 2, (10 + GAP) / 2])
    assert apart([0, 500], [10, 10], [1, 1]) == pytest.approx([0, 500])
    assert apart([0, 0], [10, 10], [1, 1e-9])[0] == pytest.approx(0, abs=1e-6)


def test_nothing_to_lay_out() -> None:
    """A graph without boxes has no width."""
    assert layout([], []).width == 0
