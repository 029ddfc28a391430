"""From NNCF's quantizers to a trainable student, in which light modules take their places, and its teacher."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from qft_plugin.graph.comparison import Comparison
from qft_plugin.graph.layer_graph import Ref
from qft_plugin.graph.torch_model import Call, Functional, repeatable, replace_modules, tensor_of, tensors_in
from qft_plugin.nncf._place import Placed
from qft_plugin.nncf._read import Source, add_factors
from qft_plugin.nncf._replay import Replay, replay
from qft_plugin.nncf._smooth import smoothing
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution
from qft_plugin.training.student import (
    FakeQuantizer,
    Unfold,
    Watcher,
    compiled_fake_quantize,
    looked_at,
    prediction_of,
    set_grids,
    unfolded,
)

FIRST: Final = 2
"""Images that hooks are found with."""


class _FixedQuantizer(nn.Module):
    """Stands in for a quantizer that is not trained (an embedding's weight, a scale per activation channel)."""

    def __init__(self, hook: nn.Module, dims: int) -> None:
        super().__init__()
        assert isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer))
        low, high, scale, zero_point = hook.get_parameters_for_torch_fq()
        narrow = bool(getattr(hook, "narrow_range", False))
        self.low, self.high = int(low) + int(narrow and low < 0), int(high)
        shape = hook.scale_shape if len(hook.scale_shape) == dims else (1,)
        self.register_buffer("scale", scale.detach().reshape(shape))
        self.register_buffer("zero_point", zero_point.reshape(shape).to(scale))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        assert isinstance(self.zero_point, Tensor)
        rounded = torch.clamp(torch.round(x / self.scale) + self.zero_point, self.low, self.high)
        return (rounded - self.zero_point) * self.scale


class _Capture(nn.Module):
    """Keeps the value that passes; a copy, because what reads it may change it in place."""

    def __init__(self, factor: Tensor | None) -> None:
        """Say by what SmoothQuant has multiplied the value, which is undone: the teacher has no such factor."""
        super().__init__()
        self.factor = factor
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.value = x.clone() if self.factor is None else x / self.factor
        return x


