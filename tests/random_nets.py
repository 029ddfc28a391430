"""Networks that are drawn at random: a list of steps, which is printed and shrunk, and the module that runs it.

Every step reads values that earlier steps made, counted back from the last one, and takes whatever shape it finds: any
list of steps is a network, so that Hypothesis can leave out steps and lower numbers until the smallest failing network
is left. Its `repr` makes it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = {1: (3, 12), 2: (3, 8, 8), 3: (2, 4, 4, 4)}
"""Shape of one image by the number of its dimensions."""

MOST_CHANNELS, MOST_POSITIONS = 16, 256
"""What a concatenation or an enlargement may reach; steps that would go beyond it pass their value on."""

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MaxPool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AvgPool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
AdaptivePool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
InstanceNorm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "relu in place": lambda _: nn.ReLU(inplace=True),
    "relu6": lambda _: nn.ReLU6(),
    "leaky relu": lambda _: nn.LeakyReLU(0.1),
    "prelu": lambda _: nn.PReLU(init=0.2),
    "prelu per channel": lambda channels: nn.PReLU(channels, init=0.2),
    "hardtanh": lambda _: nn.Hardtanh(-0.5, 1.5),
    "silu": lambda _: nn.SiLU(),
    "gelu": lambda _: nn.GELU(),
    "hardswish": lambda _: nn.Hardswish(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "elu": lambda _: nn.ELU(),
    "dropout": lambda _: nn.Dropout(0.3),
}

PER_GROUP = {"whole": lambda _: 1, "halves": lambda _: 2, "depthwise": lambda channels: channels}
"""Number of groups of a convolution by the number of channels that it reads."""

NORMS = ("batch", "group", "instance", "layer")
POOLS = ("max", "average", "padded max", "padded average", "to two", "global")
JOINS = ("add", "concatenate", "subtract", "multiply")
MOVES = ("half", "shuffle", "twice as large", "smooth", "pad", "crop", "flip", "scale", "shift", "to channels", "clamp")

Groups = Literal["whole", "halves", "depthwise"]


class Step:
    """Prints as the call that makes it, without what has its default."""

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Convolve(Step):
    """A convolution, transposed or not. `on` counts values back from the last one."""

    on: int = 0
    out: int = 4
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: Groups = "whole"
    bias: bool = True
    transposed: bool = False


@dataclass(frozen=True, repr=False)
class Again(Step):
    """The latest convolution that fits, a second time."""

    on: int = 0


@dataclass(frozen=True, repr=False)
class Norm(Step):
    """A normalisation."""

    on: int = 0
    kind: str = "batch"


@dataclass(frozen=True, repr=False)
class Act(Step):
    """An elementwise function."""

    on: int = 0
    kind: str = "relu"


@dataclass(frozen=True, repr=False)
class Pool(Step):
    """A pool."""

    on: int = 0
    kind: str = "max"


@dataclass(frozen=True, repr=False)
class Join(Step):
    """A value and the `other`-th of those that have a fitting shape; the value itself is one of them."""

    on: int = 0
    other: int = 0
    kind: str = "add"


@dataclass(frozen=True, repr=False)
class Gate(Step):
    """Squeeze and excite."""

    on: int = 0
    hard: bool = False


@dataclass(frozen=True, repr=False)
class Move(Step):
    """A function without parameters that moves, repeats, drops or scales elements."""

    on: int = 0
    kind: str = "half"


@dataclass(frozen=True)
class Net:
    """A network: its steps, and the seed of its parameters.

    Attributes:
        steps: what it does one after the other.
        head: what stands after the last step, and what is returned.
        dims: dimensions of its images.
        seed: of the parameters.
        unused: whether it also runs the steps whose values nothing uses.
    """

    steps: tuple[Step, ...]
    head: Literal["pooled", "flattened", "convolution", "two"] = "pooled"
    dims: int = 2
    seed: int = 0
    unused: bool = False

    def build(self) -> "RandomNet":
        """Make the network, with the parameters and statistics of its seed, in eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = RandomNet(self)
            net.eval()
            unsettle(net)
        return net

    def images(self, count: int, *, seed: int = 0) -> Tensor:
        """Return random images."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *SIZES[self.dims], generator=generator)


@dataclass(frozen=True)
class Call:
    """What is called with which of the values so far; its result is the next value.

    Attributes:
        function: a function, or the number of a module: what replaces a module is called in its place.
        reads: numbers of the values.
    """

    function: Callable[..., Any] | int
    reads: tuple[int, ...]


class OverChannels(nn.Module):
    """Brings the channels to the last axis, and back."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.movedim(1, -1)).movedim(-1, 1)


