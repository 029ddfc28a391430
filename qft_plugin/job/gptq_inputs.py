"""The inputs that meet the weights of a layer, for the compensation of its rounding errors."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qft_plugin.graph.layer_graph import Layer, Op

POSITIONS: Final = 64
"""Rows that are kept for each image."""

UNFOLDED: Final = 4
"""How many times the rows that are kept may be unfolded."""


def can_compensate(layer: Layer) -> bool:
    """Whether the inputs that meet each weight of a layer can be listed as the rows of a matrix."""
    return layer.kind in ("linear", "conv1d", "conv2d")


def input_rows(x: Tensor, op: Op, layer: Layer, W: Tensor, *, generator: torch.Generator) -> Tensor:
    """List what meets the weights of one output at some random positions.

    Args:
        x: input of the layer, `[images, in, *space]`, or `[..., in]` of a linear layer.
        op: the call of the layer, for its stride, padding and dilation.
        layer: the layer.
        W: its weight, `[out, in/groups, *k]`.
        generator: chooses the positions.

    Returns:
        `[groups, rows, in/groups * k]`.
    """
    if layer.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        keep = torch.randint(rows.shape[0], (min(rows.shape[0], POSITIONS * x.shape[0]),), generator=generator)
        return rows[keep.to(x.device)].unsqueeze(0)
    if layer.kind == "conv1d":
        x, W = x.unsqueeze(2), W.unsqueeze(2)
    images = layer.kind == "conv2d"
    stride = _pair(op.argument(3, "stride", 1), images=images, fill=1)
    dilation = _pair(op.argument(5, "dilation", 1), images=images, fill=1)
    padding = op.argument(4, "padding", 0)
    if isinstance(padding, str):
        # "same" pads by half of what the kernel spans; where that is uneven, one side of it more than torch does.
        spans = [d * (k - 1) for d, k in zip(dilation, W.shape[2:], strict=True)]
        pad_h, pad_w = ((s + 1) // 2 if padding == "same" else 0 for s in spans)
    else:
        pad_h, pad_w = _pair(padding, images=images, fill=0)
    # Unfolding is what costs: of large images only some are looked at, at more positions each.
    area = max(1, x.shape[2] * x.shape[3] // (stride[0] * stride[1]))
    some = min(x.shape[0], max(1, -(-UNFOLDED * POSITIONS * x.shape[0] // area)))
    positions = POSITIONS * x.shape[0] // some
    columns = functional.unfold(x[:some], tuple(W.shape[2:]), dilation=dilation, padding=(pad_h, pad_w), stride=stride)
    keep = torch.randint(columns.shape[2], (min(columns.shape[2], positions),), generator=generator)
    picked = (
        columns[:, :, keep.to(x.device)].transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups)
    )
    return picked.transpose(0, 1)


def _pair(value: object, *, images: bool, fill: int) -> tuple[int, int]:
    """Return a setting of a convolution over both axes of an image; a sequence is an image of height 1."""
    values = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    values = values * 2 if images and len(values) == 1 else values if images else [fill, *values]
    return int(values[0]), int(values[1])
