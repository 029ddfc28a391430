"""Where the boxes of a graph are: in rows from top to bottom, branches side by side, few crossings.

Rows are given by the longest path from an input. An edge over several rows goes through a narrow place of its own in
each of them, which all edges from the same box share. Places are ordered by the mean of what is above or below them,
and then moved as near to their neighbours as their widths allow, by least squares.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Place = tuple[int, int]
"""Number of a box, and a row: that of the box itself, or one that an edge from it passes through."""

GAP: Final = 18
LANE: Final = 14
SWEEPS: Final = 4

LIGHT: Final = 1e-3
"""Weight of an edge's place beside that of a box: edges go around, boxes stay in line."""


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        row: of each box.
        x: of the middle of each place, pixels from the left end.
        edges: pairs of places in neighbouring rows, upper and lower one; each is drawn once.
        width: of the whole, pixels.
    """

    row: tuple[int, ...]
    x: dict[Place, float]
    edges: tuple[tuple[Place, Place], ...]
    width: float


def layout(inputs: Sequence[Sequence[int]], widths: Sequence[float]) -> Layout:
    """Lay out a graph.

    Args:
        inputs: for each box the numbers of the boxes that it reads, each smaller than its own.
        widths: of each box, pixels.
    """
    row = _rows(inputs)
    above = _above(inputs, row)
    rows: list[list[Place]] = [[] for _ in range(max(row, default=-1) + 1)]
    for place in sorted(above, key=lambda p: (p[1] != row[p[0]], p[0])):  # boxes first: edges pass on the right
        rows[place[1]].append(place)
    below: dict[Place, list[Place]] = {place: [] for place in above}
    for place, uppers in above.items():
        for upper in uppers:
            below[upper].append(place)
    _order(rows, above, below)
    wide = {p: widths[p[0]] if row[p[0]] == p[1] else LANE for p in above}
    readers = Counter(k for reads in inputs for k in set(reads))
    forks = {k: (k, r) for k, r in enumerate(row) if readers[k] > 1}
    x = _coordinates(rows, above, below, wide=wide, boxes=frozenset(enumerate(row)), forks=forks)
    left = min((x[p] - wide[p] / 2 for p in x), default=0.0)
    right = max((x[p] + wide[p] / 2 for p in x), default=0.0)
    edges = tuple((upper, place) for place, uppers in above.items() for upper in uppers)
    return Layout(tuple(row), {p: v - left for p, v in x.items()}, edges, right - left)


def _rows(inputs: Sequence[Sequence[int]]) -> list[int]:
    row: list[int] = []
    for reads in inputs:
        row.append(1 + max((row[k] for k in reads), default=-1))
    return row


def _above(inputs: Sequence[Sequence[int]], row: Sequence[int]) -> dict[Place, list[Place]]:
    """List what each place is connected with in the row above."""
    above: dict[Place, list[Place]] = {(k, r): [] for k, r in enumerate(row)}
    for box, reads in enumerate(inputs):
        for k in dict.fromkeys(reads):
            for r in range(row[k] + 1, row[box]):
                above.setdefault((k, r), [(k, r - 1)])
            above[box, row[box]].append((k, row[box] - 1))
    return above


def _order(rows: list[list[Place]], above: dict[Place, list[Place]], below: dict[Place, list[Place]]) -> None:
    """Order each row by the mean place of its neighbours, from the top, from the bottom, and from the top again."""
    at = {place: float(n) for places in rows for n, place in enumerate(places)}
    for sweep in range(SWEEPS + 1):
        down = sweep % 2 == 0
        for places in rows if down else reversed(rows):
            means = {p: _mean([at[q] for q in (above if down else below)[p]], at[p]) for p in places}
            places.sort(key=means.__getitem__)  # stable: equal ones stay as they are
            at.update({place: float(n) for n, place in enumerate(places)})


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _coordinates(
    rows: Sequence[Sequence[Place]],
    above: dict[Place, list[Place]],
    below: dict[Place, list[Place]],
    *,
    wide: dict[Place, float],
    boxes: frozenset[Place],
    forks: dict[int, Place],
) -> dict[Place, float]:
    x: dict[Place, float] = {}

    def wish(place: Place, neighbours: Sequence[Place]) -> float:
        # Where an edge around other boxes ends, a block ends: it comes back to where it began, so that no block moves
        # the next one aside.
        began = [forks[k] for k, r in neighbours if (k, r) not in boxes and k in forks]
        if place in boxes and began:
            return x.get(min(began), x.get(place, 0.0))
        # What only passes by does not pull a box out of line.
        strong = [q for q in neighbours if q in boxes] or neighbours
        return _mean([x[q] for q in strong if q in x], x.get(place, 0.0))

    for sweep in range(SWEEPS + 1):
        down = sweep % 2 == 0
        for places in rows if down else reversed(rows):
            wishes = [wish(p, (above if down else below)[p]) for p in places]
            weights = [1.0 if p in boxes else LIGHT for p in places]
            x.update(zip(places, apart(wishes, [wide[p] for p in places], weights), strict=True))
    return x


def apart(wishes: Sequence[float], widths: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the middles of boxes side by side, as near to where they want to be as their widths allow.

    Least squares under `x[n + 1] - x[n] >= (widths[n] + widths[n + 1]) / 2 + GAP`: with these distances taken off it is
    a regression onto values that do not fall, which merging neighbours solves.

    Args:
        wishes: where each wants its middle, pixels.
        widths: of each, pixels.
        weights: of each, positive.
    """
    offsets, offset = [], 0.0
    for n, wide in enumerate(widths):
        offset += (widths[n - 1] + wide) / 2 + GAP if n else 0.0
        offsets.append(offset)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for wish, offset, weight in zip(wishes, offsets, weights, strict=True):
        block = (wish - offset, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, heavy, many = blocks.pop()
            total = heavy + block[1]
            block = ((mean * heavy + block[0] * block[1]) / total, total, many + block[2])
        blocks.append(block)
    fitted = [mean for mean, _, many in blocks for _ in range(many)]
    return [f + o for f, o in zip(fitted, offsets, strict=True)]
