"""OpenVINO IR with 4-bit weights that CPUs run in int8, and the proof that it computes what the student computes."""

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from qft_plugin.errors import DeployabilityError, ParityError

logger = logging.getLogger("qft_plugin")

Storage = Literal["i4", "i4_plain", "i8"]
STORAGES: Final = ("i4", "i4_plain", "i8")

OUTPUT_TOLERANCE: Final = 0.02
"""Largest relative L2 difference of an output: runtimes round a few activations the other way, each by one step of 8
bits; a wrong weight or scale shows as 0.1 and more."""

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

    target = Path(path)
    if storage not in STORAGES:
        raise DeployabilityError(f"weights should be one of {STORAGES}. Found {storage!r}.")
    if target.suffix != ".xml" or not target.parent.is_dir():
        raise DeployabilityError(f"path should be an .xml file in an existing folder. Found {os.fspath(path)!r}.")
    set_weight_storage(model, storage)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".qft_") as folder:
        draft = Path(folder) / target.name
        # Half-precision constants would round the scales, and the integers would mean something else.
        openvino.save_model(model, draft, compress_to_fp16=False)
        report = inspect_file(draft, integers=integers, inputs=inputs, outputs=outputs)
        os.replace(draft.with_suffix(".bin"), target.with_suffix(".bin"))
        os.replace(draft, target)
    return OpenVINOReport(
        target, report.bytes, report.weights, report.relative_error, report.convolutions, report.linear
    )


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

    core = openvino.Core()
    model = core.read_model(path)
    if integers is not None:
        _compare_integers(model, integers)
    # On CPUs with bf16 units the default would round everything that is not quantized.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    error = math.nan
    if integers is not None and len(inputs):
        result = compiled([t.detach().cpu().numpy() for t in inputs])
        error = _compare_outputs([torch.from_numpy(np.asarray(result[o])) for o in compiled.outputs], outputs)
    precisions: dict[str, dict[str, str]] = {"convolution": {}, "linear": {}}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        layer = _text(info, "layerType")
        if layer in COUNTED:
            precisions["convolution"][op.get_friendly_name()] = _text(info, "runtimePrecision")
        elif layer in ("FullyConnected", "MatMul"):
            precisions["linear"][op.get_friendly_name()] = _text(info, "runtimePrecision")
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    compared = 0 if integers is None else len(integers)
    return OpenVINOReport(path, size, compared, error, precisions["convolution"], precisions["linear"])


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _compare_integers(model: Any, integers: Mapping[str, Tensor]) -> None:
    """Find every weight among the constants of the file, equal in every integer.

    OpenVINO renames and reshapes constants, so they are found by their content.
    """
    found = [
        constant_integers(op).reshape(-1)
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("i4", "i8")
    ]
    for name, expected in integers.items():
        wanted = expected.detach().cpu().to(torch.int64).numpy().reshape(-1)
        candidates = [c for c in found if c.size == wanted.size]
        if not any(np.array_equal(c, wanted) for c in candidates):
            least = min((int((c != wanted).sum()) for c in candidates), default=wanted.size)
            raise ParityError(
                f"Weight {name}: its integers should be in the IR. Found {least} of {wanted.size} that differ "
                "from the closest constant. Please report the model."
            )


def _compare_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(found) != len(expected):
        raise ParityError(f"The IR should have the model's {len(expected)} outputs. Found {len(found)}.")
    worst = 0.0
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        e = e.detach().cpu()
        error = float((f - e).norm() / e.norm().clamp(min=1e-12)) if e.is_floating_point() else float((f != e).any())
        if not error <= OUTPUT_TOLERANCE:
            raise ParityError(
                f"Output {number} of the IR should be the model's within {OUTPUT_TOLERANCE} (relative L2, f32). "
                f"Found {error:.3g}. Please report the model."
            )
        worst = max(worst, error)
    return worst
