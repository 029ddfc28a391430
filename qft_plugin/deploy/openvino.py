"""OpenVINO IR with 4-bit weights that CPUs run in int8, and the proof that it computes what the student computes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from qft_plugin.deploy.files import checked_path, refused, room_in, written_to
from qft_plugin.deploy.ir_view import IRFile, constant_integers
from qft_plugin.deploy.layers import FileLayer, file_layers, precisions, runtime_ops
from qft_plugin.deploy.normalisation import keep_epsilon
from qft_plugin.deploy.openvino_defects import (
    bias_shared_products,
    skip_before_convolutions,
    upsample_in_float,
    widen_reductions,
)
from qft_plugin.deploy.proof import Proof, Proved, prove
from qft_plugin.deploy.watched import Watched
from qft_plugin.errors import DeployabilityError
from qft_plugin.files import draft_of, put_both
from qft_plugin.graph.torch_model import Call
from qft_plugin.report.progress import phase

Storage = Literal["i4", "i4_plain", "i8"]
STORAGES: Final = ("i4", "i4_plain", "i8")

INT8: Final = frozenset(["i8", "u8"])


class RunInInt8:
    """Of the report of a file that OpenVINO's CPU plugin has compiled: what runs in int8."""

    convolutions: Mapping[str, str]

    @property
    def int8_convolutions(self) -> int:
        """How many convolutions run in int8."""
        return sum(precision in INT8 for precision in self.convolutions.values())


@dataclass(frozen=True, repr=False)
class OpenVINOReport(Proved, RunInInt8):
    """Contents of a saved IR, and how it runs on this machine's CPU.

    Attributes:
        path: the XML file.
        bytes: size of both files together.
        proof: its proof, and how it differs from torch; empty where it was not checked.
        convolutions: runtime precision (`"i8"`, `"u8"`, `"f32"`, ...) of every convolution by name of the module, or
            where it is not known, by its runtime name.
        linear: likewise of every fully connected layer.
        layers: all convolutions and linear layers of the file in its order, with what they take in it.
    """

    path: Path
    bytes: int
    proof: Proof
    convolutions: Mapping[str, str]
    linear: Mapping[str, str]
    layers: tuple[FileLayer, ...] = ()


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


def checked_target(path: str | os.PathLike[str], storage: Storage) -> Path:
    """Check where an IR is to be written and how, before any work.

    Raises:
        DeployabilityError: the path cannot be written, or the storage is unknown.
    """
    if storage not in STORAGES:
        raise DeployabilityError(f"weights should be one of {STORAGES}. Found {storage!r}. Name one of them.")
    return checked_path(path, ".xml")


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    storage: Storage = "i4",
    watched: Watched | None = None,
    example: Call,
    images: Sequence[Call] = (),
) -> OpenVINOReport:
    """Write an IR and prove it; the files appear whole and only if the proof holds.

    Args:
        model: an `openvino.Model` converted from the quantized torch model.
        path: of the XML file; the weights go beside it as `.bin`.
        storage: see `set_weight_storage`.
        watched: the torch model; `None` skips the proof.
        example: the arguments that the model was converted with.
        images: other arguments to prove it with.

    Raises:
        DeployabilityError: the path cannot be written, or the storage is unknown.
        ParityError: the file differs from the torch model.
    """
    import openvino

    target = checked_target(path, storage)
    skip_before_convolutions(model)
    bias_shared_products(model)
    upsample_in_float(model)
    widen_reductions(model)
    set_weight_storage(model, storage)
    keep_epsilon(model)
    with written_to(target), draft_of(target) as draft:
        # Half-precision constants would round the scales, and the integers would mean something else.
        with phase("writing"), refused("OpenVINO should write the file.", f"It is to be written {room_in(target)}."):
            openvino.save_model(model, draft, compress_to_fp16=False)
        report = inspect_file(draft, watched=watched, example=example, images=images)
        put_both(draft, target, ".bin")
    return replace(report, path=target)


def inspect_file(path: Path, *, watched: Watched | None, example: Call, images: Sequence[Call] = ()) -> OpenVINOReport:
    """Read an IR back, prove it, and report the precision that each layer runs in.

    Args:
        path: of the XML file.
        watched: the torch model; `None` skips the proof.
        example: the arguments that the model was converted with.
        images: other arguments to prove it with.

    Raises:
        ParityError: a constant or a layer differs; it names the layer.
    """
    import openvino

    model = openvino.Core().read_model(path)
    proof = Proof()
    if watched is not None:
        with phase("proof"):
            proof = prove(watched, IRFile(model, free_batch=True), example, images)[0]
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    with phase("looking at precisions"):
        ops = runtime_ops(model)
    return OpenVINOReport(
        path, size, proof, *precisions(ops, proof.layers), layers=file_layers(model, ops, proof.layers)
    )
