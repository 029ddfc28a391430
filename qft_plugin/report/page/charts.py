"""Pictures of the whole job: losses, seconds, and all layers side by side."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from qft_plugin.report.page.numbers import TIMES, known, number, percent, short
from qft_plugin.report.page.svg import Axis, Figure, axis_over, bars, frame, marks, path, picture, px, text
from qft_plugin.report.record import Layer

WIDTH: Final = 990
LEFT: Final = 62
RIGHT: Final = 14

LOG_FROM: Final = 8
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""

POINTS: Final = 300
"""How many places a line has at most."""

WORST: Final = 5
"""How many layers are marked."""

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

FACTORS: Final = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1000)

STILL: Final = 1.0005
"""A scale that moved by less stayed where it was."""

SHAPES: Final = (
    ("per-tensor", "mark square b"),
    ("per-channel", "mark round a"),
    ("doubly per-channel", "mark small c"),
)
"""Marks of the three granularities, which differ in shape and size besides colour."""


def worst_layers(layers: Sequence[Layer]) -> list[int]:
    """List the places of the layers that cost the network most by themselves, worst first; empty without errors."""
    costs = [(layer.errors.loss_only, n) for n, layer in enumerate(layers) if layer.errors is not None]
    ranked = sorted(((cost, n) for cost, n in costs if known(cost) and cost > 0), reverse=True)
    return [n for _, n in ranked[:WORST]]


def loss_curve(losses: Sequence[float], start: float | None, final: float | None) -> Figure | None:
    """Draw the loss of each step, its running mean, and the loss on the images by which the state was chosen."""
    steps = [(n, v) for n, v in enumerate(losses, 1) if math.isfinite(v)]
    ends = [v for v in (start, final) if v is not None and math.isfinite(v)]
    if len(steps) < 2:
        return None
    values = [v for _, v in steps] + ends
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    right = WIDTH - 96
    x, y = Axis(0, len(losses), LEFT, right), axis_over(values, 258, 14, zero=not log, log=log)
    drawn = [("line raw", "loss of each batch", path([(x(n), y(v)) for n, v in _thinned(steps)], "line raw"))]
    window = len(steps) // 16
    if window > 1:  # of a few steps each one can be seen
        mean = zip(steps, _running_mean([v for _, v in steps], window), strict=True)
        smooth = [(x(n), y(v)) for (n, _), v in mean]
        edge = window // 6  # where next to nothing is averaged
        line = path(smooth[edge : len(smooth) - edge : max(1, len(smooth) // POINTS)], "line a thick")
        drawn.append(("line a thick", "running mean", line))
    if start is not None and math.isfinite(start):
        mark = marks([(x.start, y(start))], "mark square b") + text(LEFT + 9, y(start) - 7, number(start), "halo")
        drawn.append(("mark square b", "start", mark))
    if final is not None and math.isfinite(final):
        mark = marks([(x.end, y(final))], "mark round c") + text(right + 9, y(final) + 4, number(final), "halo")
        drawn.append(("mark round c", "result", mark))
    parts = [frame(x, y), *(mark for _, _, mark in drawn), text((LEFT + right) / 2, 292, "step", "m")]
    return Figure(
        title="Loss of the finetune",
        svg=picture(
            WIDTH,
            300,
            parts,
            alternative=f"Loss over {len(losses)} steps: the batches' from {number(steps[0][1])} to "
            f"{number(steps[-1][1])}; on the images of the choice {number(start)} before and {number(final)} after.",
        ),
        caption="Each step's loss is that of its own batch. Start and result are compared on the same images."
        + (" The vertical axis is logarithmic." if log else ""),
        keys=tuple((kind, words) for kind, words, _ in drawn),
    )


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    # Near the ends fewer are averaged, as many before as after, so that a slope does not bend the line.
    reaches = [min(window // 2, n, len(values) - 1 - n) for n in range(len(values))]
    return [(sums[n + reach + 1] - sums[n - reach]) / (2 * reach + 1) for n, reach in enumerate(reaches)]


def _thinned(steps: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep the lowest and the highest of every few steps, so that noise looks as it is."""
    few = math.ceil(len(steps) / POINTS)
    if few <= 2:
        return list(steps)
    kept = []
    for begin in range(0, len(steps), few):
        part = steps[begin : begin + few]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def phases(seconds: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
    """List letter, name, seconds and share of every phase; empty where none took any time."""
    known_ones = {name: s for name, s in seconds.items() if math.isfinite(s) and s >= 0}
    total = sum(known_ones.values())
    letters = [LETTERS[n % 26] + (str(n // 26) if n >= 26 else "") for n in range(len(known_ones))]
    spent = zip(letters, known_ones.items(), strict=True)
    return [(letter, name, s, s / total) for letter, (name, s) in spent] if total > 0 else []


def layer_numbers(count: int) -> list[tuple[float, str]]:
    """List the numbers of layers that stand below an axis of layers."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count / s <= 26 or s == 1000)
    return [(n, str(n)) for n in range(1, count + 1) if n == 1 or n % step == (1 if step == 2 else 0)]


def _over_layers(count: int) -> tuple[float, Axis]:
    """Return the width of a picture of all layers, and its axis of their numbers."""
    width = max(WIDTH, LEFT + RIGHT + 7 * count)
    return width, Axis(0.5, count + 0.5, LEFT, width - RIGHT)


def _finite(points: Iterable[tuple[int, float | None]]) -> list[tuple[int, float]]:
    return [(n, v) for n, v in points if v is not None and math.isfinite(v)]


def where_accuracy_is_lost(layers: Sequence[Layer]) -> Figure | None:
    """Draw the loss by each layer alone, and below it how the error grows from layer to layer."""
    measured = [(n, layer.errors) for n, layer in enumerate(layers, 1) if layer.errors is not None]
    costs = _finite((n, e.loss_only) for n, e in measured)
    grown = _finite((n, e.output_accumulated) for n, e in measured)
    alone = _finite((n, e.output_alone) for n, e in measured)
    if not costs or not grown:
        return None
    width, x = _over_layers(len(layers))
    y = axis_over([v for _, v in costs], 210, 34, zero=True)
    z = axis_over([v for _, v in grown + alone], 424, 264, zero=True)
    numbers = layer_numbers(len(layers))
    wide = min(60.0, max(2.0, 0.62 * (x(2) - x(1))))
    marked = {n + 1 for n in worst_layers(layers)} & {n for n, _ in costs}
    columns = {n: (x(n) - wide / 2, y(v), wide, y.start - y(v)) for n, v in costs}
    parts = [
        text(LEFT, 20, "loss of the network where only this layer is quantized", "strong"),
        frame(x, y, x_ticks=numbers, most=4),
        bars([r for n, r in columns.items() if n not in marked], "fill a"),
        bars([r for n, r in columns.items() if n in marked], "fill b"),
    ]
    last = -math.inf
    for n in sorted(marked):  # numbers of neighbours would cover each other
        parts.append(text(x(n), y(dict(costs)[n]) - 5 - (11 if x(n) - last < 16 else 0), str(n), "m strong"))
        last = x(n)
    parts += [
        text(LEFT, 252, "relative error of the output", "strong"),
        frame(x, z, x_ticks=numbers, most=4),
        path([(x(n), z(v)) for n, v in grown], "line a thick"),
        marks([(x(n), z(v)) for n, v in alone], "mark round c"),
        text((x.start + x.end) / 2, 458, "number of the layer, in the order of execution", "m"),
    ]
    names = [f"{n + 1} {layers[n].name}" for n in worst_layers(layers)]
    most = max(grown, key=lambda p: p[1])
    alternative = (
        f"Losses by {len(costs)} layers. Largest: {', '.join(names) or 'none'}. The error of the output grows to "
        f"{percent(most[1])} at layer {most[0]} and is {percent(grown[-1][1])} at the last."
    )
    return Figure(
        title="Layer by layer",
        svg=picture(width, 466, parts, alternative=alternative),
        caption=f"Costliest by themselves, with their numbers: {', '.join(names) or 'none'}.",
        keys=(
            ("fill a", "loss"),
            ("fill b", "loss of the costliest, with their numbers"),
            ("line a thick", "error in the quantized network"),
            ("mark round c", "error where this layer alone is quantized"),
        ),
    )


def granularities(layers: Sequence[Layer]) -> Figure | None:
    """Draw the error of every float weight on grids of the three granularities (Fig. 3 of the paper)."""
    found = [(n, layer.figures.granularity) for n, layer in enumerate(layers, 1) if layer.figures is not None]
    points = {name: [(n, g[name]) for n, g in found if name in g and math.isfinite(g[name])] for name, _ in SHAPES}
    values = [v for column in points.values() for _, v in column]
    if not values:
        return None
    width, x = _over_layers(len(layers))
    y = axis_over(values, 238, 14, zero=True)
    spans: dict[int, list[float]] = {}
    for n, v in (point for column in points.values() for point in column):
        spans.setdefault(n, []).append(v)
    lines = "".join(f"M{px(x(n))} {px(y(min(v)))}V{px(y(max(v)))}" for n, v in spans.items())
    means = [(name, statistics.fmean(v for _, v in column)) for name, column in points.items() if column]
    said = ", ".join(f"{name} {number(mean)}" for name, mean in means)
    parts = [
        frame(x, y, x_ticks=layer_numbers(len(layers))),
        f'<path class="line faint" d="{lines}"/>',
        *(marks([(x(n), y(v)) for n, v in points[name]], kind) for name, kind in SHAPES),
        text((x.start + x.end) / 2, 272, "number of the layer", "m"),
    ]
    return Figure(
        title="What a finer granularity would bring (Fig. 3)",
        svg=picture(width, 280, parts, alternative=f"Mean relative error of a 4-bit weight: {said}."),
        caption=f"Relative error of each float weight on 4-bit grids that are fitted to it. Means: {said}.",
        keys=tuple((kind, name) for name, kind in SHAPES if points[name]),
    )


def steps_of(layer: Layer) -> list[tuple[float, float]]:
    """List each step of a weight before and after the finetune; empty where they cannot be compared."""
    f = layer.figures
    if f is None or len(f.scales_before) != len(f.scales_after):
        return []
    pairs = zip(f.scales_before, f.scales_after, strict=True)
    return [(before, after) for before, after in pairs if 0 < before < math.inf and 0 < after < math.inf]


def moves_of(layer: Layer) -> list[float]:
    """List by which factor the finetune changed each step of a weight, ascending."""
    return sorted(after / before for before, after in steps_of(layer))


def scale_moves(layers: Sequence[Layer]) -> Figure | None:
    """Draw how far the steps of every weight moved: all, the middle half, and the median; `None` if none moved."""
    moved = {n: moves for n, layer in enumerate(layers, 1) if (moves := moves_of(layer))}
    most = max((max(m[-1], 1 / m[0]) for m in moved.values()), default=1.0)
    if most < STILL:
        return None
    most *= 1.05
    width, x = _over_layers(len(layers))
    y = Axis(1 / most, most, 238, 14, True)
    ticks = [(1.0, f"{TIMES}1")]
    at = y(1)
    for factor in FACTORS:
        if factor <= most and at - y(factor) >= 22:
            ticks += [(factor, f"{TIMES}{short(factor)}"), (1 / factor, f"÷{short(factor)}")]
            at = y(factor)
    grid = "".join(f"M{LEFT} {px(y(v))}H{px(x.end)}" for v, _ in ticks)
    whole = "".join(f"M{px(x(n))} {px(y(m[0]))}V{px(y(m[-1]))}" for n, m in moved.items())
    half = "".join(f"M{px(x(n))} {px(y(_quantile(m, 0.25)))}V{px(y(_quantile(m, 0.75)))}" for n, m in moved.items())
    every = sorted(factor for m in moved.values() for factor in m)
    far = sum(not 1 / 1.1 <= factor <= 1.1 for factor in every) / len(every)
    middle = number(_quantile(every, 0.5))
    said = f"{percent(far)} of {len(every):,} steps moved by more than a tenth; the median is {TIMES}{middle}"
    parts = [
        f'<path class="grid" d="{grid}"/>',
        *(text(LEFT - 6, y(v) + 4, words, "e") for v, words in ticks),
        *(text(x(n), 254, words, "m") for n, words in layer_numbers(len(layers))),
        f'<path class="line a thin" d="{whole}"/><path class="line a box" d="{half}"/>',
        marks([(x(n), y(_quantile(m, 0.5))) for n, m in moved.items()], "mark round b"),
        text((x.start + x.end) / 2, 272, "number of the layer", "m"),
    ]
    return Figure(
        title="How far the finetune moved the scales of weights",
        svg=picture(width, 280, parts, alternative=f"{said}."),
        caption=f"Step after training over step before, one for each channel. {said}.",
        keys=(("line a thin", "all channels"), ("line a box", "the middle half"), ("mark round b", "median")),
    )


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[round(share * (len(ascending) - 1))]


def all_integers(layers: Sequence[Layer]) -> list[Figure]:
    """Draw how often each integer occurs in the whole network, one picture for each grid."""
    grids: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
    for layer in layers:
        if layer.figures is not None and layer.bits is not None and layer.figures.integers:
            key = layer.bits, layer.figures.low, len(layer.figures.integers)
            grids.setdefault(key, []).append(layer.figures.integers)
    drawn = []
    for (bits, low, length), columns in sorted(grids.items()):
        counts = [sum(column) for column in zip(*columns, strict=True)]
        total = sum(counts)
        if total == 0:
            continue
        shares = [c / total for c in counts]
        x, y = Axis(low - 1, low + length, 44, 330), axis_over([100 * s for s in shares], 168, 12, zero=True)
        wide = max(1.2, 0.7 * (x(1) - x(0)))
        zero = shares[-low] if 0 <= -low < length else 0.0
        ends = (shares[0] + shares[-1]) if length > 1 else 0.0
        said = f"{percent(zero)} are 0, {percent(ends)} are at the ends of the grid"
        columns_drawn = [(x(low + n) - wide / 2, y(100 * s), wide, y.start - y(100 * s)) for n, s in enumerate(shares)]
        parts = [
            frame(x, y, x_ticks=integer_ticks(low, length), most=4),
            bars(columns_drawn, "fill a"),
            text(187, 200, "integer", "m"),
            text(4, 8, "%"),
        ]
        few = "1 layer" if len(columns) == 1 else f"{len(columns)} layers"
        drawn.append(
            Figure(
                title=f"Integers of the {bits}-bit weights",
                svg=picture(340, 206, parts, alternative=f"Of {total:,} weights {said}.", kind="small"),
                caption=f"{total:,} weights in {few}; {said}.",
            )
        )
    return drawn


def integer_ticks(low: int, length: int) -> list[tuple[float, str]]:
    """List the integers that stand below an axis of a grid: even ones of a small one, else the ends and 0."""
    high = low + length - 1
    every = (
        [n for n in range(low, high + 1) if n % 2 == 0]
        if length <= 16
        else sorted({low, 0, high} if low < 0 < high else {low, high})
    )
    return [(n, short(n)) for n in every]


def latencies(latency: Mapping[str, float]) -> list[tuple[str, float, float, float | None]]:
    """List what was timed, its milliseconds, its share of the longest, and how many times the first's it is."""
    longest, first = max(latency.values(), default=0.0), next(iter(latency.values()), 0.0)
    return [(name, ms, ms / longest if longest else 0.0, ms / first if first else None) for name, ms in latency.items()]
