"""The independent degrees of freedom: all that trains (Eq. 6)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from qft_plugin.config import HardwareSpec, Rounding, Sparsity
from qft_plugin.graph.layer_graph import PINNED, DofMap, Layer, absorbs_input
from qft_plugin.graph.placement import ActivationGrid, merged
from qft_plugin.tensors.fake_quantize import multiplied
from qft_plugin.tensors.grid import quantize_factor, round_ste
from qft_plugin.training.activation_scales import shared_grids, tied_grids
from qft_plugin.training.held import Held
from qft_plugin.training.rounding import NearestRounding, check_masks, element_of, undecided

DEFAULT: Final = HardwareSpec()

NO_MASKS: Final[Mapping[str, Tensor]] = {}


@dataclass(frozen=True)
class WeightGrid:
    """How one layer's weight is quantized.

    Attributes:
        bits: bit width; the grid is symmetric and narrow.
        scale: initial step, `[out]` or `[]`, real per step, in the equalized network.
        s_in: name of the activation quantizer of its input edge, or of one of them where their scales are the same;
            `None` where that edge is not quantized, or has no single scale.
        s_out: name of the activation quantizer of its output edge, likewise.
        scale_in: initial left scale, `[in]`, relative to `scale`, of a kernel whose scale differs by input channel too
            (doubly per-channel, Eq. 5); `None` where it does not.
    """

    bits: int
    scale: Tensor
    s_in: str | None
    s_out: str | None
    scale_in: Tensor | None = None


@dataclass(frozen=True)
class Channels:
    """The cross-layer factors of the channels of one layer.

    Attributes:
        inputs: `[in]`.
        outputs: `[out]`.
    """

    inputs: Tensor
    outputs: Tensor

    def detach(self) -> "Channels":
        """Return the same factors as constants."""
        return Channels(self.inputs.detach(), self.outputs.detach())


class LayerDof(nn.Module):
    """The degrees of freedom of one layer.

    Attributes:
        held: its state while a part of it trains; no part of the state dict, because `efqat.settle` writes it into `W`.
    """

    held: Held | None = None
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
        unit = layer.axes.on_weight(step, left, W)
        self.register_buffer("unit", unit)
        self.register_buffer("bias_unit", step * input_magnitude)
        self.register_buffer("in_index", layer.in_index.to(W.device))
        self.register_buffer("out_index", layer.out_index.to(W.device))
        self.folds_in = absorbs_input(layer.kind) and bool((layer.in_index != PINNED).any())
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

    def channels(self, c: Tensor) -> Channels:
        """Return the factors of this layer's channels.

        Args:
            c: factor of every variable, `[1 + size]`.
        """
        return Channels(c.index_select(0, self.in_index), c.index_select(0, self.out_index))

    def folded(self, c: Channels) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the cross-layer factors moved into them, real units.

        Args:
            c: the factors of the layer's channels.
        """
        return self.folded_weight(c), self.folded_bias(c)

    def folded_weight(self, c: Channels) -> Tensor:
        """Return the weight with the cross-layer factors moved into it, real units.

        Args:
            c: the factors of the layer's channels.
        """
        return multiplied(self.W, self.units(c))

    def units(self, c: Channels) -> tuple[Tensor, ...]:
        """Return what the stored weight is multiplied by, in this order, to be the folded one.

        Args:
            c: the factors of the layer's channels.
        """
        axes, out = self.layer.axes, self.unit
        if self.folds_out:
            out = out / axes.per_out(c.outputs, self.W)
        return (out, axes.per_in(c.inputs, self.W)) if self.folds_in else (out,)

    def folded_bias(self, c: Channels) -> Tensor | None:
        """Return the bias with the cross-layer factors moved into it, `[out]`, real units; `None` where there is none.

        Args:
            c: the factors of the layer's channels.
        """
        if self.bias is None:
            return None
        B = self.bias * self.bias_unit
        return B / c.outputs if self.folds_out else B


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
    in_indices: Tensor
    out_indices: Tensor
    layer_of_step: Tensor

    def __init__(
        self,
        dof_map: DofMap,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, WeightGrid],
        activations: Mapping[str, ActivationGrid],
        *,
        train_cross_layer: bool = True,
        train_scales: bool = True,
        hardware: HardwareSpec = DEFAULT,
        addends: Sequence[Sequence[str]] = (),
        shared: Sequence[Sequence[str]] = (),
        rounding: Rounding = "ste",
        sparsity: Sparsity = None,
        kept: Mapping[str, Tensor] = NO_MASKS,
    ) -> None:
        """Start every degree of freedom at its initial value.

        Args:
            dof_map: which scales are shared, free, or pinned.
            tensors: weights and biases by name, real units, of the equalized network.
            weights: grid of each weight that is quantized; all others stay as they are but for folding.
            activations: grid of each activation quantizer, by name.
            train_cross_layer: train the cross-layer factors; else they stay as the tensors have them. They train with
                `"ste"` only (see the other elements for why).
            train_scales: train all scales and zero points, the cross-layer factors included.
            hardware: the constraints between scales, and on biases.
            addends: groups of activation quantizers that `hardware.elementwise_rescale` ties to each other.
            shared: groups that have one scale whatever the hardware can do, because a kernel reads all of a group.
            rounding: what makes integers of weights in training.
            sparsity: which weights become 0.
            kept: by name of a weight, true where it is not 0 in the user's model and may be another number here; a
                weight that is not in it is not pruned.

        Raises:
            ModelError: the sparsity fits no layer.
        """
        super().__init__()
        self.map = dof_map
        self.weight_grids = dict(weights)
        self.hardware = hardware
        kind, order = hardware.elementwise_rescale, list(activations)
        related = merged([*shared, *addends], order)
        one_scale = related if kind == "none" else merged(shared, order)
        self.activation_grids = tied_grids(shared_grids(activations, shared), related, kind)
        first = next(iter(tensors.values()))
        trains_factors = train_cross_layer and train_scales and rounding == "ste"
        self.log_c = nn.Parameter(first.new_zeros(dof_map.size), requires_grad=trains_factors)
        self._root = {name: group[0] for group in related for name in group}
        self._shared = {name: tuple(group) for group in shared for name in group}
        self._activation_index, own = _numbered(activations, one_scale)
        steps = [first.new_tensor(self.activation_grids[name].scale) for name in own]
        self.log_s = nn.ParameterList([nn.Parameter(s.log(), requires_grad=train_scales) for s in steps])
        self._shift_index, moving = _numbered([n for n, g in activations.items() if g.shifts], shared)
        self.shift = nn.ParameterList([nn.Parameter(first.new_zeros(()), requires_grad=train_scales) for _ in moving])
        self.layers = nn.ModuleList(
            LayerDof(layer, tensors, weights.get(layer.weight), self._input_magnitude(weights.get(layer.weight)))
            for layer in dof_map.layers
        )
        for layer_dof in self.quantized():
            grid = weights[layer_dof.layer.weight]
            element = element_of(
                layer_dof.layer,
                layer_dof.W,
                bits=grid.bits,
                rounding=rounding,
                sparsity=sparsity,
                kept=kept.get(layer_dof.layer.weight),
            )
            layer_dof.set_element(element)
            s_in, s_out = self._initial_step(grid.s_in), self._initial_step(grid.s_out)
            layer_dof.log_F.data.copy_((grid.scale.to(first) * s_in / s_out).log())
            for scale in (layer_dof.log_F, layer_dof.log_L):
                if scale is not None:
                    scale.requires_grad_(train_scales)
        check_masks(self._elements(), sparsity)
        every = [d for d in self.layers if isinstance(d, LayerDof)]
        self._in_sizes, self._out_sizes = [len(d.in_index) for d in every], [len(d.out_index) for d in every]
        numbers = torch.arange(len(self.quantized()))
        sizes = torch.tensor([d.log_F.numel() for d in self.quantized()], dtype=torch.long)
        for name, index in (
            ("in_indices", torch.cat([d.in_index for d in every])),
            ("out_indices", torch.cat([d.out_index for d in every])),
            ("layer_of_step", numbers.repeat_interleave(sizes).to(first.device)),
        ):
            self.register_buffer(name, index, persistent=False)

    def _initial_step(self, name: str | None) -> float:
        return 1.0 if name is None else self.activation_grids[name].scale

    def _input_magnitude(self, grid: WeightGrid | None) -> float:
        if grid is None or grid.s_in is None:
            return 1.0
        activation = self.activation_grids[grid.s_in]
        return activation.scale * (activation.high - activation.low) / 4

    def input_grids(self, weight: str) -> tuple[ActivationGrid, ...]:
        """List the grids of what a quantized layer reads, which have one scale; none where that has no single scale."""
        name = self.weight_grids[weight].s_in
        return () if name is None else tuple(self.activation_grids[n] for n in self._shared.get(name, (name,)))

    def quantized(self) -> list[LayerDof]:
        """List the degrees of freedom of the layers whose weights are quantized."""
        return [d for d in self.layers if isinstance(d, LayerDof) and d.layer.weight in self.weight_grids]

    def _elements(self) -> dict[str, NearestRounding]:
        return {d.layer.weight: d.element for d in self.quantized() if d.element is not None}

    def set_progress(self, progress: float) -> None:
        """Tell the elements the position of the training, 0 to 1."""
        self.progress = progress

    def penalty(self) -> Tensor | None:
        """Return what the elements ask for in addition to a small loss, `[]`; `None` where that is nothing."""
        return undecided(self._elements().values(), self.progress)

    def trained_weight(self, name: str) -> LayerDof:
        """Return the degrees of freedom of a quantized layer by the name of its weight."""
        return next(d for d in self.quantized() if d.layer.weight == name)

    @torch.no_grad()
    def shift_bias(self, weight: str, change: Tensor) -> None:
        """Add to the bias of a quantized layer.

        Args:
            weight: name of its weight.
            change: `[out]`, real (folded) units.
        """
        layer = self.trained_weight(weight)
        assert layer.bias is not None
        layer.bias.add_(change * self.factors()[layer.out_index] / layer.bias_unit)

    def activation_scales(self) -> dict[str, Tensor]:
        """Return the step of every activation quantizer by name, `[]`, real (folded) per step."""
        if not len(self.log_s):
            return {}
        own = torch.stack(list(self.log_s)).exp().unbind()
        scales = {name: own[i] for name, i in self._activation_index.items()}
        if self.hardware.elementwise_rescale == "power_of_two":
            for name, root in self._root.items():
                scales[name] = scales[root] * quantize_factor(scales[name] / scales[root], "power_of_two")
        return scales

    def zero_points(self) -> dict[str, Tensor]:
        """Return the zero point of every activation quantizer that trains one, `[]`, a whole number held in float."""
        found = {}
        for name, i in self._shift_index.items():
            grid = self.activation_grids[name]
            moved = grid.zero_point + (grid.high - grid.low) * self.shift[i]
            found[name] = round_ste(moved.clamp(grid.low, grid.high))
        return found

    def spread(self, c: Tensor) -> list[Channels]:
        """Give every layer the factors of its channels, with two operations for all of them.

        Args:
            c: factor of every variable, `[1 + size]`.
        """
        inputs, outputs = (
            c.index_select(0, index).split_with_sizes(sizes)
            for index, sizes in ((self.in_indices, self._in_sizes), (self.out_indices, self._out_sizes))
        )
        return [Channels(c_in, c_out) for c_in, c_out in zip(inputs, outputs, strict=True)]

    def rescale_factor(self, layer: LayerDof) -> Tensor:
        """Return a layer's rescale factor as the hardware holds it, `[]` or `[out]`.

        Where an edge of the layer is not quantized it is no factor between integers, and any number will do.
        """
        grid, F = self.weight_grids[layer.layer.weight], layer.log_F.exp()
        between_integers = grid.s_in is not None and grid.s_out is not None
        return quantize_factor(F, self.hardware.rescale_factor) if between_integers else F

    def factors(self) -> Tensor:
        """Return the cross-layer factor of every variable, `[1 + size]`; the first is that of pinned channels, 1."""
        return torch.cat([self.log_c.new_zeros(1), self.log_c]).exp()

    def parameter_groups(
        self,
        *,
        learning_rate: float,
        scale_learning_rate: float,
        layers: Collection[str] | None = None,
        quantizers: Collection[str] | None = None,
        factors: bool = True,
    ) -> list[dict[str, object]]:
        """Group what trains for an optimizer: weights and biases, then the logarithms of all scales.

        Of a kernel that is held the rows that train; cross-layer factors and left scales then stay as they are.

        Args:
            learning_rate: of weights and biases.
            scale_learning_rate: of the logarithms.
            layers: the weights whose layers train, `None` for all.
            quantizers: the activation quantizers that train, `None` for all.
            factors: whether cross-layer factors train.
        """
        values: list[Tensor] = []
        roots = {name: self._root.get(name, name) for name in self._activation_index}
        # A scale that several quantizers share, or are shifts of, trains where all of them do.
        fixed = set() if quantizers is None else {root for name, root in roots.items() if name not in quantizers}
        trained = [name for name, root in roots.items() if root not in fixed]
        scales: list[Tensor] = [self.log_s[i] for i in dict.fromkeys(self._activation_index[n] for n in trained)]
        scales += [self.shift[i] for i in dict.fromkeys(i for n, i in self._shift_index.items() if n in trained)]
        for layer in self.quantized():
            if layers is not None and layer.layer.weight not in layers:
                continue
            if layer.held is None:
                values.append(layer.W)
            elif len(layer.held.index):
                values.append(layer.held.rows)
            values.extend(() if layer.bias is None else (layer.bias,))
            values.extend(() if layer.element is None else layer.element.parameters())
            scales.append(layer.log_F)
            if layer.log_L is not None and layer.held is None:
                scales.append(layer.log_L)
        if factors and self.log_c.numel() and not any(layer.held is not None for layer in self.quantized()):
            scales.append(self.log_c)
        groups = ((values, learning_rate), (scales, scale_learning_rate))
        return [{"params": [p for p in found if p.requires_grad], "lr": rate} for found, rate in groups]


def _numbered(names: Collection[str], groups: Sequence[Sequence[str]]) -> tuple[dict[str, int], list[str]]:
    """Number what has a trained value of its own, groups having one; returns the numbers and a name for each."""
    first = {name: group[0] for group in groups for name in group}
    own = list(dict.fromkeys(first.get(name, name) for name in names))
    return {name: own.index(first.get(name, name)) for name in names}, own
