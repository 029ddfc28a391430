"""A float twin of a Brevitas model: plain torch layers, and a light stand-in for each quantizer of this plugin.

The twin has the model's parameter names. It is traced and trained in the model's place: torch's own layers cost less
per call than Brevitas' and a plain tensor can be followed where a `QuantTensor` cannot.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from brevitas.nn import QuantCat, QuantEltwiseAdd
from brevitas.nn.quant_layer import QuantNonLinearActLayer, QuantWeightBiasInputOutputLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from qft_plugin.brevitas._quantizers import KEPT
from qft_plugin.brevitas._scalings import ActivationScaling, WeightScaling
from qft_plugin.errors import ModelError
from qft_plugin.graph.batch_norms import CONVOLUTIONS
from qft_plugin.graph.copies import copy_of
from qft_plugin.training.student import FakeQuantizer

PLAIN: Final = (*CONVOLUTIONS, nn.Linear)


def activation_scaling(proxy: nn.Module) -> ActivationScaling | None:
    """Return the trained state of an activation quantizer of this plugin, `None` for any other."""
    kept = proxy.__dict__.get(KEPT)
    return kept if isinstance(kept, ActivationScaling) else None


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of Brevitas with a quantized weight, by whichever quantizer."""
    return isinstance(module, QuantWeightBiasInputOutputLayer) and module.weight_quant.is_quant_enabled


def weight_scaling(layer: nn.Module) -> WeightScaling | None:
    """Return the trained state of a layer's weight quantizer, `None` where it is not one of this plugin."""
    kept = layer.weight_quant.__dict__.get(KEPT) if hasattr(layer, "weight_quant") else None
    return kept if isinstance(kept, WeightScaling) else None


def make_twin(model: nn.Module) -> nn.Module:
    """Return a float copy of a model in eval mode; the model is not changed.

    Raises:
        ModelError: a layer with a quantizer of this plugin quantizes its bias too.
    """
    twin = copy_of(model).eval()
    quantizers: dict[int, FakeQuantizer] = {}
    replaced: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        if id(module) in inside:
            continue
        if id(module) not in replaced:
            replacement = _replacement(name, module, quantizers)
            if replacement is None:
                continue
            replaced[id(module)] = replacement
        inside.update(id(m) for m in module.modules() if m is not module)
        if not name:
            return replaced[id(module)]
        twin.set_submodule(name, replaced[id(module)])
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def _replacement(name: str, module: nn.Module, quantizers: dict[int, FakeQuantizer]) -> nn.Module | None:
    """Return what stands for a module in the twin, or `None` where it is an ordinary one."""
    proxies = [child for child in module.children() if isinstance(child, QuantProxyFromInjector)]
    if not proxies:
        return None
    if not all(activation_scaling(p) or p.__dict__.get(KEPT) or not p.is_quant_enabled for p in proxies):
        if any(p.__dict__.get(KEPT) for p in proxies) and quantizes_bias(module):
            raise ModelError(
                f"Layer {name}: its bias should not be quantized while its scales are trained. Found a bias_quant. "
                "Build it with bias_quant=None and pass bias_bits to fold."
            )
        return _Foreign(module)

    def stand_in(proxy: Any) -> FakeQuantizer | None:
        scaling = activation_scaling(proxy)
        return None if scaling is None else quantizers.setdefault(id(scaling), FakeQuantizer())

    its_own = type(module).forward.__module__.startswith("brevitas.nn")
    if not its_own or getattr(module, "is_same_padded_strided", False):
        return _Foreign(module)
    if isinstance(module, QuantWeightBiasInputOutputLayer) and isinstance(module, PLAIN):
        return _plain_layer(module, stand_in(module.input_quant), stand_in(module.output_quant))
    if isinstance(module, QuantNonLinearActLayer):
        fused = module.act_quant.fused_activation_quant_proxy
        function = nn.Identity() if fused is None else fused.activation_impl
        return _Activation(stand_in(module.input_quant), function, stand_in(module.act_quant))
    if isinstance(module, (QuantEltwiseAdd, QuantCat)):
        join = torch.add if isinstance(module, QuantEltwiseAdd) else torch.cat
        return _Join(stand_in(module.input_quant), join, stand_in(module.output_quant))
    return _Foreign(module)


def quantizes_bias(module: nn.Module) -> bool:
    """Whether a layer has a quantizer of its bias that is on."""
    proxy = getattr(module, "bias_quant", None)
    return proxy is not None and bool(proxy.is_quant_enabled)


def _plain_layer(layer: nn.Module, before: FakeQuantizer | None, after: FakeQuantizer | None) -> nn.Module:
    """Return torch's own layer with the same settings and tensors, and quantizers as hooks around it."""
    base = next(c for c in type(layer).__mro__ if c in PLAIN)
    plain: nn.Module = base.__new__(base)
    nn.Module.__init__(plain)
    # The constructor would make and fill new tensors only to drop them.
    settings = {k: v for k, v in vars(layer).items() if not k.startswith("_") or k.startswith("_reversed_padding")}
    plain.__dict__.update(settings)
    for name in ("weight", "bias"):
        plain.register_parameter(name, getattr(layer, name))
    if before is not None:
        plain.add_module("input_quant", before)
        plain.register_forward_pre_hook(lambda module, args: (module.input_quant(args[0]), *args[1:]))
    if after is not None:
        plain.add_module("output_quant", after)
        plain.register_forward_hook(lambda module, _, out: module.output_quant(out))
    return plain


class _Activation(nn.Module):
    """An activation function between quantizers."""

    def __init__(self, before: FakeQuantizer | None, function: nn.Module, after: FakeQuantizer | None) -> None:
        super().__init__()
        self.input_quant, self.function, self.act_quant = before, function, after

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quant is not None:
            x = self.input_quant(x)
        x = self.function(x)
        return x if self.act_quant is None else self.act_quant(x)


class _Join(nn.Module):
    """An addition or a concatenation of quantized tensors."""

    def __init__(self, before: FakeQuantizer | None, join: Callable[..., Tensor], after: FakeQuantizer | None) -> None:
        super().__init__()
        self.input_quant, self.join, self.output_quant = before, join, after

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def quantized(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [quantized(t) for t in x]
            return self.input_quant(x) if self.input_quant is not None and isinstance(x, Tensor) else x

        x = self.join(*(quantized(a) for a in args), **kwargs)
        return x if self.output_quant is None else self.output_quant(x)


class _Foreign(nn.Module):
    """A module with quantizers of another kind: it computes what it computes, and no scale passes through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Under a name of its own its parameters would not be found by those of the model; they are not trained.
        self.__dict__["module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return foreign_quantizer(*args, module=self.module, **kwargs)


@wrap_torch_function(lambda *args, **_: [a for a in args if isinstance(a, Tensor)])
def foreign_quantizer(*args: Any, module: nn.Module, **kwargs: Any) -> Any:
    """Call a module as one operation, whose inside a recorder does not see."""
    return getattr(result := module(*args, **kwargs), "value", result)