class RandomNet(nn.Module):
    """Runs the steps of a network: a list of calls that is made once, so that a trace sees no Python of this class."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.dims, self.parts = net.dims, nn.ModuleList()
        self._shapes: list[tuple[int, ...]] = [SIZES[net.dims]]
        self._calls: list[Call] = []
        self._of_input = {0}
        for step in net.steps:
            MAKERS[type(step)](self, step)
        self._returned = self._finish(net.head)
        self._used = set(range(len(self._calls))) if net.unused else self._needed()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for number, call in enumerate(self._calls):
            if number not in self._used:
                values.append(x)  # in its place
                continue
            function = self.parts[call.function] if isinstance(call.function, int) else call.function
            values.append(function(*(values[i] for i in call.reads)))
        found = [values[i] for i in self._returned]
        return found[0] if len(found) == 1 else tuple(found)

    def _finish(self, head: str) -> list[int]:
        if head in ("convolution", "two"):
            self.module(Conv[self.dims - 1](self.shape(-1)[0], 4, 1), self.last)
        if head == "convolution":
            return [self.last]
        feature = [self.last] if head == "two" else []
        if head != "flattened":
            axes = tuple(range(2, 2 + self.dims))
            self.call(lambda x: x.mean(axes), self.last)
        else:
            self.module(nn.Flatten(), self.last)
        self.module(nn.Linear(self.shape(-1)[0], 4), self.last)
        return [*feature, self.last]

    def _needed(self) -> set[int]:
        """List the calls that an output depends on; call `i` makes value `i + 1`."""
        needed = set(self._returned)
        for number in reversed(range(len(self._calls))):
            if number + 1 in needed:
                needed |= set(self._calls[number].reads)
        return {value - 1 for value in needed if value > 0}

    @property
    def last(self) -> int:
        """Number of the last value."""
        return len(self._shapes) - 1

    def back(self, on: int) -> int:
        """Return the number of the value that is so many back."""
        return self.last - on % len(self._shapes)

    def is_input(self, number: int) -> bool:
        """Whether a value is in the memory of the images."""
        return number in self._of_input

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a value for one image."""
        return self._shapes[number]

    def fitting(self, fits: Callable[[tuple[int, ...]], bool]) -> list[int]:
        """List the values of fitting shapes, the latest first."""
        return [i for i in reversed(range(len(self._shapes))) if fits(self._shapes[i])]

    def module(self, module: nn.Module, *reads: int) -> None:
        """Call a module of the network's own."""
        self.parts.append(module)
        self.call(len(self.parts) - 1, *reads)

    def call(self, function: Callable[..., Any] | int, *reads: int) -> None:
        """Call a function, or the module of a number, with some of the values."""
        with torch.no_grad():
            training = self.training
            self.eval()
            given = [torch.zeros(2, *self.shape(i)) for i in reads]
            made = (self.parts[function] if isinstance(function, int) else function)(*given)
            self.train(training)
        memory = {i: t.untyped_storage().data_ptr() for i, t in zip(reads, given, strict=True) if i in self._of_input}
        if made.untyped_storage().data_ptr() in memory.values():
            self._of_input.add(len(self._shapes))
        self._calls.append(Call(function, reads))
        self._shapes.append(tuple(made.shape[1:]))

    def convolution_of(self, channels: int) -> int | None:
        """Return the number of the latest convolution that reads so many channels at every position."""
        fit = [i for i, m in enumerate(self.parts) if isinstance(m, (*Conv, *Transposed)) and m.in_channels == channels]
        return next((i for i in reversed(fit) if self.parts[i].stride[0] == 1), None)


