"""Well-known architectures, narrow and short, with every construct of the real ones; none of them is trained.

Written from what the architectures are, with the calls that the usual implementations make: where torchvision calls a
function instead of a module, so does the network here.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from nets import as_positional, settled
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.channel_affine import free_channels
from qft_plugin.graph.channel_clip import free_bounds
from qft_plugin.graph.record import record

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


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        self.branch1 = nn.Sequential(
            ConvNorm(inputs, inputs, 3, stride, groups=inputs, activation=None), ConvNorm(inputs, half, 1)
        )
        self.branch2 = nn.Sequential(
            ConvNorm(inputs if stride > 1 else half, half, 1),
            ConvNorm(half, half, 3, stride, groups=half, activation=None),
            ConvNorm(half, half, 1),
        )
        if stride == 1:
            self.branch1 = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """Half of the channels pass a block unchanged and are mixed with the others by a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.maxpool = ConvNorm(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(ShuffleBlock(8, 16, 2), ShuffleBlock(16, 16, 1), ShuffleBlock(16, 16, 1))
        self.stage3 = nn.Sequential(ShuffleBlock(16, 24, 2), ShuffleBlock(24, 24, 1))
        self.conv5, self.fc = ConvNorm(24, 32, 1), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.maxpool(self.conv1(x))))
        return self.fc(self.conv5(x).mean([2, 3]))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__({f"layer{i}": DenseLayer(inputs + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Every layer reads all earlier ones, through a BatchNorm of its own that follows the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            DenseBlock(8, 4, 3),
            nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2),
            DenseBlock(10, 4, 3),
            nn.BatchNorm2d(22),
        )  # fmt: skip
        self.classifier = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(out, (1, 1)), 1))


