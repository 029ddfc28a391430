"""Quantizers for Brevitas' layers whose scales are computed from degrees of freedom that layers share.

An injector says what a quantizer is; Brevitas builds the quantizer from it, and builds it again after a weight was
assigned or a state dict was loaded. The trained state must survive that, so it is kept on the proxy, and the injector
hands the same module to every new quantizer.
"""

import types
from collections.abc import Callable
from typing import Any, Final

from brevitas.core.function_wrapper import TensorClamp
from brevitas.inject import value
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant.base import IntQuant, NarrowIntQuant, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from qft_plugin.brevitas._scalings import ActivationScaling, Scaling, WeightScaling, ZeroPoint
from qft_plugin.errors import ConfigError, ModelError
from qft_plugin.graph.batch_norms import CONVOLUTIONS
from qft_plugin.tensors.grid import integer_range, largest_integer

KEPT: Final = "_qft_scaling"
"""Attribute of a proxy that holds its trained state; not registered, because its quantizer registers it already."""


def _kept(proxy: nn.Module, make: Callable[[], Scaling]) -> Scaling:
    """Return the trained state of a proxy, made at the first time, and again in place of placeholders."""
    scaling: Scaling | None = proxy.__dict__.get(KEPT)
    if scaling is None or scaling.is_meta:
        scaling = make()
        _keep(proxy, scaling)
    return scaling


def _keep(proxy: nn.Module, scaling: Scaling) -> None:
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


def _check_scale(restriction: Any, granularity: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse settings of a scale that would be accepted and have no effect."""
    if RestrictValueType(restriction) != RestrictValueType.FP:
        raise ConfigError(
            f"restrict_scaling_type should be FP: scales are trained as any positive number. Found {restriction}. "
            "Leave it out."
        )
    if ScalingPerOutputType(granularity) not in allowed:
        names = " or ".join(a.name for a in allowed)
        raise ConfigError(
            f"scaling_per_output should be {names}; vectors over the channels of activations come from link. "
            f"Found {granularity}."
        )


_Metaclass: Any = type(NarrowIntQuant)


class _TrueInjector(_Metaclass):
    """An injector that is true where it is tested, as any other class is.

    Brevitas' own have the length 0, for debuggers, and are false (0.13.1 to 0.13.4): `{"weight_bit_width": 8} if
    weight_quant else {}` in a network's class would leave its bit widths out without a word.
    """

    def __bool__(cls) -> bool:
        return True


class _QFTWeight(NarrowIntQuant, WeightQuantSolver, metaclass=_TrueInjector):
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
        restrict_scaling_type: Any,
        scaling_per_output: Any,
        scaling_per_input_channel: bool,
    ) -> Scaling:
        both = (ScalingPerOutputType.TENSOR, ScalingPerOutputType.CHANNEL)
        _check_scale(restrict_scaling_type, scaling_per_output, both)
        if not narrow_range:
            raise ConfigError(
                "weight_narrow_range should be True: the grid of a weight is symmetric (Eq. 1). Found False."
            )
        first = module[0] if isinstance(module, tuple) else module
        if not isinstance(first, (*CONVOLUTIONS, nn.Linear)):
            raise ModelError(
                "A weight quantizer of qft_plugin.brevitas should be that of a convolution or linear layer: its scale "
                f"is computed from those of the activations around it. Found one in a {type(first).__qualname__}. Give "
                "that layer a weight quantizer of brevitas.quant, or none."
            )
        if scaling_per_input_channel:
            take_plain_inputs(first)
        high = largest_integer(int(bit_width))
        return _kept(
            proxy_module,
            lambda: WeightScaling(
                first,
                high=high,
                per_channel=scaling_per_output == ScalingPerOutputType.CHANNEL,
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


class _QFTAct(ActQuantSolver, metaclass=_TrueInjector):
    """An activation quantizer that trains with the native gradient of its scale."""

    bit_width = 8
    restrict_scaling_type = RestrictValueType.FP
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_impl_type = ScalingImplType.CONST  # asked for by the solver; `scaling_impl` decides
    asymmetric = False
    tensor_clamp_impl = TensorClamp

    @value
    def scaling_impl(
        proxy_module: Any,
        bit_width: Any,
        signed: bool,
        narrow_range: bool,
        asymmetric: bool,
        act_impl: Any,
        restrict_scaling_type: Any,
        scaling_per_output: Any,
    ) -> Scaling:
        _check_scale(restrict_scaling_type, scaling_per_output, (ScalingPerOutputType.TENSOR,))
        if isinstance(act_impl, nn.Hardtanh):
            raise ConfigError(
                "QuantHardTanh leaves its clip to its quantizer's range, which is trained here. "
                "Use torch's Hardtanh and a QuantIdentity after it."
            )
        low, high = integer_range(int(bit_width), signed=signed, narrow=narrow_range)
        return _kept(proxy_module, lambda: ActivationScaling(low=low, high=high, asymmetric=asymmetric))


class QFTUint8ActPerTensorFloat(UintQuant, _QFTAct):
    """8-bit unsigned activations with zero point 0, for values that are never negative."""


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
