"""A job that is kept in a folder while it runs, so that the same call goes on with it after an interruption."""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.config_file import config_to_dict
from qft_plugin.errors import ConfigError, warn
from qft_plugin.files import draft_of, put, remove_abandoned, used_alone, write_whole
from qft_plugin.job.report import versions_of
from qft_plugin.packages import require
from qft_plugin.training.data import Inputs
from qft_plugin.training.keeping import FORGETFUL, Keeper, Saved

logger = logging.getLogger("qft_plugin")

JOB: Final = "job.json"
"""The file that says which job it is."""

FORMAT: Final = 1
"""Counts changes of what the files hold."""

SECONDS: Final = 60.0
"""So often the work is kept."""

SHARE: Final = 0.02
"""Writing takes at most this share of the time: what takes long to write is kept less often."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")

LISTED: Final = 3
"""How many differences an error names."""

PARTS: Final = 64
"""Into so many parts a tensor is cut to be read: that of the images may be larger than the memory."""

DIGEST: Final = 32
"""Letters of a digest. What is as long is not quoted in an error."""

ABSENT: Final = {"settings": "at its default"}
"""What it means where a part of a job's identity lacks a name."""

HINTS: Final = {
    "images": " A loader that shuffles gives others each time: leave shuffle off, or give it a seeded generator.",
}


@contextlib.contextmanager
def kept_in(folder: str | os.PathLike[str] | None, *, processes: int = 1) -> Iterator[Keeper]:
    """Open the folder of a job that is kept; no other process can open it inside the block.

    Args:
        folder: it is made where it is missing; `None` keeps nothing.
        processes: how many train together.

    Raises:
        ConfigError: the folder cannot be used, or another process uses it.
        HostError: safetensors is not installed.
    """
    if folder is None:
        yield FORGETFUL
        return
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"checkpoint should be the path of a folder, or None. Found {folder!r}.")
    if processes > 1:
        raise ConfigError(
            f"checkpoint should be None where several processes train. Found {os.fspath(folder)} and {processes} "
            "processes. Leave it out, or train in one."
        )
    require("safetensors", extra="checkpoint")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with draft_of(path / JOB):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoint={str(path)!r} should be a folder that can be written to. Found {type(error).__name__}: "
            f"{error}. Choose another one."
        ) from error
    with used_alone(path) as alone:
        if not alone:
            raise ConfigError(
                f"checkpoint={str(path)!r} should be the folder of one job. Found that another process uses it. Wait "
                "until that one has ended, or choose another folder."
            )
        yield Checkpoint(path)


