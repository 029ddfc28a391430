"""Torch's own layers in the places of subclasses, and the computation of a subclass around its layer."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin.brevitas._layers import QUANTIZED
from qft_plugin.graph.batch_norms import NORMS
from qft_plugin.graph.operations import LAYERS, TABLE
from qft_plugin.graph.record import function_name
from qft_plugin.graph.torch_model import Call, replace_modules, version_of
from qft_plugin.tensors.axes import Axes

NORM: Final = "batch_norm"


class Around(nn.Module):
    """A subclass of a layer, in which a module of torch's own stands for the call of the layer's function.

    Attributes:
        layer: the module that is called in the place of the function.
        original: the subclass.
    """

    def __init__(self, original: nn.Module, layer: nn.Module, function: str) -> None:
        """Put a layer into a subclass.

        Args:
            original: an object of the subclass; it calls the function once.
            layer: the module to call instead.
            function: name of the function.
        """
        super().__init__()
        self.layer = layer
        self.original = original
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the subclass with its layer."""
        with _Instead(self.function, self.layer):
            return self.original(*args, **kwargs)


class _Instead(TorchFunctionMode):
    """While active, the first call of a function is that of a module."""

    def __init__(self, function: str, module: nn.Module) -> None:
        super().__init__()
        self._function, self._module, self._called = function, module, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._called or function_name(func) != self._function:
            return func(*args, **kwargs)
        self._called = True
        return self._module(args[0] if args else kwargs["input"])


@dataclass(frozen=True)
class _Seen:
    """One call of a layer's function in one call of a module."""

    function: str
    arguments: Mapping[str, Any]
    direct: bool


@dataclass(frozen=True)
class _Noted:
    """A call with its result; the versions tell whether something was in place before or after it."""

    function: str
    arguments: Mapping[str, Any]
    read: int
    result: Any
    made: int


class _Watch(TorchFunctionMode):
    """Notes the calls of layers' functions and of BatchNorms while a module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Noted] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name not in LAYERS and name != NORM:
            return func(*args, **(kwargs or {}))
        given = dict(zip(TABLE[name].arguments, args, strict=False)) | (kwargs or {})
        version = version_of(given["input"])
        result = func(*args, **(kwargs or {}))
        self.calls.append(_Noted(name, given, version, result, version_of(result)))
        return result


@torch.no_grad()
def make_plain(model: nn.Module, call: Call) -> None:
    """Put torch's own layers into the places of subclasses, in place; the model computes what it has computed.

    A subclass that calls the function of its layer on its input, and returns what comes out, is that layer: its weight
    may be computed from parameters (a standardised or normalised kernel), which is constant once the network is
    trained. One that computes something around it (padding, an activation function after a BatchNorm) keeps that, and
    its layer becomes a module in it, named `layer`.

    Args:
        model: a float model in eval mode.
        call: arguments to run it with.
    """
    special = [m for m in model.modules() if _is_special(m)]
    if not special:
        return
    seen: dict[nn.Module, list[_Seen | None]] = {module: [] for module in special}
    for module, calls in seen.items():
        # On the object, and taken away below: what the forward calls is seen, its children included.
        module.__dict__["forward"] = _watched(module, module.forward, calls)
    try:
        model(*call[0], **call[1])
    finally:
        for module in special:
            del module.__dict__["forward"]
    replaced: dict[nn.Module, nn.Module] = {}
    for module, calls in seen.items():
        plain = _plain(module, calls)
        if plain is not None:
            replaced[module] = plain
    replace_modules(model, replaced)


def _is_special(module: nn.Module) -> bool:
    """Whether a module is a layer or a BatchNorm, but not one of torch's own with parameters of its own."""
    kinds = (*QUANTIZED, *NORMS)
    if not isinstance(module, kinds):
        return False
    weight = module._parameters.get("weight", None)
    return type(module) not in kinds or (isinstance(module, tuple(QUANTIZED)) and weight is None)


def _watched(module: nn.Module, forward: Callable[..., Any], calls: list[_Seen | None]) -> Callable[..., Any]:
    """Return a forward that notes what it calls; `None` where that is not one layer."""

    def run(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        version = version_of(x) if isinstance(x, Tensor) else 0
        with _Watch() as watch:
            result = forward(*args, **kwargs)
        own = [c for c in watch.calls if (c.function == NORM) == isinstance(module, NORMS)]
        if len(own) != 1 or len(args) + len(kwargs) != 1 or not isinstance(x, Tensor):
            calls.append(None)
            return result
        noted = own[0]
        reads_input = noted.arguments.get("input") is x and noted.read == version
        returned = noted.result is result and noted.made == version_of(noted.result)
        calls.append(_Seen(noted.function, noted.arguments, reads_input and returned))
        if noted.function != NORM and not _is_constant(module, forward, x, noted.arguments):
            calls.append(None)
        return result

    return run


def _is_constant(module: nn.Module, forward: Callable[..., Any], x: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether the weight that a module computes is the same for another input."""
    if given["weight"] is module._parameters.get("weight"):
        return True
    with _Watch() as watch:
        forward(0.5 * x + 0.25)
    again = [c.arguments for c in watch.calls if c.function in LAYERS]
    return len(again) == 1 and all(_same(given.get(k), again[0].get(k)) for k in ("weight", "bias"))


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _plain(module: nn.Module, calls: list[_Seen | None]) -> nn.Module | None:
    """Return what takes the place of a subclass; `None` where it stays as it is."""
    first = calls[0] if calls else None
    if first is None or any(c is None or not _alike(c, first) for c in calls):
        return None
    layer = _norm(module, first) if first.function == NORM else _layer(first)
    if layer is None:
        return None
    return layer if all(c is not None and c.direct for c in calls) else Around(module, layer, first.function)


def _alike(a: _Seen, b: _Seen) -> bool:
    """Whether two calls are the same but for their inputs."""
    names = (set(a.arguments) | set(b.arguments)) - {"input"}
    return a.function == b.function and all(
        _same(x, y) or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)
        for x, y in ((a.arguments.get(n), b.arguments.get(n)) for n in names)
    )


def _parameter(value: Any) -> nn.Parameter | None:
    if value is None or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone())


def _layer(seen: _Seen) -> nn.Module | None:
    """Make the layer that calls a function with these arguments."""
    given = {name: value for name, value in seen.arguments.items() if name != "input"}
    weight, bias = _parameter(given.pop("weight")), _parameter(given.pop("bias", None))
    assert weight is not None
    (kind,) = TABLE[seen.function].modules
    names = inspect.signature(kind).parameters
    if not set(given) <= set(names):
        return None
    ins, outs = Axes(seen.function, int(given.get("groups", 1))).channels(weight)
    sizes = () if kind is nn.Linear else (tuple(weight.shape[2:]),)
    layer: Any = kind(ins, outs, *sizes, **given, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = weight, bias
    return layer.eval() if isinstance(layer, nn.Module) else None


def _norm(module: nn.Module, seen: _Seen) -> nn.Module | None:
    """Make torch's own BatchNorm with the tensors of a subclass; `None` where it uses others."""
    given = seen.arguments
    names = ("running_mean", "running_var", "weight", "bias")
    if given.get("training") or any(given.get(n) is not getattr(module, n) for n in names):
        return None
    if given.get("running_mean") is None:
        return None
    kind = next(k for k in NORMS if isinstance(module, k))
    layer = kind(len(given["running_mean"]), eps=given.get("eps", 1e-5), affine=given.get("weight") is not None)
    for name in names:
        setattr(layer, name, given.get(name))
    return layer.eval()
