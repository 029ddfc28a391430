"""The tensors that hardware holds: integers of weights and biases, folded tensors, widths of accumulators."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qft_plugin.training.dof import Dof, LayerDof
from qft_plugin.training.solve import accumulator_step, integers_of, on_hardware, scales_of


@dataclass(frozen=True)
class DeployedWeight:
    """A quantized weight as it leaves the training.

    Attributes:
        integers: the integers, held in float, of the shape of the weight.
        step: `[]` or `[out]`, real per step.
        step_in: `[in]`, relative to `step`, of a doubly per-channel kernel, else `None`.
        bits: bit width.
    """

    integers: Tensor
    step: Tensor
    step_in: Tensor | None
    bits: int


@torch.no_grad()
def deployed_weights(dof: Dof) -> dict[str, DeployedWeight]:
    """Return the integers and steps of all quantized weights by name."""
    scales, found = scales_of(dof), {}
    for module in dof.quantized():
        name = module.layer.weight
        integers, bits = integers_of(module, scales), dof.weight_grids[name].bits
        found[name] = DeployedWeight(integers, scales.weights[name], module.scale_in, bits)
    return found


@torch.no_grad()
def folded_tensors(dof: Dof) -> dict[str, Tensor]:
    """Return weights and biases by name with the trained cross-layer factors folded in, real units.

    Weights are not yet rounded; where an element has decided on another integer than the nearest one, the weight is
    moved next to it. Biases are rounded as the hardware holds them.
    """
    scales = scales_of(dof)
    tensors: dict[str, Tensor] = {}
    for module in dof.layers:
        assert isinstance(module, LayerDof)
        layer, channels = module.layer, module.channels(scales.factors)
        step = module.unit if module.element is None else module.step(scales.weights[layer.weight])
        W, B = module.folded_weight(channels, step), module.folded_bias(channels)
        if module.element is not None:
            W = module.element.near(W, step)
        tensors[layer.weight] = W
        if layer.bias is not None and B is not None:
            tensors[layer.bias] = on_hardware(dof, module, B, scales)
    return tensors


@torch.no_grad()
def integer_biases(dof: Dof, deployed: Mapping[str, DeployedWeight]) -> dict[str, Tensor]:
    """Return the integers that an accumulator starts from: the bias and what the zero point of the input adds (Eq. 7).

    sum_i (q_i - Z) W_int[o, i] + B / S_acc  =  sum_i q_i W_int[o, i] + (B / S_acc - Z sum_i W_int[o, i])

    The second bracket is constant, so that a kernel multiplies the integers q alone. An input that is padded is padded
    with Z, which stands for the real 0.

    Args:
        dof: the degrees of freedom.
        deployed: the integers of all quantized weights by name.

    Returns:
        `[out]` by name of the weight, for every layer whose accumulator has one scale, held in float.
    """
    scales, Z = scales_of(dof), dof.activations.zero_points()
    found = {}
    for module in dof.quantized():
        layer, grid = module.layer, dof.weight_grids[module.layer.weight]
        S_acc = accumulator_step(dof, module, scales)
        if S_acc is None or grid.s_in is None or not layer.is_kernel:
            continue
        sums = layer.axes.out_slices(deployed[layer.weight].integers).sum(1)
        B = module.folded_bias(module.channels(scales.factors))
        start = torch.zeros_like(sums) if B is None else (on_hardware(dof, module, B, scales) / S_acc).round()
        zero_point = Z.get(grid.s_in, sums.new_tensor(dof.activations.grids[grid.s_in].zero_point))
        found[layer.weight] = start - zero_point * sums
    return found


@torch.no_grad()
def accumulator_bits(dof: Dof, deployed: Mapping[str, DeployedWeight]) -> dict[str, int]:
    """Return how wide the accumulator of each layer must be so that no input can overflow it.

    Args:
        dof: the degrees of freedom.
        deployed: the integers of all quantized weights by name.

    Returns:
        Bits of a signed accumulator by name of the weight, for every layer whose accumulator has one scale.
    """
    found = {}
    for name, bias in integer_biases(dof, deployed).items():
        # Of a concatenation, parts may have integers of different widths: the widest could meet every weight.
        read = dof.input_grids(name)
        W_int = dof.map.layer(name).axes.out_slices(deployed[name].integers)
        ends = torch.stack([W_int * min(g.low for g in read), W_int * max(g.high for g in read)])
        largest = torch.maximum(ends.amax(0).sum(1) + bias.clamp(min=0), bias)
        smallest = torch.minimum(ends.amin(0).sum(1) + bias.clamp(max=0), bias)
        peak = max(float(largest.max()), -float(smallest.min()) - 1, 1.0)
        found[name] = 1 + math.floor(math.log2(peak)) + 1
    return found
