"""NNCF's hooks run without NNCF: the same modules at the same calls, without finding out in every run which they are.

NNCF names every call anew in every run, by the stack of modules that it stands in, and looks for hooks by this name.
While a student trains the calls are the same in every step, so the hooks are found once; from then on they belong to
the n-th call of their function.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from torch import Tensor, nn

from qft_plugin.graph.channel_clip import relu_operands
from qft_plugin.graph.operations import NEW_MEMORY
from qft_plugin.graph.record import Counted, function_name
from qft_plugin.graph.torch_model import tensors_in, version_of
from qft_plugin.training.student import FakeQuantizer

logger = logging.getLogger("qft_plugin")

Place = tuple[int | str, int | None]
"""An argument by position or keyword, or a result, and the position in it where it is a list."""


class LostHookError(Exception):
    """The call that a hook belongs to cannot be found."""


@dataclass
class Hooks:
    """The hooks of one call, in the order that they run in.

    Attributes:
        before: on its arguments.
        after: on its results, which count as the arguments of a call of their own.
        rectifies: the call is a ReLU, or a bounded one, and nothing else reads, or changes, what it reads: a quantizer
            that computes it keeps that for the backward pass, and does not change it where the ReLU works in place.
    """

    before: list[tuple[Place, nn.Module]] = field(default_factory=list)
    after: list[tuple[Place, nn.Module]] = field(default_factory=list)
    rectifies: bool = False

    def quantizer(self) -> FakeQuantizer | None:
        """Return the quantizer that computes the call along with its own rounding, `None` where there is none."""
        first = self.after[0][1] if self.rectifies and self.after else None
        return first if isinstance(first, FakeQuantizer) and first.starts_at_zero else None


class _Probe(nn.Module):
    """Stands in for a hook and writes down its input."""

    def __init__(self, name: str, seen: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.name, self.seen = name, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.name, x))
        return x


class _Finder(Counted):
    """Finds the call of every hook in a run where probes stand in for all of them."""

    def __init__(
        self, modules: Mapping[str, nn.Module], seen: list[tuple[str, Tensor]], args: Any, kwargs: Mapping[str, Any]
    ) -> None:
        """Start where the model's inputs have just been made.

        Args:
            modules: the hooks by name.
            seen: where the probes write.
            args: of the model.
            kwargs: of the model.
        """
        super().__init__()
        self.inputs = Hooks()
        self.calls: dict[str, Hooks] = {}
        self._modules, self._seen = modules, seen
        self._last: tuple[Hooks, Any, Mapping[str, Any]] = self.inputs, args, kwargs
        self._readers: Counter[tuple[int, int]] = Counter()
        self._makers: dict[tuple[int, int], str] = {}
        self._relus: list[tuple[Hooks, tuple[int, int]]] = []
        self._alive: list[Any] = []  # an id is unique only while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks, name = Hooks(self.assigned(args, kwargs or {})), function_name(func)
        if relu_operands(name, args) is not None:
            self._relus.append((hooks, _value(args[0])))
        read = [_value(t) for t in tensors_in([args, kwargs or {}])]
        result = func(*args, **(kwargs or {}))
        made = [t for t in _listed(result) if isinstance(t, Tensor)]
        if made:
            self._alive += (args, kwargs, result)
            self._readers.update(read)
            self._makers |= {_value(t): name for t in made if _value(t) not in self._makers}
        self.calls[self.key(func)] = hooks
        self._last = hooks, _listed(result), {}
        return result

    def finish(self, outputs: Any) -> None:
        """Give the hooks since the last call to its results, and find the ReLUs that a quantizer may compute.

        Args:
            outputs: of the model.

        Raises:
            LostHookError: a hook is on an output of the model.
        """
        self.assigned((), {})
        self._readers.update(_value(t) for t in tensors_in(outputs))
        for hooks, read in self._relus:
            hooks.rectifies = self._readers[read] == 1 and self._makers.get(read) in NEW_MEMORY

    def assigned(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[Place, nn.Module]]:
        """Give the hooks since the last call to the results of that call, and return those of the next one.

        Args:
            args: of the next call.
            kwargs: of the next call.

        Raises:
            LostHookError: a hook was given something that neither of them has.
        """
        before: list[tuple[Place, nn.Module]] = []
        places: dict[tuple[str, int], Place] = {}
        for name, x in self._seen:
            kind, op, port = decode_hook_name(name)
            hooks, *results = self._last
            place = next(_places(x, *results), None) if kind == "post_hooks" else None
            if place is not None:
                hooks.after.append((place, self._modules[name]))
                continue
            # One tensor may be several arguments: those of one port share a place, those of another have another.
            if (op, port) not in places:
                free = [place for place in _places(x, args, kwargs) if place not in places.values()]
                if not free:
                    raise LostHookError(name)
                places[op, port] = free[0]
            before.append((places[op, port], self._modules[name]))
        self._seen.clear()
        return before


def _value(t: Tensor) -> tuple[int, int]:
    """Tell a tensor from others, and from itself before and after an operation in place."""
    return id(t), version_of(t)


def _listed(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _places(x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Place]:
    """Yield every place where a tensor stands among arguments."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if value is x:
            yield key, None
        elif isinstance(value, (tuple, list)):
            yield from ((key, part) for part, v in enumerate(value) if v is x)


