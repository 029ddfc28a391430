"""Ways to corrupt a QCDQ or QONNX file, one place at a time."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from changes import LITTLE, Way, add_to_one, lower_all, negate_one, one_factor, swap_two, ways_of_weights
from corruptions import Corruption
from onnx import helper, numpy_helper
from torch import Tensor

from qft_plugin.deploy.file_view import File
from qft_plugin.deploy.onnx_view import ONNXFile

PRODUCTS: Final = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])

Reader = Callable[[Any], ONNXFile]
Change = Callable[["Graph", Any], None]


class Graph:
    """An `onnx.ModelProto`, its layers by the names of the torch model, and what stands next to what."""

    def __init__(self, model: Any, layers: Mapping[str, frozenset[str]]) -> None:
        self.graph = model.graph
        self.model = model
        self.layers = layers
        self.values = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.moving = {i.name for i in self.graph.input} - set(self.values)
        self.inputs = frozenset(self.moving)
        self.made = {}
        for node in self.graph.node:
            if any(name in self.moving for name in node.input):
                self.moving |= set(node.output)
            self.made |= dict.fromkeys(node.output, node)

    def nodes(self, *kinds: str) -> Iterator[Any]:
        """List the nodes of some types that depend on the input."""
        return (n for n in self.graph.node if n.op_type in kinds and n.output[0] in self.moving)

    def readers(self, name: str) -> list[Any]:
        """List the nodes that read a tensor."""
        return [n for n in self.graph.node if name in n.input]

    def put(self, node: Any, place: int, value: np.ndarray) -> None:
        """Give a node another constant; nobody else who reads the old one sees it."""
        name = f"changed_{node.output[0]}_{place}"
        while any(t.name == name for t in self.graph.initializer):
            name += "_"
        self.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
        self.values[name] = value
        node.input[place] = name

    def add_before(self, node: Any, new: Any) -> None:
        """Put a new node into the order before another one."""
        place = next(k for k, n in enumerate(self.graph.node) if n.output[0] == node.output[0])
        self.graph.node.insert(place, new)

    def instead(self, name: str, by: str) -> None:
        """Let everyone who reads a tensor read another one."""
        for node in self.graph.node:
            for place, read in enumerate(node.input):
                if read == name and node.output[0] != by:
                    node.input[place] = by
        for output in self.graph.output:
            if output.name == name:
                self.graph.node.append(helper.make_node("Identity", [by], [f"{name}_instead"]))
                output.name = f"{name}_instead"

    def weight(self, node: Any) -> Any:
        """Return the node that dequantizes the weight of a layer."""
        name = next(name for name in node.input[:2] if name not in self.moving)
        while self.made[name].op_type not in ("DequantizeLinear", "Quant"):
            name = self.made[name].input[0]
        return self.made[name]

    def around(self, node: Any) -> frozenset[str]:
        """Return the layer of a node, or the layers right before and right after it and its own name in the model."""
        if node.output[0] in self.layers:
            return self.layers[node.output[0]]
        # Before the first layer there is a quantizer alone, which the user knows by its own name.
        found = self._before(node)
        return (found or frozenset(["quantizer_0"])) | self._after(node)

    def _before(self, node: Any) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for name in node.input:
            if name in self.moving - self.inputs:
                found |= self.layers.get(name) or self._before(self.made[name])
        return found

    def _after(self, node: Any) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for name in node.output:
            for reader in self.readers(name):
                found |= self.layers.get(reader.output[0]) or self._after(reader)
        return found


@dataclass(frozen=True)
class Quantizer:
    """The nodes of a quantizer of activations: the first reads, the last makes."""

    first: Any
    last: Any


def quantizer_of(g: Graph, node: Any) -> Quantizer:
    first = node
    while first.op_type not in ("QuantizeLinear", "Quant"):
        first = g.made[first.input[0]]
    return Quantizer(first, node)


def layers(g: Graph) -> Iterator[Any]:
    return (n for n in g.nodes(*PRODUCTS) if n.output[0] in g.layers)


def quantizers(g: Graph) -> Iterator[Any]:
    return g.nodes("DequantizeLinear", "Quant")


def biases(g: Graph) -> Iterator[Any]:
    return (n for n in layers(g) if len(n.input) > 2 and n.input[2] in g.values and np.any(g.values[n.input[2]]))


def shifts(g: Graph) -> Iterator[Any]:
    """List additions of constants per channel, without those that a softmax may not see: of an attention's keys."""
    for node in with_constant("Add")(g):
        if g.values[node.input[constant_place(g, node)]].size == 1:
            continue  # an epsilon
        left, ends = [node], []
        while left:
            n = left.pop()
            passes = n.op_type in ("Add", "Reshape", "Transpose", "Mul")
            ends += [] if passes else [n]
            left += g.readers(n.output[0]) if passes else []
        if not any(n.op_type == "MatMul" and all(name in g.moving for name in n.input) for n in ends):
            yield node