class BasicConv(nn.Module):
    """Inception's convolution: BatchNorm with a large epsilon and a functional ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1 = BasicConv(inputs, width, 1)
        self.branch2 = nn.Sequential(BasicConv(inputs, width, 1), BasicConv(width, 2 * width, 3, padding=1))
        self.branch3 = nn.Sequential(BasicConv(inputs, 2, 1), BasicConv(2, width, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Four branches and a concatenation; the input is normalised anew, channel by channel, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.maxpool1 = BasicConv(3, 8, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.conv3 = BasicConv(8, 8, 1), BasicConv(8, 12, 3, padding=1)
        self.inception3a, self.inception3b = InceptionBlock(12, 4), InceptionBlock(20, 4)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = InceptionBlock(20, 6)
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        second = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        third = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        x = torch.cat((first, second, third), 1)
        x = self.conv3(self.conv2(self.maxpool1(self.conv1(x))))
        x = self.inception4a(self.maxpool3(self.inception3b(self.inception3a(x))))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


class InceptionV3(nn.Module):
    """One of each of Inception's later blocks: a mean in a branch, a max in a branch, 1x7 kernels, cat in cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(BasicConv(3, 8, 3, stride=2), BasicConv(8, 12, 3, padding=1), nn.MaxPool2d(3, 2))
        self.a1, self.a2 = BasicConv(12, 6, 1), BasicConv(12, 6, 1)
        self.a5_1, self.a5_2 = BasicConv(12, 6, 1), BasicConv(6, 6, 5, padding=2)
        self.b3 = BasicConv(18, 8, 3, stride=2)
        self.c7 = nn.Sequential(
            BasicConv(26, 6, 1), BasicConv(6, 6, (1, 7), padding=(0, 3)), BasicConv(6, 8, (7, 1), padding=(3, 0))
        )
        self.c1 = BasicConv(26, 8, 1)
        self.e0, self.e = BasicConv(16, 8, 1), BasicConv(16, 8, 1)
        self.e1, self.e2 = BasicConv(8, 8, (1, 3), padding=(0, 1)), BasicConv(8, 8, (3, 1), padding=(1, 0))
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        x = torch.cat([self.a1(x), self.a5_2(self.a5_1(x)), self.a2(pooled)], 1)
        x = torch.cat([self.b3(x), functional.max_pool2d(x, kernel_size=3, stride=2)], 1)
        x = torch.cat([self.c1(x), self.c7(x)], 1)
        inner = self.e(x)
        inner = torch.cat([self.e1(inner), self.e2(inner)], 1)
        x = torch.cat([inner, self.e0(x)], 1)
        return self.fc(torch.flatten(self.dropout(self.avgpool(x)), 1))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, expanded, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    """Fire blocks and a classifier that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(12, 4, 8), Fire(16, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 6, 12),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(24, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class VGG(nn.Module):
    """Convolutions with BatchNorm, and a flatten of several positions into the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2, 2)]
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(),
            nn.Linear(32, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class LayerNorm2d(nn.LayerNorm):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(0.5 + torch.rand(dim, 1, 1))
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        result = self.stochastic_depth(self.layer_scale * self.block(x))
        result += x
        return result


class ConvNeXt(nn.Module):
    """LayerNorm over channels, linear layers on the last axis, GELU, and a trained scale on each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8, eps=1e-6),
            ConvNeXtBlock(8), ConvNeXtBlock(8),
            LayerNorm2d(8, eps=1e-6), nn.Conv2d(8, 12, 2, 2),
            ConvNeXtBlock(12), ConvNeXtBlock(12),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(12, eps=1e-6), nn.Flatten(1), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


class PoolFormerBlock(nn.Module):
    """GroupNorms with one group, a pool less its input as the mixer, and a trained scale on each branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.fc1, self.act = nn.Conv2d(channels, 2 * channels, 1), nn.GELU()
        self.fc2 = nn.Conv2d(2 * channels, channels, 1)
        self.scale1, self.scale2 = (nn.Parameter(0.5 + torch.rand(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (self.pool(y) - y) * self.scale1.view(-1, 1, 1)
        return x + self.fc2(self.act(self.fc1(self.norm2(x)))) * self.scale2.view(-1, 1, 1)


class PoolFormer(nn.Module):
    """Blocks without attention, in two stages, and a GroupNorm of several groups in front of a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block1 = nn.Conv2d(3, 8, 7, 4, 2), PoolFormerBlock(8)
        self.down, self.block2 = nn.Conv2d(8, 12, 3, 2, 1), PoolFormerBlock(12)
        self.norm, self.last = nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        return self.head(functional.relu(self.last(functional.relu(self.norm(x)))).mean([-2, -1]))


class RepBlock(nn.Module):
    """MobileOne's block while it trains: branches that are added from 0 on, one of them a BatchNorm alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleList(ConvNorm(channels, channels, activation=None) for _ in range(2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result = 0
        for branch in self.branches:
            result += branch(x)
        return self.act(result + self.identity(x))


class MobileOne(nn.Module):
    """Branches side by side that a deployment would merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, stride=2)
        self.body = nn.Sequential(RepBlock(8), nn.Conv2d(8, 12, 3, 2), RepBlock(12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """An encoder and a decoder with skip connections; one step up by a transposed convolution, one by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(ConvNorm(3, 8), ConvNorm(8, 8))
        self.down2 = nn.Sequential(ConvNorm(8, 12), ConvNorm(12, 12))
        self.bottom = nn.Sequential(ConvNorm(12, 16), ConvNorm(16, 16))
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.join2 = nn.Sequential(ConvNorm(24, 12), ConvNorm(12, 12))
        self.narrow1 = nn.Conv2d(12, 8, 1)
        self.join1 = nn.Sequential(ConvNorm(16, 8), ConvNorm(8, 8))
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        x = self.up2(self.bottom(self.pool(two)))
        x = functional.pad(x, [0, two.shape[3] - x.shape[3], 0, two.shape[2] - x.shape[2]])
        x = self.join2(torch.cat([two, x], dim=1))
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.join1(torch.cat([one, self.narrow1(x)], dim=1)))


class SSD(nn.Module):
    """A plain backbone, an L2 norm with a scale for each channel, and heads on several levels: a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.scale_weight = nn.Parameter(5 + torch.rand(12))
        self.conv4 = nn.Sequential(
            nn.MaxPool2d(2, 2), nn.Conv2d(12, 16, 3, padding=2, dilation=2), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.extra = nn.Sequential(
            nn.Conv2d(16, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True)
        )
        widths = (12, 16, 16)
        self.classes = nn.ModuleList(nn.Conv2d(w, 2 * CLASSES, 3, padding=1) for w in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(w, 2 * 4, 3, padding=1) for w in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.conv3(x)
        second = self.conv4(first)
        levels = [self.scale_weight.view(1, -1, 1, 1) * functional.normalize(first), second, self.extra(second)]
        scores = [self.per_anchor(head(f), CLASSES) for head, f in zip(self.classes, levels, strict=True)]
        boxes = [self.per_anchor(head(f), 4) for head, f in zip(self.boxes, levels, strict=True)]
        return {"boxes": torch.cat(boxes, dim=1), "scores": torch.cat(scores, dim=1)}

    def per_anchor(self, x: Tensor, columns: int) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, -1, columns, height, width).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, columns)


class YOLO(nn.Module):
    """Leaky ReLUs, a pyramid of max pools, nearest upsampling and concatenation; a list of outputs."""

    def __init__(self) -> None:
        super().__init__()

        def leaky(inplace: bool) -> nn.Module:
            return nn.LeakyReLU(0.1, inplace=inplace)

        def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
            return ConvNorm(inputs, outputs, kernel, stride, activation=leaky)

        self.stem, self.down = conv(3, 8, 3, 2), conv(8, 16, 3, 2)
        self.split1, self.split2 = conv(16, 8), conv(16, 8)
        self.inner1, self.inner2, self.merge = conv(8, 8), conv(8, 8, 3), conv(16, 16)
        self.deep = conv(16, 24, 3, 2)
        self.spp, self.pool, self.spp_out = conv(24, 8), nn.MaxPool2d(5, 1, 2), conv(32, 24)
        self.lateral, self.up, self.mix = conv(24, 8), nn.Upsample(scale_factor=2, mode="nearest"), conv(24, 16, 3)
        self.head1, self.head2 = nn.Conv2d(16, 2 * (5 + CLASSES), 1), nn.Conv2d(24, 2 * (5 + CLASSES), 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.down(self.stem(x))
        inner = self.split1(x)
        inner = inner + self.inner2(self.inner1(inner))
        shallow = self.merge(torch.cat((inner, self.split2(x)), 1))
        x = self.spp(self.deep(shallow))
        once = self.pool(x)
        twice = self.pool(once)
        deep = self.spp_out(torch.cat((x, once, twice, self.pool(twice)), 1))
        mixed = self.mix(torch.cat((self.up(self.lateral(deep)), shallow), 1))
        outputs = []
        for head, feature in ((self.head1, mixed), (self.head2, deep)):
            found = head(feature)
            batch, _, height, width = found.shape
            outputs.append(found.view(batch, 2, 5 + CLASSES, height, width).permute(0, 1, 3, 4, 2).contiguous())
        return outputs


class RetinaNet(nn.Module):
    """A feature pyramid whose levels share one head; a tuple of a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        self.layer2, self.layer3 = BasicBlock(8, 12, 2), BasicBlock(12, 16, 2)
        self.inner2, self.inner3 = nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)
        self.outer2, self.outer3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.p6 = nn.Conv2d(8, 8, 3, 2, 1)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.classes, self.boxes = nn.Conv2d(8, CLASSES, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        c2 = self.layer2(self.stem(x))
        c3 = self.layer3(c2)
        top = self.inner3(c3)
        lower = self.inner2(c2)
        lower = lower + functional.interpolate(top, size=lower.shape[-2:], mode="nearest")
        p2, p3 = self.outer2(lower), self.outer3(top)
        levels = [p2, p3, self.p6(functional.relu(p3))]
        towers = [self.tower(level) for level in levels]
        scores = [self.classes(t).flatten(2).transpose(1, 2) for t in towers]
        boxes = torch.cat([self.boxes(t).flatten(2).transpose(1, 2) for t in towers], 1)
        return scores, {"boxes": boxes}


class ViTBlock(nn.Module):
    """An encoder block of torchvision's kind, whose attention is one module."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = self.dropout(y) + x
        return x + self.mlp(self.ln_2(x))


class FusedBlock(nn.Module):
    """An encoder block of timm's kind: one linear layer for query, key and value, and torch's attention function."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(0.5 + torch.rand(dim))
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.gamma * self.proj(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, position embeddings, and encoder blocks with the norm first."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        dim = 16
        self.conv_proj = nn.Conv2d(3, dim, 8, 8)
        self.class_token = nn.Parameter(0.3 * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.3 * torch.randn(1, 17, dim))
        self.layers = nn.Sequential(block(dim, 2), block(dim, 2))
        self.ln, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.conv_proj(x).reshape(batch, 16, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(batch, -1, -1), x], dim=1)
        x = self.ln(self.layers(x + self.pos_embedding))
        return self.head(x[:, 0])


class BERTLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm2, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.size**0.5 + mask
        context = torch.matmul(self.dropout(functional.softmax(scores, dim=-1)), value)
        context = context.permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.shape[:2], self.heads * self.size)
        x = self.norm1(self.dropout(self.dense(context)) + x)
        return self.norm2(self.dropout(self.output(functional.gelu(self.intermediate(x)))) + x)


class BERT(nn.Module):
    """Embedded tokens, encoder layers with the norm last, a mask; a dictionary with two outputs."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        dim = 16
        self.words, self.positions = nn.Embedding(32, dim), nn.Embedding(12, dim)
        self.register_buffer("position_ids", torch.arange(12).expand(1, -1))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(0.1)
        self.layer1, self.layer2 = BERTLayer(dim, 2), BERTLayer(dim, 2)
        self.pooler, self.classifier = nn.Linear(dim, dim), nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.positions(self.position_ids[:, : tokens.shape[1]])
        hidden = (1.0 - mask[:, None, None, :]) * -10000.0
        x = self.layer2(self.layer1(self.dropout(self.norm(x)), hidden), hidden)
        return {"hidden": x, "logits": self.classifier(torch.tanh(self.pooler(x[:, 0])))}


class TCN(nn.Module):
    """One axis: dilated and separable convolutions, padded on one side, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv1d(4, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8)
        self.conv1, self.bn1 = nn.Conv1d(8, 12, 3, dilation=2, bias=False), nn.BatchNorm1d(12)
        self.shortcut = nn.Conv1d(8, 12, 1)
        self.depth, self.point = nn.Conv1d(12, 12, 3, groups=12, padding=1, bias=False), nn.Conv1d(12, 16, 1)
        self.bn2, self.prelu = nn.BatchNorm1d(16), nn.PReLU(16)
        self.pool, self.fc = nn.MaxPool1d(2), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)))
        y = functional.relu(self.bn1(self.conv1(functional.pad(x, (4, 0)))))
        x = self.pool(functional.relu(y + self.shortcut(x)))
        x = self.prelu(self.bn2(self.point(self.depth(x))))
        return self.fc(functional.adaptive_avg_pool1d(x, 1).squeeze(-1))


