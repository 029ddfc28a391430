"""What the tests of the command line share: a runner, folders of images, and a host that stands in for a real one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from qft_plugin.cli.app import app

RUNNER = CliRunner()


def qft(*arguments: object) -> Any:
    """Run a command; what it raises is raised here, but for its exit."""
    return RUNNER.invoke(app, [str(a) for a in arguments])


def write_images(folder: Path, count: int = 3, *, size: tuple[int, int] = (12, 10)) -> Path:
    """Write random images of a height and a width into a folder, half of them in a folder below it."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / "below" if number % 2 else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:03}.png")
    return folder


class Said:
    """A report that says, and writes, what it was made of."""

    def __init__(self, text: str) -> None:
        """Keep the text."""
        self.text = text

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def to_json(self) -> str:
        """Return the text as JSON."""
        return f'"{self.text}"'

    def save_html(self, path: Path, *, file: Any = None) -> None:
        """Write the text, and how large the file is that it is about."""
        size = "" if file is None else f" of {file.bytes} bytes"
        Path(path).write_text(f"<p>{self.text}{size}</p>", encoding="utf-8")


class HostStandIn(SimpleNamespace):
    """Has the functions of `qft_plugin.brevitas`, keeps what they were called with, and quantizes nothing."""

    def __init__(self, **more: Any) -> None:
        """Begin with no calls."""
        super().__init__(calls=[], **more)

    def quantize(self, model: nn.Module, data: Any, *, config: Any, **_: Any) -> nn.Module:
        """Keep the images and the settings."""
        self.calls.append(("quantize", model, torch.cat(list(data)), config))
        return model

    def fold(self, model: nn.Module) -> nn.Module:
        """Return the same model."""
        return model

    def save_qcdq(self, model: nn.Module, path: Path, example: Any) -> Any:
        """Write a file of one byte."""
        self.calls.append(("save_qcdq", model, path, example))
        path.write_bytes(b"q")
        return SimpleNamespace(
            path=path, bytes=1, weights=2, int8_convolutions=1, convolutions={"a": "i8"}, proof="proved"
        )
