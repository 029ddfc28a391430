"""QCDQ (quantize, clip, dequantize in standard ONNX): making it run in int8, and the proof of what it computes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.openvino import INT8, run_on_cpu
from qft_plugin.deploy.parity import compare_outputs, find_integers

BETWEEN: Final = frozenset(["Relu", "MaxPool", "Identity", "Reshape", "Flatten", "Transpose", "Slice", "Split", "Clip"])
"""What may stand between a concatenation and its quantizer."""


@dataclass(frozen=True)
class QCDQReport:
    """What is in a QCDQ file and how it runs on this machine's CPU.

    Attributes:
        path: the file.
        bytes: its size.
        weights: how many weights were compared, each equal in every integer; 0 where not checked.
        relative_error: largest relative L2 difference of an output of ONNX Runtime, without its optimizations, from
            torch; NaN where not checked.
        openvino_error: likewise of OpenVINO.
        convolutions: OpenVINO's runtime precision (`"i8"`, `"u8"`, `"f32"`, ...) of every convolution by its name.
        linear: likewise of every fully connected layer.
    """

    path: Path
    bytes: int
    weights: int
    relative_error: float
    openvino_error: float
    convolutions: Mapping[str, str]
    linear: Mapping[str, str]

    @property
    def int8_convolutions(self) -> int:
        """How many convolutions run in int8."""
        return sum(precision in INT8 for precision in self.convolutions.values())


def strip_weight_clips(model: Any) -> int:
    """Remove the clips of constants that are in range already, in place.

    A narrow or 4-bit weight is exported as an int8 constant behind a Clip. The Clip changes nothing, but OpenVINO does
    not look through it and runs the layer in floating point (2026.4). Constants are removed from the inputs of the
    graph too: what is an input could be changed.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many clips were removed.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    renamed = {}
    for node in list(graph.node):
        if node.op_type != "Clip" or not all(name in constants for name in node.input):
            continue
        values, low, high = (constants[name] for name in node.input)
        if low <= values.min() and values.max() <= high:
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    for value in list(graph.input):
        if any(t.name == value.name for t in graph.initializer):
            graph.input.remove(value)
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)
    return len(renamed)


def shift_behind_concatenations(model: Any) -> int:
    """Let signed quantizers behind a concatenation count from 0 to 255 around 128, in place: the same numbers.

    OpenVINO's CPU plugin loses the scale of an int8 quantizer there and rounds to whole numbers (2026.4).

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many quantizers were changed.
    """
    from onnx import numpy_helper

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    shifted = set()
    for node in graph.node:
        readers = [n for n in graph.node if node.output[0] in n.input]
        if node.op_type != "QuantizeLinear" or any(n.op_type != "DequantizeLinear" for n in readers):
            continue
        before = makers.get(node.input[0])
        while before is not None and before.op_type in BETWEEN:
            before = makers.get(before.input[0])
        zero_points = [constants.get(n.input[2]) for n in (node, *readers) if len(n.input) > 2]
        known = len(zero_points) == 1 + len(readers) and all(z is not None and z.dtype == np.int8 for z in zero_points)
        if before is None or before.op_type != "Concat" or not known:
            continue
        for n, zero_point in zip((node, *readers), zero_points, strict=True):
            n.input[2] = f"{n.output[0]}_zero_point"
            unsigned = (np.asarray(zero_point, dtype=np.int16) + 128).astype(np.uint8)
            graph.initializer.append(numpy_helper.from_array(unsigned, n.input[2]))
        shifted.add(node.output[0])
    for value in [v for v in graph.value_info if v.name in shifted]:
        graph.value_info.remove(value)
    return len(shifted)


def inspect_file(
    path: Path, *, integers: Mapping[str, Tensor] | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> QCDQReport:
    """Check a file, run it in ONNX Runtime and OpenVINO, and compare it with the torch model.

    Args:
        path: the file.
        integers: the integers of every quantized weight by name; `None` compares nothing.
        inputs: one input of the network.
        outputs: what torch computes for it.

    Raises:
        ParityError: an integer or an output differs; it names the weight or the output.
        onnx.checker.ValidationError: the file is not valid ONNX.
    """
    import onnx
    import openvino
    from onnx import numpy_helper

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    ran = run_on_cpu(openvino.Core().read_model(path), inputs if integers is not None else ())
    errors = math.nan, math.nan
    if integers is not None:
        int8 = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
        find_integers([numpy_helper.to_array(t).astype(np.int64).reshape(-1) for t in int8], integers)
        errors = (
            compare_outputs(run(path, inputs), outputs, runtime="ONNX Runtime"),
            compare_outputs(ran.outputs, outputs, runtime="OpenVINO"),
        )
    return QCDQReport(path, path.stat().st_size, len(integers or ()), *errors, ran.convolutions, ran.linear)


def run(path: Path, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a file in ONNX Runtime as it stands: with its optimizations it would use kernels that round differently.

    Args:
        path: the file.
        inputs: one input of the network.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    values = {name: t.detach().cpu().numpy() for name, t in zip(names, inputs, strict=True)}
    return tuple(torch.from_numpy(np.array(o)) for o in session.run(None, values))
