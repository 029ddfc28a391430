"""An ONNX file as it is read: checked, its number of images made free, and run by ONNX Runtime."""

import copy
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from qft_plugin.errors import HostError, ModelError

Array = NDArray[Any]

INSTALL: Final = "pip install 'qft_plugin[onnx]'"

FEWER, MORE = 2, 3
"""Numbers of images of the two runs: what differs between them depends on it."""

CLOSE: Final = 1e-4
"""Largest relative L2 difference of two runs in float32 that count as the same."""

QUANTIZED: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv"}
    | {"QLinearMatMul", "Quant", "BipolarQuant", "FakeQuantize"}
)

SHAPES: Final = frozenset(["Shape", "Size"])
"""Operations whose result depends on the shape of an image, not on its values."""


@dataclass(frozen=True)
class Input:
    """One input of a file: name, type of its elements, and shape, where `None` is an axis of any size."""

    name: str
    dtype: Any
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Traced:
    """A file, and all that it computes in two runs.

    Attributes:
        model: an `onnx.ModelProto` whose functions are inlined.
        fewer: values of one run by name.
        more: those of one with more images; the same run where the number is fixed.
        images: how many images both runs had.
        moving: names of all values that depend on the values of the images.
    """

    model: Any
    fewer: Mapping[str, Array]
    more: Mapping[str, Array]
    images: tuple[int, int]
    moving: frozenset[str]


def need(package: str) -> Any:
    """Import a package of the extra `onnx`.

    Raises:
        HostError: it is missing; the message names the line that installs it.
    """
    try:
        return __import__(package)
    except ImportError:
        raise HostError(f"{package} should be installed to read ONNX. Found none. Run: {INSTALL}") from None


def read(path: str | os.PathLike[str]) -> Any:
    """Read a file, and refuse what can be seen without running it.

    Raises:
        ModelError: it is no ONNX file, is quantized already, or is not in float32.
    """
    onnx = need("onnx")
    if not Path(path).is_file():
        raise ModelError(f"{path}: should be an ONNX file. Found none. Look at the name.")
    try:
        model = onnx.load(path)
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    except Exception as error:  # protobuf and missing files of weights raise kinds of their own
        said = str(error).strip().splitlines()[:1] or [""]
        raise ModelError(
            f"{path}: should be an ONNX file with all of its weights. Found {type(error).__name__}: {said[0]}. "
            "Export the model again, and keep files of weights beside it."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path}: should be an ONNX file with operations. Found none. Export the model again.")
    quantized = sorted({node.op_type for node in model.graph.node if node.op_type in QUANTIZED})
    if quantized:
        raise ModelError(
            f"{path}: should be a float model. Found one that is quantized already, with {', '.join(quantized)}. "
            "Export the model from before its quantization."
        )
    half = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
    found = sorted({half[t.data_type] for t in model.graph.initializer if t.data_type in half})
    if found:
        raise ModelError(
            f"{path}: should be in float32. Found weights in {', '.join(found)}, too coarse for the scales that are "
            "trained. Export the model from float32."
        )
    return model


def inputs_of(model: Any) -> list[Input]:
    """List the inputs that are no weights."""
    from onnx import helper

    weights = {t.name for t in model.graph.initializer}
    found = []
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name not in weights:
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            found.append(Input(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type), shape))
    return found


