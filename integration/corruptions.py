"""Right files of several networks, and ways to corrupt them on purpose, one place at a time."""

import functools
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nets
import torch
from conftest import four_bits
from torch import Tensor, nn

from qft_plugin.deploy.file_view import File
from qft_plugin.deploy.proof import Proof, prove
from qft_plugin.deploy.watched import Watched
from qft_plugin.errors import ParityError
from qft_plugin.graph.torch_model import Call


class Deep(nn.Module):
    """The shape of ResNet-20: 19 convolutions, 9 additions, and two shortcuts with a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.shortcuts = nn.ModuleList(), nn.ModuleDict()
        before = 8
        for number, width in enumerate((8, 8, 8, 16, 16, 16, 32, 32, 32)):
            stride = 1 if width == before else 2
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                )
            )
            if stride == 2:
                self.shortcuts[str(number)] = nn.Conv2d(before, width, 1, 2, bias=False)
            before = width
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for number, block in enumerate(self.blocks):
            shortcut = self.shortcuts[str(number)](x) if str(number) in self.shortcuts else x
            x = (block(x) + shortcut).relu()
        return self.fc(x.mean((2, 3)))


class Mobile(nn.Module):
    """The shape of MobileNetV2: a chain of inverted residuals with ReLU6, 17 convolutions."""

    def __init__(self) -> None:
        super().__init__()

        def part(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(o)]

        def block(i: int, o: int, stride: int) -> nn.Sequential:
            m = 4 * i
            expand, depth = part(i, m), part(m, m, 3, stride, m)
            return nn.Sequential(*expand, nn.ReLU6(), *depth, nn.ReLU6(), *part(m, o))

        self.stem = nn.Sequential(*part(3, 8, 3), nn.ReLU6())
        self.blocks = nn.ModuleList(
            [block(8, 8, 1), block(8, 12, 2), block(12, 12, 1), block(12, 16, 2), block(16, 16, 1)]
        )
        self.last = nn.Sequential(*part(16, 48), nn.ReLU6())
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return self.fc(self.last(x).mean((2, 3)))


class Wide(nn.Module):
    """Layers of 192 to 384 channels, in which one channel is a small part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192)
        self.conv1, self.norm1 = nn.Conv2d(192, 384, 3, 2, 1, bias=False), nn.BatchNorm2d(384)
        self.conv2, self.norm2 = nn.Conv2d(384, 384, 1, bias=False), nn.BatchNorm2d(384)
        self.conv3 = nn.Conv2d(384, 384, 1)
        self.fc = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = self.norm1(self.conv1(x)).relu()
        x = (self.norm2(self.conv2(x)) + x).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


@dataclass(frozen=True)
class Kind:
    """A network for corruptions.

    Attributes:
        build: makes it, in eval mode.
        shape: of one input.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def louder(model: nn.Module) -> nn.Module:
    """Scale the outputs of BatchNorms, so that each ReLU6 is reached."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data *= 3
            norm.bias.data *= 3
    return model


def saturated(name: str) -> nn.Module:
    """Make a network of the collection whose ReLU6 are reached."""
    return louder(nets.build(name))


NETWORKS: Final[Mapping[str, Kind]] = {
    **{name: Kind(functools.partial(nets.build, name), nets.NETS[name].shapes["x"])
       for name in ("residual", "transformer")},
    **{name: Kind(functools.partial(saturated, name), nets.NETS[name].shapes["x"])
       for name in ("inverted", "preactivation")},
    "deep": Kind(lambda: nets.settled(Deep()), (3, 16, 16)),
    "mobile": Kind(lambda: louder(nets.settled(Mobile())), (3, 16, 16)),
    "wide": Kind(lambda: nets.settled(Wide()), (3, 8, 8)),
}  # fmt: skip


def images(shape: Sequence[int], count: int) -> Tensor:
    """Make images in which neighbours are alike, as in photographs; sequences of random vectors."""
    x = torch.randn(count, *shape)
    return x if x.dim() < 4 else nn.functional.avg_pool2d(x, 3, 1, 1) * 2


EXAMPLES: Final[Mapping[str, Callable[[Sequence[int]], Tensor]]] = {
    "zeros": lambda shape: torch.zeros(1, *shape),
    "ones": lambda shape: torch.ones(1, *shape),
    "noise": lambda shape: 3 * torch.randn(2, *shape),
    "one image": lambda shape: images(shape, 1),
    "eight images": lambda shape: images(shape, 8),
}
"""What users give as `example_input`."""


@dataclass(frozen=True)
class Corruption:
    """A file with one wrong place.

    Attributes:
        kind: what is wrong, in words.
        place: where, by the names of the file.
        layers: the layers next to it, by the names of the model; a message should name one of them.
        make: makes the file.
    """

    kind: str
    place: str
    layers: frozenset[str]
    make: Callable[[], File]


