"""Tiny networks of Brevitas' layers with this plugin's quantizers, and what tests ask of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloatMaxInit
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.brevitas import QFTInt4Weight, QFTInt8Act, QFTUint8Act, link
from qft_plugin.brevitas._quantizers import KEPT
from qft_plugin.brevitas._scalings import ActivationScaling, WeightScaling

CLOSE = 0.15
"""Error of 8-bit weights and activations, relative to what differs between images; a wrong bound shows as 0.4."""


def few_steps(**settings: Any) -> FinetuneConfig:
    """Make a finetune of 4 steps."""
    return FinetuneConfig(**{"images_fed": 64, "batch_size": 16, **settings})


def few(**settings: Any) -> QFTConfig:
    """Make settings for a model that has its quantizers."""
    return QFTConfig(**{"finetune": few_steps(), **settings})


def conv(ins: int, outs: int, size: int = 3, *, weight: Any = QFTInt4Weight, **settings: Any) -> qnn.QuantConv2d:
    """Make a convolution that keeps the size of the image."""
    return qnn.QuantConv2d(ins, outs, size, **{"padding": size // 2, "weight_quant": weight, **settings})


def relu() -> qnn.QuantReLU:
    """Make a ReLU with a quantizer after it."""
    return qnn.QuantReLU(act_quant=QFTUint8Act)


def identity(quantizer: Any = QFTInt8Act) -> qnn.QuantIdentity:
    """Make a quantizer of its own."""
    return qnn.QuantIdentity(act_quant=quantizer)


class Residual(nn.Module):
    """Convolutions with a residual addition, a pool and a linear layer."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.c1, self.r1 = conv(3, 8, weight=weight), relu()
        self.c2, self.r2 = conv(8, 8, weight=weight), relu()
        self.c3, self.q3 = conv(8, 8, weight=weight), identity()
        self.r3 = relu()
        self.c4, self.r4 = conv(8, 12, weight=weight), relu()
        self.pooled = identity(QFTUint8Act)
        self.fc = qnn.QuantLinear(12, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r1(self.c1(self.inp(x)))
        x = self.r3(self.q3(self.c3(self.r2(self.c2(x)))) + x)
        return self.fc(self.pooled(self.r4(self.c4(x)).mean((2, 3))))


class Depthwise(nn.Module):
    """A depthwise convolution between ReLU6, whose bound must not be rescaled."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.expand, self.depth = conv(3, 8, 1, weight=weight), conv(8, 8, weight=weight, groups=8)
        self.project, self.fc = conv(8, 6, 1, weight=weight), qnn.QuantLinear(6, 4, weight_quant=weight)
        self.six = nn.ReLU6()
        self.q1, self.q2, self.q3 = (identity(QFTUint8Act) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(self.six(4 * self.expand(self.inp(x))))
        x = self.q2(self.six(4 * self.depth(x)))
        return self.fc(self.q3(self.project(x).relu().mean((2, 3))))


class LinearOnly(nn.Module):
    """Linear layers only."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.fc1, self.r1 = qnn.QuantLinear(12, 16, weight_quant=weight), relu()
        self.fc2, self.r2 = qnn.QuantLinear(16, 16, weight_quant=weight, bias=False), relu()
        self.fc3 = qnn.QuantLinear(16, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.r2(self.fc2(self.r1(self.fc1(self.inp(x))))))


class Normed(nn.Module):
    """BatchNorms after layers with and without a bias, and one that alone cannot be folded."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.c1, self.bn1, self.r1 = conv(3, 8, weight=weight, bias=False), nn.BatchNorm2d(8), relu()
        self.c2, self.bn2, self.r2 = conv(8, 8, weight=weight), nn.BatchNorm2d(8), relu()
        self.last = nn.BatchNorm1d(8)
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight)
        for norm in (self.bn1, self.bn2, self.last):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r1(self.bn1(self.c1(self.inp(x))))
        return self.fc(self.last(self.r2(self.bn2(self.c2(x))).mean((2, 3))))


class OnLayers(nn.Module):
    """Activation quantizers that belong to the layers."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.c1 = conv(3, 8, weight=weight, input_quant=QFTInt8Act)
        self.c2 = conv(8, 8, weight=weight, input_quant=QFTUint8Act, output_quant=QFTInt8Act)
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight, input_quant=QFTUint8Act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c2(self.c1(x).relu()).relu().mean((2, 3)))


class SharedActivation(nn.Module):
    """One quantizer that three tensors pass: they have one scale in every channel."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp, self.act = identity(), relu()
        self.c1, self.c2, self.c3 = conv(3, 8, weight=weight), conv(8, 8, weight=weight), conv(8, 8, weight=weight)
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c1(self.inp(x)))
        x = self.act(self.c2(x))
        return self.fc(self.act(self.c3(x)).mean((2, 3)))


class Added(nn.Module):
    """Brevitas' own addition, whose input quantizer both addends pass."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.left, self.right = conv(3, 8, weight=weight), conv(3, 8, 1, weight=weight)
        self.add = qnn.QuantEltwiseAdd(input_quant=QFTInt8Act, output_quant=QFTInt8Act)
        self.c2, self.r2 = conv(8, 8, weight=weight), relu()
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = self.add(self.left(x), self.right(x))
        return self.fc(self.r2(self.c2(x)).mean((2, 3)))


