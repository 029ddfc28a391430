"""The offline subgraph: from the independent degrees of freedom to what the hardware runs (Sec. 3.2, Fig. 4).

The scale of an activation edge is a vector over its channels,  S_a = s * c:  `s` is the one step of the edge's
quantizer, `c` the cross-layer factors, one per variable of the DoF map. The student is trained in the *folded* form
that will be deployed: every factor c moves into the weights on both sides of its edge,

    W_folded = W * c_in / c_out        bias_folded = bias / c_out

so that the online graph has per-tensor activation scales only, and a kernel is quantized with the step
S_wR * S_wL * c_in / c_out = s_out * F / s_in. The integers are those of Eq. (2) before folding, because numerator and
denominator of  W / (S_wR * S_wL)  are multiplied by the same factor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qft_plugin.elements import NearestRounding, check_masks, element_of, masked, undecided
from qft_plugin.graph import PINNED, DofMap, Layer
from qft_plugin.placement import ActivationGrid
from qft_plugin.quantize import per_in, per_out
from qft_plugin.spec import Rounding, Sparsity


@dataclass(frozen=True)
class WeightGrid:
    """How one layer's weight is quantized.

    Attributes:
        bits: bit width; the grid is symmetric and narrow.
        scale: initial step, `[out]` or `[]`, real per step, in the equalized network.
        s_in: name of the activation quantizer of its input edge, `None` where that edge is not quantized.
        s_out: name of the activation quantizer of its output edge, likewise.
        scale_in: initial left scale, `[in]`, relative to `scale`, of a kernel whose scale differs by input channel too
            (doubly per-channel, Eq. 5); `None` where it does not.
    """

    bits: int
    scale: Tensor
    s_in: str | None
    s_out: str | None
    scale_in: Tensor | None = None


def weight_scales(S_a_in: Tensor, S_a_out: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """Solve a kernel's left and right scales from the degrees of freedom.

    Eq. (2):  S_wL = 1 / S_a_in      S_wR = S_a_out * F

    Args:
        S_a_in: scale of the input edge, `[in]`, real per step.
        S_a_out: scale of the output edge, `[out]`, real per step.
        F: rescale factor, `[]` (layerwise) or `[out]` (channelwise), output steps per accumulator step.

    Returns:
        `S_wL`, `[in]`, and `S_wR`, `[out]`. The step of `W[o, i]` is `S_wR[o] * S_wL[i]`.
    """
    return 1 / S_a_in, S_a_out * F


def on_weight(scale: Tensor, scale_in: Tensor | None, W: Tensor, layer: Layer) -> Tensor:
    """Put the scales of a kernel onto its axes, so that they broadcast against it.

    Args:
        scale: `[]` or `[out]`.
        scale_in: `[in]`, or `None`.
        W: the weight.
        layer: its layer.
    """
    step = per_out(scale, W, groups=layer.groups, kind=layer.kind) if scale.dim() else scale
    return step if scale_in is None else step * per_in(scale_in, W, groups=layer.groups, kind=layer.kind)


def fold(W: Tensor, c_in: Tensor, c_out: Tensor, *, kind: str, groups: int) -> Tensor:
    """Move the cross-layer factors on both sides of a kernel into the kernel.

    Args:
        W: weight, real units.
        c_in: factor of each input channel, `[in]`.
        c_out: factor of each output channel, `[out]`.
        kind: the layer's torch function.
        groups: number of groups.

    Returns:
        W * c_in / c_out, of the shape of `W`.
    """
    if kind != "layer_norm":
        W = W * per_in(c_in, W, groups=groups, kind=kind)
    return W / per_out(c_out, W, groups=groups, kind=kind)


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
        folded[layer.weight] = fold(W, c_in, c_out, kind=layer.kind, groups=layer.groups)
        if layer.bias is not None:
            folded[layer.bias] = tensors[layer.bias] / c_out
    return folded


class Dof(nn.Module):
    """All trainable tensors of Eq. (6): weights, biases, rescale factors, activation steps and cross-layer factors.

    Scales are stored as logarithms. A weight is stored in units of its initial step and a bias in units of the
    initial step times a typical input, so that one learning rate means the same for every layer of every network,
    however its channels are scaled.

    Departure: the paper trains weights in real units; there the learning rate must be retuned where weights are
    scaled differently, and equalized and original networks train differently.

    Attributes:
        progress: position of the training, 0 to 1, that the elements hear of; at 1 what is solved is what is deployed.
    """

    progress: float = 1.0

    def __init__(
        self,
        dof_map: DofMap,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, WeightGrid],
        activations: Mapping[str, ActivationGrid],
        *,
        train_cross_layer: bool = True,
        rounding: Rounding = "ste",
        sparsity: Sparsity = None,
    ) -> None:
        """Start every degree of freedom at its initial value.

        Args:
            dof_map: which scales are shared, free, or pinned.
            tensors: weights and biases by name, real units, of the equalized network.
            weights: grid of each weight that is quantized; all others stay as they are but for folding.
            activations: grid of each activation quantizer, by name.
            train_cross_layer: train the cross-layer factors; else they stay as the tensors have them. They train with
                `"ste"` only (see the other elements for why).
            rounding: what makes integers of weights in training.
            sparsity: which weights become 0.

        Raises:
            ModelError: the sparsity fits no layer.
        """
        super().__init__()
        self.map = dof_map
        self.weight_grids = dict(weights)
        self.activation_grids = dict(activations)
        first = next(iter(tensors.values()))
        trains_factors = train_cross_layer and rounding == "ste"
        self.log_c = nn.Parameter(first.new_zeros(dof_map.size), requires_grad=trains_factors)
        self._activation_index = {name: i for i, name in enumerate(activations)}
        steps = torch.tensor([grid.scale for grid in activations.values()], device=first.device, dtype=first.dtype)
        self.log_s = nn.ParameterList([nn.Parameter(s.log()) for s in steps])
        self.layers = nn.ModuleList(
            _LayerDof(layer, tensors, weights.get(layer.weight), self._input_magnitude(weights.get(layer.weight)))
            for layer in dof_map.layers
        )
        for layer_dof in self._quantized():
            grid = weights[layer_dof.layer.weight]
            layer_dof.set_element(
                element_of(layer_dof.layer, layer_dof.W, bits=grid.bits, rounding=rounding, sparsity=sparsity)
            )
            s_in, s_out = self._initial_step(grid.s_in), self._initial_step(grid.s_out)
            layer_dof.log_F.data.copy_((grid.scale.to(first) * s_in / s_out).log())
        check_masks(self._elements(), sparsity)

    def _initial_step(self, name: str | None) -> float:
        return 1.0 if name is None else self.activation_grids[name].scale

    def _input_magnitude(self, grid: WeightGrid | None) -> float:
        if grid is None or grid.s_in is None:
            return 1.0
        activation = self.activation_grids[grid.s_in]
        return activation.scale * (activation.high - activation.low) / 4

    def _quantized(self) -> "list[_LayerDof]":
        return [d for d in self.layers if isinstance(d, _LayerDof) and d.layer.weight in self.weight_grids]

    def _elements(self) -> dict[str, NearestRounding]:
        return {d.layer.weight: d.element for d in self._quantized() if d.element is not None}

    def set_progress(self, progress: float) -> None:
        """Tell the elements the position of the training, 0 to 1."""
        self.progress = progress

    def penalty(self) -> Tensor | None:
        """Return what the elements ask for in addition to a small loss, `[]`; `None` where that is nothing."""
        return undecided(self._elements().values(), self.progress)

    def trained_weight(self, name: str) -> "_LayerDof":
        """Return the degrees of freedom of a quantized layer by the name of its weight."""
        return next(d for d in self._quantized() if d.layer.weight == name)

    def activation_scale(self, name: str) -> Tensor:
        """Return the step of an activation quantizer, `[]`, real (folded) per step."""
        log_s: Tensor = self.log_s[self._activation_index[name]]
        return log_s.exp()

    def activation_scales(self) -> dict[str, Tensor]:
        """Return the step of every activation quantizer by name."""
        if not len(self.log_s):
            return {}
        return dict(zip(self._activation_index, torch.stack(list(self.log_s)).exp().unbind(), strict=True))

    def factors(self) -> Tensor:
        """Return the cross-layer factor of every variable, `[1 + size]`; the first is that of pinned channels, 1."""
        return torch.cat([self.log_c.new_zeros(1), self.log_c]).exp()

    def parameter_groups(self, *, learning_rate: float, scale_learning_rate: float) -> list[dict[str, object]]:
        """Group what trains for an optimizer: weights and biases, then the logarithms of all scales."""
        values: list[nn.Parameter] = []
        scales: list[nn.Parameter] = [*self.log_s]
        for layer in self._quantized():
            values.extend(p for p in (layer.W, layer.bias) if p is not None and p.requires_grad)
            values.extend(() if layer.element is None else layer.element.parameters())
            scales.append(layer.log_F)
            if layer.log_L is not None:
                scales.append(layer.log_L)
        if self.log_c.requires_grad and self.log_c.numel():
            scales.append(self.log_c)
        return [{"params": values, "lr": learning_rate}, {"params": scales, "lr": scale_learning_rate}]


class _LayerDof(nn.Module):
    """The degrees of freedom of one layer."""

    unit: Tensor
    bias_unit: Tensor
    in_index: Tensor
    out_index: Tensor

    def __init__(
        self, layer: Layer, tensors: Mapping[str, Tensor], grid: WeightGrid | None, input_magnitude: float
    ) -> None:
        super().__init__()
        self.layer = layer
        W = tensors[layer.weight].detach()
        B = tensors[layer.bias].detach() if layer.bias is not None else None
        step = grid.scale.to(W) if grid is not None else W.new_ones(())
        left = grid.scale_in.to(W) if grid is not None and grid.scale_in is not None else None
        trains = grid is not None
        unit = on_weight(step, left, W, layer)
        self.register_buffer("unit", unit)
        self.register_buffer("bias_unit", step * input_magnitude)
        self.register_buffer("in_index", layer.in_index.to(W.device))
        self.register_buffer("out_index", layer.out_index.to(W.device))
        self.folds_in = layer.kind != "layer_norm" and bool((layer.in_index != PINNED).any())
        self.folds_out = bool((layer.out_index != PINNED).any())
        self.W = nn.Parameter(W / unit, requires_grad=trains)
        self.bias = nn.Parameter(B / self.bias_unit, requires_grad=trains) if B is not None else None
        self.log_F = nn.Parameter(torch.zeros_like(step), requires_grad=trains)
        self.log_L = nn.Parameter(left.log()) if left is not None else None
        self.element: NearestRounding | None = None

    def set_element(self, element: NearestRounding) -> None:
        """Choose what makes integers of the weight."""
        self.element = element
        self.W.requires_grad_(element.trains_weight)

    @property
    def scale_in(self) -> Tensor | None:
        """The trained left scale of a doubly per-channel kernel, `[in]`."""
        return None if self.log_L is None else self.log_L.exp()

    def folded(self, c: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the cross-layer factors moved into them, real units.

        Args:
            c: factor of every variable, `[1 + size]`.
            kept: weights that are not 0, a boolean tensor of the shape of the weight; `None` where none is dropped.
        """
        layer = self.layer
        out = self.unit
        B = None if self.bias is None else self.bias * self.bias_unit
        # A weight that is dropped hears of its gradient, the factors do not.
        W: Tensor = self.W if kept is None else masked(self.W, kept)
        if self.folds_out:
            c_out = c.index_select(0, self.out_index)
            out = self.unit / per_out(c_out, W, groups=layer.groups, kind=layer.kind)
            B = None if B is None else B / c_out
        W = W * out
        if self.folds_in:
            W = W * per_in(c.index_select(0, self.in_index), W, groups=layer.groups, kind=layer.kind)
        return W, B


