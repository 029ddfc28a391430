"""Back to Brevitas: trained degrees of freedom into a linked model, and a linked model into an ordinary one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from brevitas.core.zero_point import ParameterZeroPoint
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant.base import IntQuant, NarrowIntQuant, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.bias import BiasQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn

from qft_plugin.brevitas._attach import Placed
from qft_plugin.brevitas._link import dof_map_of, shared_factors
from qft_plugin.brevitas._quantizers import take_any_inputs
from qft_plugin.brevitas._read import Source
from qft_plugin.brevitas._save import weight_integers
from qft_plugin.brevitas._scalings import ActivationScaling, WeightScaling
from qft_plugin.brevitas._twin import activation_scaling, weight_scaling
from qft_plugin.deploy.images import hand_images_on
from qft_plugin.errors import ConfigError, DeployabilityError
from qft_plugin.graph.batch_norms import NORMS, affine_of, set_affine
from qft_plugin.graph.channel_affine import Rescaled
from qft_plugin.graph.channel_clip import ChannelHardtanh
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import PINNED, DofMap
from qft_plugin.graph.torch_model import replace_modules, tensor_of
from qft_plugin.job.host import Start
from qft_plugin.report.kept import hand_report_on
from qft_plugin.tensors.grid import signed_peak
from qft_plugin.training.integers import DeployedWeight, folded_tensors
from qft_plugin.training.rounding import moved_to
from qft_plugin.training.solve import rescale_factor


@torch.no_grad()
def write(source: Source, start: Start[Placed], deployed: Mapping[str, DeployedWeight]) -> None:
    """Put the degrees of freedom into the linked model that was read, in place.

    Args:
        source: its description.
        start: holds the degrees of freedom and the factors that were folded before.
        deployed: the integers and steps of all quantized weights by name.
    """
    model = source.linked
    dof = start.dof
    log_c = start.log_c + dof.log_c
    values = folded_tensors(dof)
    for name, found in deployed.items():
        step = dof.map.layer(name).axes.on_weight(found.step, found.step_in, values[name])
        values[name] = moved_to(found.integers, values[name], step)
    unfolded = fold_network(dof.map, -log_c, values)
    for layer in dof.map.layers:
        if layer.weight in dof.weight_grids:
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    model.get_parameter(parameter).copy_(unfolded[parameter])
    scales, zero_points = dof.activations.steps(), dof.activations.zero_points()
    for name, scaling in source.activations.items():
        scaling.start(scales[name], int(zero_points.get(name, dof.activations.grids[name].zero_point)))
    factors = shared_factors(model)
    assert factors is not None
    factors.log_c.copy_(log_c)
    factors.bias_bits = dof.hardware.bias_bits
    for name in dof.weight_grids:
        weight, trained = source.weights[name], dof.trained_weight(name)
        weight.log_F.copy_(rescale_factor(dof, trained).log())
        before = weight.neighbours.before
        if before is not None and dof.weight_grids[name].s_in is None:
            weight.log_F.add_(before.log_s)  # its inputs have several scales, of which it follows one from now on
        if weight.log_L is not None and trained.log_L is not None:
            weight.log_L.copy_(trained.log_L)
        weight.ready = True


class _Constant(ExtendedInjector):
    """A stock quantizer whose scale is given and stays in the state dict."""

    restrict_scaling_type = RestrictValueType.FP
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_per_output_type = ScalingPerOutputType.TENSOR


class FoldedWeight(_Constant, NarrowIntQuant, WeightQuantSolver):
    """Narrow-range signed weights with a given scale."""


class FoldedBias(_Constant, IntQuant, BiasQuantSolver):
    """Signed biases with a given scale."""

    requires_input_scale = False


class FoldedIntAct(_Constant, IntQuant, ActQuantSolver):
    """Signed activations with a given scale."""


class FoldedUintAct(_Constant, UintQuant, ActQuantSolver):
    """Unsigned activations with a given scale."""


class FoldedShiftedUintAct(FoldedUintAct):
    """Unsigned activations with a given scale and zero point."""

    quantize_zero_point = True
    zero_point_impl = ParameterZeroPoint


@torch.no_grad()
def fold(model: nn.Module, *, bias_bits: int | None = None) -> nn.Module:
    """Return an ordinary Brevitas model with constant scales, which every exporter of Brevitas takes.

    The cross-layer factors move into the weights and biases on both sides, so that activations have one scale per
    tensor and weights one per tensor or per output channel. The integer weights are those of the linked model.

    Args:
        model: a linked model; it is not changed.
        bias_bits: quantize the biases to so many bits, with the scale of the accumulator (Eq. 8); `None` takes the
            `HardwareSpec.bias_bits` that the model was finetuned with, and leaves them in float where it had none.

    Raises:
        ModelError: the model is not linked.
        DeployabilityError: a bias has no accumulator scale, because the input of its layer is not quantized or the
            weight's scale differs by input channel, or does not fit the bits; it names the layer.
        ConfigError: `bias_bits` is no bit width.
    """
    if bias_bits is not None and (type(bias_bits) is not int or not 2 <= bias_bits <= 32):
        raise ConfigError(f"bias_bits should be a whole number from 2 to 32, or None. Found {bias_bits!r}.")
    dof_map = dof_map_of(model)
    trained = shared_factors(model)
    assert trained is not None
    bits = trained.bias_bits if bias_bits is None else bias_bits
    folded = copy_of(model).eval()
    scalings = {name: s for name, m in folded.named_modules() if (s := weight_scaling(m)) is not None}
    integers = weight_integers(folded)
    factors = shared_factors(folded)
    assert factors is not None
    dof_map = _channelwise(folded, dof_map)
    tensors = {name: tensor_of(folded, name) for name in names_of(dof_map.layers)}
    for name, tensor in fold_network(dof_map, factors.log_c, tensors).items():
        tensors[name].copy_(tensor)
    proxies: dict[int, Any] = {}
    for name, module in folded.named_modules():
        if name in scalings:
            _fix_weight(module, scalings[name], integers[f"{name}.weight"], proxies)
            # Training leaves the biases of layers without an accumulator in float; who asks for them here is told.
            asked = bias_bits is not None or not _missing_accumulator(scalings[name])
            if bits is not None and module.bias is not None and asked:
                _fix_bias(name, module, scalings[name], bits)
    for module in list(folded.modules()):
        for attribute in ("input_quant", "act_quant", "output_quant"):
            proxy = getattr(module, attribute, None)
            scaling = activation_scaling(proxy) if isinstance(proxy, nn.Module) else None
            if scaling is not None:
                setattr(module, attribute, _fixed_activation(module, proxy, scaling, proxies))
    hand_images_on(model, folded)  # a copy of an fx module has lost them
    hand_report_on(model, folded)
    return folded.eval()  # new quantizers start in train mode


def _channelwise(model: nn.Module, dof_map: DofMap) -> DofMap:
    """Let modules of a model hold what its channels need, in place; return the map without those that need nothing.

    A ReLU6 gets a bound for each channel, a function that no scale passes through a factor after it, and a BatchNorm
    becomes one that only multiplies and shifts.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    needless = []
    like = next(p for p in model.parameters() if p.is_floating_point())
    for layer in dof_map.layers:
        if layer.kind not in ("hardtanh", "channel_affine"):
            continue
        module, channels = model.get_submodule(layer.weight.rpartition(".")[0]), len(layer.out_index)
        if isinstance(module, NORMS):
            set_affine(module, *affine_of(module))
        elif isinstance(module, Rescaled):
            continue  # the factors of an addend, which swap has put there
        elif not bool((layer.out_index != PINNED).any()):
            needless.append(layer)
        elif isinstance(module, nn.Hardtanh):
            replaced[module] = ChannelHardtanh(module, channels, axis=layer.axis, like=like)
        else:
            replaced[module] = Rescaled(module, channels, axis=layer.axis, like=like)
    replace_modules(model, replaced)
    return replace(dof_map, layers=tuple(layer for layer in dof_map.layers if layer not in needless))