class R2Plus1D(nn.Module):
    """Three axes: kernels over space, then over time, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True),
            nn.Conv3d(8, 8, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.block = nn.Sequential(
            nn.Conv3d(8, 10, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(10), nn.ReLU(inplace=True),
            nn.Conv3d(10, 12, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(12),
        )  # fmt: skip
        self.downsample = nn.Sequential(nn.Conv3d(8, 12, 1, 2, bias=False), nn.BatchNorm3d(12))
        self.relu, self.avgpool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.block(x) + self.downsample(x))
        return self.fc(self.avgpool(x).flatten(1))


@dataclass(frozen=True)
class Structure:
    """One architecture.

    Attributes:
        build: makes it, with random weights.
        shapes: of one image for each input.
        free: at least so many inputs of its layers can be rescaled in every channel.
        tokens: inputs that are whole numbers, and how many values each has.
    """

    build: Callable[[], nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    free: int
    tokens: Mapping[str, int] = field(default_factory=dict)


IMAGE = {"x": (3, 32, 32)}

STRUCTURES: dict[str, Structure] = {
    "resnet18": Structure(lambda: ResNet(BasicBlock, (8, 12, 16)), IMAGE, free=15),
    "resnet50": Structure(lambda: ResNet(Bottleneck, (16, 24, 32)), IMAGE, free=22),
    "vgg": Structure(VGG, IMAGE, free=5),
    "mobilenet_v2": Structure(MobileNetV2, IMAGE, free=13),
    "mobilenet_v3": Structure(MobileNetV3, IMAGE, free=13),
    "mnasnet": Structure(MnasNet, IMAGE, free=16),
    "regnet_x": Structure(lambda: RegNet(se=False), IMAGE, free=15),
    "regnet_y": Structure(lambda: RegNet(se=True), IMAGE, free=23),
    "efficientnet": Structure(EfficientNet, IMAGE, free=3),
    "shufflenet_v2": Structure(ShuffleNetV2, IMAGE, free=21),
    "densenet": Structure(DenseNet, IMAGE, free=14),
    "googlenet": Structure(GoogLeNet, IMAGE, free=21),
    "inception_v3": Structure(InceptionV3, IMAGE, free=15),
    "squeezenet": Structure(SqueezeNet, IMAGE, free=10),
    "convnext": Structure(ConvNeXt, IMAGE, free=6),
    "poolformer": Structure(PoolFormer, IMAGE, free=4),
    "mobileone": Structure(MobileOne, IMAGE, free=6),
    "unet": Structure(UNet, IMAGE, free=12),
    "ssd": Structure(SSD, IMAGE, free=8),
    "yolo": Structure(YOLO, IMAGE, free=13),
    "retinanet": Structure(RetinaNet, IMAGE, free=14),
    "vit_torchvision": Structure(lambda: ViT(ViTBlock), IMAGE, free=3),
    "vit_timm": Structure(lambda: ViT(FusedBlock), IMAGE, free=7),
    "bert": Structure(
        BERT,
        {"tokens": (12,), "mask": (12,)},
        free=2,
        tokens={"tokens": 32, "mask": 2},
    ),
    "tcn": Structure(TCN, {"x": (4, 64)}, free=5),
    "r2plus1d": Structure(R2Plus1D, {"x": (3, 8, 16, 16)}, free=5),
}


def build(name: str) -> nn.Module:
    """Make a network in eval mode whose norms have values as after a training."""
    return settled(STRUCTURES[name].build())


def items(name: str, *, batches: int = 4, size: int = 16) -> list[Any]:
    """Make batches of inputs in the form that a dataset yields: a tensor, or a tuple of several."""
    structure = STRUCTURES[name]
    return [
        as_positional(
            *(
                torch.randint(structure.tokens[key], (size, *shape))
                if key in structure.tokens
                else torch.randn(size, *shape)
                for key, shape in structure.shapes.items()
            )
        )
        for _ in range(batches)
    ]


@torch.no_grad()
def folded_norms(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Make a network in float64 with its BatchNorms folded, without any host, and two inputs for it."""
    model, item = build(name).double(), items(name, batches=1, size=2)[0]
    inputs = tuple(t.double() if t.is_floating_point() else t for t in (item if isinstance(item, tuple) else (item,)))
    merge_norms(model, model, record(model, (inputs, {})))
    free_bounds(model, (inputs, {}))
    free_channels(model, (inputs, {}), norms=True)
    return model, inputs
