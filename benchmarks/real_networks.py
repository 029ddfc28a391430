"""A folder of real networks: `nets.py` with `load(name)` and `normalise(images)`, and images as two .npz files."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 500
PIXELS = 1 << 18
"""What a batch has at most: 5 images of 224x224, whose activations torch computes twice as fast as those of 20."""

SELF_IMAGES = 200
"""Images on which a network is compared with itself."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images as their file holds them, decoded and normalised only where they are read: floats take many times as much.

    Attributes:
        rows: `[images, ...]`.
        normalise: makes the input of the network of them.
    """

    rows: Tensor
    normalise: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, which: slice) -> "Images":
        """Return some of them."""
        return Images(self.rows[which], self.normalise)

    def tensor(self) -> Tensor:
        """Return what a network reads, `[images, 3, height, width]`."""
        return self.normalise(self.rows).contiguous()

    def split(self, size: int) -> list["Images"]:
        """Cut into batches of `size` images, fewer where images are large."""
        height, width = self[:1].tensor().shape[-2:]
        return [Images(part, self.normalise) for part in self.rows.split(min(size, PIXELS // (height * width)))]


@dataclass(frozen=True, eq=False)
class RealNetwork:
    """A pretrained network with its images.

    Attributes:
        net: in eval mode.
        calibration: unlabeled images.
        test: images that neither calibration nor training sees.
        labels: their classes.
    """

    net: nn.Module
    calibration: Images
    test: Images
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
        Images(torch.from_numpy(calibration), nets.normalise),
        Images(torch.from_numpy(x), nets.normalise),
        torch.from_numpy(y),
    )


@torch.no_grad()
def outputs(model: Any, images: Images) -> Tensor:
    """Return what a model computes for each image."""
    return torch.cat([model(part.tensor()) for part in images.split(BATCH)])


def classes(model: Any, images: Images) -> Tensor:
    """Return the class that a model names for each image."""
    return outputs(model, images).argmax(1)


def self_difference(model: nn.Module, images: Images) -> dict[str, float]:
    """Say how far a model is from itself: computed in float64, against float32."""
    exact = copy.deepcopy(model).double()
    return difference(outputs(lambda x: exact(x.double()), images), outputs(model, images).double())


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Say how far outputs are from others: relative L2, and the share of images of equal class, in percent."""
    same = percent(found.argmax(1) == expected.argmax(1))
    return {"relative_l2": round(float((found - expected).norm() / expected.norm()), 4), "same_class": round(same, 2)}


def on_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a file as a function on the CPU, at the precision that its weights ask for."""
    import openvino

    compiled: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(np.array(compiled([x.numpy()])[0]))


def percent(hits: Tensor) -> float:
    """Return the share of True, in percent."""
    return 100 * float(hits.double().mean())
