"""Architectures of `structures`: residual networks, with and without inverted bottlenecks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 4


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size, BatchNorm, and an activation function in place."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        act = [] if activation is None else [activation(inplace=True)]
        super().__init__(conv, nn.BatchNorm2d(outputs), *act)


class SqueezeExcite(nn.Module):
    """A gate for each channel, from the mean over the image."""

    def __init__(self, channels: int, squeezed: int, *, activation: type[nn.Module], scale: type[nn.Module]) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = activation(), scale()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class StochasticDepth(nn.Module):
    """Drops a whole branch while training, and nothing in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(0.8)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = ConvNorm(inputs, outputs, 1, stride, activation=None) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        shortcut = stride != 1 or inputs != outputs
        self.downsample = ConvNorm(inputs, outputs, 1, stride, activation=None) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Residual blocks with a convolution in the shortcut of the first block of a stage."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], widths: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], 8
        for i, width in enumerate(widths):
            stages += [block(inputs, width, 1 if i == 0 else 2), block(width, width, 1)]
            inputs = width
        self.layers = nn.Sequential(*stages)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, and a linear projection with a shortcut where the sizes fit."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        first = [ConvNorm(inputs, hidden, 1, activation=nn.ReLU6)] if expand != 1 else []
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *first,
            ConvNorm(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """Linear bottlenecks between ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(3, 8, 3, 2, activation=nn.ReLU6),
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
            InvertedResidual(12, 16, 2, 3),
            ConvNorm(16, 32, 1, activation=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class MobileNetV3Block(nn.Module):
    def __init__(
        self, inputs: int, hidden: int, outputs: int, stride: int, *, se: bool, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        gate = SqueezeExcite(hidden, 8, activation=nn.ReLU, scale=nn.Hardsigmoid)
        self.block = nn.Sequential(
            *([ConvNorm(inputs, hidden, 1, activation=activation)] if hidden != inputs else []),
            ConvNorm(hidden, hidden, 5 if se else 3, stride, groups=hidden, activation=activation),
            *([gate] if se else []),
            ConvNorm(hidden, outputs, 1, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    """Blocks with ReLU, then with Hardswish, some with squeeze-excite and Hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()
        relu, hard = nn.ReLU, nn.Hardswish
        self.features = nn.Sequential(
            ConvNorm(3, 8, 3, 2, activation=hard),
            MobileNetV3Block(8, 8, 8, 1, se=False, activation=relu),
            MobileNetV3Block(8, 16, 12, 2, se=False, activation=relu),
            MobileNetV3Block(12, 24, 12, 1, se=True, activation=relu),
            MobileNetV3Block(12, 24, 16, 2, se=True, activation=hard),
            MobileNetV3Block(16, 32, 16, 1, se=True, activation=hard),
            ConvNorm(16, 32, 1, activation=hard),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(32, 32), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(32, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class MnasBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.apply_residual = inputs == outputs and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden, momentum=0.0003), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, momentum=0.0003), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs, momentum=0.0003),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.apply_residual:
            return self.layers(x) + x
        return self.layers(x)


class MnasNet(nn.Module):
    """MobileNetV2's block with ReLU, and a separable convolution at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
            MnasBlock(8, 12, 3, 2), MnasBlock(12, 12, 3, 1), MnasBlock(12, 16, 5, 2), MnasBlock(16, 16, 5, 1),
            nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean([2, 3]))


class RegNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, *, se: bool) -> None:
        super().__init__()
        self.proj = ConvNorm(inputs, outputs, 1, stride, activation=None) if stride != 1 or inputs != outputs else None
        gate = SqueezeExcite(outputs, max(4, inputs // 4), activation=nn.ReLU, scale=nn.Sigmoid)
        self.f = nn.Sequential(
            OrderedDict(
                a=ConvNorm(inputs, outputs, 1),
                b=ConvNorm(outputs, outputs, 3, stride, groups=outputs // 8),
                **({"se": gate} if se else {}),
                c=ConvNorm(outputs, outputs, 1, activation=None),
            )
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class RegNet(nn.Module):
    """Bottlenecks without a bottleneck: grouped convolutions; the Y kind gates them."""

    def __init__(self, *, se: bool) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        self.trunk_output = nn.Sequential(
            RegNetBlock(8, 16, 2, se=se),
            RegNetBlock(16, 16, 1, se=se),
            RegNetBlock(16, 24, 2, se=se),
            RegNetBlock(24, 24, 1, se=se),
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.trunk_output(self.stem(x))).flatten(start_dim=1))


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            *([ConvNorm(inputs, hidden, 1, activation=nn.SiLU)] if expand != 1 else []),
            ConvNorm(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU),
            SqueezeExcite(hidden, max(1, inputs // 4), activation=nn.SiLU, scale=nn.Sigmoid),
            ConvNorm(hidden, outputs, 1, activation=None),
        )
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    """SiLU and squeeze-excite in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(3, 8, 3, 2, activation=nn.SiLU),
            MBConv(8, 8, 3, 1, 1),
            MBConv(8, 12, 3, 2, 3),
            MBConv(12, 12, 3, 1, 3),
            MBConv(12, 16, 5, 2, 3),
            ConvNorm(16, 32, 1, activation=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
