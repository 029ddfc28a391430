"""QCDQ (quantize, clip, dequantize in standard ONNX): making it run in int8, and its proof in two runtimes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft_plugin.deploy.files import refused
from qft_plugin.deploy.layers import FileLayer, file_layers, precisions, runtime_ops
from qft_plugin.deploy.onnx_run import in_onnx_runtime, in_openvino
from qft_plugin.deploy.onnx_view import ONNXFile, constants_of
from qft_plugin.deploy.openvino import RunInInt8
from qft_plugin.deploy.proof import Proof, Proved, prove
from qft_plugin.deploy.watched import Watched
from qft_plugin.errors import ParityError
from qft_plugin.graph.torch_model import Call
from qft_plugin.report.progress import phase


@dataclass(frozen=True, repr=False)
class QCDQReport(Proved, RunInInt8):
    """Contents of a QCDQ file, and how it runs on this machine's CPU.

    Attributes:
        path: the file.
        bytes: its size.
        proof: its proof in ONNX Runtime, without its optimizations; empty where it was not checked.
        openvino: likewise in OpenVINO.
        convolutions: OpenVINO's runtime precision (`"i8"`, `"u8"`, `"f32"`, ...) of every convolution by name of the
            module, or where it is not known, by its runtime name.
        linear: likewise of every fully connected layer.
        layers: all convolutions and linear layers of the file in its order, with what they take in it.
    """

    path: Path
    bytes: int
    proof: Proof
    openvino: Proof
    convolutions: Mapping[str, str]
    linear: Mapping[str, str]
    layers: tuple[FileLayer, ...] = ()

    @property
    def openvino_error(self) -> float:
        """Largest relative L2 difference of an output of OpenVINO from torch; NaN where nothing was checked."""
        return self.openvino.from_torch.relative


def strip_weight_clips(model: Any) -> int:
    """Remove the clips of constants that are in range already, in place.

    A narrow or 4-bit weight is exported as an int8 constant with a Clip. The Clip changes nothing, but OpenVINO does
    not look through it and runs the layer in floating point (2026.4). Constants are removed from the inputs of the
    graph too: an input could be changed.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many clips were removed.

    Raises:
        ParityError: a constant is not in range, so that the clip would change it.
    """
    graph = model.graph
    constants = constants_of(graph)
    renamed = {}
    for node in list(graph.node):
        if node.op_type != "Clip" or not all(name in constants for name in node.input):
            continue
        values, low, high = (constants[name] for name in node.input)
        outside = int(((values < low) | (values > high)).sum())
        if outside:
            raise ParityError(
                f"Constant {node.input[0]}: its integers should be from {low} to {high}, as its clip {node.name} says. "
                f"Found {outside} of {values.size} outside, which the model does not have. Please report the model."
            )
        renamed[node.output[0]] = node.input[0]
        graph.node.remove(node)
    for node in _nodes(graph):
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    for value in list(graph.input):
        if any(t.name == value.name for t in graph.initializer):
            graph.input.remove(value)
    used = {name for node in _nodes(graph) for name in node.input} | {o.name for o in graph.output}
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)
    return len(renamed)


def _nodes(graph: Any) -> Iterator[Any]:
    """Iterate over the nodes of a graph and of the loops and branches in it, which read its tensors too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def inspect_file(path: Path, *, watched: Watched | None, example: Call, images: Sequence[Call] = ()) -> QCDQReport:
    """Check a file, prove it in ONNX Runtime and in OpenVINO, and report the precision that each layer runs in.

    Args:
        path: the file.
        watched: the torch model; `None` skips the proof.
        example: the arguments that the model was exported with.
        images: other arguments to prove it with.

    Raises:
        ParityError: a constant or a layer differs; it names the layer.
        DeployabilityError: the file is not valid ONNX, or a runtime cannot run it.
    """
    import onnx
    import openvino

    model = onnx.load(path)
    with refused(
        "The exported file should be valid ONNX.",
        "Replace the operation that it names; where it names bfloat16, leave torch.autocast out of the forward.",
    ):
        onnx.checker.check_model(model, full_check=True)
    proof = in_openvino_proof = Proof()
    if watched is not None:
        files = [
            ONNXFile(model, runtime=runtime, free_batch=True, run=run)
            for runtime, run in (("ONNX Runtime", in_onnx_runtime(model)), ("OpenVINO", in_openvino(path)))
        ]
        with phase("proof"):
            proof, in_openvino_proof = prove(watched, files[0], example, images, others=files[1:])
    with phase("looking at precisions"):
        read = openvino.Core().read_model(path)
        ops = runtime_ops(read)
    return QCDQReport(
        path,
        path.stat().st_size,
        proof,
        in_openvino_proof,
        *precisions(ops, proof.layers),
        layers=file_layers(read, ops, proof.layers),
    )
