"""An ONNX file of quantizers: its constants, its stretches, and how a runtime runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qft_plugin.deploy.file_view import FileProduct, FileQuantizer, Integers, Ran, Stretches, as_array
from qft_plugin.deploy.onnx_run import infer, session_of

PRODUCTS: Final = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
MOVES: Final = frozenset(["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"])
"""Operations that may stand between a constant of integers and the product that reads it."""

Constant = NDArray[Any]


@dataclass(frozen=True)
class _Place:
    """Where a quantizer stands: the tensors that it reads and makes."""

    read: str
    made: str


@dataclass(frozen=True)
class _Product:
    """A product, the name of its constant, and its bias."""

    node: Any
    weight: str
    bias: Constant | None

    @property
    def made(self) -> str:
        """Name of the product where its bias is added apart from it."""
        return f"{self.node.output[0]}" + ("" if self.bias is None else "/product")

    def apart(self) -> tuple[list[Any], list[Any]]:
        """Return nodes that add the bias apart from the product, and their constants."""
        from onnx import NodeProto, helper, numpy_helper

        if self.bias is None:
            return [self.node], []
        product, bias = NodeProto(), numpy_helper.from_array(self.bias.astype(np.float32), f"{self.made}/bias")
        product.CopyFrom(self.node)
        del product.input[2:]
        product.output[0] = self.made
        return [product, helper.make_node("Add", [self.made, bias.name], [self.node.output[0]])], [bias]


class ONNXFile:
    """A QCDQ or QONNX file that was read back."""

    def __init__(
        self,
        model: Any,
        *,
        runtime: str,
        free_batch: bool,
        run: Callable[[Sequence[Tensor], Sequence[str]], list[Tensor]],
    ) -> None:
        """Find quantizers and products.

        Args:
            model: an `onnx.ModelProto`.
            runtime: who runs it, for messages.
            free_batch: whether it takes any number of images.
            run: runs the file on inputs; returns the outputs and then the tensors of the given names.
        """
        import onnx

        self.model, self.runtime, self.free_batch = model, runtime, free_batch
        self._run = run
        inferred = onnx.shape_inference.infer_shapes(model)
        self._ranks = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
            if v.type.tensor_type.HasField("shape")
        }
        self._constants = _Constants(model)
        found = [q for node in model.graph.node if (q := self._quantizer(node)) is not None]
        self._places = [place for place, _ in found]
        self.quantizers: Sequence[FileQuantizer] = [quantizer for _, quantizer in found]
        self._products = [p for node in model.graph.node if (p := self._product(node)) is not None]
        self.products: Sequence[FileProduct] = [self._weight(p) for p in self._products]
        used = {name for p in self._products for name in self._constants.sources(p.weight)}
        self.constants: Sequence[Integers] = [
            t.reshape(-1) for name, t in self._constants.integers.items() if name not in used
        ]
        self._session: Any = None

    def stretches(self, inputs: Sequence[Tensor], quantized: Sequence[Tensor]) -> Stretches:
        """Compute each stretch, with given values in the place of each quantizer's."""
        if self._session is None:
            self._session = session_of(self._cut())
        results = infer(self._session, [*inputs, *quantized])
        ends = len(self._places), len(self._places) + len(self._products)
        return Stretches(results[: ends[0]], results[ends[0] : ends[1]], results[ends[1] :])

    def run(self, inputs: Sequence[Tensor], *, hidden: frozenset[int] = frozenset()) -> Ran:
        """Run the file as it is, and look at the outputs of the quantizers that are not hidden."""
        shown = [k for k in range(len(self._places)) if k not in hidden]
        results = self._run(inputs, [self._places[k].made for k in shown])
        count = len(self.model.graph.output)
        values: list[Tensor | None] = [None] * len(self._places)
        for k, value in zip(shown, results[count:], strict=True):
            values[k] = value
        return Ran(results[:count], values)

    def _quantizer(self, node: Any) -> tuple[_Place, FileQuantizer] | None:
        """Read a quantizer of activations: a Quant, or what a DequantizeLinear ends."""
        known = self._constants.values
        if node.op_type == "Quant" and node.input[0] not in known:
            low, high = quant_range(node, float(known[node.input[3]]))
            scale, zero_point = (as_array(known[name]) for name in node.input[1:3])
            return self._described(node, node.input[0], low, high, (scale, zero_point), (scale, zero_point))
        if node.op_type != "DequantizeLinear" or node.input[0] in known:
            return None
        clip = self._maker(node.input[0])
        bounds = None
        first = clip
        if clip.op_type == "Clip":
            bounds = [float(known[name]) for name in clip.input[1:3]]
            first = self._maker(clip.input[0])
        if first.op_type != "QuantizeLinear":
            return None
        kind = np.iinfo(str(known[first.input[2]].dtype))
        low, high = bounds or (float(kind.min), float(kind.max))
        reads, makes = (
            (self._on_axis(n, known[n.input[1]]), self._on_axis(n, known[n.input[2]])) for n in (first, node)
        )
        return self._described(node, first.input[0], low, high, reads, makes)

    def _described(
        self,
        node: Any,
        source: str,
        low: float,
        high: float,
        reads: tuple[Constant, Constant],
        makes: tuple[Constant, Constant],
    ) -> tuple[_Place, FileQuantizer]:
        (s_in, z_in), (s_out, z_out) = reads, makes
        readers = [n for n in self.model.graph.node if node.output[0] in n.input]
        quantizer = FileQuantizer(
            name=node.name,
            source=source,
            low=np.atleast_1d((low - z_out) * s_out),
            high=np.atleast_1d((high - z_out) * s_out),
            read_low=np.atleast_1d((low - z_in) * s_in),
            read_high=np.atleast_1d((high - z_in) * s_in),
            levels=int(high - low) + 1,
            added=bool(readers) and all(n.op_type == "Add" for n in readers),
        )
        return _Place(source, node.output[0]), quantizer

    def _on_axis(self, node: Any, value: Constant) -> Constant:
        """Give a scale or zero point per channel the axes of the tensor that it quantizes."""
        if value.size == 1:
            return as_array(value).reshape(())
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        return as_array(value).reshape(-1, *(1,) * (self._ranks[node.input[0]] - 1 - axis))

    def _maker(self, name: str) -> Any:
        return next(node for node in self.model.graph.node if name in node.output)

    def _product(self, node: Any) -> _Product | None:
        if node.op_type not in PRODUCTS:
            return None
        weight = next((name for name in node.input[:2] if self._constants.sources(name)), None)
        if weight is None or all(name in self._constants.values for name in node.input[:2]):
            return None
        bias = self._constants.values.get(node.input[2]) if len(node.input) > 2 else None
        after = self._constants.values[weight].ndim - 2 if node.op_type.startswith("Conv") else 0
        return _Product(node, weight, None if bias is None else as_array(bias).reshape(-1, *(1,) * after))

    def _weight(self, p: _Product) -> FileProduct:
        integers, values = self._constants.integers_of(p.weight), as_array(self._constants.values[p.weight])
        by_rows = any(a.name == "transB" and a.i for a in p.node.attribute)
        if p.node.op_type in ("Gemm", "MatMul") and not by_rows:
            integers, values = integers.swapaxes(-1, -2), values.swapaxes(-1, -2)
        return FileProduct(p.node.name, integers.reshape(-1), np.ascontiguousarray(values).reshape(-1))

    def _cut(self) -> Any:
        """Return the file with an input in the place of each quantizer, and the compared tensors as its outputs."""
        from onnx import TensorProto, helper, numpy_helper

        graph = self.model.graph
        made = {place.made for place in self._places}
        outputs = [
            *(place.read for place in self._places),
            *(p.made for p in self._products),
            *(o.name for o in graph.output),
        ]
        # Rounded with its bias, a small product would be lost.
        apart = {p.node.output[0]: p.apart() for p in self._products}
        known = self._constants.values
        # Constants of other domains are evaluated, so that any runtime takes what is left.
        own = {name for node in graph.node if node.domain for name in node.output if name in known}
        kept = _needed(graph, [*outputs, *apart], stop=made | own)
        whole = [node for node in graph.node if node.output and node.output[0] in kept]
        nodes = [part for node in whole for part in apart.get(node.output[0], ([node], []))[0]]
        nodes += [helper.make_node("Identity", [name], [f"compared_{k}"]) for k, name in enumerate(outputs)]
        inputs = [i for i in graph.input if not any(t.name == i.name for t in graph.initializer)]
        inputs += [helper.make_tensor_value_info(p.made, TensorProto.FLOAT, None) for p in self._places]
        constants = [numpy_helper.from_array(known[name].astype(np.float32), name) for name in own]
        constants += [bias for _, biases in apart.values() for bias in biases]
        ends = [helper.make_empty_tensor_value_info(f"compared_{k}") for k in range(len(outputs))]
        cut = helper.make_graph(nodes, "stretches", inputs, ends, [*graph.initializer, *constants])
        return helper.make_model(cut, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)