@dataclass(frozen=True)
class Solution:
    """What the online graph runs on, as a differentiable function of the degrees of freedom.

    Attributes:
        tensors: weights (fake-quantized where the layer is quantized) and biases by name, folded, real units.
        activation_scales: step of every activation quantizer by name, `[]`.
        factors: cross-layer factor of every variable, `[1 + size]`.
    """

    tensors: dict[str, Tensor]
    activation_scales: dict[str, Tensor]
    factors: Tensor


def weight_steps(dof: Dof, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Solve the step of every quantized kernel in the folded network.

    Eq. (2) with the factors folded:  S_wR * S_wL * c_in / c_out = s_out * F / s_in

    Args:
        dof: the degrees of freedom.
        scales: step of every activation quantizer by name, `[]`.

    Returns:
        By name of the weight, `[]` or `[out]`, real per step.
    """
    steps = {}
    for layer in dof._quantized():
        grid = dof.weight_grids[layer.layer.weight]
        F = layer.log_F.exp()
        S_wR = F if grid.s_out is None else scales[grid.s_out] * F
        steps[layer.layer.weight] = S_wR if grid.s_in is None else S_wR / scales[grid.s_in]
    return steps


def solve(dof: Dof) -> Solution:
    """Compute everything that the online graph needs from the degrees of freedom (Fig. 4, Eq. 2-4)."""
    c, scales = dof.factors(), dof.activation_scales()
    steps = weight_steps(dof, scales)
    tensors: dict[str, Tensor] = {}
    for module in dof.layers:
        assert isinstance(module, _LayerDof)
        layer = module.layer
        W, B = module.folded(c)
        if module.element is not None:
            step = on_weight(steps[layer.weight], module.scale_in, W, layer)
            kept = module.element.kept(W, step)
            W = module.element(W if kept is None else module.folded(c, kept)[0], step, dof.progress)
        tensors[layer.weight] = W
        if layer.bias is not None and B is not None:
            tensors[layer.bias] = B
    return Solution(tensors, scales, c)


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
    c, scales = dof.factors(), dof.activation_scales()
    steps = weight_steps(dof, scales)
    result = {}
    for module in dof._quantized():
        layer, grid = module.layer, dof.weight_grids[module.layer.weight]
        W, _ = module.folded(c)
        step = steps[layer.weight]
        assert module.element is not None
        integers = module.element.integers(W, on_weight(step, module.scale_in, W, layer))
        result[layer.weight] = DeployedWeight(integers, step, module.scale_in, grid.bits)
    return result


@torch.no_grad()
def folded_tensors(dof: Dof) -> dict[str, Tensor]:
    """Return weights and biases by name with the trained cross-layer factors folded in, not yet rounded, real units.

    Where an element has decided on another integer than the nearest one, the weight is moved next to it.
    """
    c = dof.factors()
    steps = weight_steps(dof, dof.activation_scales())
    tensors: dict[str, Tensor] = {}
    for module in dof.layers:
        assert isinstance(module, _LayerDof)
        W, B = module.folded(c)
        if module.element is not None:
            W = module.element.near(W, on_weight(steps[module.layer.weight], module.scale_in, W, module.layer))
        tensors[module.layer.weight] = W
        if module.layer.bias is not None and B is not None:
            tensors[module.layer.bias] = B
    return tensors


def names_of(layers: Sequence[Layer]) -> list[str]:
    """List the parameters that the layers hold."""
    return [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
