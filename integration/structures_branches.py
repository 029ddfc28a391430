"""Architectures of `structures`: channels that are split, shuffled or concatenated, plain stacks, and ConvNeXt."""

from typing import Any

import torch
from structures_residual import CLASSES, ConvNorm, StochasticDepth
from torch import Tensor, nn
from torch.nn import functional


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
