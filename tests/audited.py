"""Runs a function while Python notes what it opens for writing, connects to and unpickles; run as a program.

python tests/audited.py NOTES MODULE:FUNCTION ARGUMENT...

The network is refused. What was noted while the function ran, and while its module was imported, becomes JSON in NOTES.
"""

import importlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

NETWORK = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "socket.bind",
    "urllib.Request",
)
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
OTHERS = ("pickle.find_class", "os.mkdir", "os.chmod", "os.rename", "shutil.copyfile")

noted: dict[str, list[str]] = defaultdict(list)
phase = "import"


def note(event: str, args: tuple[Any, ...]) -> None:
    """Note an event of Python's audit; refuse the network."""
    if event == "open":
        path, _, flags = args
        # A number is a file that is open already.
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
            noted[f"{phase} writes"].append(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100  (pathlib is audited too)
    elif event in NETWORK:
        noted[f"{phase} network"].append(f"{event} {args[1:]!r}")
        raise PermissionError(f"{event} is refused here")
    elif event in PROGRAMS:
        noted[f"{phase} programs"].append(repr(args[:2]))
    elif event in OTHERS:
        noted[f"{phase} {event}"].append(" ".join(str(a) for a in args[:2]))


def small(folder: str) -> None:
    """Run a whole job under the small host, whose images do not fit into memory, and save its report and settings."""
    import torch
    from small_host import quantized
    from torch import nn

    from qft_plugin import FinetuneConfig, QFTConfig, save_config

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)).eval()
    finetune = FinetuneConfig(images_fed=64, batch_size=16, memory_limit=0)
    config = QFTConfig(small_layer_share=0, finetune=finetune)
    job = quantized(model, list(torch.randn(2, 16, 3, 8, 8)), config)
    job.report.save_html(Path(folder) / "report.html")
    save_config(config, Path(folder) / "config.json")


def main(notes: str, name: str, *arguments: str) -> None:
    """Import and call the function, and write down what was noted."""
    global phase
    module, _, function = name.partition(":")
    del sys.path[0]  # of this file: what is imported is what the caller names
    sys.addaudithook(note)
    called = globals()[function] if module == "audited" else getattr(importlib.import_module(module), function)
    if module == "audited":
        importlib.import_module("small_host")
        importlib.import_module("jinja2")
    phase = "job"
    called(*arguments)
    phase = "end"
    Path(notes).write_text(json.dumps(noted))


if __name__ == "__main__":
    main(*sys.argv[1:])
