"""Well-known architectures at their usual size, with random weights: enough to time them, not to judge accuracy."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

IMAGE: Final = (3, 224, 224)
TOKENS: Final = (128, 768)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    """A residual block: basic (two 3x3 kernels) or, with an expansion, a bottleneck."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            layers = [*_conv(inputs, width, 3, stride), nn.ReLU(), *_conv(width, width, 3)]
        else:
            layers = [*_conv(inputs, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU()]
            layers += _conv(width, outputs, 1)
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(*(_conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else []))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layers(x) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. 2015, for images of 224 x 224."""

    def __init__(self, blocks: Sequence[int], expansion: int) -> None:
        """Build it.

        Args:
            blocks: number of blocks of each of the four stages.
            expansion: 1 for basic blocks, 4 for bottlenecks.
        """
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages, channels = [], 64
        for stage, count in enumerate(blocks):
            for n in range(count):
                width = 64 * 2**stage
                stages.append(_Residual(channels, width, 2 if stage > 0 and n == 0 else 1, expansion))
                channels = width * expansion
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, `[images, 3, 224, 224]`."""
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))


class _InvertedResidual(nn.Module):
    """An inverted residual block with a linear bottleneck."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        wide = [] if expansion == 1 else [*_conv(inputs, inner, 1), nn.ReLU6()]
        self.layers = nn.Sequential(
            *wide, *_conv(inner, inner, 3, stride, groups=inner), nn.ReLU6(), *_conv(inner, outputs, 1)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1, for images of 224 x 224."""

    BLOCKS: Final = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    """Expansion, channels, number and first stride of the blocks of each stage."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
        channels = 32
        for expansion, width, count, stride in self.BLOCKS:
            for n in range(count):
                layers.append(_InvertedResidual(channels, width, stride if n == 0 else 1, expansion))
                channels = width
        self.features = nn.Sequential(*layers, *_conv(channels, 1280, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, `[images, 3, 224, 224]`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


class _EncoderLayer(nn.Module):
    """A transformer encoder layer of BERT-base: width 768, 12 heads, LayerNorm after each residual addition."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.attention_output, self.attention_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = self.attention_norm(x + self.attention_output((weights @ v).transpose(1, 2).flatten(2)))
        return self.output_norm(x + self.down(self.act(self.up(x))))


class Encoder(nn.Module):
    """A stack of BERT-base's encoder layers (Devlin et al. 2018) and a classifier, on embedded tokens."""

    def __init__(self, layers: int = 4) -> None:
        """Build it.

        Args:
            layers: their number; the real network has 12 equal ones.
        """
        super().__init__()
        self.layers = nn.Sequential(*(_EncoderLayer() for _ in range(layers)))
        self.classifier = nn.Linear(TOKENS[1], 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences, `[sequences, 128, 768]`."""
        return self.classifier(self.layers(x)[:, 0])


ARCHITECTURES: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "resnet18": (lambda: ResNet((2, 2, 2, 2), 1), IMAGE),
    "resnet50": (lambda: ResNet((3, 4, 6, 3), 4), IMAGE),
    "mobilenetv2_224": (MobileNetV2, IMAGE),
    "bert": (Encoder, TOKENS),
}
"""By name: what builds the network, and the shape of one input."""


def build(name: str, inputs: int) -> tuple[nn.Module, Tensor]:
    """Build a network in eval mode, and inputs for it.

    Args:
        name: one of `ARCHITECTURES`.
        inputs: their number.

    Returns:
        The network, the same in every process, and `[inputs, ...]`.
    """
    torch.manual_seed(0)
    make, shape = ARCHITECTURES[name]
    net = make()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return net.eval(), torch.randn(inputs, *shape)