def _fix_weight(layer: Any, scaling: WeightScaling, integers: Tensor, proxies: dict[int, Any]) -> None:
    """Give a layer a stock quantizer, and exactly the weight that its integers stand for."""
    left = None if scaling.log_L is None else scaling.log_L.exp()
    if left is None:
        take_any_inputs(layer)
    step = scaling.axes.on_weight(scaling.folded_step(), left, layer.weight)
    injector = FoldedWeight.let(
        bit_width=scaling.bits,
        scaling_init=step * scaling.high,
        scaling_shape=tuple(step.shape),
        **({} if step.dim() == 0 else {"scaling_per_output_type": ScalingPerOutputType.CHANNEL}),
    )
    layer.weight_quant = _rebuilt(layer, layer.weight_quant, injector, proxies)
    layer.weight.copy_(integers * layer.weight_quant.scale())


def _missing_accumulator(scaling: WeightScaling) -> str:
    """Say why a layer has no accumulator in one scale; empty where it has."""
    problems = {
        "its input is not quantized": scaling.neighbours.before is None,
        "the scale of its weight differs by input channel": scaling.log_L is not None,
        "it reads activations of several scales": not scaling.neighbours.one_input,
    }
    return ", ".join(words for words, holds in problems.items() if holds)


def _fix_bias(name: str, layer: Any, scaling: WeightScaling, bits: int) -> None:
    """Quantize a bias with the scale of the accumulator,  S_acc = s_in * S_w  (Eq. 8)."""
    before, why = scaling.neighbours.before, _missing_accumulator(scaling)
    if before is None or why:
        raise DeployabilityError(
            f"Layer {name}: its bias should have the scale of the accumulator. Found none: {why}. "
            "Call fold without bias_bits."
        )
    largest = 2.0 ** (bits - 1)
    scale = (before.log_s.exp() * scaling.folded_step()).expand(layer.bias.shape if scaling.per_channel else ())
    peak = signed_peak((layer.bias / scale).round())
    if peak >= largest:
        raise DeployabilityError(
            f"Layer {name}: its bias should fit {bits} bits of the accumulator's scale. Found {peak} steps. "
            f"Pass bias_bits={peak.bit_length() + 1} or more."
        )
    injector = FoldedBias.let(bit_width=bits, scaling_init=scale * largest, scaling_shape=tuple(scale.shape))
    layer.bias_quant = injector.proxy_class(layer, injector)


