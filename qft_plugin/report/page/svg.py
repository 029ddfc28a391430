"""Small pieces of SVG: axes, paths and texts, coloured by the classes of the page's style."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from qft_plugin.report.page.numbers import short

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture of the page.

    Attributes:
        title: above it.
        svg: the picture; its text alternative is in it.
        caption: below it, one or two sentences.
        keys: classes of a line or a mark, with what it means.
    """

    title: str
    svg: str
    caption: str
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Axis:
    """From values to places in a picture.

    Attributes:
        low: the smallest value.
        high: the largest value; larger than `low`.
        start: where `low` is, pixels.
        end: where `high` is, pixels.
        log: whether equal factors have equal lengths; values are positive then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value; of one beyond the axis, its end."""
        low, high, at = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """List round values on the axis."""
        if not self.log:
            return _round_values(self.low, self.high, most)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        skip = math.ceil(len(powers) / most)
        for factors in ((1, 2, 5), (1, 3), (1,)) if skip == 1 else ((1,),):
            found = [f * 10.0**p for p in powers if p % skip == 0 for f in factors]
            inside = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
            if 1 < len(inside) <= most:
                return inside
        # Over many powers of ten the room that a rounded step leaves reaches down to 0, which has no logarithm.
        return [v for v in _round_values(self.low, self.high, most) if v >= self.low * 0.999]


def _round_values(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def axis_over(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """Make an axis that holds all values, with a little room.

    Args:
        values: at least one, all finite.
        start: where the smallest is, pixels.
        end: where the largest is, pixels.
        zero: begin at 0.
        log: let equal factors have equal lengths; the values are positive.
    """
    every = list(values)
    low, high = min(every), max(every)
    if log:
        return Axis(low / 1.1, high * 1.1, start, end, True)
    low = 0.0 if zero else low
    if high <= low:
        high, low = (low + abs(low) / 10, low - abs(low) / 10) if low else (1.0, 0.0)
    room = 0.05 * (high - low)
    return Axis(low if zero else low - room, high + room, start, end)


def px(value: float) -> str:
    """Write a place with one decimal at most."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def path(points: Sequence[Point], kind: str) -> str:
    """Draw a line through points."""
    if not points:
        return ""
    inside = "L".join(f"{px(x)} {px(y)}" for x, y in points)
    return f'<path class="{kind}" d="M{inside}"/>'


def marks(points: Iterable[Point], kind: str) -> str:
    """Draw a dot at each point; the class says how large, and whether it is round or square."""
    inside = "".join(f"M{px(x)} {px(y)}h0" for x, y in points)
    return f'<path class="{kind}" d="{inside}"/>' if inside else ""


def bars(rectangles: Iterable[tuple[float, float, float, float]], kind: str) -> str:
    """Draw rectangles, given as left, top, width and height, as one path."""
    inside = "".join(f"M{px(x)} {px(y)}h{px(w)}v{px(h)}h-{px(w)}z" for x, y, w, h in rectangles if h > 0 and w > 0)
    return f'<path class="{kind}" d="{inside}"/>' if inside else ""


def columns(tops: Iterable[Point], bottom: float, width: float, kind: str) -> str:
    """Draw columns of one width, each given by the middle of its upper end, as one path."""
    inside = "".join(f"M{px(x)} {px(bottom)}V{px(y)}" for x, y in tops if bottom - y > 0.05)
    return f'<path class="{kind}" stroke-width="{px(width)}" d="{inside}"/>' if inside else ""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Write words at a place; the classes `e` and `m` end and centre them there."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{px(x)}" y="{px(y)}">{escape(words)}</text>'


def frame(x: Axis, y: Axis, *, x_ticks: Sequence[tuple[float, str]] | None = None, most: int = 6) -> str:
    """Draw the lines and numbers of both axes: those of `y` on the left, with lines across, those of `x` below.

    Args:
        x: the horizontal axis.
        y: the vertical axis; it starts at the bottom.
        x_ticks: values of `x` with what to write there; round ones by default.
        most: how many numbers `y` has at most.
    """
    heights = [(v, y(v)) for v in y.ticks(most)]
    lines = "".join(f"M{px(x.start)} {px(at)}H{px(x.end)}" for _, at in heights)
    named = [(v, short(v)) for v in x.ticks()] if x_ticks is None else x_ticks
    return (
        f'<path class="grid" d="{lines}"/>'
        + f'<path class="axis" d="M{px(x.start)} {px(y.start)}H{px(x.end)}"/>'
        + "".join(text(x.start - 6, at + 4, short(v), "e") for v, at in heights)
        + "".join(text(x(v), y.start + 16, words, "m") for v, words in named)
    )


def picture(width: float, height: float, parts: Iterable[str], *, alternative: str, kind: str = "") -> str:
    """Put parts together to a picture with a text alternative.

    Args:
        width: pixels.
        height: pixels.
        parts: what is in it.
        alternative: what it shows, in words.
        kind: classes of the picture.
    """
    words = escape(alternative, quote=True)
    return (
        f'<svg class="{kind}" viewBox="0 0 {px(width)} {px(height)}" width="{px(width)}" height="{px(height)}" '
        f'role="img" aria-label="{words}">{"".join(parts)}</svg>'
    )
