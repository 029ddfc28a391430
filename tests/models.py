"""Tiny float64 networks: blocks that keep 8 channels and 6x6 positions, to be chained in any order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 8
IMAGE = (2, CHANNELS, 6, 6)


class Apply(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Small(nn.Module):
    """Two 1x1 convolutions, a buffer and a plain tensor, used as `run` says."""

    def __init__(self, run: Callable[["Small", Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("mean", torch.rand(4, 1, 1))
        self.plain = torch.rand(4, 1, 1)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concat(nn.Module):
    """Two branches side by side, mixed by a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(4, 1), conv(4)
        self.mix = nn.Conv2d(8, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.left(x).relu(), self.right(x)], dim=1))


class Halves(nn.Module):
    """Channels split in two; one half is convolved and added to the other (ShuffleNet's and CSP's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([b, a + self.body(b)], dim=1)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class LastAxis(nn.Module):
    """A body that works on channels-last tokens `[N, positions, C]`, as in transformers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)


def conv(out: int = CHANNELS, size: int = 3, **kwargs: int) -> nn.Conv2d:
    """Return a convolution of 8 channels that keeps the size of the image."""
    return nn.Conv2d(CHANNELS, out, size, padding=size // 2, **kwargs)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Shuffle channels the way ShuffleNet writes it."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "conv without bias": partial(conv, bias=False),
    "depthwise": partial(conv, groups=CHANNELS),
    "grouped": partial(conv, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1),
    "grouped transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=4),
    "depthwise transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "relu": nn.ReLU,
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(CHANNELS, init=0.3),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "max pool": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    "average pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "pad and crop": lambda: Apply(lambda x: functional.pad(x, (2, 2, 2, 2))[:, :, 1:-3, 3:-1]),
    "pad with ones": lambda: Apply(lambda x: functional.pad(x, (1, 0, 1, 0), value=1.0)[:, :, 1:, 1:]),
    "shift channels": lambda: Apply(lambda x: functional.pad(x[:, 2:], (0, 0, 0, 0, 1, 1))),
    "shuffle": lambda: Apply(shuffle),
    "resize": lambda: Apply(lambda x: functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2)),
    "residual": lambda: Residual(nn.Sequential(conv(), nn.ReLU(), conv())),
    "bottleneck": lambda: Residual(nn.Sequential(conv(4, 1), nn.ReLU(), nn.Conv2d(4, CHANNELS, 3, padding=1))),
    "concat": Concat,
    "halves": Halves,
    "gate": Gate,
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "layer norm": lambda: LastAxis(nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS))),
    "rms norm": lambda: LastAxis(nn.Sequential(nn.RMSNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS, bias=False))),
    "scalar": lambda: Apply(lambda x: 3 * x / 2),
}


def chained(*names: str) -> nn.Module:
    """Return a float64 network in eval mode: convolution, named blocks, flatten, linear; no parameter is 0 or 1."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(CHANNELS * 9, 5))
    model = nn.Sequential(conv(), *(BLOCKS[name]() for name in names), head).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def image() -> Tensor:
    """Return a random input of `chained`."""
    return torch.randn(IMAGE, dtype=torch.float64)