class Foreign(nn.Module):
    """A layer and an activation with Brevitas' stock quantizers among this plugin's."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.c1, self.r1 = conv(3, 8, weight=weight), relu()
        self.c2, self.r2 = conv(8, 8, weight=weight), relu()
        self.stock = conv(8, 8, weight=Int8WeightPerTensorFloat)
        self.stock_act = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloatMaxInit, max_val=4.0)
        self.c3, self.r3 = conv(8, 8, weight=weight), relu()
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r2(self.c2(self.r1(self.c1(self.inp(x)))))
        x = self.stock_act(self.stock(x))
        return self.fc(self.r3(self.c3(x)).mean((2, 3)))


class OneD(nn.Module):
    """Convolutions over sequences, one of them in groups."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.c1, self.r1 = qnn.QuantConv1d(4, 8, 3, padding=1, weight_quant=weight), relu()
        self.c2, self.r2 = qnn.QuantConv1d(8, 8, 3, padding=1, groups=2, weight_quant=weight), relu()
        self.fc = qnn.QuantLinear(8, 4, weight_quant=weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.r2(self.c2(self.r1(self.c1(self.inp(x))))).mean(2))


class Transposed(nn.Module):
    """Transposed convolutions, plain and in groups, whose weights have the input axis first."""

    def __init__(self, weight: Any = QFTInt4Weight) -> None:
        super().__init__()
        self.inp = identity()
        self.down, self.r0 = conv(3, 8, weight=weight, stride=2), relu()
        self.up, self.r1 = qnn.QuantConvTranspose2d(8, 12, 2, stride=2, weight_quant=weight), relu()
        self.mix, self.r2 = qnn.QuantConvTranspose2d(12, 8, 3, padding=1, groups=2, weight_quant=weight), relu()
        self.out = conv(8, 3, weight=weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.r2(self.mix(self.r1(self.up(self.r0(self.down(self.inp(x))))))))


@dataclass(frozen=True)
class Net:
    """One network of the collection.

    Attributes:
        build: makes it, from the class of its weight quantizers.
        shape: of one input.
        rescales: whether some channels of it can be rescaled.
    """

    build: Callable[..., nn.Module]
    shape: tuple[int, ...] = (3, 8, 8)
    rescales: bool = True


MODELS: dict[str, Net] = {
    "residual": Net(Residual),
    "depthwise": Net(Depthwise),
    "linear_only": Net(LinearOnly, (12,)),
    "normed": Net(Normed),
    "on_layers": Net(OnLayers),
    "shared_activation": Net(SharedActivation),
    "added": Net(Added),
    "foreign": Net(Foreign),
    "one_d": Net(OneD, (4, 16)),
    "transposed": Net(Transposed),
}

every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, weight: Any = QFTInt4Weight) -> nn.Module:
    """Make a network in eval mode, whose outputs depend on its inputs; its quantizers have seen nothing yet."""
    model = MODELS[name].build(weight).eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return model


def images(name: str, count: int = 16) -> Tensor:
    """Make inputs of a network."""
    return torch.randn(count, *MODELS[name].shape)


def batches(name: str, number: int = 4, size: int = 16) -> list[Tensor]:
    """Make a dataset for a network."""
    return [images(name, size) for _ in range(number)]


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Run a network as it is, without gradients."""
    with torch.no_grad():
        return model(x)


def weight_scalings(model: nn.Module) -> dict[str, WeightScaling]:
    """List the trained states of the weight quantizers by the name of their layer."""
    found = {n.removesuffix(".weight_quant"): m.__dict__.get(KEPT) for n, m in model.named_modules()}
    return {name: scaling for name, scaling in found.items() if isinstance(scaling, WeightScaling)}


def activation_scalings(model: nn.Module) -> dict[str, ActivationScaling]:
    """List the trained states of the activation quantizers by the name of their proxy."""
    found = {n: m.__dict__.get(KEPT) for n, m in model.named_modules()}
    return {name: scaling for name, scaling in found.items() if isinstance(scaling, ActivationScaling)}


def integers(layer: Any) -> Tensor:
    """Return the integers of a layer's weight by the scale that its quantizer reports, as float64."""
    with torch.no_grad():
        quantized = layer.weight_quant(layer.weight)
        exact = quantized.value.double() / layer.weight_quant.scale().double()
    assert torch.allclose(exact, exact.round(), atol=1e-3)
    return exact.round()


def linked(name: str, **settings: Any) -> tuple[nn.Module, Tensor]:
    """Build a network, let its quantizers see 16 images, and link it."""
    model, x = build(name, **settings), images(name)
    run(model, x)
    link(model, x[:2])
    return model, x


def shared_log_c(model: nn.Module) -> Tensor:
    """Return the one cross-layer parameter of a linked model."""
    (found,) = (p for name, p in model.named_parameters() if name.endswith("shared.log_c"))
    return found


@torch.no_grad()
def scramble(model: nn.Module, spread: float = 0.4) -> None:
    """Move every degree of freedom of a linked model away from where it starts."""
    for name, parameter in model.named_parameters():
        if name.endswith("log_c"):
            parameter.normal_(std=spread)
        elif "log_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of everything that a state dict holds."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Compare a model with its state from before, bit by bit."""
    after = model.state_dict()
    assert list(after) == list(before)
    changed = [n for n, t in after.items() if not torch.equal(t.nan_to_num(-77.0), before[n].nan_to_num(-77.0))]
    assert changed == []


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the L2 difference of two outputs, relative to how much they differ from image to image."""
    return float((found - expected).norm() / (expected - expected.mean(0)).norm())
