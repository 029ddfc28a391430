"""Random degrees of freedom of small networks."""

import torch
from graphs import mapped, parameters_of
from models import CHANNELS, conv, image
from torch import Tensor, nn

from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.training.dof import Dof, WeightGrid


def two_layers(kind: str) -> tuple[nn.Module, Tensor]:
    """Return convolution, ReLU and a second layer of another kind."""
    second = {
        "conv": conv(),
        "grouped": conv(groups=2),
        "depthwise": conv(groups=CHANNELS),
        "transposed": nn.ConvTranspose2d(CHANNELS, 4, 3),
        "grouped transposed": nn.ConvTranspose2d(CHANNELS, 4, 3, groups=2),
    }[kind]
    return nn.Sequential(
        conv(bias=False), nn.ReLU(), second, nn.ReLU(), nn.Conv2d(second.out_channels, 3, 1)
    ).double(), image()


KINDS = ["conv", "grouped", "depthwise", "transposed", "grouped transposed"]

ACTIVATIONS = {"a": ActivationGrid(0.05, 0, 255), "b": ActivationGrid(0.3, 0, 255)}


def make_dof(model: nn.Module, x: Tensor, *, bits: int = 4, channelwise: bool = True, doubly: bool = False) -> Dof:
    """Return random degrees of freedom of `two_layers`, whose middle layer reads grid `a` and feeds grid `b`."""
    dof_map = mapped(model, x)
    edges = {"0.weight": (None, "a"), "2.weight": ("a", "b"), "4.weight": ("b", None)}
    grids = {}
    for layer in dof_map.layers:
        size = (len(layer.out_index),) if channelwise else ()
        spread = parameters_of(model)[layer.weight].std()
        scale = spread * (0.15 + 0.15 * torch.rand(size, dtype=torch.float64))
        left = torch.exp(0.3 * torch.randn(len(layer.in_index), dtype=torch.float64)) if doubly else None
        grids[layer.weight] = WeightGrid(bits, scale, *edges[layer.weight], left)
    dof = Dof(dof_map, parameters_of(model), grids, ACTIVATIONS)
    with torch.no_grad():
        left_scales = [layer.log_L for layer in dof.layers if layer.log_L is not None]
        for p in [dof.log_c, *dof.activations.log_s, *(layer.log_F for layer in dof.layers), *left_scales]:
            p.add_(0.3 * torch.randn_like(p))
    return dof
