"""Tiny torch networks, each with one construct that quantizers get wrong, and one batch of inputs for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """A chain of convolution, BatchNorm and ReLU with a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class InPlace(Residual):
    """The same network, with every activation and the addition in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)), inplace=True)
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        x = torch.relu_(self.bn3(self.conv3(torch.relu_(y))))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """An inverted residual: depthwise convolution and ReLU6, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.head(x.mean((2, 3)))


class Preactivation(nn.Module):
    """BatchNorms in front of the layers, as in DenseNet, one ReLU6 module for all blocks, and a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU6()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.conv3, self.silu = nn.Conv2d(8, 8, 1), nn.SiLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.act(self.conv1(torch.relu(self.norm1(x))))], 1)
        x = self.act(self.conv2(torch.relu(self.norm2(x))))
        return self.head(self.silu(self.conv3(x)).mean((2, 3)))


class Branches(nn.Module):
    """A concatenation, a pool, and a flatten by `view` before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.join = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = functional.max_pool2d(self.join(x).relu(), 2)
        return self.fc(x.view(x.shape[0], -1))


class Grouped(nn.Module):
    """Grouped convolutions with several channels in a group, and a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 8, 1, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        b, c, h, w = x.shape
        x = x.reshape(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(self.second(x).relu().mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolutions, plain and grouped, whose weights have the input axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.mix = nn.ConvTranspose2d(12, 8, 3, padding=1, groups=2)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.down(x).relu())).relu()
        return self.out(self.mix(x).relu())


class Twice(nn.Module):
    """A convolution that is called twice: one weight, two places in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(2):
            x = self.shared(x).relu()
        return self.fc(x.mean((2, 3)))


class NoAffine(nn.Module):
    """BatchNorms without weight and bias, after a convolution without and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, affine=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


class BiasAndNorm(nn.Module):
    """Convolutions with a bias of their own before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8),
        )  # fmt: skip
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Features(nn.Module):
    """Returns a dictionary with an inner feature that later layers read too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.conv2(self.conv1(x).relu()).relu()
        return {"feature": feature, "logits": self.fc(self.conv3(feature).relu().mean((2, 3)))}


class SqueezeExcite(nn.Module):
    """A gate for each channel, computed from the feature that it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 4, 1)
        self.up = nn.Conv2d(4, 16, 1)
        self.conv2 = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        gate = self.up(self.down(functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.fc(self.conv2(x * gate).relu().mean((2, 3)))


class Transformer(nn.Module):
    """One encoder block: LayerNorm, attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.o((a @ v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class OneD(nn.Module):
    """Convolutions over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool1d(self.bn1(self.conv1(x)).relu(), 2)
        return self.fc(self.conv2(x).relu().mean(2))


class LinearOnly(nn.Module):
    """Linear layers and a BatchNorm over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(12, 24), nn.BatchNorm1d(24)
        self.fc2, self.fc3 = nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.bn1(self.fc1(x)).relu()).relu())


class TwoInputs(nn.Module):
    """Two inputs, by position or by keyword, that meet in an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.vector = nn.Linear(5, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        x = self.image(image).relu() + self.vector(vector).relu()[:, :, None, None]
        return self.fc(self.conv(x).relu().mean((2, 3)))


class NormFirst(nn.Module):
    """A BatchNorm before a convolution: nothing stands before it that it could be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(self.norm(x)).relu()).relu().mean((2, 3)))


@dataclass(frozen=True)
class Net:
    """One network of the collection.

    Attributes:
        build: makes it, with random weights.
        shapes: of one image for each input, by keyword where `by_name`.
        convolutions: how many calls of a convolution it has.
        not_int8: how many of these the hosts leave in floating point.
        not_quantized: how many weights the hosts leave in floating point.
        rescales: whether some channels of it can be rescaled.
        by_name: whether its inputs are given by keyword.
    """

    build: Callable[[], nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    convolutions: int
    not_int8: int = 0
    not_quantized: int = 0
    rescales: bool = True
    by_name: bool = False


IMAGE = {"x": (3, 8, 8)}
PAIR = {"image": (3, 8, 8), "vector": (5,)}
NETS: dict[str, Net] = {
    "residual": Net(Residual, IMAGE, 4),
    "in_place": Net(InPlace, IMAGE, 4),
    "inverted": Net(Inverted, IMAGE, 4),
    "preactivation": Net(Preactivation, IMAGE, 4),
    "branches": Net(Branches, IMAGE, 3),
    "grouped": Net(Grouped, IMAGE, 3),
    "transposed": Net(Transposed, IMAGE, 4, not_int8=1),  # OpenVINO has no int8 kernel for the grouped transposed one
    "twice": Net(Twice, IMAGE, 3),
    "no_affine": Net(NoAffine, IMAGE, 2),
    "bias_and_norm": Net(BiasAndNorm, IMAGE, 2),
    "features": Net(Features, IMAGE, 3),
    "squeeze_excite": Net(SqueezeExcite, IMAGE, 4, not_int8=2, not_quantized=2),  # NNCF skips its gate
    "transformer": Net(Transformer, {"x": (5, 6)}, 0),
    "one_d": Net(OneD, {"x": (4, 16)}, 2),
    "linear_only": Net(LinearOnly, {"x": (12,)}, 0),
    "two_inputs": Net(TwoInputs, PAIR, 2),
    "keywords": Net(TwoInputs, PAIR, 2, by_name=True),
    "norm_first": Net(NormFirst, IMAGE, 2),
}


def settled(model: nn.Module) -> nn.Module:
    """Put a network into eval mode and give its norms statistics and weights, as after a training."""
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias, std=0.3)
    return model.eval()


def build(name: str) -> nn.Module:
    """Make a network in eval mode whose BatchNorms have statistics, as after a training."""
    return settled(NETS[name].build())


def items(name: str, *, batches: int = 4, size: int = 16) -> list[Any]:
    """Make batches in the form that the network's dataset yields: a tensor, a tuple, or a dict."""
    found: list[Any] = []
    for _ in range(batches):
        values = {key: torch.randn(size, *shape) for key, shape in NETS[name].shapes.items()}
        found.append(values if NETS[name].by_name else as_positional(*values.values()))
    return found


def as_positional(*values: Tensor) -> Any:
    """Return a single input as it is and several as a tuple."""
    return values[0] if len(values) == 1 else values


def call(model: nn.Module, item: Any) -> Any:
    """Call a network on one item of its dataset."""
    if isinstance(item, dict):
        return model(**item)
    return model(*item) if isinstance(item, tuple) else model(item)
