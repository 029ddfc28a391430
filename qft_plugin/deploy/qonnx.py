"""QONNX: constants in the shape that its tools need, and the proof of a file by QONNX' own executor."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.files import runs
from qft_plugin.deploy.onnx_view import ONNXFile, constants_of
from qft_plugin.deploy.proof import Proof, Proved, prove
from qft_plugin.deploy.watched import Watched
from qft_plugin.graph.torch_model import Call
from qft_plugin.report.progress import phase

EXECUTOR: Final = "QONNX' executor"


@dataclass(frozen=True, repr=False)
class QONNXReport(Proved):
    """Contents of a QONNX file.

    Attributes:
        path: the file.
        bytes: its size.
        quantizers: how many `Quant` nodes it has, by bit width.
        proof: its proof; empty where it was not checked.
    """

    path: Path
    bytes: int
    quantizers: Mapping[int, int]
    proof: Proof


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
    constants = constants_of(graph)
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


def read_once(model: Any) -> int:
    """Let a node that reads one tensor twice, as in `x * x`, read a copy the second time, in place.

    QONNX gives a tensor another name in the first place only, where one node reads it (qonnx 1.0), and then lacks it.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many copies there are.
    """
    from onnx import helper

    graph, changed = model.graph, 0
    for node in list(graph.node):
        for place, name in enumerate(node.input):
            if name and name in node.input[:place]:
                copied = f"{node.output[0]}_input_{place}"
                copy = helper.make_node("Identity", [name], [copied], name=copied)
                graph.node.insert(list(graph.node).index(node), copy)
                node.input[place] = copied
                changed += 1
    return changed


def in_executor(model: Any) -> Callable[[Sequence[Tensor], Sequence[str]], list[Tensor]]:
    """Return a QONNX model in QONNX' own executor, node by node.

    Args:
        model: the result of `load`.
    """
    from qonnx.core.onnx_exec import execute_onnx

    def run(inputs: Sequence[Tensor], shown: Sequence[str]) -> list[Tensor]:
        values = {i.name: t.detach().cpu().numpy() for i, t in zip(model.graph.input, inputs, strict=True)}
        with runs(EXECUTOR):
            result = execute_onnx(model, values, return_full_exec_context=True)
        return [torch.from_numpy(np.array(result[name])) for name in [*(o.name for o in model.graph.output), *shown]]

    return run


def inspect_file(path: Path, *, watched: Watched | None, example: Call) -> QONNXReport:
    """Read a file back and prove it.

    Args:
        path: the file.
        watched: the torch model; `None` skips the proof.
        example: the arguments that the model was exported with; the file is for their shapes.

    Raises:
        ParityError: a constant or a layer differs; it names the layer.
    """
    with runs(EXECUTOR):
        model = load(path)
    widths = Counter(int(model.get_initializer(n.input[3])) for n in model.graph.node if n.op_type == "Quant")
    proof = Proof()
    if watched is not None:
        file = ONNXFile(model.model, runtime=EXECUTOR, free_batch=False, run=in_executor(model))
        with phase("proof"):
            (proof,) = prove(watched, file, example)
    return QONNXReport(path, path.stat().st_size, dict(widths), proof)


def load(path: Path) -> Any:
    """Load a file with its shapes inferred, as the executor needs them."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    return cleanup_model(ModelWrapper(str(path)))
