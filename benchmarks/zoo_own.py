"""Networks of our own for `zoo.py`: signals and volumes, what NNCF tests itself on, and single constructs.

Those of NNCF's tests are written anew from what the architectures are, narrower and with fewer blocks.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Apply(nn.Module):
    """A function of a module's submodules and its input, for networks that need no class of their own."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        """Build it.

        Args:
            function: its first argument is this module.
            **modules: by their names.
        """
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        """Apply the function."""
        return self.function(self, x)


class ApplyToTwo(Apply):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # a signature with *args could not be traced
        """Apply the function."""
        return self.function(self, x, y)


class Residual(nn.Module):
    """Adds what a branch makes to its input, or to a projection of it."""

    def __init__(
        self,
        *branch: nn.Module,
        shortcut: nn.Module | None = None,
        last: nn.Module | None = None,
        in_place: bool = False,
    ) -> None:
        """Build it.

        Args:
            *branch: layers, one after the other.
            shortcut: for the input; `None` adds it as it is.
            last: follows the addition.
            in_place: add with `+=`.
        """
        super().__init__()
        self.branch, self.in_place = nn.Sequential(*branch), in_place
        self.shortcut, self.last = shortcut or nn.Identity(), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        y = self.branch(x)
        if self.in_place:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        return self.last(y)


class Parallel(nn.Module):
    """Concatenates what several branches make of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        """Build it."""
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate."""
        return torch.cat([branch(x) for branch in self.branches], 1)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
GLOBAL_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Classifier(nn.Module):
    """A backbone, a global pool, and a linear layer; the outermost module is none of torch's own."""

    def __init__(self, channels: int, *layers: nn.Module, dims: int = 2) -> None:
        """Build it.

        Args:
            channels: that the last layer makes.
            *layers: of the backbone.
            dims: number of axes that are pooled.
        """
        super().__init__()
        self.features, self.pool = nn.Sequential(*layers), GLOBAL_POOLS[dims](1)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


