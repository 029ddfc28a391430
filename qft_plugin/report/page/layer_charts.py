"""Pictures of one layer: its weights on the grid, its scales, and what other granularities would cost."""

import math
from typing import Final

from qft_plugin.report.page.charts import LOG_FROM, SHAPES, STILL, integer_ticks, moves_of, steps_of
from qft_plugin.report.page.numbers import TIMES, number, percent
from qft_plugin.report.page.svg import Axis, Figure, axis_over, bars, columns, frame, picture, px, text
from qft_plugin.report.record import Layer, LayerFigures

WIDTH: Final = 300
HEIGHT: Final = 170
BOTTOM: Final = 146

CHANNELS: Final = 36
"""How many channels a picture shows at most; of more, every few."""

BINS: Final = 40
"""How many bins of float weights a picture shows at most; of more, neighbours are added up."""


def charts_of(layer: Layer) -> list[Figure]:
    """Draw what there is of a layer."""
    figures = layer.figures
    if figures is None:
        return []
    return [
        f for f in (_histogram(layer, figures), _scales(layer, figures), _granularity(layer, figures)) if f is not None
    ]


def _histogram(layer: Layer, figures: LayerFigures) -> Figure | None:
    after, low = figures.integers, figures.low
    before = _coarser(figures.before)
    if not sum(after):
        return None
    high = low + len(after) - 1
    x = Axis(low - 1, high + 1, 16, WIDTH - 16)
    shares = [n / sum(after) for n in after]
    # Both are shares for a width of one step, so that they can be compared.
    bin_width = (high - low + 2) / len(before) if before else 1.0
    density = [n / sum(before) / bin_width for n in before] if sum(before) else []
    y = Axis(0, max(*shares, *density, 0) * 1.05, BOTTOM, 6)
    across = x(low - 1 + bin_width) - x.start
    steps = "".join(f"V{y(d):.0f}h{px(across)}" for d in density)
    tops = [(x(low + n), y(s)) for n, s in enumerate(shares)]
    parts = [
        columns(tops, BOTTOM, max(1.0, 0.7 * (x(1) - x(0))), "column a"),
        f'<path class="line b" d="M16 {BOTTOM}{steps}V{BOTTOM}"/><path class="axis" d="M16 {BOTTOM}H{WIDTH - 16}"/>',
        *(text(x(v), BOTTOM + 15, words, "m") for v, words in integer_ticks(low, len(after))),
    ]
    zero = after[-low] / sum(after) if low <= 0 <= high else 0.0
    ends = (after[0] + after[-1]) / sum(after)
    return Figure(
        title="Weights",
        svg=picture(WIDTH, HEIGHT, parts, alternative=f"Weights of {layer.name}", kind="small"),
        caption=f"Columns: integers; line: float weights in steps. {percent(zero)} are 0, {percent(ends)} at the ends.",
    )


def _coarser(counts: tuple[int, ...]) -> list[int]:
    """Add up neighbouring bins until there are few; what is left over at the end stays with the last."""
    few = next((k for k in range(1, len(counts) + 1) if len(counts) / k <= BINS and len(counts) % k == 0), 1)
    return [sum(counts[n : n + few]) for n in range(0, len(counts), few)]


def _scales(layer: Layer, figures: LayerFigures) -> Figure | None:
    before, after = figures.scales_before, figures.scales_after
    if not before or not after:
        return None
    moves = moves_of(layer)
    if len(moves) < 2:
        change = f" ({TIMES}{number(moves[0])})" if moves else ""
        return Figure(title="Scales", svg="", caption=f"{_range(before)} before, {_range(after)} after{change}.")
    pairs = sorted(steps_of(layer))
    shown = pairs[:: math.ceil(len(pairs) / CHANNELS)]
    every = [v for pair in pairs for v in pair]
    log = max(every) / min(every) > LOG_FROM
    x = Axis(0, max(1, len(shown) - 1), 54, WIDTH - 10)
    y = axis_over(every, BOTTOM, 8, zero=not log, log=log)
    dots = "".join(f"M{x(n):.0f} {y(after):.0f}h0" for n, (_, after) in enumerate(shown))
    line = "L".join(f"{x(n):.0f} {y(before):.0f}" for n, (before, _) in enumerate(shown))
    parts = [
        frame(x, y, x_ticks=[], most=4),
        f'<path class="mark dot a" d="{dots}"/><path class="line b" d="M{line}"/>',
        text((54 + WIDTH) / 2, BOTTOM + 16, f"{len(pairs)} channels, sorted", "m"),
    ]
    least, middle, most = (number(moves[k]) for k in (0, len(moves) // 2, -1))
    still = max(moves[-1], 1 / moves[0]) < STILL
    said = "did not move" if still else f"moved by {TIMES}{least} to {TIMES}{most}, median {TIMES}{middle}"
    return Figure(
        title="Scales",
        svg=picture(WIDTH, HEIGHT, parts, alternative=f"Scales of {layer.name}", kind="small"),
        caption=f"Line: before; dots: after; real per step. They {said}.",
    )


def _range(scales: tuple[float, ...]) -> str:
    if len(scales) == 1:
        return number(scales[0])
    return f"{number(min(scales))} to {number(max(scales))} in {len(scales)} channels"


def _granularity(layer: Layer, figures: LayerFigures) -> Figure | None:
    named = [(name, figures.granularity[name], kind) for name, kind in SHAPES if name in figures.granularity]
    values = [v for _, v, _ in named if math.isfinite(v)]
    if not values:
        return None
    x = Axis(0, max(values) * 1.3 or 1, 8, WIDTH - 8)
    parts = []
    for n, (name, value, kind) in enumerate(named):
        top = 6 + 46 * n
        parts += [
            text(8, top + 10, name),
            bars([(8, top + 15, x(value) - 8 if math.isfinite(value) else 0, 16)], f"fill {kind.split()[-1]} soft"),
            text((x(value) if math.isfinite(value) else 8) + 6, top + 28, number(value)),
        ]
    return Figure(
        title="Error in 4 bits by granularity",
        svg=picture(WIDTH, HEIGHT, parts, alternative=f"Errors of {layer.name} by granularity", kind="small"),
        caption="",
    )
