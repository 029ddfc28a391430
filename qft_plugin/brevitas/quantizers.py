"""Quantizers for Brevitas' layers whose scales are computed from degrees of freedom that layers share.

An injector says what a quantizer is; Brevitas builds the quantizer from it, and builds it again after a weight was
assigned or a state dict was loaded. What is trained must survive that, so it is kept on the proxy, and the injector
hands the same module to every new quantizer.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from brevitas import config as brevitas_config
from brevitas.core.function_wrapper import TensorClamp
from brevitas.inject import value
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant.base import IntQuant, NarrowIntQuant, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from qft_plugin.errors import ConfigError
from qft_plugin.graph import DofMap, Layer
from qft_plugin.initialize import SMALLEST_SCALE, doubly_scales, range_max, weight_scale
from qft_plugin.norms import kind_of
from qft_plugin.offline import on_weight
from qft_plugin.quantize import TRANSPOSED_KINDS, integer_range, per_in, per_out

KEPT: Final = "_qft_scaling"
"""Attribute of a proxy that holds its trained state; not registered, because its quantizer registers it already."""


class CrossLayerFactors(nn.Module):
    """The cross-layer factors of a linked model, one for each variable of its DoF map."""

    def __init__(self, log_c: Tensor, dof_map: DofMap) -> None:
        """Start from logarithms, `[dof_map.size]`."""
        super().__init__()
        self.log_c = nn.Parameter(log_c)
        self.dof_map = dof_map

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


class _Scaling(nn.Module):
    """What activation and weight scalings have in common: logarithms that start as NaN until values are seen."""

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


class ActivationScaling(_Scaling):
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
        self.ready = True

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        c = self.channel_factors()
        x = x if c is None else x / c
        if not bool(x.any()):
            return  # Brevitas asks for the scale by calling with 0; nothing has been seen
        scale, zero_point = activation_range(x, low=self.low, high=self.high, asymmetric=self.asymmetric)
        self.start(scale, zero_point)

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
    smallest, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((largest - smallest) / (high - low)).clamp(min=SMALLEST_SCALE)
    return scale, int((low - smallest / scale).round().clamp(low, high))


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
        before: of its input edge, at its first call.
        after: of its output edge, likewise.
        one_input: whether all its calls read the same quantizer.
    """

    before: ActivationScaling | None
    after: ActivationScaling | None
    one_input: bool = True


class WeightScaling(_Scaling):
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
        self.high, self.kind, self.groups = high, kind_of(module), int(getattr(module, "groups", 1))
        ins, outs = W.shape[1] * self.groups, W.shape[0]
        if self.kind in TRANSPOSED_KINDS:
            ins, outs = W.shape[0], W.shape[1] * self.groups
        none = torch.zeros(0, dtype=torch.int64)
        self.layer = Layer("weight", None, self.kind, self.groups, (), (), (), none, none)
        self.per_channel = per_channel or doubly
        self.log_F = nn.Parameter(torch.full((outs,) if self.per_channel else (), torch.nan).to(W))
        self.log_L = nn.Parameter(torch.full((ins,), torch.nan).to(W)) if doubly else None
        self.trained = ("log_F", "log_L") if doubly else ("log_F",)
        self.register_buffer("in_index", None, persistent=False)
        self.register_buffer("out_index", None, persistent=False)
        self.__dict__["neighbours"] = Neighbours(None, None)

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
            W = W * per_in(c_in, W, groups=self.groups, kind=self.kind)
        if c_out is not None:
            W = W / per_out(c_out, W, groups=self.groups, kind=self.kind)
        if self.log_L is not None:
            scale, left = doubly_scales(W, self.layer, bits=self.bits)
            self.log_L.copy_(left.log())
        else:
            scale = weight_scale(W, self.layer, bits=self.bits, per_channel=self.per_channel)
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
        return on_weight(step, left, W, self.layer)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu())


def _kept(proxy: nn.Module, make: Callable[[], _Scaling]) -> _Scaling:
    """Return the trained state of a proxy, made at the first time, and again in place of placeholders."""
    scaling: _Scaling | None = proxy.__dict__.get(KEPT)
    if scaling is None or scaling.is_meta:
        scaling = make()
        _keep(proxy, scaling)
    return scaling


def _keep(proxy: nn.Module, scaling: _Scaling) -> None:
    proxy.__dict__[KEPT] = scaling
    # A bound method is copied with its object: the copy of a model builds its quantizers for itself.
    proxy.__dict__["init_tensor_quant"] = types.MethodType(_build_for_itself, proxy)


def adopt(model: nn.Module) -> None:
    """Keep the scalings that Brevitas has put into other quantizers, to give several activations one scale.

    Its `align_input_quant` hands the scaling of one quantizer to the injector of another, where it would be lost in a
    copy of the model.
    """
    for proxy in model.modules():
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and KEPT not in proxy.__dict__:
            scaling = next((m for m in proxy.modules() if isinstance(m, ActivationScaling)), None)
            if scaling is not None:
                _keep(proxy, scaling)
                proxy.quant_injector = proxy.quant_injector.let(scaling_impl=value(_kept_by))


def _kept_by(proxy_module: Any) -> Any:
    return proxy_module.__dict__[KEPT]