def constant_place(g: Graph, node: Any) -> int | None:
    return next((k for k, name in enumerate(node.input) if name in g.values), None)


def with_constant(*kinds: str) -> Callable[[Graph], Iterator[Any]]:
    return lambda g: (n for n in g.nodes(*kinds) if constant_place(g, n) is not None)


def additions(g: Graph) -> Iterator[Any]:
    return (n for n in g.nodes("Add") if all(name in g.moving for name in n.input))


def free_relus(g: Graph) -> Iterator[Any]:
    """List ReLUs which are not implied by an unsigned quantizer after them."""
    return (n for n in g.nodes("Relu") if not implied(g, n))


def implied(g: Graph, node: Any) -> bool:
    return all(unsigned(g, r) or (r.op_type == "Min" and implied(g, r)) for r in g.readers(node.output[0]))


def unsigned(g: Graph, node: Any) -> bool:
    if node.op_type == "QuantizeLinear":
        return bool(g.values[node.input[2]].dtype == np.uint8 and not g.values[node.input[2]].any())
    return node.op_type == "Quant" and not next(a.i for a in node.attribute if a.name == "signed")


def change_scale(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, node: Any) -> None:
        weight = g.weight(node)
        old = g.values[weight.input[1]]
        scales = old.copy()
        change(scales.reshape(-1))
        if weight.op_type == "Quant":  # holds what its integers stand for
            g.put(weight, 0, g.values[weight.input[0]] * (scales / old))
        if weight.op_type == "Quant" and (scales < 0).any():
            return  # its scales stay positive, and its integers have the other sign
        g.put(weight, 1, scales)

    return apply


def change_integers(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, node: Any) -> None:
        weight = g.weight(node)
        stored = g.values[weight.input[0]]
        scales = g.values[weight.input[1]] if weight.op_type == "Quant" else np.float32(1)
        integers = np.rint(stored / scales)
        change(integers)
        g.put(weight, 0, (integers * scales).astype(stored.dtype))

    return apply


def change_bias(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, node: Any) -> None:
        bias = g.values[node.input[2]].copy()
        change(bias)
        g.put(node, 2, bias)

    return apply


def no_bias(_: Graph, node: Any) -> None:
    del node.input[2]


def change_constant(change: Callable[[np.ndarray], None]) -> Change:
    def apply(g: Graph, node: Any) -> None:
        place = constant_place(g, node)
        value = g.values[node.input[place]].copy()
        change(value.reshape(-1))
        g.put(node, place, value)

    return apply


def scaled(factor: float, *, first: bool = True) -> Change:
    """Change the scale of a quantizer, or of its end alone."""

    def apply(g: Graph, node: Any) -> None:
        q = quantizer_of(g, node)
        value = (g.values[q.first.input[1]] * factor).astype(np.float32)
        g.put(q.last, 1, value)
        if first and q.first != q.last:
            g.put(q.first, 1, value)

    return apply


