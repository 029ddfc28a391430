"""The network as a graph, its boxes by precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Final

from qft_plugin.report.page.layout import Layout, layout
from qft_plugin.report.page.numbers import counted
from qft_plugin.report.page.svg import Figure, picture, px, text
from qft_plugin.report.record import Layer, Node

MOST: Final = 400
"""From more operations on, chains of them without a weight are one box."""

WIDE: Final = 208
FLAT, TALL, BETWEEN = 24.0, 38.0, 20.0
LETTERS: Final = 28
"""How many letters of a name have room in a box."""

KINDS: Final = {
    "q2": "2- or 3-bit weights",
    "q4": "4-bit weights",
    "q6": "5- to 7-bit weights",
    "q8": "8-bit weights, or more",
    "qf": "weights in floating point",
    "oi": "no weights, reads integers (A8: of 8 bits)",
    "of": "no weights, reads floats",
    "in": "input",
}
"""Classes of boxes, with what they mean; each has a pattern or an outline of its own."""


@dataclass(frozen=True)
class Box:
    """One box of the picture.

    Attributes:
        label: its operation, or several.
        kind: one of `KINDS`.
        inputs: numbers of the boxes that it reads.
        name: of its layer; empty for others.
        number: of its layer, from 1; 0 for others.
        badge: its bits in letters, `"W4 A8"`.
        full: everything about it, for who points at it.
        many: how many operations it stands for.
    """

    label: str
    kind: str
    inputs: tuple[int, ...]
    name: str = ""
    number: int = 0
    badge: str = ""
    full: str = ""
    many: int = 1


def network(nodes: Sequence[Node], layers: Sequence[Layer]) -> Figure | None:
    """Draw the network; `None` where its operations are not known."""
    if not nodes:
        return None
    boxes = boxes_of(nodes, {layer.name: (n, layer) for n, layer in enumerate(layers, 1)})
    if len(nodes) > MOST:
        boxes = merged(boxes)
    placed = layout([box.inputs for box in boxes], [WIDE] * len(boxes))
    tops, height = _tops(boxes, placed)
    parts = [_edges(boxes, placed, tops)]
    for n, box in enumerate(boxes):
        parts.append(_box(box, placed.x[n, placed.row[n]] - WIDE / 2, tops[placed.row[n]]))
    of_kind = {kind: [box for box in boxes if box.kind == kind] for kind in KINDS}
    keys = tuple(
        (f"box {kind}", f"{KINDS[kind]} ({sum(box.many for box in found)})")
        for kind, found in of_kind.items()
        if found and kind != "in"
    )
    said = "; ".join(words for _, words in keys)
    return Figure(
        title="The network by precision",
        svg=picture(
            placed.width + 4, height, parts, alternative=f"Graph of {len(nodes)} operations. {said}.", kind="graph"
        ),
        caption=f"{counted(len(nodes), 'operation')}, from top to bottom. W: bits of the weight, A: of what it reads."
        + (" Chains of operations without weights are one box." if len(nodes) > MOST else ""),
        keys=keys,
    )


def boxes_of(nodes: Sequence[Node], layers: Mapping[str, tuple[int, Layer]]) -> list[Box]:
    """Make a box for each operation, and one for each tensor that none of them makes.

    Args:
        nodes: in the order of execution.
        layers: number and layer by its name.
    """
    made = {node.name for node in nodes}
    boxes: list[Box] = []
    places: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            if name not in made and name not in places:
                places[name] = len(boxes)
                boxes.append(Box(_short(name), "in", (), full=name))
        number, layer = layers.get(node.layer, (0, None))
        # What comes later in the order of execution cannot be read.
        reads = tuple(places[name] for name in node.inputs if name in places)
        activation = "" if node.bits is None else f"A{node.bits}"
        if layer is None:
            kind, badge = ("of" if node.bits is None else "oi"), activation
        else:
            kind = _kind_of(layer.bits)
            badge = f"{'float' if layer.bits is None else f'W{layer.bits}'} {activation}".strip()
        full = " ".join(part for part in (node.name, badge and f"({badge})", layer and layer.reason) if part)
        places[node.name] = len(boxes)
        name = node.layer if layer is not None else ""
        boxes.append(Box(_short(node.function), kind, reads, name=name, number=number, badge=badge, full=full))
    return boxes


def _kind_of(bits: int | None) -> str:
    if bits is None:
        return "qf"
    return "q8" if bits >= 8 else "q6" if bits > 4 else "q4" if bits == 4 else "q2"


def _short(name: str, most: int = LETTERS) -> str:
    """Keep the end of a name, which says more than its beginning."""
    return name if len(name) <= most else "…" + name[1 - most :]


def merged(boxes: Sequence[Box]) -> list[Box]:
    """Make one box of each chain of operations without weights, where nobody else reads what is inside.

    Args:
        boxes: each reads only earlier ones.
    """
    readers = [0] * len(boxes)
    for box in boxes:
        for k in box.inputs:
            readers[k] += 1
    kept: list[Box] = []
    place: list[int] = []
    for box in boxes:
        reads = tuple(place[k] for k in box.inputs)
        last = kept[reads[0]] if len(box.inputs) == 1 else None
        if last is not None and readers[box.inputs[0]] == 1 and {box.kind, last.kind} <= {"oi", "of"}:
            first = last.label.split(" … ")[0]
            full, many = f"{last.full}, {box.full}", last.many + box.many
            kept[reads[0]] = replace(last, label=f"{first} … {box.label}", full=full, many=many)
            place.append(reads[0])
        else:
            place.append(len(kept))
            kept.append(replace(box, inputs=reads))
    return kept


def _tops(boxes: Sequence[Box], placed: Layout) -> tuple[list[float], float]:
    """Return where each row begins, and the height of the whole."""
    heights = [FLAT] * (max(placed.row) + 1)
    for box, row in zip(boxes, placed.row, strict=True):
        heights[row] = max(heights[row], _height(box))
    tops, at = [], 2.0
    for height in heights:
        tops.append(at)
        at += height + BETWEEN
    return tops, at - BETWEEN + 2


def _height(box: Box) -> float:
    return TALL if box.number else FLAT


def _edges(boxes: Sequence[Box], placed: Layout, tops: Sequence[float]) -> str:
    drawn = []
    for upper, lower in placed.edges:
        x, end = placed.x[upper] + 2, placed.x[lower] + 2
        passes = placed.row[upper[0]] != upper[1]
        start = tops[upper[1]] if passes else tops[upper[1]] + _height(boxes[upper[0]])
        bottom, top = tops[lower[1]] - BETWEEN, tops[lower[1]]
        middle = (bottom + top) / 2
        down = f"V{px(bottom)}" if bottom > start + 0.1 else ""
        # A straight line stays one; others bend in the space between two rows.
        bend = (
            f"V{px(top)}" if abs(end - x) < 0.5 else f"C{px(x)} {px(middle)} {px(end)} {px(middle)} {px(end)} {px(top)}"
        )
        drawn.append(f"M{px(x)} {px(start)}{down}{bend}")
    return f'<path class="edge" d="{"".join(drawn)}"/>'


def _box(box: Box, left: float, top: float) -> str:
    left += 2
    height = _height(box)
    badge = text(left + WIDE - 7, top + 16, box.badge, "e strong") if box.badge else ""
    second = text(left + 20, top + 31, _short(box.name), "muted") if box.number else ""
    label = _short(box.label, LETTERS - len(box.badge))
    inside = (
        f"<title>{escape(box.full)}</title>"
        f'<rect x="{px(left)}" y="{px(top)}" width="{WIDE}" height="{px(height)}"/>'
        f'<rect class="s" x="{px(left)}" y="{px(top)}" width="13" height="{px(height)}"/>'
        f"{text(left + 20, top + 16, label)}{badge}{second}"
    )
    if box.number:  # the table has the same links for the keyboard
        inside = f'<a href="#layer-{box.number}" tabindex="-1">{inside}</a>'
    return f'<g class="{box.kind}">{inside}</g>'
