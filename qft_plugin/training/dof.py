"""The independent degrees of freedom: all that trains (Eq. 6)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import PINNED, DofMap, Layer, absorbs_input
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import multiplied
from qft_plugin.tensors.sparsity import mask_of
from qft_plugin.training.activation_scales import ActivationScales, Ties
from qft_plugin.training.held import Held
from qft_plugin.training.rounding import NearestRounding, check_masks, element_of, undecided

CROSS_LAYER: Final = 0.1
"""Learning rate of cross-layer factors over that of the other scales. A factor rounds all weights of its channels anew:
1 % of it moves those at the ends of a grid of 4 bits by a fourteenth of a step, all in one direction. Where they train
ten times as fast, the result is worse than its start."""

DEFAULT: Final = QFTConfig()
NO_TIES: Final = Ties()


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
        kept: true where the weight is not 0 in the user's model and may be another number here; `None` where it is not
            pruned.
    """

    bits: int
    scale: Tensor
    s_in: str | None
    s_out: str | None
    scale_in: Tensor | None = None
    kept: Tensor | None = None


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

    def quantize(self, grid: WeightGrid, config: QFTConfig, *, s_in: float, s_out: float) -> None:
        """Choose the element, and start the rescale factor,  F = S_w * s_in / s_out.

        Args:
            grid: how the weight is quantized.
            config: of the job.
            s_in: initial step of the input edge; 1 where it is not quantized.
            s_out: initial step of the output edge, likewise.
        """
        mask = mask_of(self.W, self.layer.axes, config.sparsity, kept=grid.kept)
        self.element = element_of(self.W, bits=grid.bits, rounding=config.rounding, mask=mask)
        self.W.requires_grad_(self.element.trains_weight)
        self.log_F.data.copy_((grid.scale.to(self.log_F) * s_in / s_out).log())
        for scale in (self.log_F, self.log_L):
            if scale is not None:
                scale.requires_grad_(config.train_scales)

    @property
    def scale_in(self) -> Tensor | None:
        """The trained left scale of a doubly per-channel kernel, `[in]`."""
        return None if self.log_L is None else self.log_L.exp()

    def values(self) -> list[Tensor]:
        """List the weight, or the rows of it that train, and the bias, with the parameters of the element."""
        kernel = [self.W] if self.held is None else [self.held.rows] if len(self.held.index) else []
        bias = [] if self.bias is None else [self.bias]
        return [*kernel, *bias, *(() if self.element is None else self.element.parameters())]

    def scales(self) -> list[Tensor]:
        """List the logarithms of the rescale factor and of the left scale, which stays while the kernel is held."""
        return [self.log_F] if self.log_L is None or self.held is not None else [self.log_F, self.log_L]

    def step(self, scale: Tensor) -> Tensor:
        """Put a solved step, `[]` or `[out]`, and the trained left scale onto the axes of the weight."""
        return self.layer.axes.on_weight(scale, self.scale_in, self.W)

    def channels(self, c: Tensor) -> Channels:
        """Return the factors of this layer's channels.

        Args:
            c: factor of every variable, `[1 + size]`.
        """
        return Channels(c.index_select(0, self.in_index), c.index_select(0, self.out_index))

    def folded_weight(self, c: Channels, step: Tensor) -> Tensor:
        """Return the weight with the cross-layer factors moved into it, real units.

        Args:
            c: the factors of the layer's channels.
            step: as in `units`.
        """
        return multiplied(self.W, self.units(c, step))

    def units(self, c: Channels, step: Tensor) -> tuple[Tensor, ...]:
        """Return what the stored weight is multiplied by, in this order, to be the folded one.

        Args:
            c: the factors of the layer's channels.
            step: of the weight as it is now, broadcasts against it; `unit` where it is not quantized.
        """
        axes, out = self.layer.axes, step
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


