"""The inputs that meet the weights of a layer, for the compensation of its rounding errors."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qft_plugin.graph.layer_graph import Layer, Op

PER_COLUMN: Final = 128
"""Rows for each weight of an output: a target that moves is a regression with as many unknowns."""

LEAST_ROWS: Final = 2_048
MOST_ROWS: Final = 65_536

PRODUCTS: Final = 10**11
"""Products in the moments of one part of a kernel: a second of arithmetic. Above it there are fewer rows."""

IMAGES: Final = 64
"""Images that are padded at a time."""


def can_compensate(layer: Layer) -> bool:
    """Whether the inputs that meet each weight of a layer can be listed as the rows of a matrix."""
    return layer.kind in ("linear", "conv1d", "conv2d")


def rows_wanted(columns: int) -> int:
    """Return how many rows the moments of so many columns should be taken over."""
    most = min(MOST_ROWS, PRODUCTS // columns**2)
    return max(LEAST_ROWS, min(PER_COLUMN * columns, most))


def input_rows(x: Tensor, op: Op, layer: Layer, W: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """List what meets the weights of one output, in all images at the same random positions.

    Args:
        x: input of the layer, `[images, in, *space]`, or `[..., in]` of a linear layer.
        op: the call of the layer, for its stride, padding and dilation.
        layer: the layer.
        W: its weight, `[out, in/groups, *k]`.
        count: rows that are wanted; there are fewer where `x` has fewer, and up to one for each image more.
        generator: chooses the positions; in the same state it chooses the same ones for inputs of one shape.

    Returns:
        `[groups, rows, in/groups * k]`.
    """
    if layer.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        keep = torch.randperm(len(rows), generator=generator)[:count]
        return rows[keep.to(x.device)].unsqueeze(0)
    if layer.kind == "conv1d":
        x, W = x.unsqueeze(2), W.unsqueeze(2)
    images = layer.kind == "conv2d"
    stride = _pair(op.argument(3, "stride", 1), images=images, fill=1)
    dilation = _pair(op.argument(5, "dilation", 1), images=images, fill=1)
    padding = op.argument(4, "padding", 0)
    spans = [d * (k - 1) for d, k in zip(dilation, W.shape[2:], strict=True)]
    if isinstance(padding, str):
        before = [s // 2 if padding == "same" else 0 for s in spans]
        after = [s - b if padding == "same" else 0 for s, b in zip(spans, before, strict=True)]
    else:
        before = after = list(_pair(padding, images=images, fill=0))
    sizes = [
        (size + b + a - span - 1) // by + 1
        for size, b, a, span, by in zip(x.shape[2:], before, after, spans, stride, strict=True)
    ]
    positions = -(-count // len(x))
    keep = torch.randperm(sizes[0] * sizes[1], generator=generator)[:positions].to(x.device)
    tops, lefts = keep // sizes[1] * stride[0], keep % sizes[1] * stride[1]
    y_offsets, x_offsets = (torch.arange(k, device=x.device) * d for k, d in zip(W.shape[2:], dilation, strict=True))
    across, down = (lefts[:, None] + x_offsets)[:, None, :], (tops[:, None] + y_offsets)[:, :, None]
    pads = (before[1], after[1], before[0], after[0])
    picked = [functional.pad(part, pads)[:, :, down, across].transpose(1, 2) for part in torch.split(x, IMAGES)]
    return torch.cat(picked).reshape(-1, layer.groups, W[0].numel()).transpose(0, 1)


def _pair(value: object, *, images: bool, fill: int) -> tuple[int, int]:
    """Return a setting of a convolution over both axes of an image; a sequence is an image of height 1."""
    values: Sequence[int] = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    values = [*values] * 2 if images and len(values) == 1 else values if images else [fill, *values]
    return int(values[0]), int(values[1])
