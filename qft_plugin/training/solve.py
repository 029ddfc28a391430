"""The offline subgraph: from the degrees of freedom to the tensors and scales of the hardware (Sec. 3.2, Fig. 4).

The scale of an activation edge is a vector over its channels,  S_a = s * c:  `s` is the one step of the edge's
quantizer, `c` the cross-layer factors, one per variable of the DoF map. The student is trained in the *folded* form
that will be deployed: every factor c moves into the weights on both sides of its edge,

    W_folded = W * c_in / c_out        bias_folded = bias / c_out

so that the online graph has per-tensor activation scales only, and a kernel is quantized with the step
S_wR * S_wL * c_in / c_out = s_out * F / s_in. The integers are those of Eq. (2) before folding, because numerator and
denominator of  W / (S_wR * S_wL)  are multiplied by the same factor.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.tensors.grid import integer_range, quantize_factor
from qft_plugin.tensors.partial_gradients import PartialWeight
from qft_plugin.training.dof import Channels, Dof, LayerDof
from qft_plugin.training.held import Held, partly_trained
from qft_plugin.training.rounding import NearestRounding


@dataclass(frozen=True)
class Solution:
    """Tensors and scales of the online graph, as a differentiable function of the degrees of freedom.

    Attributes:
        tensors: weights (fake-quantized where the layer is quantized) and biases by name, folded, real units.
        activation_scales: step of every activation quantizer by name, `[]`; one that is left out passes values on.
        factors: cross-layer factor of every variable, `[1 + size]`.
        zero_points: those that train, by name of the activation quantizer, `[]`.
        partial: kernels of which a part trains, for their cheaper backward pass.
    """

    tensors: dict[str, Tensor]
    activation_scales: dict[str, Tensor]
    factors: Tensor
    zero_points: dict[str, Tensor] = field(default_factory=dict)
    partial: tuple[PartialWeight, ...] = ()


def weight_scales(s_in: Tensor, s_out: Tensor, F: Tensor, *, kernel: Tensor) -> Tensor:
    """Solve the scales of all kernels in the folded network from the degrees of freedom.

    Eq. (2):  S_wL = 1 / S_a(in)      S_wR = S_a(out) * F      with  S_a = s * c

    The factors c are in the weights already, so that the step of a folded weight is

        S_wR * S_wL * c_in / c_out = F * s_out / s_in

    Args:
        s_in: step of the input edge of each kernel, `[kernels]`, real per step; 1 where it is not quantized.
        s_out: step of the output edge of each kernel, likewise.
        F: rescale factors of all kernels, one (layerwise) or `out` (channelwise) of each, `[factors]`, output steps per
            accumulator step.
        kernel: number of the kernel of each factor, `[factors]`.

    Returns:
        `[factors]`, real per step.
    """
    return F * (s_out / s_in).index_select(0, kernel)


def rescale_factor(dof: Dof, layer: LayerDof) -> Tensor:
    """Return a layer's rescale factor as the hardware holds it, `[]` or `[out]`.

    Where an edge of the layer is not quantized it is no factor between integers, and any number will do.
    """
    grid, F = dof.weight_grids[layer.layer.weight], layer.log_F.exp()
    between_integers = grid.s_in is not None and grid.s_out is not None
    return quantize_factor(F, dof.hardware.rescale_factor) if between_integers else F


@dataclass(frozen=True)
class Scales:
    """All scales in one state of the degrees of freedom.

    Attributes:
        factors: cross-layer factor of every variable, `[1 + size]`.
        activations: step of every activation quantizer by name, `[]`, real (folded) per step.
        weights: step of every quantized kernel in the folded network by name of the weight, `[]` or `[out]`, real per
            step.
    """

    factors: Tensor
    activations: dict[str, Tensor]
    weights: dict[str, Tensor]


def scales_of(dof: Dof) -> Scales:
    """Solve all scales."""
    factors, activations, layers = dof.factors(), dof.activations.steps(), dof.quantized()
    if not layers:
        return Scales(factors, activations, {})
    if dof.hardware.rescale_factor == "float":
        F = torch.cat([layer.log_F.reshape(-1) for layer in layers]).exp()
    else:
        F = torch.cat([rescale_factor(dof, layer).reshape(-1) for layer in layers])
    grids = [dof.weight_grids[layer.layer.weight] for layer in layers]
    one = F.new_ones(())
    s_out, s_in = (
        torch.stack([one if name is None else activations[name] for name in names])
        for names in ([grid.s_out for grid in grids], [grid.s_in for grid in grids])
    )
    steps = weight_scales(s_in, s_out, F, kernel=dof.index.kernel_of_step)
    parts = steps.split_with_sizes([layer.log_F.numel() for layer in layers])
    weights = {d.layer.weight: part.view(d.log_F.shape) for d, part in zip(layers, parts, strict=True)}
    return Scales(factors, activations, weights)


def solve(dof: Dof) -> Solution:
    """Compute everything that the online graph needs from the degrees of freedom (Fig. 4, Eq. 2-4)."""
    scales = scales_of(dof)
    tensors: dict[str, Tensor] = {}
    partial: list[PartialWeight] = []
    for module, channels in zip(dof.layers, dof.index.channels(scales.factors), strict=True):
        assert isinstance(module, LayerDof)
        layer = module.layer
        if module.held is not None and module.element is not None:
            W, cheaper = _partly_trained(module, module.element, module.held, channels, scales.weights[layer.weight])
            partial += [] if cheaper is None else [cheaper]
        elif module.element is not None:
            step = module.step(scales.weights[layer.weight])
            W = module.element.folded(module.W, module.units(channels, step), step, dof.progress)
        else:
            W = module.folded_weight(channels, module.unit)
        B = module.folded_bias(channels)
        tensors[layer.weight] = W
        if layer.bias is not None and B is not None:
            tensors[layer.bias] = on_hardware(dof, module, B, scales)
    return Solution(tensors, scales.activations, scales.factors, dof.activations.zero_points(), tuple(partial))


def _partly_trained(
    layer: LayerDof, element: NearestRounding, held: Held, c: Channels, scale: Tensor
) -> tuple[Tensor, PartialWeight | None]:
    """Compute a kernel of which a part trains; fixed integers follow neither cross-layer factors nor a left scale."""
    left = None if layer.scale_in is None else layer.scale_in.detach()
    step = layer.layer.axes.on_weight(scale, left, layer.W)
    return partly_trained(held, layer.units(c.detach(), step), step, scale, element, layer.layer.axes)


def integers_of(layer: LayerDof, scales: Scales) -> Tensor:
    """Return the integers of a quantized weight, held in float, of the shape of the weight."""
    assert layer.element is not None
    step = layer.step(scales.weights[layer.layer.weight])
    return layer.element.integers(layer.folded_weight(layer.channels(scales.factors), step), step)


def accumulator_step(dof: Dof, layer: LayerDof, scales: Scales) -> Tensor | None:
    """Return the scale of a layer's accumulator (Eq. 8), or `None` where it has none.

    S_acc = s_in * S_w

    Args:
        dof: the degrees of freedom.
        layer: those of the layer.
        scales: all scales.

    Returns:
        `[]` or `[out]`, real per step.
    """
    grid = dof.weight_grids.get(layer.layer.weight)
    if grid is None or grid.s_in is None or layer.log_L is not None:
        return None
    return scales.weights[layer.layer.weight] * scales.activations[grid.s_in]


def on_hardware(dof: Dof, layer: LayerDof, B: Tensor, scales: Scales) -> Tensor:
    """Fake-quantize a bias to integers in the scale of the accumulator, where the hardware holds it so."""
    S_acc = None if dof.hardware.bias_bits is None else accumulator_step(dof, layer, scales)
    if S_acc is None or dof.hardware.bias_bits is None:
        return B
    low, high = integer_range(dof.hardware.bias_bits, signed=True)
    return fake_quantize(B, S_acc, low=low, high=high)
