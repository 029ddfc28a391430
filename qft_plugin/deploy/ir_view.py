"""An IR in OpenVINO: its constants, its quantizers, and how the CPU plugin runs it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.file_view import Array, FileProduct, FileQuantizer, Integers, Ran, Stretches, as_array
from qft_plugin.deploy.files import runs

PRODUCTS: Final = frozenset(
    ["Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"]
)
INTEGER_TYPES: Final = frozenset(["i4", "u4", "i8", "u8"])
PASSES: Final = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Transpose", "Convert"])

F32: Final = {"INFERENCE_PRECISION_HINT": "f32"}
"""On CPUs with bf16 units the default would round everything that is not quantized."""

EXACT: Final = {**F32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""By default the CPU plugin rounds to 8 bits what a linear layer with constant integers reads in float (2026.4): a
setting of the runtime, and not in the file."""


class Compiled:
    """An `openvino.Model`, compiled for the CPU, of which more than its outputs is looked at."""

    def __init__(self, model: Any, looked_at: Sequence[Any], *, parameters: Sequence[Any] = ()) -> None:
        """Compile it.

        Args:
            model: a copy: its tensors get more readers.
            looked_at: tensors of the model; one may be asked for several times, or be an output.
            parameters: inputs that come after its own.
        """
        import openvino
        from openvino import opset13

        results = list(model.get_results())
        keys = [_key(r.input_value(0)) for r in results]
        # The CPU plugin does not take a model that returns one tensor twice (2026.4).
        added = {_key(o): o for o in looked_at if _key(o) not in keys}
        self._order = [*range(len(keys)), *([*keys, *added].index(_key(o)) for o in looked_at)]
        results += [opset13.result(o) for o in added.values()]
        self._whole = openvino.Model(results, [*model.get_parameters(), *parameters])
        self._model: Any = None
        self._largest = 0

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run it on inputs in the order of its parameters; returns its outputs, then the tensors that are looked at.

        A model with a free batch that has run many images may compute fewer of them wrong afterwards: networks of one
        dimension with a pool do (2026.4). That is no property of the file, so it is compiled anew.
        """
        import openvino

        size = sum(t.numel() for t in inputs)
        with runs("OpenVINO"):
            if self._model is None or size < self._largest:
                self._model, self._largest = openvino.Core().compile_model(self._whole, "CPU", dict(EXACT)), 0
            self._largest = max(self._largest, size)
            result = self._model([t.detach().cpu().numpy() for t in inputs])
        return [torch.from_numpy(np.array(result[k])) for k in self._order]


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


class IRFile:
    """An IR that was read back."""

    runtime: str = "OpenVINO"

    def __init__(self, model: Any, *, free_batch: bool) -> None:
        """Find quantizers and products.

        Args:
            model: an `openvino.Model`.
            free_batch: whether it takes any number of images.
        """
        self.model, self.free_batch = model, free_batch
        moving: set[str] = set()
        self._fakes: list[Any] = []
        self._products: list[tuple[Any, int]] = []
        in_products: set[str] = set()
        for op in model.get_ordered_ops():
            kind, inputs = op.get_type_name(), [i.get_source_output().get_node() for i in op.inputs()]
            if kind == "Parameter" or any(node.get_friendly_name() in moving for node in inputs):
                moving.add(op.get_friendly_name())
            if kind == "FakeQuantize" and inputs[0].get_friendly_name() in moving:
                self._fakes.append(op)
            if kind in PRODUCTS:
                place = next((k for k, node in enumerate(inputs[:2]) if node.get_friendly_name() not in moving), None)
                used = set() if place is None else integer_constants(inputs[place])
                if place is not None and used:
                    self._products.append((op, place))
                    in_products |= used
        self.quantizers: Sequence[FileQuantizer] = [_quantizer(op) for op in self._fakes]
        self.products: Sequence[FileProduct] = [_product(op, place) for op, place in self._products]
        self.constants: Sequence[Integers] = [
            constant_integers(op).reshape(-1)
            for op in model.get_ops()
            if op.get_type_name() == "Constant"
            and op.get_element_type().get_type_name() in INTEGER_TYPES
            and op.get_friendly_name() not in in_products
        ]
        self._compiled: dict[frozenset[int] | None, Compiled] = {}

    def stretches(self, inputs: Sequence[Tensor], quantized: Sequence[Tensor]) -> Stretches:
        """Compute each stretch, with given values in the place of each quantizer's."""
        if None not in self._compiled:
            self._compiled[None] = self._cut()
        results = self._compiled[None]([*inputs, *quantized])
        count = len(self.model.outputs)
        read = count + len(self.quantizers)
        return Stretches(results[count:read], results[read:], results[:count])

    def run(self, inputs: Sequence[Tensor], *, hidden: frozenset[int] = frozenset()) -> Ran:
        """Run the file as it is, and look at the outputs of the quantizers that are not hidden."""
        shown = [k for k in range(len(self.quantizers)) if k not in hidden]
        if hidden not in self._compiled:
            model, by_name = _copied(self.model)
            fakes = [by_name[self._fakes[k].get_friendly_name()] for k in shown]
            self._compiled[hidden] = Compiled(model, [fake.output(0) for fake in fakes])
        results = self._compiled[hidden](inputs)
        values: list[Tensor | None] = [None] * len(self.quantizers)
        count = len(self.model.outputs)
        for k, value in zip(shown, results[count:], strict=True):
            values[k] = value
        return Ran(results[:count], values)

    def _cut(self) -> Compiled:
        """Compile the file with an input in the place of each quantizer, and the compared tensors as its outputs."""
        from openvino import opset13

        model, by_name = _copied(self.model)
        fakes = [by_name[op.get_friendly_name()] for op in self._fakes]
        products = [by_name[op.get_friendly_name()] for op, _ in self._products]
        parameters = []
        for fake in fakes:
            parameter = opset13.parameter(fake.get_output_partial_shape(0), np.float32)
            for target in list(fake.output(0).get_target_inputs()):
                target.replace_source_output(parameter.output(0))
            parameters.append(parameter)
        looked_at = [*(fake.input_value(0) for fake in fakes), *(p.output(0) for p in products)]
        return Compiled(model, looked_at, parameters=parameters)