class Checkpoint(Keeper):
    """Keeps the parts of a job as files of a folder, each of which appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Look at nothing yet.

        Args:
            folder: it is there.
        """
        self._folder = folder
        self._job = ""
        self._due = time.monotonic() + SECONDS
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._failed = False

    def identify(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Compare the job with the one whose files are there, or note it where there is none.

        Raises:
            ConfigError: it is another job; the message names what differs.
        """
        # As it is read back: keys are words, and tuples lists.
        found, expected = self._read_job(), json.loads(json.dumps(identity()))
        for part in expected if found is not None else ():
            differences = list(_differences(part, found.get(part), expected[part]))
            if differences:
                more = f" and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
                raise ConfigError(
                    f"checkpoint={str(self._folder)!r} should be of the same job. Found another one: "
                    f"{'; '.join(differences[:LISTED])}{more}.{HINTS.get(part, '')} Choose another folder, or "
                    "delete this one to begin anew."
                )
        text = json.dumps(expected, indent=1)
        self._job = hashlib.sha256(text.encode()).hexdigest()
        if found is None:
            self._folder.mkdir(exist_ok=True)
            write_whole(self._folder / JOB, text + "\n")

    def inner(self, name: str) -> "Checkpoint":
        """Return the keeper of one of several jobs inside this one, in a folder inside its folder."""
        return Checkpoint(self._folder / name)

    def saved(self, part: str) -> Saved | None:
        """Return what an earlier run of the same job has left of a part of it; `None` for nothing.

        Raises:
            ConfigError: its file is damaged, or of another job.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(part)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            facts = json.loads(about["facts"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{path} should be a file of this checkpoint. Found {type(error).__name__}: {error}. Delete it; this "
                "part of the job is then done again."
            ) from error
        if about.get("job") != self._job:
            raise ConfigError(f"{path} should be of the job in {JOB} beside it. Found another job's. Delete it.")
        return Saved(facts, tensors)

    def save(self, part: str, made: Saved) -> None:
        """Write a part to its file, in the place of an earlier one; where that cannot be, warn once and go on."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        began, path = time.monotonic(), self._path(part)
        about = {"job": self._job, "facts": json.dumps(made.facts)}
        try:
            with draft_of(path) as draft:
                save_file(_apart(made.tensors), draft, about)
                put(draft, path)
        except (OSError, SafetensorError) as error:
            if not self._failed:
                warn(
                    f"checkpoint: {path} should be written. Found {type(error).__name__}: {error}. The job goes on, "
                    "and what was kept before stays. Make room on the disk, or look at the folder.",
                    stacklevel=2,
                )
            self._failed = True
        now = time.monotonic()
        self._due = now + max(SECONDS, (now - began) / SHARE)

    def tick(self, part: str, make: Callable[[], Saved]) -> None:
        """Keep what `make` returns if it is time for it, or if an interruption waits, which then takes place."""
        if self._signal is None and time.monotonic() < self._due:
            return
        self.save(part, make())
        if self._signal is not None:
            waiting, self._signal = self._signal, None
            self._give_back()
            logger.warning("checkpoint: the same call goes on from %s", self._folder)
            signal.raise_signal(waiting)
            self._take_over()  # the user's own handler has gone on

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM wait for the next `tick`; a second one acts at once.

        Python handles signals in the main thread only: in another one they act as they did.
        """
        self._take_over()
        try:
            yield
        finally:
            self._give_back()

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _read_job(self) -> Any:
        path = self._folder / JOB
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found = error
        if not isinstance(found, dict) or "format" not in found:
            raise ConfigError(
                f"{path} should be a file of a checkpoint. Found something else. Choose another folder for checkpoint."
            )
        return found

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            # What is ignored stays ignored, and what is no handler of Python's cannot be given back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._note)

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, _frame: Any) -> None:
        if self._signal is not None:
            self._give_back()
            signal.raise_signal(number)
            return
        self._signal = number
        logger.warning("checkpoint: interrupted; this step is finished and kept first. Interrupt again to stop at once")


def identity_of(
    model: nn.Module, inputs: Inputs, config: QFTConfig, *, host: str, asked: Mapping[str, str]
) -> dict[str, Any]:
    """Return what makes a job this one, as JSON holds it; its order is that of comparing.

    Args:
        model: the user's model.
        inputs: the images.
        config: the settings.
        host: name of the package of the framework.
        asked: what else the user asked the host for.
    """
    return {
        "format": FORMAT,
        "versions": versions_of(host),
        "host": {"name": host, **asked},
        "settings": _flat(config_to_dict(config)),
        "model": {"class": type(model).__qualname__, "structure": ADDRESS.sub("", repr(model))},
        "weights": digests(model),
        "images": {"count": len(inputs), **_digests_of({**dict(enumerate(inputs.args)), **inputs.kwargs})},
    }


def digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each parameter and buffer by name."""
    return _digests_of(dict([*model.named_parameters(), *model.named_buffers()]))


def _digests_of(tensors: Mapping[Any, Tensor]) -> dict[str, str]:
    return {str(name): digest(t) for name, t in tensors.items()}


def digest(t: Tensor) -> str:
    """Return a digest of a tensor: of its dtype, its shape and its values, wherever they are in memory."""
    found = hashlib.sha256(f"{t.dtype} {list(t.shape)}".encode())
    rows = t.detach().reshape(1) if t.dim() == 0 else t.detach()
    for part in torch.split(rows, max(1, len(rows) // PARTS)):
        found.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:DIGEST]


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that do not overlap, each laid out by rows, as a file of safetensors has them."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().contiguous()
        storage = t.untyped_storage().data_ptr()
        result[name] = t.clone() if storage in seen else t
        seen.add(storage)
    return result


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with points between the names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _differences(part: str, found: Any, expected: Any) -> Iterator[str]:
    if not isinstance(found, dict) or not isinstance(expected, dict):
        if found != expected:
            yield f"{part} {found} there, {expected} here"
        return
    for name in dict.fromkeys([*expected, *found]):
        there, here = (str(side.get(name, ABSENT.get(part, "missing"))) for side in (found, expected))
        if there != here:
            long = max(len(there), len(here)) >= DIGEST
            yield f"{part}: {name} differs" if long else f"{part}: {name} is {there} there, {here} here"