def _convolve(net: RandomNet, step: Convolve) -> None:
    on = net.back(step.on)
    channels, *size = net.shape(on)
    groups = PER_GROUP[step.groups](channels)
    if channels % groups:
        groups = 1
    out = max(step.out // groups, 1) * groups if step.groups != "depthwise" else channels * (1 + (step.out > 6))
    if out > MOST_CHANNELS:
        out = groups
    stride = step.stride if min(size) >= 2 else 1
    if step.transposed and _positions(size) * stride ** len(size) > MOST_POSITIONS:
        stride = 1
    dilation = step.dilation if min(size) > 2 else 1
    kind = (Transposed if step.transposed else Conv)[net.dims - 1]
    settings = {"padding": dilation * (step.kernel // 2), "stride": stride, "dilation": dilation, "groups": groups}
    if step.transposed and stride > 1 and step.kernel == 3:
        settings["output_padding"] = 1
    net.module(kind(channels, out, step.kernel, bias=step.bias, **settings), on)


def _again(net: RandomNet, step: Again) -> None:
    on = net.back(step.on)
    found = net.convolution_of(net.shape(on)[0])
    if found is not None:
        net.call(found, on)


def _norm(net: RandomNet, step: Norm) -> None:
    on, k = net.back(step.on), net.dims - 1
    channels, *size = net.shape(on)
    groups = 2 if channels % 2 == 0 else 1
    counted = {"instance": _positions(size), "group": channels // groups * _positions(size), "layer": channels}
    if counted.get(step.kind, 4) < 4:
        return  # of one value torch makes no norm; of two it is their sign, which no scale survives
    made = {
        "batch": lambda: BatchNorm[k](channels),
        "group": lambda: nn.GroupNorm(groups, channels),
        "instance": lambda: InstanceNorm[k](channels, affine=True),
        "layer": lambda: OverChannels(nn.LayerNorm(channels)),
    }
    net.module(made[step.kind](), on)


def _act(net: RandomNet, step: Act) -> None:
    on = net.back(step.on)
    # In place, what others read changes too. The images of the user are left alone.
    kind = step.kind.removesuffix(" in place") if net.is_input(on) else step.kind
    net.module(ACTIVATIONS[kind](net.shape(on)[0]), on)


def _pool(net: RandomNet, step: Pool) -> None:
    on, k = net.back(step.on), net.dims - 1
    size = net.shape(on)[1:]
    made: dict[str, Callable[[], nn.Module]] = {
        "max": lambda: MaxPool[k](2),
        "average": lambda: AvgPool[k](2),
        "padded max": lambda: MaxPool[k](3, stride=1, padding=1),
        "padded average": lambda: AvgPool[k](3, stride=1, padding=1, count_include_pad=False),
        "to two": lambda: AdaptivePool[k](2),
        "global": lambda: AdaptivePool[k](1),
    }
    if min(size) < {"global": 1, "padded max": 3, "padded average": 3}.get(step.kind, 2):
        return
    if step.kind == "to two" and any(s % 2 for s in size):
        return  # windows that overlap, which neither format has
    net.module(made[step.kind](), on)


def _join(net: RandomNet, step: Join) -> None:
    on = net.back(step.on)
    shape = net.shape(on)
    if step.kind == "concatenate":
        found = net.fitting(lambda s: s[1:] == shape[1:] and s[0] + shape[0] <= MOST_CHANNELS)
        if found:
            net.call(lambda a, b: torch.cat([a, b], 1), on, found[step.other % len(found)])
        return
    found = net.fitting(lambda s: s == shape)
    function = {"add": torch.add, "subtract": torch.sub, "multiply": torch.mul}[step.kind]
    net.call(function, on, found[step.other % len(found)])


def _gate(net: RandomNet, step: Gate) -> None:
    on, k = net.back(step.on), net.dims - 1
    channels = net.shape(on)[0]
    down, up = Conv[k](channels, 2, 1), Conv[k](2, channels, 1)
    gate = nn.Sequential(AdaptivePool[k](1), down, nn.ReLU(), up, nn.Hardsigmoid() if step.hard else nn.Sigmoid())
    net.module(gate, on)
    net.call(torch.mul, on, net.last)


def _move(net: RandomNet, step: Move) -> None:
    on, dims = net.back(step.on), net.dims
    channels, *size = net.shape(on)
    if step.kind == "half" and channels < 2:
        return
    if step.kind in ("twice as large", "smooth") and _positions(size) * 2**dims > MOST_POSITIONS:
        return
    if step.kind in ("crop", "to channels") and min(size) < 3:
        return
    if step.kind == "to channels" and (dims != 2 or any(s % 2 for s in size) or channels * 4 > MOST_CHANNELS):
        return
    groups = 2 if channels % 2 == 0 else 1
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    inner = (slice(None), slice(None), *[slice(1, None)] * dims)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "half": lambda x: x.chunk(2, 1)[1],
        "shuffle": lambda x: x.unflatten(1, (groups, channels // groups)).transpose(1, 2).flatten(1, 2),
        "twice as large": lambda x: functional.interpolate(x, scale_factor=2),
        "smooth": lambda x: functional.interpolate(x, scale_factor=2, mode=mode, align_corners=False),
        "pad": lambda x: functional.pad(x, (1, 0) * dims),
        "crop": lambda x: x[inner],
        "flip": lambda x: x.flip(1),
        "scale": lambda x: x * 0.5,
        "shift": lambda x: x + 0.25,
        "to channels": lambda x: functional.pixel_unshuffle(x, 2),
        "clamp": lambda x: x.clamp(-1, 2),
    }
    net.call(functions[step.kind], on)


MAKERS: dict[type[Step], Callable[[RandomNet, Any], None]] = {
    Convolve: _convolve,
    Again: _again,
    Norm: _norm,
    Act: _act,
    Pool: _pool,
    Join: _join,
    Gate: _gate,
    Move: _move,
}


def _positions(size: Sequence[int]) -> int:
    count = 1
    for n in size:
        count *= n
    return count


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Give a network parameters as training leaves them, and worse: channels of different sizes, dead ones, signs."""
    for m in model.modules():
        if isinstance(m, (*Conv, *Transposed)):
            # Along the first axis: the output channels of a convolution, the input channels of a transposed one.
            spread = torch.exp(0.7 * torch.randn(m.weight.shape[0]))
            spread[torch.rand(len(spread)) < 0.08] = 0
            m.weight.mul_(spread.view(-1, *(1,) * (m.weight.dim() - 1)))
        elif isinstance(m, BatchNorm):
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.05, 3)
            m.weight.mul_(torch.exp(0.5 * torch.randn_like(m.weight)))
            m.weight[torch.rand_like(m.weight) < 0.15] *= -1
            m.weight[torch.rand_like(m.weight) < 0.08] = 0
            m.bias.normal_(std=0.3)
        elif isinstance(m, (nn.GroupNorm, nn.LayerNorm, *InstanceNorm)):
            m.weight.mul_(torch.exp(0.5 * torch.randn_like(m.weight)))
            m.bias.normal_(std=0.3)