def trace(model: Any, images: Mapping[str, Array]) -> Traced:
    """Run a file with fewer and with more images, and keep all that it computes.

    Where it is for a fixed number of images, the number is made free if its outputs stay the same ones.

    Args:
        model: an `onnx.ModelProto`.
        images: `MORE` images or, for a fixed number, twice as many, for each input by name.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    fixed = {i.shape[0] for i in inputs_of(model)} - {None}
    if fixed:
        size = next(iter(fixed))
        assert size is not None
        free = with_free_batch(model)
        if len(fixed) > 1 or not same_when_free(model, free, images, size):
            values = _values(model, {name: rows[:size] for name, rows in images.items()})
            return Traced(model, values, values, (size, size), moving_in(model))
        model = free
    fewer, more = (_values(model, {name: rows[:n] for name, rows in images.items()}) for n in (FEWER, MORE))
    return Traced(model, fewer, more, (FEWER, MORE), moving_in(model))


def with_free_batch(model: Any) -> Any:
    """Return a copy of a file for any number of images, as far as the numbers that stand in it allow."""
    from onnx import numpy_helper

    free = copy.deepcopy(model)
    weights = {t.name for t in free.graph.initializer}
    size = next(i.shape[0] for i in inputs_of(model))
    for value in (*free.graph.input, *free.graph.output):
        if value.name not in weights and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "images"
    del free.graph.value_info[:]  # shapes of what lies between
    shapes = {node.input[1] for node in free.graph.node if node.op_type == "Reshape" and len(node.input) > 1}
    constants = [t for t in free.graph.initializer if t.name in shapes]
    for node in free.graph.node:
        if node.op_type == "Constant" and node.output[0] in shapes:
            constants += [a.t for a in node.attribute if a.name == "value"]
    for tensor in constants:
        shape = numpy_helper.to_array(tensor).copy()
        if shape.ndim == 1 and shape.size and shape[0] == size:
            shape[0] = 0 if -1 in shape[1:] else -1  # 0 takes what the input has
            tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))
    return free


def same_when_free(model: Any, free: Any, images: Mapping[str, Array], size: int) -> bool:
    """Whether a file with a free number of images computes what the original does, batch by batch."""
    parts = [{name: rows[start : start + size] for name, rows in images.items()} for start in (0, size)]
    both = {name: rows[: 2 * size] for name, rows in images.items()}
    expected = [run(model, part) for part in parts]
    try:
        found, other = run(free, both), run(free, {name: rows[:MORE] for name, rows in images.items()})
    except ModelError:
        return False
    joined = [np.concatenate(values) for values in zip(*expected, strict=True) if values[0].ndim]
    return (
        len(joined) == len(found)
        and all(close(f, e) for f, e in zip(found, joined, strict=True))
        and all(o.shape[0] == MORE for o in other)
    )


def close(found: Array, expected: Array) -> bool:
    """Whether two results are the same within float32."""
    return found.shape == expected.shape and relative(found, expected) < CLOSE


def relative(found: Array, expected: Array) -> float:
    """Return the relative L2 difference, infinity for another shape or for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    size, difference = float(np.linalg.norm(wide)), float(np.linalg.norm(found.astype(np.float64) - wide))
    error = difference / size if size else difference
    return error if np.isfinite(error) else float("inf")


def run(model: Any, images: Mapping[str, Array]) -> list[Array]:
    """Run a file in ONNX Runtime, as it is written.

    Raises:
        ModelError: it cannot be run; the message says why.
    """
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        results: list[Array] = session.run(None, dict(images))
    except Exception as error:  # its errors have no common class
        said = str(error).strip().splitlines()[-1:] or [""]
        raise ModelError(
            f"ONNX Runtime should run the file. Found {type(error).__name__}: {said[0]}. Export the model again, or "
            "pass an example_input of the size that it is for."
        ) from error
    return results


def _values(model: Any, images: Mapping[str, Array]) -> dict[str, Array]:
    """Run a file with every value as an output."""
    from onnx import helper

    shown = copy.deepcopy(model)
    del shown.graph.output[:]
    names = list(dict.fromkeys(name for node in shown.graph.node for name in node.output if name))
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return {**images, **dict(zip(names, run(shown, images), strict=True))}


def moving_in(model: Any) -> frozenset[str]:
    """Return the names of all values that depend on the values of the images, not only on their shape."""
    moving = {i.name for i in inputs_of(model)}
    for node in model.graph.node:
        branches = any(a.HasField("g") for a in node.attribute)  # they may read anything
        if branches or (node.op_type not in SHAPES and moving.intersection(node.input)):
            moving.update(name for name in node.output if name)
    return frozenset(moving)


def readers_of(nodes: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the nodes that read each value, by its name."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    return readers
