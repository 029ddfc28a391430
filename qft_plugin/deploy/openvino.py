"""OpenVINO IR with 4-bit weights that CPUs run in int8, and the proof that it computes what the student computes."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.files import checked_path, draft_of
from qft_plugin.deploy.parity import compare_outputs, find_integers
from qft_plugin.errors import DeployabilityError

logger = logging.getLogger("qft_plugin")

Storage = Literal["i4", "i4_plain", "i8"]
STORAGES: Final = ("i4", "i4_plain", "i8")

INT8: Final = frozenset(["i8", "u8"])
COUNTED: Final = frozenset(["Convolution", "GroupConvolution", "Deconvolution"])


@dataclass(frozen=True)
class OpenVINOReport:
    """What is in a saved IR and how it runs on this machine's CPU.

    Attributes:
        path: the XML file.
        bytes: size of both files together.
        weights: how many quantized weights were compared, each equal in every integer; 0 where not checked.
        relative_error: largest relative L2 difference of an output from torch; NaN where not checked.
        convolutions: runtime precision (`"i8"`, `"u8"`, `"f32"`, ...) of every convolution by its runtime name.
        linear: likewise of every fully connected layer.
    """

    path: Path
    bytes: int
    weights: int
    relative_error: float
    convolutions: Mapping[str, str]
    linear: Mapping[str, str]

    @property
    def int8_convolutions(self) -> int:
        """How many convolutions run in int8."""
        return sum(precision in INT8 for precision in self.convolutions.values())


def set_weight_storage(model: Any, storage: Storage) -> None:
    """Choose how 4-bit weights are stored, in place.

    A 4-bit constant that feeds its dequantization directly makes OpenVINO's CPU plugin compute in f32; widened to
    8 bits inside the graph, the same file is run in int8 (OpenVINO 2026.4).

    Args:
        model: an `openvino.Model`.
        storage: `"i4"` stores 4 bits and widens them in the graph; `"i4_plain"` leaves them (for NPUs); `"i8"` stores
            8 bits (for runtimes without 4-bit constants).
    """
    from openvino import opset13

    for constant in model.get_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type().get_type_name() != "i4":
            continue
        targets = list(constant.output(0).get_target_inputs())
        if storage == "i4":
            replacement = opset13.convert(constant, "i8")
        elif storage == "i8":
            replacement = opset13.constant(constant_integers(constant).astype(np.int8))
        else:
            return
        for target in targets:
            target.replace_source_output(replacement.output(0))


def constant_integers(constant: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Read the integers of a 4-bit or 8-bit constant, in its shape."""
    shape = tuple(constant.get_output_shape(0))
    if constant.get_element_type().get_type_name() != "i4":
        return np.asarray(constant.data, dtype=np.int64).reshape(shape)
    packed = np.asarray(constant.data).view(np.uint8).reshape(-1)
    # Two values to a byte, the first one in the low half, each in two's complement.
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[: math.prod(shape)].astype(np.int64)
    return np.where(nibbles > 7, nibbles - 16, nibbles).reshape(shape)


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    storage: Storage = "i4",
    integers: Mapping[str, Tensor] | None = None,
    inputs: Sequence[Tensor] = (),
    outputs: Sequence[Tensor] = (),
) -> OpenVINOReport:
    """Write an IR and prove it; the files appear whole and only if the proof holds.

    Args:
        model: an `openvino.Model` converted from the quantized torch model.
        path: of the XML file; the weights go beside it as `.bin`.
        storage: see `set_weight_storage`.
        integers: the integers of every quantized weight by name; `None` skips the proof.
        inputs: one input of the network, in the order of its arguments.
        outputs: what torch computes for it.

    Raises:
        DeployabilityError: the path cannot be written, or the storage is unknown.
        ParityError: the file differs from the torch model.
    """
    import openvino

    if storage not in STORAGES:
        raise DeployabilityError(f"weights should be one of {STORAGES}. Found {storage!r}.")
    target = checked_path(path, ".xml")
    set_weight_storage(model, storage)
    with draft_of(target) as draft:
        # Half-precision constants would round the scales, and the integers would mean something else.
        openvino.save_model(model, draft, compress_to_fp16=False)
        report = inspect_file(draft, integers=integers, inputs=inputs, outputs=outputs)
        os.replace(draft.with_suffix(".bin"), target.with_suffix(".bin"))
        os.replace(draft, target)
    return replace(report, path=target)


def inspect_file(
    path: Path, *, integers: Mapping[str, Tensor] | None, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> OpenVINOReport:
    """Read an IR back, compare it with the torch model and report the precision that each layer runs in.

    Args:
        path: of the XML file.
        integers: the integers of every quantized weight by name; `None` compares nothing.
        inputs: one input of the network.
        outputs: what torch computes for it.

    Raises:
        ParityError: an integer or an output differs; it names the weight or the output.
    """
    import openvino

    model = openvino.Core().read_model(path)
    if integers is not None:
        _compare_integers(model, integers)
    ran = run_on_cpu(model, inputs if integers is not None else ())
    error = math.nan
    if integers is not None and len(inputs):
        error = compare_outputs(ran.outputs, outputs, runtime="the IR")
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    compared = 0 if integers is None else len(integers)
    return OpenVINOReport(path, size, compared, error, ran.convolutions, ran.linear)


@dataclass(frozen=True)
class CPURun:
    """How a model ran on OpenVINO's CPU plugin.

    Attributes:
        outputs: what it computed; empty without inputs.
        convolutions: runtime precision of every convolution by its runtime name.
        linear: likewise of every fully connected layer.
    """

    outputs: tuple[Tensor, ...]
    convolutions: Mapping[str, str]
    linear: Mapping[str, str]


def run_on_cpu(model: Any, inputs: Sequence[Tensor]) -> CPURun:
    """Compile an `openvino.Model` for the CPU, run it once, and read back the precision that each layer runs in.

    Args:
        model: an `openvino.Model`.
        inputs: one input of the network; nothing is run where there is none.
    """
    import openvino

    # On CPUs with bf16 units the default would round everything that is not quantized.
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs: tuple[Tensor, ...] = ()
    if len(inputs):
        result = compiled([t.detach().cpu().numpy() for t in inputs])
        outputs = tuple(torch.from_numpy(np.array(result[o])) for o in compiled.outputs)
    precisions: dict[str, dict[str, str]] = {"convolution": {}, "linear": {}}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        layer = _text(info, "layerType")
        if layer in COUNTED:
            precisions["convolution"][op.get_friendly_name()] = _text(info, "runtimePrecision")
        elif layer in ("FullyConnected", "MatMul"):
            precisions["linear"][op.get_friendly_name()] = _text(info, "runtimePrecision")
    return CPURun(outputs, precisions["convolution"], precisions["linear"])


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _compare_integers(model: Any, integers: Mapping[str, Tensor]) -> None:
    """Find every weight among the constants of the file, equal in every integer."""
    find_integers(
        [
            constant_integers(op).reshape(-1)
            for op in model.get_ops()
            if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("i4", "i8")
        ],
        integers,
    )
