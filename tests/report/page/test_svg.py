"""Pieces of SVG."""

from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qft_plugin.report.page.svg import Axis, axis_over, bars, columns, frame, marks, path, picture, px, text

SIZES = st.floats(1e-9, 1e9)


@given(low=SIZES, factor=st.floats(1.001, 1e12), log=st.booleans(), most=st.integers(2, 8))
@example(low=2.0, factor=1001001003.0, log=True, most=2)
def test_ticks_are_few_and_inside(low: float, factor: float, log: bool, most: int) -> None:
    """Every axis has some ticks, ascending, not beyond its ends, and hardly more than asked for."""
    axis = Axis(low, low * factor, 0, 100, log)
    ticks = axis.ticks(most)
    assert ticks == sorted(ticks)
    assert len(ticks) <= most + 1
    room = 1e-3 * low if log else 1e-6 * (axis.high - axis.low)
    assert all(low - room <= t <= axis.high * 1.001 for t in ticks)


@given(values=st.lists(SIZES, min_size=1, max_size=5), zero=st.booleans(), log=st.booleans())
def test_an_axis_holds_all_values(values: list[float], zero: bool, log: bool) -> None:
    """Each value is inside, whatever they are, and order is kept."""
    axis = axis_over(values, 100, 0, zero=zero, log=log)
    places = [axis(v) for v in sorted(values)]
    assert all(0 <= p <= 100 for p in places)
    assert places == sorted(places, reverse=True)
    assert axis.low <= min(values) <= max(values) <= axis.high


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_an_axis_of_one_value(value: float) -> None:
    """Equal values, or zeros, do not divide by zero."""
    axis = axis_over([value, value], 0, 100)
    assert axis.low <= value <= axis.high
    assert axis.low < axis.high


def test_a_picture_is_xml_with_its_words() -> None:
    """All pieces together parse, names are escaped, and the alternative is there."""
    x, y = Axis(0, 10, 50, 200), Axis(1, 1000, 100, 0, True)
    parts = [
        frame(x, y),
        path([(0, 1), (2, 3)], "line"),
        marks([(1, 1)], "mark"),
        bars([(0, 0, 5, 5)], "fill"),
        columns([(3, 4)], 10, 2, "column"),
        text(1, 2, "<b>&"),
    ]
    root = ElementTree.fromstring(picture(200, 100, parts, alternative='says "<i>"'))
    assert root.attrib["aria-label"] == 'says "<i>"'
    assert "<b>&" in [node.text for node in root.iter("text")]
    assert len(list(root.iter("path"))) == 6


def test_nothing_is_drawn_of_nothing() -> None:
    """Empty data make no element."""
    assert path([], "a") == marks([], "a") == bars([(0, 0, 1, 0)], "a") == columns([(0, 10)], 10, 1, "a") == ""


def test_places_have_one_decimal() -> None:
    """And no minus in front of a zero."""
    assert [px(v) for v in (3.04, -0.01, -2.56, 10)] == ["3", "0", "-2.6", "10"]
