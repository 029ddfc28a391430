"""Pictures of the whole job, and of one layer."""

import dataclasses
import math
import re
from xml.etree import ElementTree

import pytest
from mobile_report import mobile_report

from qft_plugin.report.page import charts
from qft_plugin.report.page.layer_charts import charts_of
from qft_plugin.report.page.svg import Figure
from qft_plugin.report.record import Layer, LayerFigures

REPORT = mobile_report()
LAYERS = REPORT.layers


def drawn(figure: Figure | None) -> ElementTree.Element:
    """Parse a picture."""
    assert figure is not None
    return ElementTree.fromstring(figure.svg)


def of_class(root: ElementTree.Element, kind: str) -> str:
    """Return the path of a class."""
    (path,) = [node.attrib["d"] for node in root.iter("path") if node.attrib["class"] == kind]
    return path


def with_figures(layer: Layer, **changes: object) -> Layer:
    """Change figures of a layer."""
    assert layer.figures is not None
    return dataclasses.replace(layer, figures=dataclasses.replace(layer.figures, **changes))


def test_the_loss_has_its_start_and_its_result() -> None:
    """Both are marked with their numbers, and what they are is said in words too."""
    figure = charts.loss_curve(REPORT.losses, REPORT.start_loss, REPORT.final_loss)
    root = drawn(figure)
    words = [node.text for node in root.iter("text")]
    assert "0.0713" in words
    assert "0.0162" in words
    assert "768 steps" in root.attrib["aria-label"]


def test_only_what_is_drawn_has_a_key() -> None:
    """Of a few steps there is no mean; without an evaluation there are no marks."""
    figure = charts.loss_curve([0.1, 0.2, 0.15], None, math.nan)
    assert figure is not None
    assert figure.keys == (("line raw", "loss of each batch"),)
    every = charts.loss_curve(REPORT.losses, REPORT.start_loss, REPORT.final_loss)
    assert every is not None
    assert [words for _, words in every.keys] == ["loss of each batch", "running mean", "start", "result"]


@pytest.mark.parametrize("losses", [(), (0.1,), (math.nan, math.inf)])
def test_no_curve_of_fewer_than_two_losses(losses: tuple[float, ...]) -> None:
    """Nothing is drawn where nothing can be seen."""
    assert charts.loss_curve(losses, 0.1, 0.05) is None


def test_a_long_finetune_is_drawn_by_its_extremes() -> None:
    """Of many steps the lowest and highest are kept, in order; an axis over decades is logarithmic."""
    losses = [1.0 / (n + 1) for n in range(20_000)]
    losses[777] = 50.0
    figure = charts.loss_curve(losses, 60.0, 1e-4)
    assert figure is not None
    raw = of_class(drawn(figure), "line raw")
    assert raw.count("L") <= 2 * charts.POINTS + 2
    heights = [float(point.split()[1]) for point in raw[1:].split("L")]
    assert min(heights) < heights[0]
    assert "logarithmic" in figure.caption


def test_equal_losses_can_be_drawn() -> None:
    """A flat line divides by no zero; so do zeros."""
    assert charts.loss_curve([0.5] * 9, None, 0.5) is not None
    assert charts.loss_curve([0.0] * 9, None, None) is not None


def test_phases_add_up() -> None:
    """Every phase has a letter and its share; what is no time is left out."""
    rows = charts.phases({**REPORT.seconds, "odd": math.nan})
    assert [row[0] for row in rows] == list("ABCDEF")
    assert sum(row[3] for row in rows) == pytest.approx(1)
    assert charts.phases({"a": 0.0}) == charts.phases({}) == []
    assert len({row[0] for row in charts.phases({str(n): 1.0 for n in range(60)})}) == 60


def test_the_costliest_layers_are_named() -> None:
    """The five largest losses are marked by number and colour, in picture and caption; the rest has columns too."""
    worst = charts.worst_layers(LAYERS)
    costs = {n: layer.errors.loss_only for n, layer in enumerate(LAYERS) if layer.errors is not None}
    assert worst == sorted(costs, key=lambda n: -costs[n])[: charts.WORST]
    figure = charts.where_accuracy_is_lost(LAYERS)
    root = drawn(figure)
    assert figure is not None
    assert all(f"{n + 1} {LAYERS[n].name}" in figure.caption for n in worst)
    assert of_class(root, "fill b").count("M") == len(worst)
    assert of_class(root, "mark round c").count("M") == len(LAYERS)
    assert of_class(root, "line a thick").count("L") == len(LAYERS) - 1


def test_layers_without_errors_are_left_out() -> None:
    """NaN and layers that were not measured leave a gap; without any there is no picture and nothing is marked."""
    first = LAYERS[0]
    assert first.errors is not None
    changed = dataclasses.replace(first.errors, loss_only=math.nan, output_alone=None, output_accumulated=None)
    odd = dataclasses.replace(first, errors=changed)
    none = dataclasses.replace(first, errors=None)
    root = drawn(charts.where_accuracy_is_lost([odd, none, *LAYERS[2:]]))
    assert of_class(root, "mark round c").count("M") == len(LAYERS) - 2
    assert 0 not in charts.worst_layers([odd, none])
    endless = dataclasses.replace(first, errors=dataclasses.replace(first.errors, loss_only=math.inf))
    assert charts.worst_layers([*LAYERS, endless])[0] == len(LAYERS)
    assert of_class(drawn(charts.where_accuracy_is_lost([*LAYERS, endless])), "fill b").count("M") == charts.WORST - 1
    assert charts.where_accuracy_is_lost([none]) is None
    assert charts.worst_layers([none]) == []