class _Watch(nn.Module):
    """Shows a function every value that passes."""

    def __init__(self, watcher: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.watcher = watcher

    def forward(self, x: Tensor) -> Tensor:
        self.watcher(x)
        return x


class Observed:
    """A wrapped model and the places where it is compared."""

    def __init__(self, model: nn.Module, at: Comparison, source: Source, names: Mapping[str, str]) -> None:
        """Put a capture on each compared input.

        Args:
            model: wrapped by NNCF.
            at: where it is compared.
            source: the model as it was read.
            names: of the operations of its graph in `model`.
        """
        self.model = model
        self._with_outputs = at.outputs
        self._captures: list[_Capture] = []
        factors = smoothing(model)
        for place in at.inputs:
            port = names[place.op], _ports_of_input(source, place.index)[place.op]
            self._captures.append(_Capture(factors.get(port)))
            get_hook_storage(model).register_pre_function_hook(*port, self._captures[-1])

    def predict(self, run: Callable[[], Any]) -> Prediction:
        """Call the model through `run` and collect the compared activations and outputs."""
        outputs = list(tensors_in(run()))
        values = [capture.value for capture in self._captures if capture.value is not None]
        for capture in self._captures:
            capture.value = None
        return prediction_of(outputs, values, with_outputs=self._with_outputs)


def _ports_of_input(source: Source, index: int) -> dict[str, int]:
    """Return the port of each operation that receives its activation input number `index`."""
    return {op: port for (op, port), what in source.ports.items() if what == Ref(index)}


def teacher(source: Source, at: Comparison) -> Callable[[Call], Prediction]:
    """Return the untouched float model as a function from the arguments of a call to a prediction."""
    observed = Observed(wrap_model(copy.deepcopy(source.teacher)), at, source, source.in_teacher)

    def run(call: Call) -> Prediction:
        args, kwargs = call
        return observed.predict(lambda: observed.model(*args, **kwargs))

    return run


class Student:
    """The fake-quantized network; its weights, biases and scales are an argument of every call."""

    def __init__(
        self,
        placed: Placed,
        source: Source,
        at: Comparison,
        unfolds: Sequence[Unfold | None],
        *,
        compiled: bool,
    ) -> None:
        """Replace NNCF's quantizers by light ones in a copy.

        Args:
            placed: the model with NNCF's quantizers.
            source: the model as it was read.
            at: where it is compared with the teacher.
            unfolds: the factors that bring each activation there back to the teacher's units.
            compiled: fuse the fake-quantization with `torch.compile`.
        """
        model = copy.deepcopy(placed.model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        storage = get_hook_storage(model)
        function = compiled_fake_quantize() if compiled else fake_quantize
        self._quantizers: dict[str, FakeQuantizer] = {}
        for quantizer, names in placed.hooks.items():
            module = FakeQuantizer(placed.placement.activations[quantizer], function)
            self._quantizers[quantizer] = module
            for name in names:
                storage.set_submodule(name, module)
        for names in placed.weight_hooks.values():
            for name in names:
                storage.delete_hook(name)
        for name, hook in list(storage.named_hooks(remove_duplicate=False)):
            if isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)):
                storage.set_submodule(name, _FixedQuantizer(hook, len(hook.scale_shape)))
        self._names, self._ops = _remove_neutral_norms(model, source)
        own = add_factors(model, source.addends, source.ports, self._ops)
        self._names |= {source.addends[addend]: name for addend, name in own.items()}
        self._observed, self._function = Observed(model, at, source, self._ops), Functional(model)
        self._unfolds = unfolds
        self._first_port = _ports_of_input(source, 0)
        self._looked = False
        self._replay: Replay | None = None

    def __call__(self, solution: Solution, call: Call) -> Prediction:
        """Run the student on one batch, with gradients to everything in `solution`."""
        set_grids(self._quantizers, solution)
        # Once, when training begins: who looks into an earlier run should see one run.
        if not self._looked and torch.is_grad_enabled():
            self._looked, self._replay = True, self._found(solution.tensors, call)
        with contextlib.nullcontext() if self._replay is None else self._replay.active():
            prediction = self._run(solution.tensors, call)
        return unfolded(prediction, self._unfolds, solution.factors)

    def _found(self, tensors: Mapping[str, Tensor], call: Call) -> Replay | None:
        """Look for a way to run without NNCF, with the first images."""
        args, kwargs = call
        call = tuple(t[:FIRST] for t in args), {name: t[:FIRST] for name, t in kwargs.items()}

        def run() -> list[Tensor]:
            with repeatable():
                return list(self._run(tensors, call).tensors)

        # In full precision: in a lower one a bound is rounded before values are compared with it, or it is not.
        with torch.autocast(next(iter(tensors.values())).device.type, enabled=False):
            return replay(self._observed.model, run)

    def observe(self, tensors: Mapping[str, Tensor], call: Call, watcher: Watcher) -> None:
        """Run with float activations and show the input that each activation quantizer would have had."""
        with looked_at(self._quantizers, watcher):
            self._run(tensors, call)

    def watch(
        self, tensors: Mapping[str, Tensor], call: Call, watchers: Mapping[str, Callable[[Tensor], None]]
    ) -> None:
        """Run with float activations and show each watcher the input of its operation.

        Args:
            tensors: weights and biases by name.
            call: the batch.
            watchers: called with the first activation input, by name of the operation.
        """
        for module in self._quantizers.values():
            module.scale = None
        with self._watched(watchers):
            self._run(tensors, call)

    def trace(self, solution: Solution, call: Call, watchers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run with quantized activations and show each watcher the input of its operation.

        Args:
            solution: weights, biases and scales.
            call: the batch.
            watchers: called with the first activation input, by name of the operation; one that NNCF does not run
                itself, such as a factor in front of an addition, is left out.
        """
        set_grids(self._quantizers, solution)
        with self._watched({op: watcher for op, watcher in watchers.items() if op in self._first_port}):
            self._run(solution.tensors, call)

    def looked_at(self, look: Callable[[str, Tensor], None]) -> contextlib.AbstractContextManager[None]:
        """Show a function the input of each activation quantizer in runs with float activations, with its name."""
        return looked_at(self._quantizers, look)

    @contextlib.contextmanager
    def _watched(self, watchers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
        storage = get_hook_storage(self._observed.model)
        handles = [
            storage.register_pre_function_hook(self._ops[op], self._first_port[op], _Watch(watcher))
            for op, watcher in watchers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, tensors: Mapping[str, Tensor], call: Call) -> Prediction:
        args, kwargs = call
        renamed = {self._names.get(name, name): tensor for name, tensor in tensors.items()}
        return self._observed.predict(lambda: self._function(renamed, args, kwargs))


def _remove_neutral_norms(model: nn.Module, source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """Let each layer add its own bias, so that the neutral BatchNorms cost nothing while the student trains.

    Returns:
        The new name of each bias that moved, and that of every operation: NNCF numbers the calls of a function.
    """
    removed = {n.norm_op: n for n in source.norms if n.replaceable}
    biases = {}
    for norm in removed.values():
        layer = model.get_submodule(norm.layer)
        if getattr(layer, "bias", None) is None:
            layer.register_parameter("bias", nn.Parameter(tensor_of(model, norm.bias).detach().clone(), False))
        biases[norm.bias] = f"{norm.layer}.bias"
        replace_modules(model, {model.get_submodule(norm.norm): nn.Identity()})
    names = {op: removed[op].layer_op if op in removed else _renumbered(op, removed) for op in source.in_result}
    rename_hooks(get_hook_storage(model), names)
    return biases, names


def _renumbered(op: str, removed: Iterable[str]) -> str:
    """Name an operation after others are gone; the last part of its name is its number among those of one kind."""
    kind, _, number = op.rpartition("/")
    gone = sum(k == kind and int(n) < int(number) for k, _, n in (name.rpartition("/") for name in removed))
    return f"{kind}/{int(number) - gone}"


def rename_hooks(storage: Any, names: Mapping[str, str]) -> None:
    """Give the hooks of operations to those of other names, all at once, so that two may change places.

    Args:
        storage: the hooks.
        names: the new name of each operation; those of other names keep theirs.
    """
    hooks = [(name, *decode_hook_name(name), hook) for name, hook in storage.named_hooks(remove_duplicate=False)]
    for name, _, op, _, _ in hooks:
        if names.get(op, op) != op:
            storage.delete_hook(name)
    for _, kind, op, port, hook in hooks:
        new = names.get(op, op)
        if new != op:
            add = storage.register_pre_function_hook if kind == "pre_hooks" else storage.register_post_function_hook
            add(new, port, hook)
