"""The host that a command asks for, and what it does with a network."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Final

from torch import nn

from qft_plugin.cli.saying import wrong_use
from qft_plugin.config import QFTConfig
from qft_plugin.errors import HostError


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


def function_of(host: Host, name: str) -> Callable[..., Any]:
    """Return a function of a host's folder by name.

    Raises:
        HostError: this version has none.
    """
    found: Callable[..., Any] | None = getattr(loaded(host), name, None)
    if found is None:
        raise HostError(
            f"qft_plugin.{host.value} should have the function {name}. Found none in this version. Update qft_plugin."
        )
    return found


def quantized(host: Host, model: nn.Module, batches: Iterable[Any], config: QFTConfig, *, quiet: bool) -> nn.Module:
    """Quantize a network.

    Args:
        host: which host does it.
        model: the float network.
        batches: of its inputs.
        config: the settings.
        quiet: show no progress.
    """
    shown = {"verbose": not quiet} if _shows_itself(host) else {}
    done = loaded(host).quantize(model, _dataset(host, batches), config=config, **shown)
    made: nn.Module = done.model if host is Host.nncf else done
    return made


def _shows_itself(host: Host) -> bool:
    """Whether jobs of this version show their progress, and their report at the end."""
    return "verbose" in inspect.signature(loaded(host).quantize).parameters


def inspected(host: Host, model: nn.Module, batches: Iterable[Any], config: QFTConfig) -> Any:
    """Look at what a job would do.

    Args:
        host: which host would do it.
        model: the float network.
        batches: of its inputs.
        config: the settings.

    Returns:
        The inspection of that host.

    Raises:
        HostError: this version has none.
    """
    return function_of(host, "inspect")(model, _dataset(host, batches), config=config)


def _dataset(host: Host, batches: Iterable[Any]) -> Any:
    if host is not Host.nncf:
        return batches
    import nncf

    return nncf.Dataset(batches)


def saved(host: Host, model: nn.Module, out: Path, example: Any, *, form: Format, storage: Storage) -> Any:
    """Write the file that was asked for; it is proved, and appears whole or not at all.

    Args:
        host: which host has quantized the network.
        model: what `quantized` returned.
        out: the file.
        example: one input.
        form: of a file of Brevitas'.
        storage: of the weights of an IR.

    Returns:
        The report of the save.
    """
    folder = loaded(host)
    if host is Host.nncf:
        return folder.save_openvino(model, out, example, weights=storage.value)
    save = folder.save_qcdq if form is Format.qcdq else folder.save_qonnx
    return save(folder.fold(model) if form is Format.qcdq else model, out, example)


def described(host: Host, model: nn.Module, report: Any) -> str:
    """Say what a job reached: its own report, where it has not been shown, and what is in the file.

    Args:
        host: which host has quantized the network.
        model: what `quantized` returned.
        report: of the save.
    """
    report_of = None if _shows_itself(host) else getattr(loaded(host), "report_of", None)
    lines = [] if report_of is None else [str(report_of(model))]
    lines.append(f"{report.path}: {report.bytes:,} bytes, {report.weights} quantized weights, each proved")
    if hasattr(report, "convolutions"):
        lines.append(f"{report.int8_convolutions} of {len(report.convolutions)} convolutions run in int8 in OpenVINO")
    lines.append(str(report.proof))
    return "\n".join(lines)
