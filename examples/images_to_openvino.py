"""Quantizes a torch network with NNCF on a folder of images, and saves it as OpenVINO IR with 4-bit weights.

python examples/images_to_openvino.py IMAGES model.xml --model torchvision.models:mobilenet_v2 --size 224

`--model` names a function that returns the float network: `package.module:function`. Put its trained weights in by
`--weights`, a state dict.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import qft_plugin.nncf
from qft_plugin import FinetuneConfig, QFTConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read(path: Path, size: int, mean: list[float], std: list[float]) -> Tensor:
    """Read an image as the network wants it, [channels, size, size]; one channel where `mean` is one number."""
    image = Image.open(path).convert("L" if len(mean) == 1 else "RGB").resize((size, size))
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, len(mean)) / 255
    return torch.from_numpy((pixels - mean) / std).float().permute(2, 0, 1)


def build(name: str, weights: Path | None) -> nn.Module:
    """Make the float network."""
    module, _, function = name.partition(":")
    make: Callable[[], Any] = getattr(importlib.import_module(module), function)
    model: nn.Module = make()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def main() -> None:
    """Do it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images, about a thousand of the kind that will be seen")
    parser.add_argument("file", type=Path, help="where the IR goes, *.xml")
    parser.add_argument("--model", required=True, help="function that returns the network, package.module:function")
    parser.add_argument("--weights", type=Path, help="state dict of the network")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406], help="taken off, by channel")
    parser.add_argument("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225], help="divided by, by channel")
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig.images_fed, help="how long is trained")
    args = parser.parse_args()

    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    model = build(args.model, args.weights)
    dataset = nncf.Dataset(paths, lambda path: read(path, args.size, args.mean, args.std)[None])
    config = QFTConfig(finetune=FinetuneConfig(images_fed=args.images_fed))
    quantized = nncf.quantize(model, dataset, algorithm=config)
    example = read(paths[0], args.size, args.mean, args.std)[None]
    report = qft_plugin.nncf.save_openvino(quantized, args.file, example)
    print(f"{report.int8_convolutions} of {len(report.convolutions)} convolutions in int8, {report.bytes} bytes")
    print(report.proof)


if __name__ == "__main__":
    main()
