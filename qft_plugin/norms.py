"""Folding a BatchNorm, as it is in eval mode, into the layer before it."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from qft_plugin.quantize import per_out

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def kind_of(layer: nn.Module) -> str:
    """Return the torch function that a convolution or linear layer calls."""
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, CONVOLUTIONS)
    return f"{'conv_transpose' if isinstance(layer, TRANSPOSED) else 'conv'}{layer.weight.dim() - 2}d"


def can_fold(layer: nn.Module, norm: nn.Module, shape: Sequence[int]) -> bool:
    """Whether `norm` is an affine function of each channel that `layer` can absorb.

    A norm counts its channels along axis 1, a linear layer along the last one: on tokens they are different axes.

    Args:
        layer: what makes the activation.
        norm: what reads it.
        shape: of the activation.
    """
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or not isinstance(norm, NORMS):
        return False
    return len(shape) == layer.weight.dim() and norm.running_mean is not None and not norm.training


def folded_norm(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer that computes what `layer` and `norm` compute together.

    In float64, so that the folded network differs from the float one by one rounding only.

    Args:
        layer: a convolution or linear layer.
        norm: a BatchNorm with running statistics.

    Returns:
        Weight, of the shape of the layer's, and bias, `[out]`; both float64.
    """
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * factor
    W = layer.weight.double()
    return W * per_out(factor, W, groups=getattr(layer, "groups", 1), kind=kind_of(layer)), shift
