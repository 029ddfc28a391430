"""Ways to corrupt an OpenVINO IR, one place at a time."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from changes import LITTLE, Way, add_to_one, middle, negate_one, one_factor, swap_two, ways_of_weights
from corruptions import Corruption
from torch import Tensor

from qft_plugin.deploy.ir_view import INTEGER_TYPES, PRODUCTS, IRFile, constant_integers

Change = Callable[["Graph", Any], None]


class Graph:
    """An `openvino.Model`, its layers by the names of the torch model, and what stands next to what."""

    def __init__(self, model: Any, integers: Mapping[str, Tensor]) -> None:
        self.model = model
        self.ops = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
        self.moving: set[str] = set()
        for name, op in self.ops.items():
            if op.get_type_name() == "Parameter" or any(self.moves(node) for node in before(op)):
                self.moving.add(name)
        flat = {name: t.flatten().numpy() for name, t in integers.items()}
        self.layers: dict[str, frozenset[str]] = {}
        for name in self.moving:
            found = [constant_integers(c).reshape(-1) for node in self.constants(self.ops[name]) for c in stored(node)]
            same = {w for w, values in flat.items() for f in found if np.array_equal(f, values)}
            if same:
                self.layers[name] = frozenset(same)
            elif self.ops[name].get_type_name() == "Parameter":
                self.layers[name] = frozenset([name])

    def moves(self, node: Any) -> bool:
        """Whether a node depends on the input."""
        return node.get_friendly_name() in self.moving

    def constants(self, op: Any) -> list[Any]:
        """List the constant expressions that an operation reads."""
        return [node for node in before(op) if not self.moves(node)]

    def around(self, op: Any) -> frozenset[str]:
        """Return the layer of an operation, or the layers and inputs right before and right after it."""
        here = self.layers.get(op.get_friendly_name())
        return here or self._next(op, before) | self._next(op, after)

    def _next(self, op: Any, step: Callable[[Any], list[Any]]) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for node in step(op):
            name = node.get_friendly_name()
            if name in self.moving:
                found |= self.layers.get(name) or self._next(node, step)
        return found


def before(op: Any) -> list[Any]:
    """List the nodes that an operation reads."""
    return [i.get_source_output().get_node() for i in op.inputs()]


def after(op: Any) -> list[Any]:
    """List the nodes that read an operation."""
    return [target.get_node() for o in op.outputs() for target in o.get_target_inputs()]


def stored(node: Any) -> list[Any]:
    """List the integer constants that a constant expression is made of."""
    if node.get_type_name() == "Constant":
        return [node] if node.get_element_type().get_type_name() in INTEGER_TYPES else []
    return [c for n in before(node) for c in stored(n)]


def put(op: Any, place: int, values: np.ndarray) -> None:
    """Give an operation another constant; nobody else who reads the old one sees it."""
    from openvino import opset13

    op.input(place).replace_source_output(opset13.constant(values).output(0))


def values(op: Any, place: int) -> np.ndarray:
    """Read a floating-point constant of an operation."""
    node = op.input(place).get_source_output().get_node()
    return np.array(node.data, dtype=np.float32).reshape(tuple(node.get_output_shape(0)))


def replace(op: Any, by: Any) -> None:
    """Let everyone who reads an operation read another one."""
    for target in list(op.output(0).get_target_inputs()):
        if target.get_node() != by:
            target.replace_source_output(by.output(0))


def is_constant(op: Any, place: int) -> bool:
    """Whether an operation reads a floating-point constant at a place."""
    node = op.input(place).get_source_output().get_node()
    return node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32"


def constant_place(g: Graph, op: Any) -> int | None:
    """Return the place of the floating-point constant that meets what moves; `None` where there is none."""
    if op.get_input_size() != 2 or not any(g.moves(node) for node in before(op)):
        return None
    return next((k for k in range(2) if is_constant(op, k)), None)


# Where: names of operations, and what is done there.


def of_kind(*kinds: str) -> Callable[[Graph], Iterator[Any]]:
    """Return where there are moving operations of some types."""
    return lambda g: (op for name, op in g.ops.items() if name in g.moving and op.get_type_name() in kinds)


def quantizers(g: Graph) -> Iterator[Any]:
    return of_kind("FakeQuantize")(g)


def layers(g: Graph) -> Iterator[Any]:
    return (op for op in of_kind(*PRODUCTS)(g) if op.get_friendly_name() in g.layers)


def with_constant(kind: str) -> Callable[[Graph], Iterator[Any]]:
    return lambda g: (op for op in of_kind(kind)(g) if constant_place(g, op) is not None)


def biases(g: Graph) -> Iterator[Any]:
    """List additions of constants right after a layer."""
    return (op for op in with_constant("Add")(g) if any(n.get_friendly_name() in g.layers for n in before(op)))


def shifts(g: Graph) -> Iterator[Any]:
    """List other additions of constants: of a BatchNorm that could not be folded."""
    own = {op.get_friendly_name() for op in biases(g)}
    return (op for op in with_constant("Add")(g) if op.get_friendly_name() not in own)


def factors(g: Graph) -> Iterator[Any]:
    return with_constant("Multiply")(g)


def additions(g: Graph) -> Iterator[Any]:
    """List additions of two activations of the same shape."""
    return (
        op for op in of_kind("Add")(g)
        if all(g.moves(n) for n in before(op)) and before(op)[0] != before(op)[1]
    )  # fmt: skip


def free_relus(g: Graph) -> Iterator[Any]:
    """List ReLUs which are not implied by an unsigned quantizer after them."""
    for op in of_kind("Relu")(g):
        readers = after(op)
        if not all(r.get_type_name() == "FakeQuantize" and values(r, 3).min() >= 0 for r in readers):
            yield op


def weight_scale(g: Graph, op: Any) -> tuple[Any, int]:
    """Return the multiplication that gives a weight its scales, and the place of the scales."""
    (node,) = g.constants(op)
    found = []
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if node.get_type_name() == "Multiply":
            found += [(node, k) for k in range(2) if is_constant(node, k)]
        nodes += before(node)
    return max(found, key=lambda pair: values(*pair).size)


def weight_integers(g: Graph, op: Any) -> tuple[Any, int, np.ndarray]:
    """Return who reads the integer constant of a weight, at which place, and the integers."""
    (constant,) = [c for node in g.constants(op) for c in stored(node)]
    target = next(iter(constant.output(0).get_target_inputs()))
    return target.get_node(), target.get_index(), constant_integers(constant)


def change_scale(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, op: Any) -> None:
        node, place = weight_scale(g, op)
        scales = values(node, place)
        change(scales.reshape(-1))
        put(node, place, scales)

    return apply


def change_integers(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, op: Any) -> None:
        node, place, W_int = weight_integers(g, op)
        change(W_int)
        put(node, place, W_int.astype(np.int8))

    return apply


def change_constant(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, op: Any) -> None:
        place = constant_place(g, op)
        old = values(op, place)
        change(old.reshape(-1))
        put(op, place, old)

    return apply


def change_range(change: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]) -> Change:
    """Change both ranges of a quantizer, of what it reads and of what it gives."""

    def apply(_: Graph, op: Any) -> None:
        levels = int(op.get_attributes()["levels"])
        for low, high in ((1, 2), (3, 4)):
            found = change(values(op, low), values(op, high), levels)
            for place, value in zip((low, high), found, strict=True):
                put(op, place, value.astype(np.float32))

    return apply


def other_step(g: Graph, op: Any) -> None:
    """Change one bias by one step of the quantizer after it."""
    nodes = [op]
    while nodes[0].get_type_name() != "FakeQuantize":
        nodes = [*nodes[1:], *after(nodes[0])]
    step = float((values(nodes[0], 2) - values(nodes[0], 1)).max()) / (int(nodes[0].get_attributes()["levels"]) - 1)

    def add(x: np.ndarray) -> None:
        x[middle(x)] += step

    change_constant(add)(g, op)


def other_levels(levels: int) -> Change:
    """Keep the range of a quantizer and change its step."""

    def apply(_: Graph, op: Any) -> None:
        from openvino import opset13

        made = opset13.fake_quantize(*(op.input_value(k) for k in range(5)), levels)
        _take_place(op, made)

    return apply


def only_clip(_: Graph, op: Any) -> None:
    """Put a clip into the place of a quantizer: nothing is rounded."""
    from openvino import opset13

    low, high = float(values(op, 1).min()), float(values(op, 2).max())
    replace(op, opset13.clamp(op.input_value(0), low, high))


def left_out(g: Graph, op: Any) -> None:
    """Leave an operation out: the last input that moves takes its place."""
    places = list(g.ops)
    names = [(places.index(node.get_friendly_name()), k) for k, node in enumerate(before(op)) if g.moves(node)]
    k = max(names)[1]
    for target in list(op.output(0).get_target_inputs()):
        target.replace_source_output(op.input_value(k))


def lower_bound(_: Graph, op: Any) -> None:
    from openvino import opset13

    attributes = op.get_attributes()
    _take_place(op, opset13.clamp(op.input_value(0), attributes["min"], 0.9 * attributes["max"]))


def no_padding_value(_: Graph, op: Any) -> None:
    """Move the window of a convolution by one pixel."""
    begin, end = (list(op.get_attributes()[key]) for key in ("pads_begin", "pads_end"))
    op.set_attribute("pads_begin", [b + 1 for b in begin])
    op.set_attribute("pads_end", [e - 1 for e in end])


def padded(g: Graph) -> Iterator[Any]:
    return (op for op in layers(g) if "pads_end" in op.get_attributes() and min(op.get_attributes()["pads_end"]) > 0)


def other_epsilon(_: Graph, op: Any) -> None:
    op.set_attribute("eps", 0.1)


def _take_place(op: Any, made: Any) -> None:
    name = op.get_friendly_name()
    replace(op, made)
    op.set_friendly_name(f"{name}_before")
    made.set_friendly_name(name)


WAYS: Final[Mapping[str, Way]] = {
    **ways_of_weights(layers, change_scale, change_integers),
    "one bias off by half the largest": Way(biases, change_constant(add_to_one)),
    "one bias off by one step": Way(lambda g: (op for op in biases(g) if _quantized_after(op)), other_step),
    "sign of one bias flipped": Way(biases, change_constant(negate_one)),
    "two biases swapped": Way(biases, change_constant(swap_two)),
    "a bias removed": Way(biases, left_out),
    "shift of a BatchNorm changed": Way(shifts, change_constant(add_to_one)),
    "one factor changed": Way(factors, change_constant(one_factor)),
    "a factor removed": Way(factors, left_out),
    "activation scale doubled": Way(quantizers, change_range(lambda low, high, _: (2 * low, 2 * high))),
    "activation scale 1 % off": Way(quantizers, change_range(lambda low, high, _: (LITTLE * low, LITTLE * high))),
    "zero point off by one": Way(
        quantizers,
        change_range(lambda low, high, n: (low + (high - low) / (n - 1), high + (high - low) / (n - 1))),
    ),
    "255 levels": Way(
        lambda g: (op for op in quantizers(g) if op.get_attributes()["levels"] == 256), other_levels(255)
    ),
    "16 levels": Way(quantizers, other_levels(16)),
    "a quantizer removed": Way(quantizers, left_out),
    "a clip in the place of a rounding": Way(quantizers, only_clip),
    "bound of a ReLU6 lowered": Way(of_kind("Clamp"), lower_bound),
    "a ReLU6 removed": Way(of_kind("Clamp"), left_out),
    "a ReLU removed": Way(free_relus, left_out),
    "an addition left out": Way(additions, left_out),
    "window of a convolution moved": Way(padded, no_padding_value),
    "epsilon of a norm changed": Way(of_kind("MVN"), other_epsilon),
}
"""What can be wrong in one place."""


def _quantized_after(op: Any) -> bool:
    kind = op.get_type_name()
    return kind == "FakeQuantize" or any(_quantized_after(node) for node in after(op))


def corruptions(model: Any, integers: Mapping[str, Tensor], chance: random.Random) -> list[Corruption]:
    """List ways to corrupt a file, each at a place that is chosen by chance.

    Args:
        model: an `openvino.Model`.
        integers: of each quantized weight of the torch model.
        chance: chooses.
    """
    graph, found = Graph(model, integers), []
    for kind, way in WAYS.items():
        names = [op.get_friendly_name() for op in way.where(graph)]
        if names:
            found.append(_corruption(graph, integers, kind, way, chance.choice(names)))
    pair = _alike(graph, chance)
    if pair is not None:
        found.append(_swapped("weights of two layers swapped", graph, pair, _swap_weights))
    fakes = [op.get_friendly_name() for op in quantizers(graph)]
    pair = tuple(chance.sample(fakes, 2))
    found.append(_swapped("ranges of two quantizers swapped", graph, pair, _swap_ranges))
    return found


def _corruption(graph: Graph, integers: Mapping[str, Tensor], kind: str, way: Way, name: str) -> Corruption:
    def make() -> IRFile:
        copied = Graph(graph.model.clone(), integers)
        way.change(copied, copied.ops[name])
        return IRFile(copied.model, free_batch=True)

    return Corruption(kind, name, graph.around(graph.ops[name]), make)


def _swapped(kind: str, graph: Graph, pair: tuple[str, str], swap: Callable[[Any, Any], None]) -> Corruption:
    def make() -> IRFile:
        model = graph.model.clone()
        ops = {op.get_friendly_name(): op for op in model.get_ops()}
        swap(*(ops[name] for name in pair))
        return IRFile(model, free_batch=True)

    layers = frozenset().union(*(graph.around(graph.ops[name]) for name in pair))
    return Corruption(kind, " and ".join(pair), layers, make)


def _alike(graph: Graph, chance: random.Random) -> tuple[str, str] | None:
    """Choose two layers whose weights have the same shape."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for op in layers(graph):
        (node,) = graph.constants(op)
        by_shape.setdefault(tuple(node.get_output_shape(0)), []).append(op.get_friendly_name())
    groups = [names for names in by_shape.values() if len(names) > 1]
    if not groups:
        return None
    one, other = chance.sample(chance.choice(groups), 2)
    return one, other


def _swap_weights(one: Any, other: Any) -> None:
    first, second = one.input_value(1), other.input_value(1)
    one.input(1).replace_source_output(second)
    other.input(1).replace_source_output(first)


def _swap_ranges(one: Any, other: Any) -> None:
    for place in range(1, 5):
        first, second = values(one, place), values(other, place)
        put(one, place, second.reshape(second.shape if second.size > 1 else (1,)))
        put(other, place, first.reshape(first.shape if first.size > 1 else (1,)))
