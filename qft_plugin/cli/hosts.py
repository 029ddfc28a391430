"""The host that a command asks for, and what it does with a network."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from torch import nn

from qft_plugin.cli.saying import wrong_use
from qft_plugin.config import QFTConfig
from qft_plugin.deploy.openvino import RunInInt8
from qft_plugin.deploy.proof import Proved
from qft_plugin.report.inspection import Inspection


class Host(str, Enum):
    """A host by its name."""

    nncf = "nncf"
    brevitas = "brevitas"


class Format(str, Enum):
    """What a file of Brevitas' is."""

    qcdq = "qcdq"
    qonnx = "qonnx"


class Storage(str, Enum):
    """How an IR stores 4-bit weights."""

    i4 = "i4"
    i4_plain = "i4_plain"
    i8 = "i8"


HOST_OF: Final = {".xml": Host.nncf, ".onnx": Host.brevitas}
"""Which host writes a file, by its suffix."""


@dataclass(frozen=True)
class Order:
    """What a command asks for.

    Attributes:
        host: which host does it.
        form: of a file of Brevitas'.
        storage: of the weights of an IR.
        config: the settings.
        out: the file.
        page: where the report is written as a page; `None` for nowhere.
        data: likewise as JSON.
        checkpoint: the folder in which the job is kept; `None` for nowhere.
    """

    host: Host
    form: Format
    storage: Storage
    config: QFTConfig
    out: Path
    page: Path | None
    data: Path | None
    checkpoint: Path | None


def host_for(out: Path, asked: Host | None) -> Host:
    """Choose the host by the file that is asked for; what does not go together ends the command."""
    if out.suffix not in HOST_OF:
        wrong_use(f"--out should end with .xml (NNCF, OpenVINO) or .onnx (Brevitas). Found {out.name!r}.")
    host = HOST_OF[out.suffix]
    if asked not in (None, host):
        wrong_use(f"--host should be {host.value} for a {out.suffix} file. Found {asked.value}. Change one of them.")
    return host


def loaded(host: Host) -> Any:
    """Import the package's folder of a host.

    Raises:
        HostError: the host is missing or too old; the message names the line that installs it.
    """
    return importlib.import_module(f"qft_plugin.{host.value}")


def quantized(order: Order, model: nn.Module, batches: Iterable[Any], *, quiet: bool) -> nn.Module:
    """Quantize a network.

    Args:
        order: what is asked for.
        model: the float network.
        batches: of its inputs.
        quiet: show no progress, and no report at the end.
    """
    host, dataset = loaded(order.host), _dataset(order.host, batches)
    done = host.quantize(model, dataset, config=order.config, verbose=not quiet, checkpoint=order.checkpoint)
    made: nn.Module = done.model if order.host is Host.nncf else done
    return made


def inspected(host: Host, model: nn.Module, batches: Iterable[Any], config: QFTConfig, *, quiet: bool) -> Inspection:
    """Look at what a job would do.

    Args:
        host: which host would do it.
        model: the float network.
        batches: of its inputs.
        config: the settings.
        quiet: show no progress.
    """
    found: Inspection = loaded(host).inspect(model, _dataset(host, batches), config=config, verbose=not quiet)
    return found


def _dataset(host: Host, batches: Iterable[Any]) -> Any:
    if host is not Host.nncf:
        return batches
    import nncf

    return nncf.Dataset(batches)


def saved(order: Order, model: nn.Module, example: Any, *, quiet: bool) -> Proved:
    """Write the file that was asked for; it is proved, and appears whole or not at all.

    Args:
        order: what is asked for.
        model: what `quantized` returned.
        example: one input.
        quiet: show no progress.

    Returns:
        The report of the save.
    """
    folder, out = loaded(order.host), order.out
    if order.host is Host.nncf:
        report: Proved = folder.save_openvino(model, out, example, weights=order.storage.value, verbose=not quiet)
    elif order.form is Format.qcdq:
        report = folder.save_qcdq(folder.fold(model), out, example, verbose=not quiet)
    else:
        report = folder.save_qonnx(model, out, example, verbose=not quiet)
    return report


def described(report: Proved) -> str:
    """Say what is in a file.

    Args:
        report: of the save.
    """
    lines = [f"{report.path}: {report.bytes:,} bytes, {report.weights} quantized weights, each proved"]
    if isinstance(report, RunInInt8):  # OpenVINO runs no QONNX
        lines.append(f"{report.int8_convolutions} of {len(report.convolutions)} convolutions run in int8 in OpenVINO")
    return "\n".join([*lines, str(report.proof)])
