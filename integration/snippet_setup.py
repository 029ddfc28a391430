"""What the hidden set-up of the pages in docs/ imports: a small trained network and some images."""

import copy
import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

STEPS, BATCH, TRAINING_IMAGES = 200, 64, 1200


class DigitNet(nn.Module):
    """A small residual network for images of one channel; returns ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._unit(1, 16)
        self.block = self._unit(16, 16)
        self.down = self._unit(16, 32, stride=2)
        self.head = nn.Linear(32, 10)

    @staticmethod
    def _unit(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(functional.relu(self.block(x) + x))
        return self.head(x.mean((2, 3)))


def digits() -> tuple[Tensor, Tensor]:
    """Return all images [1797, 1, 8, 8] and their labels, in a fixed random order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(x).float().view(-1, 1, 8, 8)[order] / 16, torch.from_numpy(y)[order]


@functools.cache
def _trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitNet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(STEPS):
            index = torch.randint(TRAINING_IMAGES, (BATCH,))
            optimizer.zero_grad()
            functional.cross_entropy(net(_images[index]), _labels[index]).backward()
            optimizer.step()
    return net.eval()


def digit_net() -> nn.Module:
    """Return a trained network, a new copy at every call."""
    return copy.deepcopy(_trained())


_images, _labels = digits()
example_input = _images[:8]
loader = DataLoader(TensorDataset(_images[:TRAINING_IMAGES], _labels[:TRAINING_IMAGES]), batch_size=BATCH)
test_images = _images[TRAINING_IMAGES:]
