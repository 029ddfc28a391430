"""Trains a network of Brevitas' layers against its float form, and saves it as QONNX and as QCDQ.

python examples/brevitas_to_onnx.py FOLDER

The network and the images, scikit-learn's digits, stand for yours.
"""

import argparse
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.brevitas import QFTInt4Weight, QFTUint8Act, finetune, fold, initialize, link, save_qcdq, save_qonnx


class QuantNet(nn.Module):
    """One class for both networks: without quantizers it is the float one."""

    def __init__(self, weight: Any = None, activation: Any = None) -> None:
        """Make the layers with these quantizers."""
        super().__init__()
        self.pixels = qnn.QuantIdentity(act_quant=activation)
        self.conv1 = qnn.QuantConv2d(1, 16, 3, padding=1, bias=False, weight_quant=weight)
        self.norm1, self.relu1 = nn.BatchNorm2d(16), qnn.QuantReLU(act_quant=activation)
        self.conv2 = qnn.QuantConv2d(16, 32, 3, stride=2, padding=1, bias=False, weight_quant=weight)
        self.norm2, self.relu2 = nn.BatchNorm2d(32), qnn.QuantReLU(act_quant=activation)
        self.pooled = qnn.QuantIdentity(act_quant=activation)
        self.head = qnn.QuantLinear(32, 10, bias=True, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images [N, 1, 8, 8]."""
        x = self.relu1(self.norm1(self.conv1(self.pixels(x))))
        x = self.relu2(self.norm2(self.conv2(x)))
        return self.head(self.pooled(x.mean((2, 3))))


def main() -> None:
    """Do it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the two files go")
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig.images_fed, help="how long is trained")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y)

    float_net = QuantNet()
    optimizer = torch.optim.AdamW(float_net.parameters(), lr=1e-2)
    for _ in range(200):
        index = torch.randint(1200, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(float_net(images[index]), labels[index]).backward()
        optimizer.step()
    float_net.eval()

    net = QuantNet(QFTInt4Weight, QFTUint8Act)
    net.load_state_dict(float_net.state_dict(), strict=False)  # the float network has no scales
    print(link(net, images[:8]))
    data = list(images[:1200].split(64))
    config = QFTConfig(finetune=FinetuneConfig(images_fed=args.images_fed))
    initialize(net, data, config)
    result = finetune(net, float_net, data, config)
    print(f"loss {result.start_loss:.5f} -> {result.final_loss:.5f} in {result.steps} steps")

    folded = fold(net)
    save_qonnx(folded, args.folder / "net_qonnx.onnx", images[:1])
    report = save_qcdq(folded, args.folder / "net_qcdq.onnx", images[:8])
    print(f"{report.int8_convolutions} of {len(report.convolutions)} convolutions in int8, {report.bytes} bytes")


if __name__ == "__main__":
    main()