def unit(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, ...] = 3,
    *,
    stride: int | tuple[int, ...] = 1,
    groups: int = 1,
    dilation: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
    dims: int = 2,
) -> nn.Sequential:
    """Make a convolution that keeps the size, a BatchNorm, and an activation function."""
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else dilation * (kernel // 2)
    convolution = CONVOLUTIONS[dims](inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, NORMS[dims](outputs), *([act()] if act else []))


def basic(inputs: int, outputs: int, stride: int = 1, *, dims: int = 2, groups: int = 1) -> Residual:
    """Make a residual block of two convolutions, as in ResNet-18, or with groups as in ResNeXt."""
    shortcut = (
        None if stride == 1 and inputs == outputs else unit(inputs, outputs, 1, stride=stride, act=None, dims=dims)
    )
    first = unit(inputs, outputs, stride=stride, dims=dims)
    return Residual(
        first, unit(outputs, outputs, act=None, dims=dims, groups=groups), shortcut=shortcut, last=nn.ReLU()
    )


def preactivated(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Make a block of PreActResNet: norm and activation come first, and the addition is in place."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(x))
        shortcut = self.shortcut(out) if stride > 1 else x
        out = self.conv2(functional.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out

    return Apply(
        forward,
        bn1=nn.BatchNorm2d(inputs),
        conv1=nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        bn2=nn.BatchNorm2d(outputs),
        conv2=nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        shortcut=nn.Conv2d(inputs, outputs, 1, stride, bias=False),
    )


def inverted(inputs: int, outputs: int, stride: int = 1, *, act: Callable[[], nn.Module] = nn.ReLU6) -> nn.Module:
    """Make a block of MobileNetV2."""
    inner = 4 * inputs
    layers = (
        unit(inputs, inner, 1, act=act),
        unit(inner, inner, stride=stride, groups=inner, act=act),
        unit(inner, outputs, 1, act=None),
    )
    return Residual(*layers) if stride == 1 and inputs == outputs else nn.Sequential(*layers)


def excited(channels: int, gate: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Module:
    """Make a gate for each channel, as in SENet."""
    layers = nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1), gate()
    return Apply(lambda self, x: x * self.gate(x), gate=nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers))


def dense_layer(inputs: int, growth: int) -> nn.Module:
    """Make a layer of DenseNet: what it makes is put beside its input."""
    norm1, norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
    narrow = nn.Conv2d(inputs, 4 * growth, 1, bias=False), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
    return Parallel(nn.Sequential(norm1, nn.ReLU(), narrow[0], norm2, nn.ReLU(), narrow[1]), nn.Identity())


def shuffled(channels: int, groups: int) -> nn.Module:
    """Make a block of ShuffleNet: grouped convolutions with a shuffle of the channels between them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        count, c, height, width = x.shape
        y = (
            self.first(x)
            .view(count, groups, c // groups, height, width)
            .transpose(1, 2)
            .reshape(count, c, height, width)
        )
        return functional.relu(x + self.last(self.depth(y)))

    return Apply(
        forward,
        first=unit(channels, channels, 1, groups=groups),
        depth=unit(channels, channels, groups=channels, act=None),
        last=unit(channels, channels, 1, groups=groups, act=None),
    )


def dual_path(channels: int, growth: int) -> nn.Module:
    """Make a block of DPN: some channels are added, others are put beside the input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layers(x)
        return functional.relu(torch.cat([x[:, :16] + y[:, :16], x[:, 16:], y[:, 16:]], 1))

    return Apply(
        forward,
        layers=nn.Sequential(unit(channels, 16, 1), unit(16, 16, groups=4), unit(16, 16 + growth, 1, act=None)),
    )


def separable_cell(channels: int) -> nn.Module:
    """Make a cell of PNASNet: a separable convolution and a pool, added."""
    separable = unit(channels, channels, 7, groups=channels, act=None)
    return Apply(
        lambda self, x: functional.relu(self.separable(x) + functional.max_pool2d(x, 3, 1, 1)), separable=separable
    )


def lenet() -> nn.Module:
    """LeNet on images with one channel, flattened by `view`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))

    return Apply(
        forward,
        conv1=nn.Conv2d(1, 6, 5),
        conv2=nn.Conv2d(6, 16, 5),
        fc1=nn.Linear(400, 120),
        fc2=nn.Linear(120, 84),
        fc3=nn.Linear(84, CLASSES),
    )


def alexnet() -> nn.Module:
    """AlexNet for small images, with dropout."""
    features = (
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    )
    classifier = nn.Dropout(), nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(128, CLASSES)
    return Apply(
        lambda self, x: self.classifier(self.features(x).view(x.size(0), 256)),
        features=nn.Sequential(*features),
        classifier=nn.Sequential(*classifier),
    )


def vgg() -> nn.Module:
    """VGG with BatchNorms for small images."""
    widths = [16, "M", 32, "M", 48, 48, "M", 64, 64, "M"]
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers.append(unit(channels, width))
            channels = width
    return Classifier(channels, *layers, nn.AvgPool2d(1, 1))


def unet(dims: int = 2) -> nn.Module:
    """A U-Net with transposed convolutions and concatenations."""
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)

    def forward(self: Any, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        three = self.down3(self.pool(two))
        two = self.join2(torch.cat([self.up2(three), two], 1))
        return self.out(self.join1(torch.cat([self.up1(two), one], 1)))

    return Apply(
        forward,
        pool=pool,
        down1=unit(3, 8, dims=dims),
        down2=unit(8, 16, dims=dims),
        down3=unit(16, 32, dims=dims),
        up2=up(32, 16, 2, 2),
        join2=unit(32, 16, dims=dims),
        up1=up(16, 8, 2, 2),
        join1=unit(16, 8, dims=dims),
        out=CONVOLUTIONS[dims](8, 2, 1),
    )


def ssd() -> nn.Module:
    """A detector with a normalised feature map and heads at two scales."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        large = self.stage1(x)
        small = self.stage2(large)
        maps = functional.normalize(large, dim=1) * 20, small
        where = [head(m).permute(0, 2, 3, 1).flatten(1) for head, m in zip(self.boxes, maps, strict=True)]
        kind = [head(m).permute(0, 2, 3, 1).flatten(1) for head, m in zip(self.kinds, maps, strict=True)]
        boxes = torch.cat(where, 1)
        return boxes.view(boxes.size(0), -1, 4), torch.cat(kind, 1).view(boxes.size(0), -1, 3).softmax(-1)

    return Apply(
        forward,
        stage1=nn.Sequential(unit(3, 16, stride=2), unit(16, 32, stride=2)),
        stage2=nn.Sequential(unit(32, 32, stride=2), unit(32, 48)),
        boxes=nn.ModuleList([nn.Conv2d(c, 8, 3, padding=1) for c in (32, 48)]),
        kinds=nn.ModuleList([nn.Conv2d(c, 6, 3, padding=1) for c in (32, 48)]),
    )


def super_resolution() -> nn.Module:
    """Two images in, a larger one out: features of both, and an upsampled image that is added."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        features = torch.cat([self.one(x), self.two(y)], 1)
        return functional.pixel_shuffle(self.body(features), 2) + functional.interpolate(
            x, scale_factor=2, mode="bilinear"
        )

    body = nn.Sequential(nn.Conv2d(32, 24, 3, padding=1), nn.PReLU(), nn.Conv2d(24, 12, 3, padding=1))
    return ApplyToTwo(forward, one=nn.Conv2d(3, 16, 3, padding=1), two=nn.Conv2d(3, 16, 3, padding=1), body=body)


def shared_layers() -> nn.Module:
    """One convolution and one norm that are called several times."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = functional.relu(self.norm(self.conv(x)))
        return self.fc(x.mean((2, 3)))

    return Apply(forward, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), fc=nn.Linear(3, CLASSES))


def rotary_attention() -> nn.Module:
    """Attention on tokens with rotary positions and torch's own attention function."""

    def turned(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] / 10 ** torch.linspace(0, 2, x.shape[-1] // 2)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)

    def forward(self: Any, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2)
        return self.fc(self.norm(x + self.out(y)).mean(1))

    layers = {name: nn.Linear(32, 32) for name in ("query", "key", "value", "out")}
    return Apply(forward, embedding=nn.Embedding(50, 32), norm=nn.LayerNorm(32), fc=nn.Linear(32, CLASSES), **layers)


def attention(batch_first: bool) -> nn.Module:
    """`nn.MultiheadAttention` on embedded tokens, the batch on the first or on the second axis."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x if batch_first else x.transpose(0, 1))
        return self.fc((x + self.attention(x, x, x)[0]).mean(1 if batch_first else 0))

    mha = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    return Apply(forward, embed=nn.Linear(8, 16), attention=mha, fc=nn.Linear(16, CLASSES))


def recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> nn.Module:
    """A recurrent layer between a convolution and a linear layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(self.recurrent(functional.relu(self.conv(x)).transpose(1, 2))[0][:, -1])

    return Apply(
        forward,
        conv=nn.Conv1d(4, 16, 3, padding=1),
        recurrent=kind(16, 16, batch_first=True),
        fc=nn.Linear(16, CLASSES),
    )


def embeddings() -> nn.Module:
    """Two embeddings side by side, and a linear layer."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        return self.fc(torch.cat([self.one(tokens), self.two(tokens)], -1).mean(1))

    return Apply(forward, one=nn.Embedding(50, 12), two=nn.Embedding(50, 20), fc=nn.Linear(32, CLASSES))


def embedding_bag() -> nn.Module:
    """An embedding and an embedding bag, added."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        return self.fc(self.one(tokens).mean(1) + self.bag(tokens))

    return Apply(forward, one=nn.Embedding(50, 16), bag=nn.EmbeddingBag(50, 16), fc=nn.Linear(16, CLASSES))


def containers() -> nn.Module:
    """A dictionary with a tuple in it as output."""

    def forward(self: Any, x: Tensor) -> dict[str, Any]:
        x = self.one(x)
        return {"first": x, "others": (self.two(x), self.three(x))}

    return Apply(forward, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 8, 3), three=nn.Conv2d(8, 4, 3))


def branches() -> nn.Module:
    """Several convolutions that read the input of the network, each an output."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = functional.relu(x)
        return self.a(x), self.b(functional.max_pool2d(x, 3)), self.c(x)

    return Apply(forward, a=nn.Conv2d(3, 3, 3, padding=1, groups=3), b=nn.Conv2d(3, 4, 5), c=nn.Conv2d(3, 4, 3))


def product_and_convolution() -> nn.Module:
    """A matrix product of two inputs, divided, in front of a convolution."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return self.two(functional.relu(self.one(torch.matmul(x, y) / 2)))

    return ApplyToTwo(forward, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 4, 3))


