"""Well-known architectures, narrow and short, with every construct of the real ones; none of them is trained.

Written from what the architectures are, with the calls that the usual implementations make: where torchvision calls a
function instead of a module, so does the network here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nets import as_positional, settled
from structures_branches import (
    VGG,
    ConvNeXt,
    DenseNet,
    GoogLeNet,
    InceptionV3,
    MobileOne,
    PoolFormer,
    ShuffleNetV2,
    SqueezeNet,
)
from structures_residual import BasicBlock, Bottleneck, EfficientNet, MnasNet, MobileNetV2, MobileNetV3, RegNet, ResNet
from structures_tasks import BERT, SSD, TCN, YOLO, FusedBlock, R2Plus1D, RetinaNet, UNet, ViT, ViTBlock
from torch import Tensor, nn

from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.channel_affine import free_channels
from qft_plugin.graph.channel_clip import free_bounds
from qft_plugin.graph.record import record


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
