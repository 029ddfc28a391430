"""The runtimes of ONNX files: ONNX Runtime as it stands, and OpenVINO's CPU plugin."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.files import runs


def in_onnx_runtime(model: Any) -> Callable[[Sequence[Tensor], Sequence[str]], list[Tensor]]:
    """Return a file in ONNX Runtime as it stands: with its optimizations it would use kernels that round differently.

    Args:
        model: an `onnx.ModelProto`.
    """
    sessions: dict[tuple[str, ...], Any] = {}

    def run(inputs: Sequence[Tensor], shown: Sequence[str]) -> list[Tensor]:
        key = tuple(shown)
        with runs("ONNX Runtime"):
            if key not in sessions:
                sessions[key] = session_of(_showing(model, shown))
            return infer(sessions[key], inputs)

    return run


def in_openvino(path: Path) -> Callable[[Sequence[Tensor], Sequence[str]], list[Tensor]]:
    """Return a file in OpenVINO's CPU plugin.

    Args:
        path: of the file.
    """
    from qft_plugin.deploy.ir_view import Compiled

    sessions: dict[tuple[str, ...], Any] = {}

    def run(inputs: Sequence[Tensor], shown: Sequence[str]) -> list[Tensor]:
        import openvino

        key = tuple(shown)
        if key not in sessions:
            with runs("OpenVINO"):
                model = openvino.Core().read_model(path)
            ops = [op for op in model.get_ordered_ops() if op.get_type_name() != "Result"]
            named = {name: o for op in ops for o in op.outputs() for name in o.get_names()}
            sessions[key] = Compiled(model, [named[name] for name in shown])
        found: list[Tensor] = sessions[key](inputs)
        return found

    return run


def _showing(model: Any, shown: Sequence[str]) -> Any:
    """Return a copy of a model with more outputs."""
    import onnx
    from onnx import helper

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for k, name in enumerate(shown):
        copied.graph.node.append(helper.make_node("Identity", [name], [f"shown_{k}"]))
        copied.graph.output.append(helper.make_empty_tensor_value_info(f"shown_{k}"))
    return copied


def session_of(model: Any) -> Any:
    """Return a file in ONNX Runtime, without its optimizations.

    Args:
        model: an `onnx.ModelProto`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # unused constants of a cut file are no news
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def infer(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a session on inputs in their order; returns its outputs."""
    names = [i.name for i in session.get_inputs()]
    values = {name: t.detach().cpu().numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.array(o)) for o in session.run(None, values)]