class LayerIndex(nn.Module):
    """Where the values of each layer are in vectors over all layers: one operation is then enough for all of them.

    Attributes:
        inputs: variable of each input channel.
        outputs: variable of each output channel.
        kernel_of_step: number of the quantized layer of each weight step.
    """

    inputs: Tensor
    outputs: Tensor
    kernel_of_step: Tensor

    def __init__(self, layers: Sequence[LayerDof], quantized: Sequence[LayerDof]) -> None:
        """Count the channels of all layers, and the weight steps of those that are quantized."""
        super().__init__()
        self._in_sizes, self._out_sizes = [len(d.in_index) for d in layers], [len(d.out_index) for d in layers]
        inputs, outputs = (torch.cat(index) for index in zip(*((d.in_index, d.out_index) for d in layers), strict=True))
        sizes = torch.tensor([d.log_F.numel() for d in quantized], dtype=torch.long)
        kernels = torch.arange(len(quantized)).repeat_interleave(sizes).to(inputs.device)
        for name, index in (("inputs", inputs), ("outputs", outputs), ("kernel_of_step", kernels)):
            self.register_buffer(name, index, persistent=False)

    def channels(self, c: Tensor) -> list[Channels]:
        """Give every layer the factors of its channels.

        Args:
            c: factor of every variable, `[1 + size]`.
        """
        inputs = c.index_select(0, self.inputs).split_with_sizes(self._in_sizes)
        outputs = c.index_select(0, self.outputs).split_with_sizes(self._out_sizes)
        return [Channels(c_in, c_out) for c_in, c_out in zip(inputs, outputs, strict=True)]


