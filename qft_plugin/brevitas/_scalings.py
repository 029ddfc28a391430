"""The trained state of a quantizer: modules that compute a scale from degrees of freedom which layers share.

Brevitas calls them with the tensor to quantize; they return its scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from brevitas import config as brevitas_config
from torch import Tensor, nn

from qft_plugin.graph.batch_norms import axes_of
from qft_plugin.graph.layer_graph import DofMap
from qft_plugin.tensors.mmse import doubly_scales, weight_scale
from qft_plugin.tensors.ranges import range_max, shifted_range_max


class CrossLayerFactors(nn.Module):
    """The cross-layer factors of a linked model, one for each variable of its DoF map."""

    settings: Tensor

    def __init__(self, log_c: Tensor, dof_map: DofMap) -> None:
        """Start from logarithms, `[dof_map.size]`."""
        super().__init__()
        self.log_c = nn.Parameter(log_c)
        self.dof_map = dof_map
        # A buffer, so that a state dict brings it back: bits of the biases (0: float), whether scales are explicit.
        self.register_buffer("settings", torch.tensor([0, 0]))

    @property
    def bias_bits(self) -> int | None:
        """Bit width that the biases were trained for, `None` for floats."""
        return int(self.settings[0]) or None

    @bias_bits.setter
    def bias_bits(self, bits: int | None) -> None:
        self.settings[0] = bits or 0

    @property
    def explicit(self) -> bool:
        """Whether scales are free after functions that no scale passes through."""
        return bool(self.settings[1])

    @explicit.setter
    def explicit(self, free: bool) -> None:
        self.settings[1] = int(free)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if brevitas_config.IGNORE_MISSING_KEYS:
            del missing[before:]

    def forward(self) -> Tensor:
        """Return the factor of every variable, `[1 + size]`; the first is that of pinned channels, 1."""
        return torch.cat([self.log_c.new_zeros(1), self.log_c]).exp()


class Scaling(nn.Module):
    """Common parts of activation and weight scalings: logarithms that start as NaN until values are seen."""

    trained: tuple[str, ...] = ()
    restarts = False
    """Whether the scale is chosen anew when a state dict without it is loaded."""
    factors: CrossLayerFactors | None

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.linked = False
        self.shared: CrossLayerFactors | None = None
        # Not registered: the factors belong to one scaling of a model, all others refer to them.
        self.__dict__["factors"] = None

    def factor_of(self, index: Tensor | None) -> Tensor | None:
        """Return the cross-layer factor of each channel, `None` where all are 1."""
        if index is None or self.factors is None:
            return None
        c: Tensor = self.factors()
        return c.index_select(0, index)

    @property
    def is_meta(self) -> bool:
        """Whether the values are placeholders: Brevitas builds layers on the meta device first."""
        return any(p.is_meta for p in self.parameters())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        unexpected, errors = rest
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        lost = [name for name in self.trained if f"{prefix}{name}" not in state_dict]
        if lost:
            # A checkpoint of the float model: the scale belongs to weights that are gone.
            self.ready = self.ready and not self.restarts
            if brevitas_config.IGNORE_MISSING_KEYS:
                del missing[before:]
        else:
            self.ready = all(bool(torch.isfinite(getattr(self, name)).all()) for name in self.trained)
        if self.shared is None and f"{prefix}shared.log_c" in state_dict:
            errors.append(
                f"{prefix}shared.log_c comes from a linked model. Call qft_plugin.brevitas.link(model, example_input) "
                "before load_state_dict."
            )


class ActivationScaling(Scaling):
    """The scale of an activation: one step, `[]`, times a cross-layer factor for each channel where linked.

    S_a = s * c (Sec. 3.3); alone, `c` is 1 and the step starts at the range of the first batch.
    """

    trained = ("log_s",)
    index: Tensor | None
    zero_point: Tensor

    def __init__(self, *, low: int, high: int, asymmetric: bool) -> None:
        """Start without a value.

        Args:
            low: smallest integer.
            high: largest integer.
            asymmetric: the integer of the real 0 is chosen with the scale, else it is 0.
        """
        super().__init__()
        self.low, self.high, self.asymmetric = low, high, asymmetric
        self.log_s = nn.Parameter(torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(0.0), persistent=asymmetric)
        self.register_buffer("index", None, persistent=False)
        self.shape: tuple[int, ...] = ()
        self._first_seen: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the step is another one than that of the first batch that was seen."""
        return self.ready and float(self.log_s.detach()) != self._first_seen

    def link(self, factors: CrossLayerFactors, index: Tensor | None, shape: tuple[int, ...]) -> None:
        """Give each channel a factor.

        Args:
            factors: the shared factors.
            index: variable of each channel, `[channels]`; `None` where all are pinned.
            shape: puts `index` onto the axes of the activation: 1 but for the axis of the channels, -1.
        """
        self.linked, self.__dict__["factors"] = True, factors
        self.index, self.shape = None if index is None else index.to(self.log_s.device), shape

    def is_linked(self, index: Tensor | None, shape: tuple[int, ...]) -> bool:
        """Whether `link` would change nothing."""
        return self.linked and _same(self.index, index) and self.shape == shape

    def log_factors(self) -> tuple[Tensor | None, ...]:
        """Return the logarithm of the factor of each channel."""
        c = self.factor_of(self.index)
        return (None if c is None else c.log(),)

    def channel_factors(self) -> Tensor | None:
        """Return the factor of each channel on its axis, or `None` where all are 1."""
        c = self.factor_of(self.index)
        return None if c is None else c.view(self.shape)

    @torch.no_grad()
    def start(self, scale: Tensor, zero_point: int = 0) -> None:
        """Set the step, real per step, and the integer of the real 0."""
        self.log_s.copy_(scale.log())
        self.zero_point.fill_(zero_point)
        self.ready, self._first_seen = True, None

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        c = self.channel_factors()
        x = x if c is None else x / c
        if not bool(x.any()):
            return  # Brevitas asks for the scale by calling with 0; nothing has been seen
        scale, zero_point = activation_range(x, low=self.low, high=self.high, asymmetric=self.asymmetric)
        self.start(scale, zero_point)
        self._first_seen = float(self.log_s.detach())

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the scale, `[]` or on the axis of the channels, real per step."""
        if not self.ready:
            self._observe(x)
        # Where only 0 has been seen any scale is right, and the next batch chooses it.
        s = self.log_s.exp() if self.ready else torch.ones_like(self.log_s)
        c = self.channel_factors()
        return s if c is None else s * c


def activation_range(x: Tensor, *, low: int, high: int, asymmetric: bool) -> tuple[Tensor, int]:
    """Choose the smallest scale that clips nothing, and the integer of the real 0.

    Args:
        x: observed values.
        low: smallest integer.
        high: largest integer.
        asymmetric: use the whole grid for the range of `x`; else the real 0 is the integer 0.
    """
    if not asymmetric:
        return range_max(x, low=low, high=high), 0
    return shifted_range_max(x, low=low, high=high)


class ZeroPoint(nn.Module):
    """The integer of the real 0, as the scaling of the same quantizer has chosen it."""

    scaling: ActivationScaling

    def __init__(self, scaling: ActivationScaling) -> None:
        """Refer to the scaling, which is registered elsewhere."""
        super().__init__()
        self.__dict__["scaling"] = scaling

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """Return the zero point, `[]`."""
        return self.scaling.zero_point


@dataclass(frozen=True)
class Neighbours:
    """The activation scalings around a weight, `None` where an edge is not quantized.

    Attributes:
        inputs: of all that it reads: several where its calls, or the parts of a concatenation, have different ones.
        after: of its output edge.
    """

    inputs: tuple[ActivationScaling | None, ...]
    after: ActivationScaling | None

    @property
    def before(self) -> ActivationScaling | None:
        """One scaling of its input edge, `None` where some of that is not quantized."""
        return None if None in self.inputs or not self.inputs else self.inputs[0]

    @property
    def one_input(self) -> bool:
        """Whether all that it reads has one scale and one zero point."""
        found = {None if s is None else (float(s.log_s.detach()), int(s.zero_point)) for s in self.inputs}
        return len(found) <= 1


class WeightScaling(Scaling):
    """The scale of a weight, computed from the degrees of freedom around it (Eq. 2) where linked.

    step of W[o, i] = F[o] * s_out / s_in * c_out[o] / c_in[i], times a left scale of its own, L[i], where the
    quantizer is doubly per-channel. Alone, the step is F[o] * L[i] and starts at its MMSE value.
    """

    restarts = True
    in_index: Tensor | None
    out_index: Tensor | None
    neighbours: Neighbours

    def __init__(self, module: nn.Module, *, high: int, per_channel: bool, doubly: bool) -> None:
        """Start without a value.

        Args:
            module: the layer.
            high: largest integer.
            per_channel: one scale for each output channel.
            doubly: and one for each input channel.
        """
        super().__init__()
        W = module.weight
        assert isinstance(W, Tensor)
        self.high, self.axes = high, axes_of(module)
        ins, outs = self.axes.channels(W)
        self.per_channel = per_channel or doubly
        self.full_shape = tuple(W.shape)
        # Brevitas' GPTQ sets it: from where to where the weight that comes is cut on each axis (0.13.1 to 0.13.4).
        self.subtensor_slice_list: list[tuple[int, int] | None] = [None]
        self.log_F = nn.Parameter(torch.full((outs,) if self.per_channel else (), torch.nan).to(W))
        self.log_L = nn.Parameter(torch.full((ins,), torch.nan).to(W)) if doubly else None
        self.trained = ("log_F", "log_L") if doubly else ("log_F",)
        self.register_buffer("in_index", None, persistent=False)
        self.register_buffer("out_index", None, persistent=False)
        self.__dict__["neighbours"] = Neighbours((), None)

    def link(
        self, factors: CrossLayerFactors, in_index: Tensor | None, out_index: Tensor | None, neighbours: Neighbours
    ) -> None:
        """Compute the scale from those of the neighbouring activations; the step without factors does not change.

        Args:
            factors: the shared factors.
            in_index: variable of each input channel, `[in]`; `None` where all are pinned.
            out_index: variable of each output channel, `[out]`, likewise.
            neighbours: the scalings of its input and of its output edge.
        """
        ratio = self._log_ratio()
        self.linked, self.__dict__["factors"], self.__dict__["neighbours"] = True, factors, neighbours
        with torch.no_grad():
            self.log_F.add_(ratio - self._log_ratio())
        device = self.log_F.device
        self.in_index, self.out_index = (None if i is None else i.to(device) for i in (in_index, out_index))

    def is_linked(self, in_index: Tensor | None, out_index: Tensor | None, neighbours: Neighbours) -> bool:
        """Whether `link` would change nothing."""
        same = _same(self.in_index, in_index) and _same(self.out_index, out_index)
        mine = self.neighbours
        return self.linked and same and mine.before is neighbours.before and mine.after is neighbours.after

    def log_factors(self) -> tuple[Tensor | None, ...]:
        """Return the logarithms of the factors of input and output channels."""
        return tuple(None if c is None else c.log() for c in self.cross_layer())

    @property
    def bits(self) -> int:
        """Bit width."""
        return (self.high + 1).bit_length()

    def _log_ratio(self) -> Tensor | float:
        """Return log(s_out / s_in)."""
        before, after = self.neighbours.before, self.neighbours.after
        return (0.0 if after is None else after.log_s) - (0.0 if before is None else before.log_s)

    def folded_step(self) -> Tensor:
        """Return the step without factors and left scale,  F * s_out / s_in,  `[]` or `[out]`."""
        return (self.log_F + self._log_ratio()).exp()

    def cross_layer(self) -> tuple[Tensor | None, Tensor | None]:
        """Return c_in, `[in]`, and c_out, `[out]`; `None` where all are 1."""
        return self.factor_of(self.in_index), self.factor_of(self.out_index)

    @torch.no_grad()
    def _start(self, W: Tensor) -> None:
        c_in, c_out = self.cross_layer()
        if c_in is not None:
            W = W * self.axes.per_in(c_in, W)
        if c_out is not None:
            W = W / self.axes.per_out(c_out, W)
        if self.log_L is not None:
            scale, left = doubly_scales(W, self.axes, bits=self.bits)
            self.log_L.copy_(left.log())
        else:
            scale = weight_scale(W, self.axes, bits=self.bits, per_channel=self.per_channel)
        self.log_F.copy_(scale.log() - self._log_ratio())
        self.ready = True

    def forward(self, W: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the scale on the axes of the weight, real per step."""
        if not self.ready:
            self._start(W)
        step = self.folded_step()
        c_in, c_out = self.cross_layer()
        if c_out is not None:
            step = step * c_out
        left = None if self.log_L is None else self.log_L.exp()
        if c_in is not None:
            left = 1 / c_in if left is None else left / c_in
        return self._cut(self.axes.on_weight(step, left, step.new_empty(()).expand(self.full_shape)))

    def _cut(self, scale: Tensor) -> Tensor:
        """Return the part of the scale that belongs to a part of the weight."""
        parts = self.subtensor_slice_list[: scale.dim()]
        cuts = (p if size > 1 else None for p, size in zip(parts, scale.shape, strict=False))
        return scale[tuple(slice(None) if cut is None else slice(*cut) for cut in cuts)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu())
