"""Cross-layer factors that move into weights and biases, which leaves a network's function as it is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qft_plugin.graph.layer_graph import DofMap, Layer, absorbs_input
from qft_plugin.tensors.axes import Axes


def fold(W: Tensor, c_in: Tensor, c_out: Tensor, *, axes: Axes) -> Tensor:
    """Move the cross-layer factors on both sides of a kernel into the kernel.

    Args:
        W: weight, real units.
        c_in: factor of each input channel, `[in]`.
        c_out: factor of each output channel, `[out]`.
        axes: the meaning of its axes.

    Returns:
        W * c_in / c_out, of the shape of `W`.
    """
    if absorbs_input(axes.kind):
        W = W * axes.per_in(c_in, W)
    return W / axes.per_out(c_out, W)


def fold_network(dof_map: DofMap, log_c: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move cross-layer factors into all weights and biases; the network's function does not change.

    Args:
        dof_map: the DoF map.
        log_c: logarithm of the factor of every free variable, `[dof_map.size]`.
        tensors: weights and biases by name.

    Returns:
        The tensors that the map's layers hold, rescaled; new tensors, by name.
    """
    folded = {}
    for layer in dof_map.layers:
        W = tensors[layer.weight]
        c = torch.cat([log_c.new_zeros(1), log_c]).exp().to(W)
        c_in, c_out = c[layer.in_index.to(c.device)], c[layer.out_index.to(c.device)]
        folded[layer.weight] = fold(W, c_in, c_out, axes=layer.axes)
        if layer.bias is not None:
            folded[layer.bias] = tensors[layer.bias] / c_out
    return folded


def names_of(layers: Sequence[Layer]) -> list[str]:
    """List the parameters that the layers hold."""
    return [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