def hard_functions() -> nn.Module:
    """Hardswish and Hardsigmoid, spelled out with a ReLU6."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x * self.relu6(x + 3) / 6
        return self.relu6(self.two(x) + 3) / 6

    return Apply(forward, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 8, 3), relu6=nn.ReLU6())


def sliced_gelu() -> nn.Module:
    """A linear layer and a convolution on its transposed output, cut, with GELU."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.dropout(self.fc(x))
        return x + functional.gelu(self.conv(x.transpose(2, 1))[:, :, :-2]).transpose(2, 1)

    return Apply(forward, fc=nn.Linear(6, 8), dropout=nn.Dropout(), conv=nn.Conv1d(8, 8, 3, padding=2))


def doubled_linear() -> nn.Module:
    """A linear layer whose output is multiplied by a constant and added to its input."""
    return Apply(
        lambda self, x: self.out(x + self.fc(self.dropout(x)) * 2),
        dropout=nn.Dropout(),
        fc=nn.Linear(6, 6),
        out=nn.Linear(6, 4),
    )


def two_convolutions(function: Callable[..., Tensor]) -> nn.Module:
    """Make two convolutions with a function that gets the first one's output and the module."""
    return Apply(
        lambda self, x: self.fc(self.two(function(functional.relu(self.one(x)), self)).mean((2, 3))),
        one=unit(3, 8),
        two=unit(8, 8),
        dropout=nn.Dropout(0.1),
        fc=nn.Linear(8, CLASSES),
    )