def shifted(g: Graph, node: Any) -> None:
    """Move the zero point of a quantizer by one."""
    q = quantizer_of(g, node)
    old = g.values[q.first.input[2]]
    for n in (q.first, q.last):
        g.put(n, 2, (old + 1).astype(old.dtype))


def fewer_levels(g: Graph, node: Any) -> None:
    """Leave half of the integers."""
    q = quantizer_of(g, node)
    if node.op_type == "Quant":
        g.put(node, 3, g.values[node.input[3]] - 1)
        return
    dtype = g.values[q.first.input[2]].dtype
    ends = np.iinfo(dtype)
    name = f"{node.output[0]}_fewer"
    clip = helper.make_node("Clip", [q.last.input[0], "", ""], [name], name=name)
    g.add_before(node, clip)
    clip = g.graph.node[[n.name for n in g.graph.node].index(name)]
    g.put(clip, 1, np.array(ends.min // 2, dtype))
    g.put(clip, 2, np.array(ends.max // 2, dtype))
    node.input[0] = name


def removed(g: Graph, node: Any) -> None:
    g.instead(node.output[0], quantizer_of(g, node).first.input[0])


def only_clip(g: Graph, node: Any) -> None:
    """Put a clip into the place of a quantizer: nothing is rounded."""
    q = quantizer_of(g, node)
    scale, zero_point = (g.values[name].astype(np.float32) for name in q.first.input[1:3])
    if node.op_type == "Quant":
        bits = int(g.values[node.input[3]])
        low, high = (0, 2**bits - 1) if unsigned(g, node) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        ends = np.iinfo(g.values[q.first.input[2]].dtype)
        low, high = ends.min, ends.max
    name = f"{node.output[0]}_clip"
    clip = helper.make_node("Clip", [q.first.input[0], "", ""], [name], name=name)
    g.add_before(q.first, clip)
    clip = g.graph.node[[n.name for n in g.graph.node].index(name)]
    g.put(clip, 1, ((low - zero_point) * scale).max().astype(np.float32))
    g.put(clip, 2, ((high - zero_point) * scale).max().astype(np.float32))
    g.instead(node.output[0], name)


def other_sign(_: Graph, node: Any) -> None:
    flag = next(a for a in node.attribute if a.name == "signed")
    flag.i = 1 - flag.i


def left_out(g: Graph, node: Any) -> None:
    """Leave a node out: the last input that moves takes its place."""
    order = {name: k for k, n in enumerate(g.graph.node) for name in n.output}
    kept = max((name for name in node.input if name in g.moving), key=lambda name: order.get(name, -1))
    g.instead(node.output[0], kept)


def window_moved(_: Graph, node: Any) -> None:
    pads = next(a for a in node.attribute if a.name == "pads")
    half = len(pads.ints) // 2
    moved = [p + 1 for p in pads.ints[:half]] + [p - 1 for p in pads.ints[half:]]
    del pads.ints[:]
    pads.ints.extend(moved)


def padded(g: Graph) -> Iterator[Any]:
    return (n for n in layers(g) if any(a.name == "pads" and min(a.ints) > 0 for a in n.attribute))


WAYS: Final[Mapping[str, Way]] = {
    **ways_of_weights(layers, change_scale, change_integers),
    "one bias off by half the largest": Way(biases, change_bias(add_to_one)),
    "sign of one bias flipped": Way(biases, change_bias(negate_one)),
    "two biases swapped": Way(biases, change_bias(swap_two)),
    "a bias removed": Way(biases, no_bias),
    "shift of a BatchNorm changed": Way(shifts, change_constant(add_to_one)),
    "one factor changed": Way(with_constant("Mul", "Div"), change_constant(one_factor)),
    "a factor removed": Way(with_constant("Mul", "Div"), left_out),
    "activation scale doubled": Way(quantizers, scaled(2)),
    "activation scale 1 % off": Way(quantizers, scaled(LITTLE)),
    "scale after a quantizer 1 % off": Way(lambda g: g.nodes("DequantizeLinear"), scaled(LITTLE, first=False)),
    "zero point off by one": Way(quantizers, shifted),
    "half the levels": Way(quantizers, fewer_levels),
    "signed in the place of unsigned": Way(lambda g: g.nodes("Quant"), other_sign),
    "a quantizer removed": Way(quantizers, removed),
    "a clip in the place of a rounding": Way(quantizers, only_clip),
    "bound of a ReLU6 lowered": Way(with_constant("Min"), change_constant(lower_all)),
    "a ReLU6 removed": Way(with_constant("Min"), left_out),
    "a ReLU removed": Way(free_relus, left_out),
    "an addition left out": Way(additions, left_out),
    "window of a convolution moved": Way(padded, window_moved),
}
"""What can be wrong in one place."""


def corruptions(model: Any, read: Reader, integers: Mapping[str, Tensor], chance: random.Random) -> list[Corruption]:
    """List ways to corrupt a file, each at a place that is chosen by chance.

    Args:
        model: an `onnx.ModelProto`.
        read: reads a model.
        integers: of each quantized weight of the torch model.
        chance: chooses.
    """
    file = read(model)
    flat = {name: t.flatten().numpy() for name, t in integers.items()}
    by_name = {node.name: node.output[0] for node in model.graph.node}
    known = {
        by_name[p.name]: frozenset(name for name, values in flat.items() if np.array_equal(values, p.integers))
        for p in file.products
    }
    graph = Graph(model, {name: found for name, found in known.items() if found})
    found = []
    for kind, way in WAYS.items():
        places = [node.output[0] for node in way.where(graph)]
        if places:
            found.append(_corruption(graph, read, kind, [chance.choice(places)], lambda g, n, w=way: w.change(g, n)))
    alike: dict[tuple[int, ...], list[str]] = {}
    for node in layers(graph):
        alike.setdefault(graph.values[graph.weight(node).input[0]].shape, []).append(node.output[0])
    pairs = [names for names in alike.values() if len(names) > 1]
    if pairs:
        pair = chance.sample(chance.choice(pairs), 2)
        found.append(_corruption(graph, read, "weights of two layers swapped", pair, _swap_weights))
    pair = chance.sample([node.output[0] for node in quantizers(graph)], 2)
    found.append(_corruption(graph, read, "scales of two quantizers swapped", pair, _swap_scales))
    return found


def _corruption(graph: Graph, read: Reader, kind: str, places: list[str], change: Callable[..., None]) -> Corruption:
    def make() -> File:
        copied = onnx.ModelProto()
        copied.CopyFrom(graph.model)
        g = Graph(copied, graph.layers)
        change(g, *(g.made[name] for name in places))
        return read(copied)

    layers = frozenset().union(*(graph.around(graph.made[name]) for name in places))
    return Corruption(kind, " and ".join(places), layers, make)


def _swap_weights(g: Graph, one: Any, other: Any) -> None:
    one.input[1], other.input[1] = other.input[1], one.input[1]
    order = {n.output[0]: k for k, n in enumerate(g.graph.node)}
    nodes = sorted(g.graph.node, key=lambda n: (n.output[0] in g.moving, order[n.output[0]]))
    del g.graph.node[:]
    g.graph.node.extend(nodes)


def _swap_scales(g: Graph, one: Any, other: Any) -> None:
    first, second = (g.values[quantizer_of(g, n).first.input[1]] for n in (one, other))
    for node, value in ((one, second), (other, first)):
        q = quantizer_of(g, node)
        g.put(q.last, 1, value.reshape(-1)[:1].reshape(()) if value.size == 1 else value)
        if q.first != q.last:
            g.put(q.first, 1, value.reshape(-1)[:1].reshape(()) if value.size == 1 else value)
