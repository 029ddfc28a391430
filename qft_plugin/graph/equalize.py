"""Cross-layer equalization for 4 bits: where cross-layer factors start (App. D)."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from qft_plugin.graph.layer_graph import PINNED, DofMap
from qft_plugin.tensors.grid import largest_integer
from qft_plugin.tensors.mmse import ppq

OF_WEIGHT: Final = 1 << 20
"""Elements of a weight that its scale is estimated from, at most."""

OF_SLICE: Final = 1 << 13
"""Likewise of a slice. The factors of a layer of 25,088 inputs move by half a percent on average."""


def equalization_factor(producer: Tensor, consumer: Tensor, *, beta: float) -> Tensor:
    """Share the range of a channel between the kernel that makes it and those that read it.

    Eq. (19):  C = q^beta / p^(1 - beta)

    with p the MMSE scale of the producer's output slice and q that of the consumer's input slice, each relative to
    its own tensor. A factor C > 1 moves range from the consumer's input channel to the producer's output channel:
    after  W_producer * C  and  W_consumer / C  both relative scales are equal where beta = 1/2 (Eq. 17's toy case).

    Args:
        producer: p, `[channels]`.
        consumer: q, `[channels]`.
        beta: 1/2 equalizes both sides; 1 equalizes the consumers alone.

    Returns:
        C, `[channels]`, without unit.
    """
    return consumer.pow(beta) / producer.pow(1 - beta)


def _relative_scales(slices: Tensor, *, high: int, whole: Tensor) -> Tensor:
    """MMSE scale of each slice over that of the whole tensor; slices of zeros say nothing and count as 1."""
    relative = ppq(slices, high=high) / whole
    return torch.where(slices.abs().amax(1) > 0, relative, torch.ones_like(relative))


def _some(rows: Tensor, most: int) -> Tensor:
    """Return the rows, or of long ones the elements at random places, the same in each."""
    if rows.shape[1] <= most:
        return rows
    # Not evenly spaced: a kernel has periods, and one place of each could be all that is seen.
    places = torch.randint(rows.shape[1], (most,), generator=torch.Generator().manual_seed(0))
    return rows[:, places.sort().values]


def equalize(
    dof: DofMap, weights: Mapping[str, Tensor], bits: Mapping[str, int], *, beta: float, largest: float = 64.0
) -> Tensor:
    """Choose the initial cross-layer factors with the 4-bit equalization of App. D (Eq. 19-21).

    A variable may stand on several producers (the inputs of an elementwise add, Eq. 21) and several consumers
    (fan-out, Eq. 20): each side enters as the weighted geometric mean of its slices' relative scales, a slice
    weighing as many as it has elements.

    Args:
        dof: the DoF map.
        weights: weight by name, real units.
        bits: bit width by name of each weight that is quantized; others have no say.
        beta: see `equalization_factor`.
        largest: bound on the factor and on its inverse, so that no activation is scaled out of its 8 bits.

    Returns:
        log c of every free variable, `[dof.size]`: the natural logarithm of the scale S_a up to one constant per edge,
        c = 1 / C, because a smaller S_a gives the producer's output channel the larger integers.
    """
    sums = {side: torch.zeros(dof.size + 1, dtype=torch.float64) for side in ("p", "q", "p_weight", "q_weight")}
    for layer in dof.layers:
        if layer.weight not in bits:
            continue
        W = weights[layer.weight].detach().cpu()
        high = largest_integer(bits[layer.weight])
        whole = ppq(_some(W.reshape(1, -1), OF_WEIGHT).double(), high=high)
        for side, slices, index in (
            ("p", layer.axes.out_slices(W), layer.out_index),
            ("q", layer.axes.in_slices(W), layer.in_index),
        ):
            size = torch.full((slices.shape[0],), float(slices.shape[1]), dtype=torch.float64)
            relative = _relative_scales(_some(slices, OF_SLICE).double(), high=high, whole=whole)
            sums[side].index_add_(0, index, size * relative.log())
            sums[f"{side}_weight"].index_add_(0, index, size)
    p, q = (sums[s].div(sums[f"{s}_weight"].clamp(min=1)).exp() for s in ("p", "q"))
    C = equalization_factor(p, q, beta=beta).clamp(1 / largest, largest)
    return -C.log()[PINNED + 1 :].to(torch.float32)
