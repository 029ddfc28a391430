"""The main job on a network that is trained on the spot: no file from outside, about a minute on two cores.

    python benchmarks/demo.py [FOLDER]

Trains a small CNN on scikit-learn's digits, quantizes it in four ways, prints one table and leaves the IR files in
FOLDER. All figures are those of the saved IR on the images that neither training nor calibration saw.
"""

import argparse
import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import qft_plugin.nncf
from qft_plugin import HardwareSpec, QFTConfig

EPOCHS = 12
CALIBRATION_IMAGES = 512
BATCH = 64


class DigitNet(nn.Module):
    """A small CNN with what real ones have: BatchNorm, a depthwise layer, a residual add, a strided layer."""

    def __init__(self, width: int = 24) -> None:
        """Make the layers; `width` is the number of channels of the first block."""
        super().__init__()
        self.stem = self._unit(1, width, 3)
        self.depthwise = self._unit(width, width, 3, groups=width)
        self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.down = self._unit(width, 2 * width, 3, stride=2)
        self.mix = self._unit(2 * width, 2 * width, 3)
        self.head = nn.Linear(2 * width, 10)

    @staticmethod
    def _unit(c_in: int, c_out: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Classify images `[N, 1, 8, 8]`."""
        x = self.stem(x)
        x = functional.relu(x + self.pointwise(self.depthwise(x)))
        x = self.mix(self.down(x))
        return self.head(x.mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels; a third is for testing."""
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    parts = train_test_split(images, torch.from_numpy(y), test_size=1 / 3, random_state=0, stratify=y)
    return parts[0], parts[2], parts[1], parts[3]


def train(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train the float network; images are shifted by a pixel at random."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    net.train()
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH,))
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        batch = torch.roll(images[index], (dy, dx), dims=(2, 3))
        optimizer.zero_grad()
        functional.cross_entropy(net(batch), labels[index]).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def predictions(path: Path, images: Tensor) -> Tensor:
    """Return the class that an IR names for each image."""
    compiled: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.asarray(compiled([images.numpy()])[0])).argmax(1)


def main() -> None:
    """Train, quantize in four ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo_out"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    train_images, train_labels, test_images, test_labels = digits()
    net = DigitNet()
    start = time.perf_counter()
    train(net, train_images, train_labels)
    print(f"float network trained in {time.perf_counter() - start:.1f} s")
    batches = list(train_images[:CALIBRATION_IMAGES].split(BATCH))
    dataset = nncf.Dataset(batches)
    example = train_images[:8]

    four_bits = nncf.AdvancedQuantizationParameters(
        weights_quantization_params=nncf.quantization.advanced_parameters.QuantizationParameters(num_bits=4)
    )
    per_tensor = QFTConfig(hardware=HardwareSpec(rescale="layerwise"))
    ways: dict[str, Callable[[], nn.Module]] = {
        "NNCF, 8-bit weights": lambda: nncf.quantize(net, dataset, subset_size=len(batches)),
        "NNCF, 4-bit weights": lambda: nncf.quantize(
            net,
            dataset,
            subset_size=len(batches),
            target_device=nncf.TargetDevice.NPU,
            advanced_parameters=four_bits,
        ),
        "QFT, 4-bit, per tensor": lambda: nncf.quantize(net, dataset, algorithm=per_tensor),
        "QFT, 4-bit, per channel": lambda: nncf.quantize(net, dataset, algorithm="qft"),
    }
    with torch.no_grad():
        expected = net(test_images).argmax(1)
    path = folder / "float.xml"
    openvino.save_model(openvino.convert_model(net, example_input=example), path, compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    rows = [("float", expected, size, "f32 x 5", 0.0)]
    for name, quantize in ways.items():
        start = time.perf_counter()
        with qft_plugin.nncf.without_compiler():
            quantized = quantize()
        seconds = time.perf_counter() - start
        path = folder / (name.lower().replace(", ", "_").replace(" ", "_").replace("-", "") + ".xml")
        # The proof is for QFT's results; NNCF's own keep a quantizer that the runtime applies differently.
        report = qft_plugin.nncf.save_openvino(quantized, path, example, check=name.startswith("QFT"))
        precisions = collections.Counter(report.convolutions.values())
        words = " ".join(f"{precision} x {count}" for precision, count in sorted(precisions.items()))
        rows.append((name, predictions(path, test_images), report.bytes, words, seconds))

    print(f"\n{'':24} {'accuracy':>9} {'agreement':>10} {'IR bytes':>9} {'convolutions':>13} {'seconds':>8}")
    for name, found, size, words, seconds in rows:
        accuracy, agreement = (100 * float((found == t).double().mean()) for t in (test_labels, expected))
        print(f"{name:24} {accuracy:8.2f}% {agreement:9.2f}% {size:9d} {words:>13} {seconds:8.1f}")
    print(f"\nThe IR files are in {folder}.")


if __name__ == "__main__":
    main()