def test_granularities_have_a_mark_each() -> None:
    """One mark for each layer and granularity; means are in the caption."""
    figure = charts.granularities(LAYERS)
    root = drawn(figure)
    assert figure is not None
    assert all(of_class(root, kind).count("M") == len(LAYERS) for _, kind in charts.SHAPES)
    assert re.search(r"per-tensor 0\.1\d\d, per-channel 0\.1\d\d, doubly per-channel 0\.1\d\d", figure.caption)
    assert charts.granularities([with_figures(LAYERS[0], granularity={"per-tensor": math.nan})]) is None


def test_moves_of_scales() -> None:
    """Each is the step after over the step before; steps that cannot be compared are left out."""
    layer = with_figures(LAYERS[0], scales_before=(1.0, 2.0, 0.0), scales_after=(1.5, 1.0, 1.0))
    assert charts.moves_of(layer) == [0.5, 1.5]
    figure = charts.scale_moves([layer])
    assert figure is not None
    assert "100.0\N{NO-BREAK SPACE}% of 2 steps" in figure.caption
    assert charts.moves_of(with_figures(layer, scales_after=(1.0,))) == []
    assert charts.scale_moves([with_figures(layer, scales_after=())]) is None
    still = charts.scale_moves([with_figures(layer, scales_before=(1.0,), scales_after=(1.0,))])
    assert still is None


def test_integers_of_all_layers_are_added_up() -> None:
    """There is one picture for each grid, and every weight is counted."""
    figures = charts.all_integers(LAYERS)
    assert [figure.title for figure in figures] == ["Integers of the 4-bit weights", "Integers of the 8-bit weights"]
    sums = [sum(sum(x.figures.integers) for x in LAYERS if x.figures and x.bits == bits) for bits in (4, 8)]
    assert [int(figure.caption.split()[0].replace(",", "")) for figure in figures] == sums
    assert charts.all_integers([with_figures(LAYERS[0], integers=(0, 0, 0))]) == []


def test_latencies_are_compared_with_the_first() -> None:
    """Each has its share of the longest; a first of no time compares with nothing."""
    assert charts.latencies({"a": 2.0, "b": 4.0}) == [("a", 2.0, 0.5, 1.0), ("b", 4.0, 1.0, 2.0)]
    assert charts.latencies({"a": 0.0}) == [("a", 0.0, 0.0, None)]
    assert charts.latencies({}) == []


def test_a_layer_has_three_pictures() -> None:
    """Weights on their grid, scales, granularities; all are XML and small."""
    for layer in LAYERS:
        figures = charts_of(layer)
        assert [figure.title for figure in figures] == ["Weights", "Scales", "Error in 4 bits by granularity"]
        assert all(layer.name in drawn(figure).attrib["aria-label"] for figure in figures)
        assert sum(len(figure.svg) for figure in figures) < 9_000


def test_a_histogram_is_as_high_as_its_counts() -> None:
    """Columns are in proportion to the integers, and the outline has the same area."""
    figures = LayerFigures(
        integers=(0, 2, 4, 2, 0),
        low=-2,
        before=(0, 0, 2, 4, 2, 0),
        scales_before=(0.1,),
        scales_after=(0.2,),
        granularity={},
    )
    layer = dataclasses.replace(LAYERS[0], bits=3, figures=figures)
    weights, scales = charts_of(layer)
    path = of_class(drawn(weights), "column a")
    heights = [float(bottom) - float(top) for bottom, top in re.findall(r"M\S+ (\S+?)V([\d.]+)", path)]
    assert heights == pytest.approx([70 / 1.05, 140 / 1.05, 70 / 1.05], abs=0.11)
    assert scales.svg == ""
    assert scales.caption.startswith("0.100 before, 0.200 after (\N{MULTIPLICATION SIGN}2.00)")


@pytest.mark.parametrize(
    "changes",
    [
        {"integers": (0, 0), "before": ()},
        {"integers": (5,), "low": 0, "before": (1, 2, 3)},
        {"before": ()},
        {"before": (0, 0)},
        {"scales_before": (), "scales_after": ()},
        {"scales_before": (math.nan, 0.1, 0.2), "scales_after": (0.1, math.inf, 0.2)},
        {"scales_before": (0.1,) * 5, "scales_after": (0.1,) * 5},
        {"granularity": {}},
        {"granularity": {"per-tensor": math.nan, "per-channel": 0.1}},
        {"granularity": {"per-tensor": 0.0}},
    ],
)
def test_odd_figures_of_a_layer_are_drawn_or_left_out(changes: dict[str, object]) -> None:
    """Missing, empty, equal and broken values raise nothing and write no NaN."""
    for figure in charts_of(with_figures(LAYERS[0], **changes)):
        assert "nan" not in figure.svg
        assert "nan" not in figure.caption


def test_scales_that_stayed_are_told() -> None:
    """A finetune that gained nothing moved nothing."""
    _, scales, _ = charts_of(with_figures(LAYERS[0], scales_before=(0.1, 0.2), scales_after=(0.1, 0.2)))
    assert "did not move" in scales.caption


def test_no_figures_no_pictures() -> None:
    """A layer of which nothing is known has none."""
    assert charts_of(dataclasses.replace(LAYERS[0], figures=None)) == []