class Dof(nn.Module):
    """All trainable tensors of Eq. (6): weights, biases, rescale factors, activation steps and cross-layer factors.

    Scales are stored as logarithms. A weight is stored in units of its own step, as it is now, and a bias in units of
    the initial step times a typical input, so that one learning rate means the same for every layer of every network,
    however its channels are scaled.

    Departure: the paper trains weights in real units; there the learning rate must be retuned where weights are
    scaled differently, and equalized and original networks train differently. Where the step changes, too, all weights
    on it would be rounded anew, which destroys what integers that compensate each other are worth: a step that trains
    for a few hundred steps moves by a tenth and more. In units of the step the integers stay where they are.

    Attributes:
        map: which scales are shared, free, or pinned.
        log_c: logarithm of the cross-layer factor of every free variable, `[map.size]`.
        activations: the scales and zero points of activations.
        layers: one `LayerDof` for each layer of the map.
        weight_grids: grid of each weight that is quantized, by its name.
        hardware: the constraints between scales, and on biases.
        progress: position of the training, 0 to 1, for the elements; at 1 the solved weights are the deployed ones.
    """

    progress: float = 1.0

    def __init__(
        self,
        dof_map: DofMap,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, WeightGrid],
        activations: Mapping[str, ActivationGrid],
        *,
        config: QFTConfig = DEFAULT,
        ties: Ties = NO_TIES,
    ) -> None:
        """Start every degree of freedom at its initial value.

        Args:
            dof_map: which scales are shared, free, or pinned.
            tensors: weights and biases by name, real units, of the equalized network.
            weights: grid of each weight that is quantized; all others stay as they are but for folding.
            activations: grid of each activation quantizer, by name.
            config: of the job. Cross-layer factors train with `rounding="ste"` only (see the other elements for why).
            ties: the activation quantizers whose scales depend on each other.

        Raises:
            ModelError: the sparsity fits no layer.
        """
        super().__init__()
        self.map, self.weight_grids, self.hardware = dof_map, dict(weights), config.hardware
        like, train = next(iter(tensors.values())), config.train_scales
        trains_factors = config.train_cross_layer and train and config.rounding == "ste"
        self.log_c = nn.Parameter(like.new_zeros(dof_map.size), requires_grad=trains_factors)
        kind = config.hardware.elementwise_rescale
        self.activations = ActivationScales(activations, ties, kind=kind, like=like, train=train)
        layers = [
            LayerDof(layer, tensors, weights.get(layer.weight), self._magnitude(layer)) for layer in dof_map.layers
        ]
        self.layers = nn.ModuleList(layers)
        for module in self.quantized():
            grid = weights[module.layer.weight]
            module.quantize(grid, config, s_in=self._step(grid.s_in), s_out=self._step(grid.s_out))
        check_masks(self._elements(), config.sparsity)
        self.index = LayerIndex(layers, self.quantized())

    def _step(self, quantizer: str | None) -> float:
        """Return where the step of an edge starts."""
        return 1.0 if quantizer is None else self.activations.grids[quantizer].scale

    def _magnitude(self, layer: Layer) -> float:
        """Return a typical input of a layer, real units; 1 where that is not known."""
        grid = self.weight_grids.get(layer.weight)
        if grid is None or grid.s_in is None:
            return 1.0
        activation = self.activations.grids[grid.s_in]
        return activation.scale * (activation.high - activation.low) / 4

    def input_grids(self, weight: str) -> tuple[ActivationGrid, ...]:
        """List the grids of what a quantized layer reads, which have one scale; none where that has no single scale."""
        name = self.weight_grids[weight].s_in
        return () if name is None else self.activations.sharing(name)

    def quantized(self) -> list[LayerDof]:
        """List the degrees of freedom of the layers whose weights are quantized."""
        return [d for d in self.layers if isinstance(d, LayerDof) and d.layer.weight in self.weight_grids]

    def trained_weight(self, name: str) -> LayerDof:
        """Return the degrees of freedom of a quantized layer by the name of its weight."""
        return next(d for d in self.quantized() if d.layer.weight == name)

    def factors(self) -> Tensor:
        """Return the cross-layer factor of every variable, `[1 + size]`; the first is that of pinned channels, 1."""
        return torch.cat([self.log_c.new_zeros(1), self.log_c]).exp()

    def _elements(self) -> dict[str, NearestRounding]:
        return {d.layer.weight: d.element for d in self.quantized() if d.element is not None}

    def set_progress(self, progress: float) -> None:
        """Tell the elements the position of the training, 0 to 1."""
        self.progress = progress

    def penalty(self) -> Tensor | None:
        """Return what the elements ask for in addition to a small loss, `[]`; `None` where that is nothing."""
        return undecided(self._elements().values(), self.progress)

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


def parameter_groups(
    dof: Dof,
    *,
    learning_rate: float,
    scale_learning_rate: float,
    layers: Collection[str] | None = None,
    quantizers: Collection[str] | None = None,
    factors: bool = True,
) -> list[dict[str, object]]:
    """Group the parameters that train for an optimizer: weights and biases, the logarithms of scales, those of factors.

    Of a kernel that is held the rows train; cross-layer factors and left scales then stay as they are.

    Args:
        dof: the degrees of freedom.
        learning_rate: of weights and biases.
        scale_learning_rate: of the logarithms; of those of cross-layer factors, `CROSS_LAYER` of it.
        layers: the weights whose layers train, `None` for all.
        quantizers: the activation quantizers that train, `None` for all.
        factors: whether cross-layer factors train.
    """
    trained = [d for d in dof.quantized() if layers is None or d.layer.weight in layers]
    values = [p for d in trained for p in d.values()]
    scales = [*dof.activations.trained(quantizers), *(p for d in trained for p in d.scales())]
    trains_factors = factors and dof.log_c.numel() and all(d.held is None for d in dof.quantized())
    cross_layer = [dof.log_c] if trains_factors else []
    groups = (
        (values, learning_rate),
        (scales, scale_learning_rate),
        (cross_layer, CROSS_LAYER * scale_learning_rate),
    )
    return [{"params": [p for p in found if p.requires_grad], "lr": rate} for found, rate in groups]