def _in_place_after_reading(x: Tensor, module: Any) -> Tensor:
    y = module.two(x)
    x += 1
    return x + y


def _computed_weight() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        W = self.conv.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return self.fc(functional.relu(functional.conv2d(x, W, self.conv.bias)).mean((2, 3)))

    return Apply(forward, conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(16, CLASSES))


def _concatenation_flattened() -> nn.Module:
    """Two branches whose activations have different ranges, side by side, flattened and averaged."""
    wide = unit(8, 8)
    nn.init.constant_(wide[1].weight, 3.0)
    return Apply(
        lambda self, x: self.fc(self.branches(self.stem(x)).flatten(2).mean(2)),
        stem=unit(3, 8),
        branches=Parallel(unit(8, 8), wide),
        fc=nn.Linear(16, CLASSES),
    )


def _two_names() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    return Apply(
        lambda self, x: self.fc(self.again(functional.relu(self.conv(self.stem(x)))).mean((2, 3))),
        stem=unit(3, 8),
        conv=layer,
        again=layer,
        fc=nn.Linear(8, CLASSES),
    )


def dilated(channels: int, dilation: int) -> nn.Module:
    """Make a causal block of a TCN: padded on the left alone."""
    convolution = nn.Conv1d(channels, channels, 3, dilation=dilation)
    return Apply(
        lambda self, x: functional.relu(x + self.norm(self.conv(functional.pad(x, (2 * dilation, 0))))),
        conv=convolution,
        norm=nn.BatchNorm1d(channels),
    )


def gated(channels: int, dilation: int) -> nn.Module:
    """Make a gated block of WaveNet."""
    kwargs = {"padding": dilation, "dilation": dilation}
    return Apply(
        lambda self, x: x + self.out(torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))),
        filter=nn.Conv1d(channels, channels, 3, **kwargs),
        gate=nn.Conv1d(channels, channels, 3, **kwargs),
        out=nn.Conv1d(channels, channels, 1),
    )


def inception_time(inputs: int, width: int) -> nn.Module:
    """Make a block of InceptionTime: kernels of several lengths and a pool, side by side."""
    kernels = [unit(inputs, width, k, dims=1) for k in (9, 19, 39)]
    return Parallel(*kernels, nn.Sequential(nn.MaxPool1d(3, 1, 1), unit(inputs, width, 1, dims=1)))