def _hooked(hooks: list[tuple[Place, nn.Module]], args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return arguments with the results of hooks in their places."""
    args, kwargs = list(args), dict(kwargs)
    for (key, part), module in hooks:
        held: Any = args if isinstance(key, int) else kwargs
        if part is None:
            held[key] = module(held[key])
        else:
            values = list(held[key])
            values[part] = module(values[part])
            held[key] = _like(held[key], values)
    return args, kwargs


def _like(sequence: Any, values: list[Any]) -> Any:
    """Return other values in a sequence of the same kind."""
    make: Callable[[list[Any]], Any] = getattr(sequence, "_make", type(sequence))
    return make(values)


class _Replayed(Counted):
    """Runs the hooks of every call."""

    def __init__(self, calls: Mapping[str, Hooks]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = self._calls.get(self.key(func))
        if hooks is None:
            return func(*args, **(kwargs or {}))
        if hooks.before:
            args, kwargs = _hooked(hooks.before, args, kwargs or {})
        after, quantizer = hooks.after, hooks.quantizer()
        if quantizer is None:
            result = func(*args, **(kwargs or {}))
        else:
            read = relu_operands(function_name(func), args)
            assert read is not None
            result, after = quantizer.rectified(*read), after[1:]
        if not after:
            return result
        results, _ = _hooked(after, _listed(result), {})
        return _like(result, results) if isinstance(result, (tuple, list)) else results[0]


class Replay:
    """Runs a wrapped model with its hooks, but without NNCF."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Find the calls of all hooks in one run.

        Args:
            model: wrapped by NNCF; as it was when this returns.
            run: runs it, the way that it will be run.

        Raises:
            LostHookError: a hook's call cannot be found.
        """
        self._model = model
        storage = get_hook_storage(model)
        modules = dict(storage.named_hooks(remove_duplicate=False))
        seen: list[tuple[str, Tensor]] = []
        forward = model.forward

        @functools.wraps(forward)  # NNCF names the inputs by the signature
        def found(*args: Any, **kwargs: Any) -> Any:
            finder = _Finder(modules, seen, args, kwargs)
            with finder:
                result = forward(*args, **kwargs)
            finder.finish(result)
            self._inputs, self._calls = finder.inputs.after, finder.calls
            return result

        for name in modules:
            storage.set_submodule(name, _Probe(name, seen))
        try:
            with self._forward(found), torch.no_grad():
                run()
        finally:
            for name, module in modules.items():
                storage.set_submodule(name, module)
        self._calls = {key: hooks for key, hooks in self._calls.items() if hooks.before or hooks.after}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run the model without NNCF while this is active."""
        wrapped: Any = self._model.forward
        plain = wrapped.orig_forward

        def replayed(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _hooked(self._inputs, args, kwargs)
            with _Replayed(self._calls):
                return plain(*args, **kwargs)

        with self._forward(replayed):
            yield

    @contextlib.contextmanager
    def _forward(self, function: Callable[..., Any]) -> Iterator[None]:
        """Let the model compute a function while this is active."""
        before = self._model.__dict__["forward"]
        self._model.__dict__["forward"] = function
        try:
            yield
        finally:
            self._model.__dict__["forward"] = before


@torch.no_grad()
def replay(model: nn.Module, run: Callable[[], list[Tensor]]) -> Replay | None:
    """Return a way to run a wrapped model without NNCF, if that computes the same, bit by bit.

    Args:
        model: wrapped by NNCF; its stand-ins for quantizers have their scales.
        run: runs it and returns its outputs.

    Returns:
        `None` where a hook's call cannot be found again, for example inside a function that NNCF looks into.
    """
    expected = run()
    try:
        found = Replay(model, run)
        with found.active():
            same = all(torch.equal(e, f) for e, f in zip(expected, run(), strict=True))
    except LostHookError as error:
        logger.info("Fast hooks are off (slower, same result): hook %s could not be matched to a call", error)
        return None
    if not same:
        logger.info("Fast hooks are off (slower, same result): they change the outputs of the first images")
        return None
    return found
