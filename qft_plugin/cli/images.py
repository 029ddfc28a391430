"""A folder of images as batches, prepared as torchvision prepares images for an evaluation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.config_file import INSTALL
from qft_plugin.errors import DataError, HostError

SUFFIXES: Final = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"])

CROPPED: Final = 0.875
"""Share of the shorter side that the crop keeps where nothing else is said: 224 of 256."""


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a tensor `[channels, height, width]`.

    Attributes:
        size: height and width of the crop, pixels; `None` takes images as they are.
        resize: length of the shorter side before the crop, pixels; `None` is that of `size` over 0.875.
        mean: subtracted from each channel.
        std: each channel is divided by it.
        scale: divide by 255 first, to 0..1.
        grey: one channel instead of three.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: bool = True
    grey: bool = False

    def __call__(self, path: Path) -> Tensor:
        """Read one image.

        Raises:
            DataError: it cannot be decoded.
        """
        image_module = _pillow()
        try:
            with image_module.open(path) as opened:
                image = opened.convert("L" if self.grey else "RGB")
        except Exception as error:  # its decoders raise kinds of their own
            raise DataError(
                f"{path}: should be an image. Found {type(error).__name__}: {error}. Remove it from the folder."
            ) from error
        if self.size is not None:
            image = _cropped(self._resized(image, image_module.Resampling.BILINEAR), *self.size)
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        values = values.unsqueeze(0) if self.grey else values.permute(2, 0, 1)
        values = values / 255 if self.scale else values
        if self.mean:
            values = values - torch.tensor(self.mean).reshape(-1, 1, 1)
        if self.std:
            values = values / torch.tensor(self.std).reshape(-1, 1, 1)
        return values.contiguous()

    def _resized(self, image: Any, how: Any) -> Any:
        assert self.size is not None
        width, height = image.size
        if self.resize is not None:
            shorter = self.resize
        else:  # so that the crop keeps the same share of the side that limits it
            share = max(self.size[0] / height, self.size[1] / width) / CROPPED
            shorter = round(share * min(width, height))
        longer = int(shorter * max(width, height) / min(width, height))
        return image.resize((shorter, longer) if width <= height else (longer, shorter), how)


def _cropped(image: Any, height: int, width: int) -> Any:
    """Cut the middle out of an image; what is outside is black."""
    left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class ImageFolder:
    """Batches of the images of a folder and the folders in it.

    Attributes:
        files: in order.
        prepare: makes a tensor of one.
        batch_size: images in a batch.
    """

    files: tuple[Path, ...]
    prepare: Preparation
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        """Read the images batch by batch, `[images, channels, height, width]`."""
        first: Tensor | None = None
        for start in range(0, len(self.files), self.batch_size):
            rows = []
            for path in self.files[start : start + self.batch_size]:
                image = self.prepare(path)
                first = image if first is None else first
                if image.shape != first.shape:
                    raise DataError(
                        f"{path}: should have the size of {self.files[0]}, {_words(first)} pixels. Found "
                        f"{_words(image)}. Bring all images to one size with --size."
                    )
                rows.append(image)
            yield torch.stack(rows)

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.files) / self.batch_size)


def image_folder(folder: Path, prepare: Preparation, *, batch_size: int, at_most: int | None) -> ImageFolder:
    """Find the images of a folder.

    Args:
        folder: it is searched with all folders in it.
        prepare: makes a tensor of an image.
        batch_size: images in a batch.
        at_most: so many are taken, spread evenly over the sorted names; `None` takes all.

    Raises:
        DataError: there are none.
        HostError: what reads images is not installed.
    """
    _pillow()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(
            f"{folder}: should hold images ({', '.join(sorted(SUFFIXES))}). Found none. Look at the name of the folder."
        )
    if at_most is not None and at_most < len(files):
        files = [files[i * len(files) // at_most] for i in range(at_most)]
    return ImageFolder(tuple(files), prepare, batch_size)


def _words(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise HostError(f"pillow should be installed to read images. Found none. Run: {INSTALL}") from None
    return Image