@dataclass(frozen=True)
class Right:
    """A right file of a network.

    Attributes:
        watched: the quantized torch model.
        file: reads the right file.
        corruptions: of it.
        shape: of one input.
        prepared: the context in which the model runs.
    """

    watched: Watched
    file: Callable[[], File]
    corruptions: Sequence[Corruption]
    shape: Sequence[int]
    prepared: Callable[[], AbstractContextManager[None]] = nullcontext

    def example(self, name: str) -> Call:
        """Make one of the examples."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return (EXAMPLES[name](self.shape),), {}

    def prove(self, file: File, example: str) -> Proof:
        """Prove a file with an example, and nothing but the example."""
        with self.prepared():
            return prove(self.watched, file, self.example(example))[0]


@dataclass(frozen=True)
class Outcome:
    """What became of a corruption.

    Attributes:
        noticed: whether the proof refused the file.
        named: whether the first thing that it said named a layer next to the place.
        message: what it said.
    """

    noticed: bool
    named: bool
    message: str


def try_out(right: Right, corruption: Corruption, example: str) -> Outcome:
    """Prove a corrupted file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            right.prove(corruption.make(), example)
        except ParityError as error:
            message = str(error)
            first = message.removeprefix("The file should compute what the model computes. ")
            first = re.split(r"(?<=\.) (?=Quantizer|Weight|Layer|Output|Product|And \d|Please)", first)[0]
            return Outcome(True, any(_names(first, layer) for layer in corruption.layers), message)
    return Outcome(False, False, "")


def _names(text: str, layer: str) -> bool:
    """Whether a text names a layer, or a call of its module: `conv1.weight`, `conv1/conv2d/0`."""
    module = layer.removesuffix(".weight")
    return (
        re.search(rf"(?<![\w.]){re.escape(module)}(\.weight|\.act_quant)?(?![\w.]*\w)", text.replace("/", " "))
        is not None
    )


def right(network: str, style: str, example: str) -> Right:
    """Return a right file of a network in a format: `"ir"`, `"qcdq"` or `"qonnx"`.

    Args:
        network: its name.
        style: the format.
        example: what it will be proved with; a QONNX file is made for its number of images.
    """
    if style == "ir":
        return right_ir(network)
    return right_onnx(network, style, len(EXAMPLES[example](NETWORKS[network].shape)) if style == "qonnx" else 2)


@functools.cache
def right_ir(network: str) -> Right:
    """Quantize a network with NNCF and save it as OpenVINO IR; the same objects at every call."""
    import nncf
    from conftest import quantized_once

    import qft_plugin.nncf as host
    from qft_plugin.nncf._save import watched

    kind = NETWORKS[network]
    if network in ("residual", "transformer"):
        model = quantized_once(network).job.model
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            items = [images(kind.shape, 16) for _ in range(2)]
            config = four_bits(compensate=False, finetune=None)
            model = host.quantize(kind.build(), nncf.Dataset(items), config).model
    return ir_of(model, kind.shape, seed=network, watched=watched(model))


def ir_of(model: nn.Module, shape: Sequence[int], *, seed: str, watched: Watched) -> Right:
    """Save a quantized model and list the corruptions of the file."""
    import openvino
    from corrupt_ir import corruptions

    import qft_plugin.nncf as host
    from qft_plugin.deploy.ir_view import IRFile
    from qft_plugin.nncf._write import without_compiler

    example = images(shape, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.xml"
        host.save_openvino(model, path, example, check=False)
        read: Any = openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    with without_compiler():
        integers = watched.run(((example,), {})).weights
    return Right(
        watched,
        lambda: IRFile(read.clone(), free_batch=True),
        corruptions(read, integers, random.Random(seed)),
        shape,
        without_compiler,
    )


@functools.cache
def right_onnx(network: str, style: str, count: int = 2) -> Right:
    """Quantize a network with Brevitas and save it as QCDQ or QONNX; the same objects at every call.

    Args:
        network: its name.
        style: `"qcdq"` or `"qonnx"`.
        count: how many images the file is saved with.
    """
    import onnx
    from corrupt_onnx import corruptions
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    from qft_plugin.brevitas import save_qcdq, save_qonnx
    from qft_plugin.brevitas._save import watched
    from qft_plugin.deploy import qonnx
    from qft_plugin.deploy.onnx_run import in_onnx_runtime
    from qft_plugin.deploy.onnx_view import ONNXFile

    model, shape = _folded(network), NETWORKS[network].shape
    example = images(shape, count)

    def as_qcdq(file: Any) -> File:
        return ONNXFile(file, runtime="ONNX Runtime", free_batch=True, run=in_onnx_runtime(file))

    def as_qonnx(file: Any) -> File:
        wrapped = ModelWrapper(file).transform(InferShapes())  # tensors that were added have no shape
        return ONNXFile(wrapped.model, runtime="QONNX' executor", free_batch=False, run=qonnx.in_executor(wrapped))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        if style == "qcdq":
            save_qcdq(model, path, example, check=False)
            file, read = onnx.load(path), as_qcdq
        else:
            save_qonnx(model, path, example, check=False)
            file, read = qonnx.load(path).model, as_qonnx
    seen = watched(model)
    integers = seen.run(((example,), {})).weights
    return Right(seen, lambda: read(file), corruptions(file, read, integers, random.Random(network + style)), shape)


@functools.cache
def _folded(network: str) -> nn.Module:
    from qft_plugin import brevitas

    kind = NETWORKS[network]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        items = [images(kind.shape, 16) for _ in range(2)]
        config = four_bits(compensate=False, finetune=None)
        return brevitas.fold(brevitas.quantize(kind.build(), items, config=config)).eval()
