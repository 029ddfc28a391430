"""Copies of a model that share nothing with it, with a plain parameter for every weight that torch computes anew."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qft_plugin.errors import ModelError

OLD_NORMS: Final = ((WeightNorm, remove_weight_norm), (SpectralNorm, remove_spectral_norm))
"""Hooks that compute a weight in front of every call, and the function that leaves a plain parameter."""


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model, which stays as it is.

    `copy.deepcopy` refuses tensors with a history, such as the weight that a hook of torch's `weight_norm` or `prune`
    has computed, or an activation that a hook has kept. Here the copy gets their values.

    Args:
        model: any module.

    Raises:
        ModelError: something in it cannot be copied.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for t in _tensors(value):
                if not t.is_leaf:
                    known[id(t)] = t.detach().clone()
    try:
        return copy.deepcopy(model, known)
    except Exception as error:  # objects of other packages may refuse in any way
        raise ModelError(
            "The model should be one that copy.deepcopy can copy, since it is never changed itself. Found "
            f"{type(error).__name__}: {error}. Take what cannot be copied (a lock, a file, a generator) out of its "
            "attributes and hooks."
        ) from error


def _tensors(value: object) -> Iterator[Tensor]:
    """Iterate over the tensors in an attribute; of other packages' objects nothing is asked."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)


@dataclass(frozen=True)
class Plain:
    """A copy of a model whose weights are parameters.

    Attributes:
        model: the copy, in eval mode.
        kept: by name of a weight that `torch.nn.utils.prune` has pruned, true where it is not.
    """

    model: nn.Module
    kept: dict[str, Tensor]


@torch.no_grad()
def plain_copy(model: nn.Module) -> Plain:
    """Copy a model, and give every weight that torch computes in front of a call the value that it has in eval mode.

    These are torch's parametrizations, and what its hooks of `weight_norm`, `spectral_norm` and `prune` compute. None
    depends on the images, and no host has a quantizer for a weight that is not a parameter.

    Args:
        model: any module.

    Raises:
        ModelError: something in it cannot be copied.
    """
    plain = copy_of(model).eval()
    kept: dict[str, Tensor] = {}
    for path, module in list(plain.named_modules()):
        if parametrize.is_parametrized(module):
            _leave_parametrized(module)
        for hook in list(module._forward_pre_hooks.values()):
            for kind, remove in OLD_NORMS:
                if isinstance(hook, kind):
                    remove(module, hook.name)
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                kept[f"{path}.{name}".lstrip(".")] = getattr(module, f"{name}_mask") != 0
                prune.remove(module, name)  # type: ignore[no-untyped-call]
    return Plain(plain, kept)


def _leave_parametrized(module: nn.Module) -> None:
    """Give a module the values of its parametrized tensors.

    Torch's `remove_parametrizations` would take the property away from the class of the module, which is that of the
    user's module too.
    """
    lists: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in lists}
    trains = {name: any(True for _ in lists[name].parameters()) for name in lists}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        if trains[name]:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