def autoencoder() -> nn.Module:
    """Strided convolutions down, transposed ones up."""
    down = unit(2, 16, 4, stride=2, dims=1), unit(16, 32, 4, stride=2, dims=1)
    up = nn.ConvTranspose1d(32, 16, 4, 2, 1), nn.BatchNorm1d(16), nn.ELU(), nn.ConvTranspose1d(16, 2, 4, 2, 1)
    return Apply(lambda self, x: self.layers(x), layers=nn.Sequential(*down, *up))


def c3d() -> nn.Module:
    """Plain 3-D convolutions with pools."""
    layers = unit(3, 8, dims=3), nn.MaxPool3d((1, 2, 2)), unit(8, 16, dims=3), nn.MaxPool3d(2), unit(16, 32, dims=3)
    return Classifier(32, *layers, dims=3)


def factorised(inputs: int, outputs: int) -> nn.Module:
    """Make a block of R(2+1)D: a spatial kernel, then one over time."""
    space = unit(inputs, outputs, (1, 3, 3), dims=3)
    time = unit(outputs, outputs, (3, 1, 1), act=None, dims=3)
    return Residual(space, time, shortcut=unit(inputs, outputs, 1, act=None, dims=3), last=nn.ReLU())


def stacked(block: Callable[[int, int], nn.Module], widths: Sequence[int], stem: nn.Module) -> Classifier:
    """Make a classifier of volumes from a stem and blocks of growing width."""
    return Classifier(widths[-1], stem, *(block(i, o) for i, o in pairwise(widths)), dims=3)


ONE_DIMENSION: dict[str, Callable[[], nn.Module]] = {
    "resnet1d": lambda: Classifier(
        32, unit(2, 16, 7, dims=1), basic(16, 16, dims=1), basic(16, 32, 2, dims=1), basic(32, 32, dims=1), dims=1
    ),
    "tcn": lambda: Classifier(16, unit(2, 16, 1, dims=1), *(dilated(16, d) for d in (1, 2, 4, 8)), dims=1),
    "wavenet": lambda: Classifier(16, nn.Conv1d(2, 16, 1), *(gated(16, d) for d in (1, 2, 4)), dims=1),
    "inception_time": lambda: Classifier(32, inception_time(2, 8), inception_time(32, 8), dims=1),
    "separable1d": lambda: Classifier(
        32, unit(2, 16, dims=1), unit(16, 16, groups=16, dims=1), unit(16, 32, 1, dims=1), nn.AvgPool1d(2), dims=1
    ),
    "autoencoder1d": autoencoder,
    "unet1d": lambda: Apply(lambda self, x: self.net(self.stem(x)), stem=nn.Conv1d(2, 3, 1), net=unet(1)),
    "lstm": lambda: Apply(lambda self, x: self.net(self.stem(x)), stem=nn.Conv1d(2, 4, 1), net=recurrent(nn.LSTM)),
    "gru": lambda: Apply(lambda self, x: self.net(self.stem(x)), stem=nn.Conv1d(2, 4, 1), net=recurrent(nn.GRU)),
}
"""They read `[items, 2, 64]`."""

THREE_DIMENSIONS: dict[str, Callable[[], nn.Module]] = {
    "c3d": c3d,
    "resnet3d": lambda: Classifier(16, unit(3, 8, dims=3), basic(8, 8, dims=3), basic(8, 16, 2, dims=3), dims=3),
    "r2plus1d": lambda: stacked(factorised, (8, 12, 16), unit(3, 8, (1, 3, 3), dims=3)),
    "separable3d": lambda: Classifier(
        16, unit(3, 8, dims=3), unit(8, 8, groups=8, dims=3), unit(8, 16, 1, dims=3), dims=3
    ),
    "unet3d": lambda: unet(3),
}
"""They read `[items, 3, 8, 16, 16]`."""

