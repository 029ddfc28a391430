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
from qft_plugin.deploy.openvino import RunInInt8
from qft_plugin.report.data import Report
from qft_plugin.report.kept import keep_report

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

    def save_html(self, path: Path) -> None:
        """Write the text."""
        Path(path).write_text(f"<p>{self.text}</p>", encoding="utf-8")


class Saved(SimpleNamespace, RunInInt8):
    """The report of a file."""


REPORT = Report(
    **{"host": "brevitas", "versions": {}, "model": "Net", "images": 9, "held_out": 0, "compared_at": ()},
    **{"start_loss": None, "final_loss": None, "losses": (), "agreement": None, "start_agreement": None},
    layers=(),
)


class HostStandIn(SimpleNamespace):
    """Has the functions of `qft_plugin.brevitas`, keeps what they were called with, and quantizes nothing."""

    def __init__(self, **more: Any) -> None:
        """Begin with no calls."""
        super().__init__(calls=[], **more)

    def quantize(
        self, model: nn.Module, data: Any, *, config: Any, verbose: bool, checkpoint: Path | None
    ) -> nn.Module:
        """Keep the images, the settings and the folder of the job; make a report."""
        self.kept_in = checkpoint
        self.calls.append(("quantize", model, torch.cat(list(data)), config, verbose))
        keep_report(model, REPORT)
        return model

    def inspect(self, model: nn.Module, data: Any, *, config: Any, verbose: bool) -> Said:
        """Keep whether it should show progress; say what it was called with."""
        self.calls.append(("inspect", verbose))
        return Said(f"{type(model).__name__} {sum(len(batch) for batch in data)} {config.weight_bits}")

    def fold(self, model: nn.Module) -> nn.Module:
        """Return the same model."""
        return model

    def save_qcdq(self, model: nn.Module, path: Path, example: Any, *, verbose: bool) -> Any:
        """Write a file of one byte."""
        self.calls.append(("save_qcdq", model, path, example, verbose))
        path.write_bytes(b"q")
        return Saved(path=path, bytes=1, weights=2, convolutions={"a": "i8"}, proof="proved")
