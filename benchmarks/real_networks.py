"""A folder of real networks: `nets.py` with `load(name)` and `normalise(images)`, and images as two .npz files."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 500


@dataclass(frozen=True, eq=False)
class RealNetwork:
    """A pretrained network with its images.

    Attributes:
        net: in eval mode.
        calibration: unlabeled images, normalised, `[images, 3, height, width]`.
        test: images that neither calibration nor training sees.
        labels: their classes.
    """

    net: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor


def load(folder: Path, name: str, images: int) -> RealNetwork:
    """Load a network of the folder, its first `images` calibration images and all test images."""
    spec = importlib.util.spec_from_file_location("nets", folder / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    nets: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    calibration = np.load(next(folder.glob("*_calibration.npz")))["x"][:images]
    with np.load(next(folder.glob("*_test.npz"))) as test:
        x, y = test["x"], test["y"]
    return RealNetwork(
        nets.load(name),
        nets.normalise(torch.from_numpy(calibration)).contiguous(),
        nets.normalise(torch.from_numpy(x)).contiguous(),
        torch.from_numpy(y),
    )


@torch.no_grad()
def classes(model: Any, images: Tensor) -> Tensor:
    """Return the class that a torch model names for each image."""
    return torch.cat([model(part).argmax(1) for part in images.split(BATCH)])


def on_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a file as a function on the CPU, at the precision that its weights ask for."""
    import openvino

    compiled: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(np.asarray(compiled([x.numpy()])[0]))


def percent(hits: Tensor) -> float:
    """Return the share of True, in percent."""
    return 100 * float(hits.double().mean())