NNCF_IMAGES: dict[str, Callable[[], nn.Module]] = {
    "alexnet": alexnet,
    "vgg": vgg,
    "resnet": lambda: Classifier(32, unit(3, 16), basic(16, 16), basic(16, 32, 2), basic(32, 32)),
    "resnext": lambda: Classifier(32, unit(3, 16), basic(16, 16, groups=4), basic(16, 32, 2, groups=4)),
    "senet": lambda: Classifier(32, unit(3, 16), basic(16, 16), excited(16), basic(16, 32, 2), excited(32)),
    "preact_resnet": lambda: Classifier(
        32,
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        preactivated(16, 16),
        preactivated(16, 32, 2),
        preactivated(32, 32),
    ),
    "densenet": lambda: Classifier(
        16, nn.Conv2d(3, 16, 3, padding=1), dense_layer(16, 8), dense_layer(24, 8), unit(32, 16, 1), nn.AvgPool2d(2)
    ),
    "dpn": lambda: Classifier(40, unit(3, 24), dual_path(24, 8), dual_path(32, 8)),
    "pnasnet": lambda: Classifier(16, unit(3, 16), separable_cell(16), separable_cell(16)),
    "googlenet": lambda: Classifier(
        24,
        unit(3, 16),
        Parallel(
            unit(16, 8, 1),
            nn.Sequential(unit(16, 8, 1), unit(8, 8)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(16, 8, 1)),
        ),
    ),
    "squeezenet": lambda: Classifier(
        32, unit(3, 16, stride=2), nn.Conv2d(16, 8, 1), nn.ReLU(), Parallel(unit(8, 16, 1), unit(8, 16))
    ),
    "shufflenet": lambda: Classifier(24, unit(3, 24), shuffled(24, 3), shuffled(24, 3)),
    "mobilenet": lambda: Classifier(
        32, unit(3, 16, stride=2), unit(16, 16, groups=16), unit(16, 32, 1), unit(32, 32, groups=32), unit(32, 32, 1)
    ),
    "mobilenet_v2": lambda: Classifier(24, unit(3, 16), inverted(16, 16), inverted(16, 24, 2), inverted(24, 24)),
    "mobilenet_v3": lambda: Classifier(
        24, unit(3, 16, act=nn.Hardswish), excited(16, nn.Hardsigmoid), inverted(16, 24, 2, act=nn.Hardswish)
    ),
    "unet": unet,
    "ssd": ssd,
    "shared_layers": shared_layers,
    "containers": containers,
    "branches": branches,
    "hard_functions": hard_functions,
    "leaky_relu": lambda: Classifier(16, unit(3, 8, act=nn.LeakyReLU), unit(8, 16, act=nn.PReLU)),
    "depthwise": lambda: Classifier(6, nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)),
    "transposed": lambda: Classifier(
        8,
        nn.ConvTranspose2d(3, 8, 2, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
    ),
    "group_norm": lambda: Classifier(
        16,
        *(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()),
    ),
    "sum_of_two": lambda: Apply(
        lambda self, x: self.three(self.one(x) + self.two(x)),
        one=nn.Conv2d(3, 8, 2),
        two=nn.Conv2d(3, 8, 2),
        three=nn.Conv2d(8, 4, 1),
    ),
}
"""They read `[items, 3, 32, 32]`."""

CONSTRUCTS: dict[str, Callable[[], nn.Module]] = {
    "slice_of_the_batch": lambda: two_convolutions(lambda x, _: x[:2]),
    "batches_one_after_the_other": lambda: two_convolutions(lambda x, _: torch.cat([x, x])),
    "in_place_after_reading": lambda: two_convolutions(_in_place_after_reading),
    "dropout_in_eval": lambda: two_convolutions(lambda x, _: functional.dropout(x, 0.1, training=True)),
    "a_batch_of_one": lambda: two_convolutions(lambda x, _: x.reshape(1, -1, 16, 16).reshape(-1, 8, 16, 16)),
    "zero_added": lambda: two_convolutions(lambda x, _: 0 + x),
    "constant_added": lambda: two_convolutions(lambda x, _: x + 0.5),
    "reshape_as": lambda: two_convolutions(lambda x, _: x.flatten(1).reshape_as(x)),
    "mean_over_positions": lambda: two_convolutions(lambda x, _: x - x.flatten(2).mean(2)[:, :, None, None]),
    "clamped": lambda: two_convolutions(lambda x, _: x.clamp(0, 1)),
    "computed_weight": _computed_weight,
    "two_names": _two_names,
    "concatenation_flattened": _concatenation_flattened,
}
"""They read `[items, 3, 16, 16]`: what real networks do that quantizers stumble over."""