def constant_integers(constant: Any) -> Integers:
    """Read the integers of a 4-bit or 8-bit constant, in its shape."""
    shape, kind = tuple(constant.get_output_shape(0)), constant.get_element_type().get_type_name()
    if kind not in ("i4", "u4"):
        return np.asarray(constant.data, dtype=np.int64).reshape(shape)
    packed = np.asarray(constant.data).view(np.uint8).reshape(-1)
    # Two values to a byte, the first one in the low half, each in two's complement where they are signed.
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[: math.prod(shape)].astype(np.int64)
    return (np.where(nibbles > 7, nibbles - 16, nibbles) if kind == "i4" else nibbles).reshape(shape)


def _copied(model: Any) -> tuple[Any, dict[str, Any]]:
    copied = model.clone()
    return copied, {op.get_friendly_name(): op for op in copied.get_ops()}


def integer_constants(node: Any) -> set[str]:
    """Return the names of the integer constants that a constant expression is made of."""
    if node.get_type_name() == "Constant":
        name: str = node.get_friendly_name()
        return {name} if node.get_element_type().get_type_name() in INTEGER_TYPES else set()
    return {name for i in node.inputs() for name in integer_constants(i.get_source_output().get_node())}


def _value(node: Any) -> Array:
    """Evaluate a constant expression in float64."""
    kind = node.get_type_name()
    if kind == "Constant":
        if node.get_element_type().get_type_name() in INTEGER_TYPES:
            return as_array(constant_integers(node))
        return as_array(node.data).reshape(tuple(node.get_output_shape(0)))
    inputs = [_value(i.get_source_output().get_node()) for i in node.inputs()]
    shape = tuple(node.get_output_shape(0))
    functions: dict[str, Callable[[], Array]] = {
        "Multiply": lambda: inputs[0] * inputs[1],
        "Subtract": lambda: inputs[0] - inputs[1],
        "Add": lambda: inputs[0] + inputs[1],
        "Transpose": lambda: inputs[0].transpose(inputs[1].astype(np.int64).tolist()),
        **{name: lambda: inputs[0].reshape(shape) for name in PASSES - {"Transpose"}},
    }
    return functions[kind]()


def _integers_in(node: Any) -> Integers:
    """Return the integers of a constant expression in the layout of its result."""
    while node.get_type_name() != "Constant":
        if node.get_type_name() == "Transpose":
            order = _value(node.input(1).get_source_output().get_node()).astype(np.int64).tolist()
            return np.transpose(_integers_in(node.input(0).get_source_output().get_node()), order)
        inputs = [i.get_source_output().get_node() for i in node.inputs()]
        if node.get_type_name() == "Subtract":
            # A zero point: the integers count from it.
            zero_point = np.broadcast_to(_value(inputs[1]), inputs[0].get_output_shape(0))
            return np.asarray(_integers_in(inputs[0]) - zero_point.astype(np.int64))
        before = next(n for n in inputs if integer_constants(n))
        if node.get_type_name() == "Reshape":
            return _integers_in(before).reshape(tuple(node.get_output_shape(0)))
        node = before
    return constant_integers(node)


def _product(op: Any, place: int) -> FileProduct:
    node = op.input(place).get_source_output().get_node()
    integers, values = _integers_in(node), _value(node)
    if op.get_type_name() == "MatMul":
        # torch's weight is [out, in].
        stored = bool(op.get_attributes()["transpose_b" if place == 1 else "transpose_a"]) is (place == 1)
        if not stored:
            integers, values = integers.swapaxes(-1, -2), values.swapaxes(-1, -2)
    return FileProduct(op.get_friendly_name(), integers.reshape(-1), np.ascontiguousarray(values).reshape(-1))


def _quantizer(op: Any) -> FileQuantizer:
    ends = [_value(op.input(k).get_source_output().get_node()) for k in range(1, 5)]
    source = op.input_value(0)
    return FileQuantizer(
        name=op.get_friendly_name(),
        source=f"{source.get_node().get_friendly_name()}:{source.get_index()}",
        read_low=ends[0],
        read_high=ends[1],
        low=ends[2],
        high=ends[3],
        levels=int(op.get_attributes()["levels"]),
        added=_is_added(op),
    )


def _is_added(op: Any) -> bool:
    """Whether additions alone read what an operation makes, through operations that only move it."""
    readers = [target.get_node() for target in op.output(0).get_target_inputs()]
    return bool(readers) and all(
        reader.get_type_name() == "Add"
        or (reader.get_type_name() in ("Reshape", "Squeeze", "Unsqueeze") and _is_added(reader))
        for reader in readers
    )
