"""A quantized torch model whose quantizers are seen, and given other values, while it runs."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin.graph.operations import KEEPS_ORDER, LAYERS, MULTIPLIES, TABLE, WEIGHT_IN_OUT
from qft_plugin.graph.record import function_name
from qft_plugin.graph.torch_model import Call, tensors_in

SWALLOWED: Final = 1e-3
"""A product that is smaller than this share of its bias has lost three of its seven float32 digits to it."""


@dataclass(frozen=True)
class Grid:
    """The integers of a quantizer and their real values:  x_fq = (q - zero_point) * scale.

    Attributes:
        scale: real per step; broadcasts against the input of the quantizer.
        zero_point: the integer of the real 0, likewise.
        low: smallest integer.
        high: largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def steps(self, x: Tensor) -> Tensor:
        """Return values in steps, neither rounded nor clipped."""
        return x / self.scale + self.zero_point

    def integers(self, x_fq: Tensor) -> Tensor:
        """Return the integers of values that are on the grid."""
        return self.steps(x_fq).round()

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest real value."""
        low, high = ((end - self.zero_point.double()) * self.scale.double() for end in (self.low, self.high))
        return low, high


@dataclass(frozen=True)
class Quantizer:
    """A module of a torch model that returns a fake-quantized tensor.

    Attributes:
        module: the module.
        name: the user's name of it.
        read: from the arguments of a call to the tensor that is quantized, and its integers.
    """

    module: nn.Module
    name: str
    read: Callable[[tuple[Any, ...]], tuple[Tensor, Grid]]


@dataclass(frozen=True)
class Seen:
    """One call of an activation quantizer.

    Attributes:
        number: which call of an activation quantizer of this run it is.
        name: of the quantizer.
        layer: name of the weight that was used last on the way to it.
        x: its input.
        x_fq: its output.
        grid: its integers.
    """

    number: int
    name: str
    layer: str | None
    x: Tensor
    x_fq: Tensor
    grid: Grid

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"Quantizer {self.name}" + (f", after layer {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class Product:
    """One call of a convolution or linear function whose weight is quantized.

    Attributes:
        number: which call of such a function of this run it is.
        weight: name of the weight.
        result: its output without the bias.
        axis: the axis of the output channels.
        integers: of the weight, in its shape.
        W_fq: the quantized weight.
        out_axis: its axis of output channels (of the output channels of one group, for a transposed convolution).
        bias: `[out]`, `None` where there is none.
    """

    number: int
    weight: str
    result: Tensor
    axis: int
    integers: Tensor
    W_fq: Tensor
    out_axis: int
    bias: Tensor | None


@dataclass
class Run:
    """The record of one run.

    Attributes:
        outputs: all tensors of the model's output.
        path: names of the functions that it called, in their order.
        weights: the quantized weights that a run used, by name.
        layers: for each output the name of the weight that was used last on the way to it.
    """

    outputs: list[Tensor] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    layers: list[str | None] = field(default_factory=list)


class Watched:
    """A quantized torch model and its quantizers."""

    def __init__(
        self,
        model: nn.Module,
        quantizers: Sequence[Quantizer],
        wrapper: type[Any] | tuple[()] = (),
    ) -> None:
        """Keep the model; it is not changed.

        Args:
            model: the model, in eval mode.
            quantizers: all its quantizers, of weights and of activations.
            wrapper: the class of the host that holds a tensor as its `value`, beside its scale.
        """
        self.model, self.quantizers, self._wrapper = model, quantizers, wrapper
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._constants: dict[tuple[int, int], str] = {}
        for name, t in named:
            self._constants.setdefault(_memory(t), name)

    def outputs(self, result: Any) -> list[Tensor]:
        """List the tensors of the model's output."""
        return list(tensors_in(result, self._wrapper))

    @torch.no_grad()
    def run(
        self,
        call: Call,
        *,
        activation: Callable[[Seen], Tensor | None] = lambda _: None,
        product: Callable[[Product], Tensor | None] = lambda _: None,
    ) -> Run:
        """Run the model once.

        Args:
            call: its arguments.
            activation: called with each activation that is quantized; where it returns a tensor, the model goes on
                with that one.
            product: likewise with each product with a quantized weight.
        """
        run, weights, origins = Run(), _Weights(), _Origins(self._wrapper)
        count = 0

        def looked(quantizer: Quantizer, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
            nonlocal count
            x, grid = quantizer.read(args)
            name = self._constants.get(_memory(x))
            if name is not None:
                run.weights[name] = grid.integers(result)
                weights.add(result, name, run.weights[name])
                return None
            seen = Seen(count, quantizer.name, origins.of(x), x, result, grid)
            count += 1
            given = activation(seen)
            origins.pass_on(x, result if given is None else given)
            return given

        def hook_of(quantizer: Quantizer) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
                # Calls in here are no part of the model: neither a host's mode nor ours should count them.
                with torch._C.DisableTorchFunction():
                    return looked(quantizer, args, result)

            return hook

        args, kwargs = call
        origins.start([args, list(kwargs.values())])
        with contextlib.ExitStack() as stack:
            for quantizer in self.quantizers:
                stack.callback(quantizer.module.register_forward_hook(hook_of(quantizer)).remove)
            stack.enter_context(_Calls(run.path, weights, origins, product))
            result = self.model(*args, **kwargs)
        run.outputs = self.outputs(result)
        run.layers = [origins.of(t) for t in run.outputs]
        return run


class _Weights:
    """The quantized weights of a run, and which tensors hold them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, str, Tensor]] = {}  # a tensor that lives keeps its id

    def add(self, t: Tensor, name: str, integers: Tensor) -> None:
        self._held[id(t)] = t, name, integers

    def find(self, t: Any) -> tuple[str, Tensor] | None:
        found = self._held.get(id(t))
        return None if found is None else found[1:]


class _Origins:
    """Which weight was used last on the way to each tensor of a run."""

    def __init__(self, wrapper: type[Any] | tuple[()]) -> None:
        self._wrapper = wrapper
        self._held: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # an id is unique only while its tensor lives
        self._names: list[str] = []

    def of(self, value: Any) -> str | None:
        """Name the weight for a tensor, `None` if there is none; where it is not known, the last one of all."""
        place = self._place(value)
        place = len(self._names) - 1 if place is None else place
        return self._names[place] if place >= 0 else None

    def start(self, inputs: Any) -> None:
        """Note tensors that no weight was used for."""
        self._put(inputs, -1)

    def pass_on(self, read: Any, made: Any) -> None:
        """Note that something was made of something else."""
        place = self._place(read)
        if place is not None:
            self._put(made, place)

    def use(self, name: str, made: Any) -> None:
        """Note that a weight was used to make something."""
        self._names.append(name)
        self._put(made, len(self._names) - 1)

    def _place(self, value: Any) -> int | None:
        """Return the last of the weights that a value comes from, `None` where all of it is unknown: parameters."""
        places = []
        for t in tensors_in(value, self._wrapper):
            held = self._held.get(id(t))
            if held is not None and held[0]() is t:
                places.append(held[1])
        return max(places, default=None)

    def _put(self, value: Any, place: int) -> None:
        for t in tensors_in(value, self._wrapper):
            self._held[id(t)] = weakref.ref(t), place


class _Calls(TorchFunctionMode):
    """Follows quantized weights to the functions that multiply by them, and the products through the network."""

    def __init__(
        self, path: list[str], weights: _Weights, origins: _Origins, product: Callable[[Product], Tensor | None]
    ) -> None:
        super().__init__()
        self._path, self._weights, self._origins, self._product = path, weights, origins, product
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = function_name(func)
        if name.startswith("__") and name.endswith("__") and not isinstance(result, Tensor):
            return result  # attributes and conversions
        self._path.append(name)
        self._origins.pass_on([args, list((kwargs or {}).values())], result)
        if name in LAYERS or name in WEIGHT_IN_OUT:
            words = {**dict(zip(TABLE[name].arguments, args, strict=False)), **(kwargs or {})}
            W_fq, bias, made = (_tensor_of(t) for t in (words.get("weight"), words.get("bias"), result))
            found = self._weights.find(W_fq)
            if found is not None:
                self._origins.use(found[0], result)
                if bias is not None:
                    read = _tensor_of(words["input"])
                    made = _without_bias(func, name, {**words, "input": read, "weight": W_fq}, made, bias)
                given = self._product(_product(name, self._count, *found, W_fq, bias, made))
                self._count += 1
                result = result if given is None else given
            return result
        if name in KEEPS_ORDER or name in MULTIPLIES:
            found = self._weights.find(args[0]) if args else None
            if found is not None and result.numel() == args[0].numel():
                self._weights.add(result, *found)
        return result


def _memory(t: Tensor) -> tuple[int, int]:
    """Tell tensors apart by their memory: a view of a whole weight is that weight."""
    return t.data_ptr(), t.numel()


def _tensor_of(value: Any) -> Any:
    """Return the tensor inside the wrapper of a host."""
    return value if value is None or isinstance(value, Tensor) else value.value


def _without_bias(func: Any, name: str, words: dict[str, Any], result: Tensor, bias: Tensor) -> Tensor:
    """Take the bias off the result of a layer, which is computed anew where the bias has rounded much of it away."""
    after = 0 if name == "linear" or name in WEIGHT_IN_OUT else words["weight"].dim() - 2
    product = result - bias.reshape(-1, *(1,) * after)
    if name in WEIGHT_IN_OUT or float(product.abs().max()) > SWALLOWED * float(bias.abs().max()):
        return product
    found: Tensor = func(**{**words, "bias": None})
    return found


def _product(
    name: str, number: int, weight: str, integers: Tensor, W_fq: Tensor, bias: Tensor | None, result: Tensor
) -> Product:
    linear = name == "linear" or name in WEIGHT_IN_OUT
    if name in WEIGHT_IN_OUT:
        integers, W_fq = integers.transpose(-1, -2), W_fq.transpose(-1, -2)
    axis = result.dim() - 1 if linear else result.dim() - (W_fq.dim() - 2) - 1
    return Product(number, weight, result, axis, integers, W_fq, int(name.startswith("conv_transpose")), bias)


def positional(call: Call) -> list[Tensor]:
    """List the tensors of a call in the order of a file's inputs."""
    return list(tensors_in([*call[0], *call[1].values()]))