def take_plain_inputs(layer: Any) -> None:
    """Let a layer read plain tensors where it would read a `QuantTensor`; does nothing where it does already.

    From quantized inputs and weights Brevitas computes the scale of the accumulator, and takes the scale of the weight
    for one per output channel (0.13.1 to 0.13.4). One that differs by input channel has no accumulator scale.
    """
    if _plain_input not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_plain_input)
        layer.input_quant.register_forward_hook(_plain_output)


def take_any_inputs(layer: Any) -> None:
    """Undo `take_plain_inputs`."""
    for hooks in (layer._forward_pre_hooks, layer.input_quant._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_plain_input, _plain_output):
                del hooks[key]


def _plain_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.value if isinstance(a, QuantTensor) else a for a in args)


def _plain_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    # Brevitas asks a quantizer for its scale by calling it with a number.
    asks = isinstance(args[0], Tensor) and args[0].dim() == 0
    return output.value if isinstance(output, QuantTensor) and not asks else output


def _build_for_itself(proxy: Any, *args: Any, **kwargs: Any) -> None:
    """Build the quantizer of a proxy from its own layer and its own state.

    An injector is a class, which `copy.deepcopy` does not copy: that of a copied model still names the layer and the
    proxy of the original (seen in 0.13.1 to 0.13.4).
    """
    if proxy.quant_injector.proxy_module is not proxy:
        proxy.quant_injector = proxy.quant_injector.let(proxy_module=proxy)
        proxy.update_tracked_modules()
    type(proxy).init_tensor_quant(proxy, *args, **kwargs)


class _QFTWeight(NarrowIntQuant, WeightQuantSolver):
    """A weight quantizer that trains with the native gradient of its scale."""

    bit_width = 4
    restrict_scaling_type = RestrictValueType.FP
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_per_input_channel = False
    # The default clamp passes gradients where it clips, and the gradient of the scale then has the wrong sign.
    tensor_clamp_impl = TensorClamp

    @value
    def scaling_impl(
        proxy_module: Any,
        module: Any,
        bit_width: Any,
        narrow_range: bool,
        scaling_per_output_type: Any,
        scaling_per_input_channel: bool,
    ) -> _Scaling:
        if not narrow_range:
            raise ConfigError(
                "weight_narrow_range should be True: the grid of a weight is symmetric (Eq. 1). Found False."
            )
        first = module[0] if isinstance(module, tuple) else module
        if scaling_per_input_channel:
            take_plain_inputs(first)
        high = 2 ** (int(bit_width) - 1) - 1
        return _kept(
            proxy_module,
            lambda: WeightScaling(
                first,
                high=high,
                per_channel=scaling_per_output_type == ScalingPerOutputType.CHANNEL,
                doubly=scaling_per_input_channel,
            ),
        )


class QFTInt4WeightPerTensorFloat(_QFTWeight):
    """4-bit narrow-range signed weights with one scale per tensor."""


class QFTInt4WeightPerChannelFloat(_QFTWeight):
    """4-bit narrow-range signed weights with a scale per output channel."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class QFTInt4WeightDoublyPerChannelFloat(_QFTWeight):
    """4-bit narrow-range signed weights with a scale per output and one per input channel, S[o, i] = F[o] * L[i]."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    scaling_per_input_channel = True


class _QFTAct(ActQuantSolver):
    """An activation quantizer that trains with the native gradient of its scale."""

    bit_width = 8
    restrict_scaling_type = RestrictValueType.FP
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_impl_type = ScalingImplType.CONST  # asked for by the solver; `scaling_impl` decides
    asymmetric = False
    tensor_clamp_impl = TensorClamp

    @value
    def scaling_impl(
        proxy_module: Any, bit_width: Any, signed: bool, narrow_range: bool, asymmetric: bool, act_impl: Any
    ) -> _Scaling:
        if isinstance(act_impl, nn.Hardtanh):
            raise ConfigError(
                "QuantHardTanh leaves its clip to its quantizer's range, which is trained here. "
                "Use torch's Hardtanh and a QuantIdentity behind it."
            )
        low, high = integer_range(int(bit_width), signed=signed, narrow=narrow_range)
        return _kept(proxy_module, lambda: ActivationScaling(low=low, high=high, asymmetric=asymmetric))


class QFTUint8ActPerTensorFloat(UintQuant, _QFTAct):
    """8-bit unsigned activations with zero point 0, for what is never negative."""


class QFTInt8ActPerTensorFloat(IntQuant, _QFTAct):
    """8-bit signed activations with zero point 0."""


class QFTShiftedUint8ActPerTensorFloat(UintQuant, _QFTAct):
    """8-bit activations with a zero point: the grid covers an asymmetric range (Eq. 7)."""

    asymmetric = True

    @value
    def zero_point_impl(scaling_impl: ActivationScaling) -> ZeroPoint:
        return ZeroPoint(scaling_impl)


QFTInt4Weight = QFTInt4WeightPerChannelFloat
QFTUint8Act = QFTUint8ActPerTensorFloat
QFTInt8Act = QFTInt8ActPerTensorFloat
QFTShiftedUint8Act = QFTShiftedUint8ActPerTensorFloat