class _Constants:
    """The tensors of a graph that do not depend on its inputs.

    Attributes:
        values: every constant tensor by name; dequantized ones in float64.
        integers: the integers, counted from the zero point, of every dequantized one.
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self.values: dict[str, Constant] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.integers: dict[str, Integers] = {}
        self._sources: dict[str, frozenset[str]] = {}
        self._moved: dict[str, Integers] = {}
        for node in graph.node:
            if node.op_type == "Constant":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.input and all(name in self.values for name in node.input if name):
                self._evaluate(node, model)

    def sources(self, name: str) -> frozenset[str]:
        """Return the names of the dequantized constants that a constant is made of."""
        return self._sources.get(name, frozenset())

    def integers_of(self, name: str) -> Integers:
        """Return the integers of a constant in its layout."""
        return self._moved[name]

    def _evaluate(self, node: Any, model: Any) -> None:
        given = [self.values[name] for name in node.input if name]
        name = node.output[0]
        if node.op_type in ("DequantizeLinear", "Quant"):
            value, integers = dequantized(node, given)
            self.values[name], self.integers[name], self._moved[name] = value, integers, integers
            self._sources[name] = frozenset([name])
            return
        if node.domain:
            return
        given = [t.astype(np.float32) if t.dtype == np.float64 else t for t in given]
        evaluate = _single(node, model)
        for output, value in zip(node.output, evaluate(given), strict=True):
            self.values[output] = np.asarray(value)
        sources = frozenset().union(*(self.sources(i) for i in node.input))
        if sources and node.op_type in MOVES:
            self._sources[name] = sources
            self._moved[name] = np.asarray(evaluate([self._moved[node.input[0]], *given[1:]])[0])


def constants_of(graph: Any) -> dict[str, Constant]:
    """Return the constants of a graph by name, as they are stored."""
    from onnx import numpy_helper

    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return constants | {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"
    }


def _single(node: Any, model: Any) -> Callable[[Sequence[Constant]], list[Constant]]:
    """Return one node as a function."""
    # A node with opsets of its own: an evaluator of a bare node takes the newest.
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names)],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
    )
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))

    def run(given: Sequence[Constant]) -> list[Constant]:
        return list(evaluator.run(None, dict(zip(names, given, strict=True))))

    return run


def dequantized(node: Any, given: Sequence[Constant]) -> tuple[Constant, Integers]:
    """Evaluate a Quant or DequantizeLinear of constants, in float64.

    Returns:
        The values, and the integers, counted from the zero point.
    """
    if node.op_type == "Quant":
        x, scale, zero_point, bits = (as_array(t) for t in given)
        low, high = quant_range(node, float(bits))
        integers = np.clip(np.rint(x / scale + zero_point), low, high) - zero_point
        return integers * scale, np.rint(integers).astype(np.int64)
    q, scale = as_array(given[0]), as_array(given[1])
    zero_point = as_array(given[2]) if len(given) > 2 else np.zeros_like(scale)
    if scale.size > 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % q.ndim
        shape = (-1, *(1,) * (q.ndim - 1 - axis))
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    integers = q - zero_point
    return integers * scale, np.rint(integers).astype(np.int64)


def quant_range(node: Any, bits: float) -> tuple[float, float]:
    """Return the smallest and the largest integer of a Quant."""
    flags: Mapping[str, int] = {a.name: a.i for a in node.attribute}
    signed, narrow = bool(flags.get("signed", 1)), bool(flags.get("narrow", 0))
    if signed:
        return -(2.0 ** (bits - 1)) + narrow, 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1 - narrow


def _needed(graph: Any, outputs: Sequence[str], *, stop: set[str]) -> set[str]:
    """Return the names of all tensors that outputs are computed from, up to those where an input stands."""
    makers = {name: node for node in graph.node for name in node.output}
    needed: set[str] = set()
    left = list(outputs)
    while left:
        name = left.pop()
        if name in needed or name in stop or name not in makers:
            continue
        needed |= set(makers[name].output)
        left += makers[name].input
    return needed
