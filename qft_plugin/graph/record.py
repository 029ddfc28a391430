"""A network as torch sees it run: recording its calls into a `LayerGraph`, and looking at single calls later."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, LayerGraph, Op, Ref
from qft_plugin.graph.operations import READS_VALUES, WRITES
from qft_plugin.graph.torch_model import Call, tensors_in

Watcher = Callable[[Tensor], None]


def function_name(function: Any) -> str:
    """Name a torch function without the mark of its in-place form; dunder names keep their underscores."""
    name: str = getattr(function, "__name__", str(function))
    return name if name.startswith("__") else name.rstrip("_")


class Counted(TorchFunctionMode):
    """Numbers the calls of each torch function: `conv2d/0`, `conv2d/1`, ..."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def key(self, function: Any) -> str:
        """Return function and number of the call that begins now."""
        name = function_name(function)
        self._counts[name] += 1
        return f"{name}/{self._counts[name] - 1}"


class _Recorder(Counted):
    """Writes down every torch call that makes a tensor."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        constants = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.constants: dict[int, Const] = {}
        for name, t in constants:
            self.constants.setdefault(id(t), Const(name, tuple(t.shape)))
        inputs = [*enumerate(call[0]), *call[1].items()]
        self.names = {id(t): f"input/{key}" for key, t in inputs}
        self.shapes = {f"input/{key}": tuple(t.shape) for key, t in inputs}
        self.inputs = tuple(self.shapes)
        self.ops: list[Op] = []
        self.path: list[str] = []
        self.left: list[str] = []
        self._alive: list[Any] = [call]  # an id is unique only while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key, function = self.key(func), function_name(func)
        inputs: list[str] = []
        words = self._replaced(args, inputs), self._replaced(kwargs or {}, inputs)
        result = func(*args, **(kwargs or {}))
        changed = args[0] if function in WRITES else result
        made = [t for t in (changed if isinstance(changed, (tuple, list)) else [changed]) if isinstance(t, Tensor)]
        if not made:
            if function in READS_VALUES:
                self.left += inputs
            return result
        name = "/".join([*(p for p in self.path[-1:] if p), key])
        outputs = (name, *(f"{name}:{i}" for i in range(1, len(made))))
        self._alive.append((args, kwargs, result))
        self.names |= {id(t): o for t, o in zip(made, outputs, strict=True)}
        self.shapes |= {o: tuple(t.shape) for t, o in zip(made, outputs, strict=True)}
        self.ops.append(Op(name, function, tuple(inputs), outputs, *words))
        return result

    def _replaced(self, value: Any, inputs: list[str]) -> Any:
        """Replace the tensors in an argument by references, and list the activations among them."""
        if isinstance(value, Tensor):
            if id(value) in self.names:
                inputs.append(self.names[id(value)])
                return Ref(len(inputs) - 1)
            return self.constants.get(id(value), Const(MADE_INSIDE, tuple(value.shape)))
        if isinstance(value, dict):
            return {k: self._replaced(v, inputs) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            parts = [self._replaced(v, inputs) for v in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value


@torch.no_grad()
def record(model: nn.Module, call: Call) -> LayerGraph:
    """Run a model once and describe its calls.

    An operation is named by the module in whose forward it stands, its function, and its number among all calls of
    this function: `layer1/0/conv2/conv2d/4`.

    Args:
        model: any torch model; it is run as it is.
        call: its arguments.
    """
    recorder = _Recorder(model, call)
    names = {id(module): name.replace(".", "/") for name, module in model.named_modules()}
    own = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != own:
            return
        inherited = recorder.path[-1] if recorder.path else ""
        recorder.path.append(names.get(id(module), inherited))

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        if threading.get_ident() == own:
            recorder.path.pop()

    # Global hooks, so that nothing is put onto the model. They are called in other threads too, which do not record.
    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with recorder:
            result = model(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    outputs = tuple(dict.fromkeys(recorder.names[id(t)] for t in tensors_in(result) if id(t) in recorder.names))
    used = {name for op in recorder.ops for name in op.inputs}
    # A tensor that nothing reads leaves the network as far as can be seen.
    unread = [op for op in recorder.ops if not used.intersection(op.outputs)]
    loose = dict.fromkeys([*recorder.left, *(name for op in unread for name in op.outputs)])
    return LayerGraph(
        tuple(recorder.ops), recorder.shapes, recorder.inputs, outputs + tuple(n for n in loose if n not in outputs)
    )


class Tap(Counted):
    """While active, shows watchers the first activation that certain calls of a recorded model read.

    A model must be called as it was when it was recorded; only the sizes of the batch may differ.
    """

    def __init__(
        self,
        watchers: Mapping[str, Watcher],
        graph: LayerGraph,
        instead: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        """Remember the watchers and their operations.

        Args:
            watchers: called with the tensor, by name of the operation in the graph.
            graph: the result of `record` for the model.
            instead: called with the positional arguments in the place of an operation, by name.
        """
        super().__init__()
        position = {op.name: _first_position(op) for op in graph.ops if op.name in watchers}
        self._watchers = {_key(name): (watcher, position[name]) for name, watcher in watchers.items()}
        self._instead = {_key(name): function for name, function in (instead or {}).items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = self.key(func)
        watcher, instead = self._watchers.get(key), self._instead.get(key)
        if watcher is not None:
            show, (place, part) = watcher
            value = args[place] if isinstance(place, int) else kwargs[place]
            show(value if part is None else value[part])
        return func(*args, **(kwargs or {})) if instead is None else instead(args)


def _key(name: str) -> str:
    """Return function and number of an operation."""
    return "/".join(name.rsplit("/", 2)[-2:])


def _first_position(op: Op) -> tuple[int | str, int | None]:
    """Find the first activation among the arguments: its place or keyword, and its place in a list there."""
    places: list[tuple[int | str, Any]] = [*enumerate(op.args), *(op.kwargs or {}).items()]
    for key, value in places:
        if value == Ref(0):
            return key, None
        if isinstance(value, (list, tuple)) and Ref(0) in value:
            return key, list(value).index(Ref(0))
    raise KeyError(op.name)
