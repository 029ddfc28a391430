"""QONNX: the proof that an exported file computes what the model computes, by QONNX' own executor."""

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
            whole = np.rint(W / scale + zero_point).astype(np.int64)
            # A linear layer on more than two axes is exported as a product with its weight transposed.
            constants += [whole.reshape(-1), whole.T.reshape(-1)]
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