def _fixed_activation(module: nn.Module, proxy: Any, scaling: ActivationScaling, proxies: dict[int, Any]) -> Any:
    """Return a stock quantizer with the step of one of this plugin."""
    kind = FoldedShiftedUintAct if scaling.asymmetric else FoldedUintAct if scaling.low == 0 else FoldedIntAct
    old = proxy.quant_injector
    narrow = scaling.low + scaling.high == 0
    step = scaling.log_s.exp()
    settings: dict[str, Any] = {
        "bit_width": (scaling.high - scaling.low).bit_length(),
        "narrow_range": narrow,
        "scaling_init": step * max(scaling.high, -scaling.low),
        "act_impl": old.act_impl if "act_impl" in old else None,
        "passthrough_act": proxy.is_passthrough_act,
    }
    if scaling.asymmetric:
        settings["zero_point_init"] = step * (scaling.zero_point - scaling.low)
    return _rebuilt(module, proxy, kind.let(**settings), proxies)


def _rebuilt(module: nn.Module, old: Any, injector: Any, proxies: dict[int, Any]) -> Any:
    """Return a proxy in the place of another; modules that shared the old one share the new one."""
    if id(old) in proxies:
        proxies[id(old)][1].add_tracked_module(module)
    else:
        proxies[id(old)] = old, injector.proxy_class(module, injector)  # an id is unique only while its object lives
    proxy = proxies[id(old)][1]
    for parameter in proxy.parameters():
        parameter.requires_grad_(False)
    return proxy
