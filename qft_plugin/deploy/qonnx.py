"""QONNX: what the clean-ups of its tools need, and the proof by QONNX' own executor of what a file computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.parity import compare_outputs, find_integers


@dataclass(frozen=True)
class QONNXReport:
    """What is in a QONNX file.

    Attributes:
        path: the file.
        bytes: its size.
        quantizers: how many `Quant` nodes it has, by bit width.
        weights: how many weights were compared, each equal in every integer; 0 where not checked.
        relative_error: largest relative L2 difference of an output from torch; NaN where not checked.
    """

    path: Path
    bytes: int
    quantizers: Mapping[int, int]
    weights: int
    relative_error: float


def widen_bias_constants(model: Any) -> int:
    """Give scale and zero point of quantized biases the shape `[1]` where they have none, in place: the same numbers.

    QONNX' `ExtractBiasFromConv`, and with it every flow that moves biases out of convolutions (FINN's), gives all that
    is not of shape `[1]` the channels of the bias, which fails on a constant without axes (qonnx 1.0).

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many constants were changed.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    biases = {n.input[2] for n in graph.node if n.op_type in ("Conv", "ConvTranspose") and len(n.input) > 2}
    changed = 0
    for node in graph.node:
        if node.op_type != "Quant" or node.output[0] not in biases:
            continue
        for place, what in ((1, "scale"), (2, "zero_point")):
            value = constants.get(node.input[place])
            if value is not None and value.shape == ():
                # Under a name of its own: another quantizer may read the same constant.
                node.input[place] = f"{node.output[0]}_{what}"
                graph.initializer.append(numpy_helper.from_array(value.reshape(1), node.input[place]))
                changed += 1
    return changed


def run(model: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Execute a QONNX model node by node.

    Args:
        model: what `load` returned.
        inputs: one input of the network, in the order of the file's inputs, of the shapes that it was exported with.
    """
    from qonnx.core.onnx_exec import execute_onnx

    names = [i.name for i in model.graph.input]
    values = {name: t.detach().cpu().numpy() for name, t in zip(names, inputs, strict=True)}
    result = execute_onnx(model, values)
    return tuple(torch.from_numpy(np.array(result[o.name])) for o in model.graph.output)


def inspect_file(
    path: Path, *, integers: Mapping[str, Tensor] | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> QONNXReport:
    """Read a file back and compare it with the torch model.

    Args:
        path: the file.
        integers: the integers of every quantized weight by name; `None` compares nothing.
        inputs: one input of the network.
        outputs: what torch computes for it.

    Raises:
        ParityError: an integer or an output differs; it names the weight or the output.
    """
    model = load(path)
    nodes = [node for node in model.graph.node if node.op_type == "Quant"]
    widths: dict[int, int] = {}
    constants = []
    for node in nodes:
        bits = int(model.get_initializer(node.input[3]))
        widths[bits] = widths.get(bits, 0) + 1
        W = model.get_initializer(node.input[0])
        if W is not None:
            scale, zero_point = (model.get_initializer(name) for name in node.input[1:3])
            constants.append(np.rint(W / scale + zero_point).astype(np.int64).reshape(-1))
    error = float("nan")
    if integers is not None:
        find_integers(constants, integers)
        error = compare_outputs(run(model, inputs), outputs, runtime="the QONNX file")
    return QONNXReport(path, path.stat().st_size, widths, len(integers or ()), error)


def load(path: Path) -> Any:
    """Load a file with its shapes inferred, as the executor needs them."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    return cleanup_model(ModelWrapper(str(path)))
