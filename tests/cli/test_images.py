"""Images become the tensors that torchvision's usual evaluation makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import write_images
from PIL import Image

from qft_plugin import DataError
from qft_plugin.cli.images import Preparation, image_folder


def pixels(path: Path) -> torch.Tensor:
    """Read an image by itself, `[3, height, width]`."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.float32)).permute(2, 0, 1)


def test_images_are_taken_as_they_are(tmp_path: Path) -> None:
    """In the order of their names, of all folders below, scaled to 0..1."""
    folder = image_folder(write_images(tmp_path, 5), Preparation(), batch_size=2, at_most=None)
    batches = list(folder)
    assert [len(b) for b in batches] == [2, 2, 1]
    assert len(folder) == 3
    files = sorted(tmp_path.rglob("*.png"))
    assert torch.equal(torch.cat(batches), torch.stack([pixels(f) for f in files]) / 255)


def test_mean_and_deviation_are_of_each_channel(tmp_path: Path) -> None:
    """They are applied after the scale; without it, to 0..255."""
    (file,) = sorted(write_images(tmp_path, 1).rglob("*.png"))
    found = Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))(file)
    expected = (pixels(file) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.4, 0.3])[
        :, None, None
    ]
    assert torch.allclose(found, expected)
    assert torch.equal(Preparation(mean=(100.0,), scale=False)(file), pixels(file) - 100)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (41, 23)])
def test_the_middle_of_the_resized_image_is_cut_out(tmp_path: Path, height: int, width: int) -> None:
    """torchvision: Resize(16), CenterCrop(14): the longer side is rounded down, half pixels of the crop to even."""
    (file,) = sorted(write_images(tmp_path, 1, size=(height, width)).rglob("*.png"))
    longer = int(16 * max(height, width) / min(height, width))
    shape = (16, longer) if width <= height else (longer, 16)
    resized = Image.open(file).convert("RGB").resize(shape, Image.Resampling.BILINEAR)
    top, left = round((resized.size[1] - 14) / 2.0), round((resized.size[0] - 14) / 2.0)
    expected = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1)[
        :, top : top + 14, left : left + 14
    ]
    assert torch.equal(Preparation(size=(14, 14), resize=16)(file), expected / 255)
    assert torch.equal(Preparation(size=(14, 14))(file), expected / 255)  # 14 of 16 is the default


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    """Colours are turned into grey."""
    (file,) = sorted(write_images(tmp_path, 1).rglob("*.png"))
    assert Preparation(size=(8, 6), grey=True)(file).shape == (1, 8, 6)


def test_some_images_are_spread_over_all(tmp_path: Path) -> None:
    """The first of a folder sorted by class would be of one class."""
    folder = image_folder(write_images(tmp_path, 10), Preparation(), batch_size=4, at_most=5)
    files = sorted(tmp_path.rglob("*.png"))
    assert list(folder.files) == files[::2]


def test_images_of_other_sizes_are_named(tmp_path: Path) -> None:
    """With the option that mends it."""
    write_images(tmp_path, 2)
    write_images(tmp_path / "z", 1, size=(9, 9))
    with pytest.raises(DataError, match=r"000\.png: should have the size of .*12x10 pixels. Found 9x9. .*--size"):
        list(image_folder(tmp_path, Preparation(), batch_size=2, at_most=None))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    """A file that has the suffix of one."""
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a\.png: should be an image"):
        list(image_folder(tmp_path, Preparation(), batch_size=2, at_most=None))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """It says what it looked for."""
    with pytest.raises(DataError, match=r"should hold images \(\.bmp, .*Found none"):
        image_folder(tmp_path, Preparation(), batch_size=2, at_most=None)
