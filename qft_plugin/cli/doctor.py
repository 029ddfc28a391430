"""`qft doctor`: what is installed and what the machine has, against what a job needs."""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

OLDEST_PYTHON: Final = (3, 10)
OLDEST_TORCH: Final = (2, 7)
HOSTS: Final = ("nncf", "brevitas")
BESIDE: Final = {
    "nncf": {"openvino": "pip install 'qft_plugin[nncf]'"},
    "brevitas": {"onnx": "pip install 'qft_plugin[brevitas]'", "onnxruntime": "pip install 'qft_plugin[export]'"},
}
"""What a host needs to save, with the line that installs it."""

LOCK_SECONDS: Final = 600
"""A lock of this age belongs to no build that still runs."""

MEMORY: Final = 4 * 2**30
DISK: Final = 4 * 2**30
"""Images and outputs of the float network, above `memory_limit` in temporary files."""


class State(str, Enum):
    """How a finding is to be read."""

    good = "good"
    note = "note"
    bad = "bad"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of it.
        state: how it is.
        found: what was found.
        mend: what to do; empty where there is nothing.
    """

    name: str
    state: State
    found: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as plain data."""
        return {"name": self.name, "state": self.state.value, "found": self.found, "mend": self.mend}


def look() -> list[Finding]:
    """Look at everything."""
    hosts = hosts_found()
    found = [python(), torch_version(), *hosts]
    if all(f.state is State.note for f in hosts):
        found.append(
            Finding("hosts", State.bad, "none", "pip install 'qft_plugin[nncf]' or pip install 'qft_plugin[brevitas]'")
        )
    if version("nncf") is not None:
        found += [compiler(os.environ), lock(extensions_folder(os.environ), time.time())]
    return [*found, devices(), threads(), memory(), disk()]


def table(findings: list[Finding]) -> str:
    """Write findings as lines, with what to do below each."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.state.value:<5} {f.name:<{width}}  {f.found}")
        if f.mend:
            lines.append(f"{'':<5} {'':<{width}}  -> {f.mend}")
    return "\n".join(lines)


def version(package: str) -> str | None:
    """Return the version of a package, `None` where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    """Look at Python."""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    good = sys.version_info >= OLDEST_PYTHON
    return Finding(
        "python", State.good if good else State.bad, platform.python_version(), "" if good else f"use Python {wanted}"
    )


def torch_version() -> Finding:
    """Look at torch."""
    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    good = OLDEST_TORCH <= numbers < (3,)
    mend = "" if good else f"pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))},<3'"
    return Finding("torch", State.good if good else State.bad, torch.__version__, mend)


def hosts_found() -> list[Finding]:
    """Look at each host, and at what it saves with."""
    found = []
    for host in HOSTS:
        installed = version(host)
        if installed is None:
            found.append(Finding(host, State.note, "not installed", f"for it: pip install 'qft_plugin[{host}]'"))
            continue
        try:
            importlib.import_module(f"qft_plugin.{host}")
        except Exception as error:  # a broken installation raises anything
            found.append(Finding(host, State.bad, installed, _one_line(f"{type(error).__name__}: {error}")))
            continue
        found.append(Finding(host, State.good, installed))
        for package, line in BESIDE[host].items():
            beside = version(package)
            missing = beside is None
            found.append(
                Finding(
                    package,
                    State.bad if missing else State.good,
                    beside or f"not installed: {host} cannot save",
                    line if missing else "",
                )
            )
    return found


def compiler(environment: Mapping[str, str]) -> Finding:
    """Look for what NNCF compiles its quantizers with."""
    name = environment.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    has_ninja = shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None
    missing = [what for what, there in ((name, shutil.which(name) is not None), ("ninja", has_ninja)) if not there]
    if not missing:
        return Finding("compiler", State.good, f"{name} and ninja")
    return Finding(
        "compiler",
        State.note,
        f"no {' and no '.join(missing)}: NNCF cannot compile its quantizers, and its models run slower",
        f"install a C++ compiler{', and: pip install ninja' if 'ninja' in missing else ''}",
    )


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return where torch builds extensions."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))


def lock(folder: Path, now: float) -> Finding:
    """Look for a lock that a build has left: the next one waits for it for ever.

    Args:
        folder: where torch builds extensions.
        now: the time, seconds.
    """
    locks = sorted(folder.rglob("lock")) if folder.is_dir() else []
    stale = [path for path in locks if now - path.stat().st_mtime > LOCK_SECONDS]
    if stale:
        listed = " ".join(f"'{path}'" for path in stale)
        return Finding("locks of builds", State.bad, f"{len(stale)} left: NNCF waits for them for ever", f"rm {listed}")
    return Finding("locks of builds", State.good, "a build runs now" if locks else "none")


def devices() -> Finding:
    """List what a model can run on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return Finding("devices", State.good, ", ".join(["CPU", *names]))


def threads() -> Finding:
    """Compare torch's threads with the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    found = f"{used} of torch on {cores} cores"
    if used > cores:
        return Finding("threads", State.note, f"{found}: more than cores are slower", f"OMP_NUM_THREADS={cores}")
    return Finding("threads", State.good, found)


def memory() -> Finding:
    """Look at the memory that is free."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return Finding("memory", State.good, "unknown on this system")
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if ":" in line
    }
    return _enough("memory", sizes.get("MemAvailable", 0), MEMORY, "lower FinetuneConfig.batch_size and memory_limit")


def disk() -> Finding:
    """Look at the disk for temporary files."""
    folder = tempfile.gettempdir()
    return _enough(f"disk of {folder}", shutil.disk_usage(folder).free, DISK, "set TMPDIR to a folder on a larger disk")


def _enough(name: str, free: int, wanted: int, mend: str) -> Finding:
    found = f"{free / 2**30:.1f} GB free"
    return Finding(name, State.good, found) if free >= wanted else Finding(name, State.note, found, mend)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
