"""From a model with NNCF's hooks to OpenVINO by torch's tracer, with every hook at the call that it belongs to.

NNCF names a call by its module, its function and how many calls of the function came before it. While torch traces, the
sizes of tensors are tensors themselves, so that a sum of sizes is a call of `add`, which it is not in a run, and the
hooks of all later additions would be shifted. Here computations with sizes alone are not counted.
"""

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
from nncf.torch.function_hook.hook_storage import decode_hook_name
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from qft_plugin.errors import DeployabilityError, warn
from qft_plugin.graph.operations import OPERATORS, READS_SIZES
from qft_plugin.graph.record import function_name
from qft_plugin.graph.torch_model import tensors_in, traceable

HOSTS: Final = frozenset(["torch", "nncf", "openvino", "qft_plugin"])
"""Packages whose decisions are no concern of a user's."""

BETWEEN: Final = frozenset(["warnings", "torch._tensor", "torch.overrides"])
"""Modules that stand between a call and the code that makes it."""


def converted(model: nn.Module, example_input: Any) -> Any:
    """Convert a model of NNCF to an `openvino.Model`; no axis of its inputs is fixed.

    Args:
        model: in eval mode; as it was when this returns.
        example_input: one input: a tensor, a tuple of tensors or a dict of tensors. Another call is made with other
            numbers of images, to see which sizes depend on it.

    Raises:
        DeployabilityError: torch cannot trace the model, or it runs differently while it is traced, so that the hooks
            have no sure place.
    """
    import openvino

    runs = _Runs(model)
    with torch.no_grad(), runs.followed():
        runs.run(example_input)
        try:
            with runs.warnings_noted():
                result = openvino.convert_model(model, example_input=example_input)
        except RuntimeError as error:
            raise DeployabilityError(
                f"The model should be one that torch.jit.trace can trace. Found: {error.__cause__ or error}. Write "
                "its forward so that sizes may be tensors: no round, divmod or dictionary of sizes."
            ) from error
    runs.check()
    runs.warn()
    return result


class _Runs:
    """The runs of a model up to its conversion: their calls, the sizes that they read, and the warnings of the tracer.

    Attributes:
        model: the model.
        quiet: decisions that are made now depend on nothing that is free in the file.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.quiet = False
        self._calls: list[Counter[str]] = []
        self._traced: list[Counter[str]] = []
        self._sizes: list[list[tuple[int, ...]]] = []
        self._places: dict[str, None] = {}

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Let the model run in a mode that counts as a run without a trace does."""
        wrapped: Any = self.model.forward

        @functools.wraps(wrapped.orig_forward)  # NNCF and OpenVINO name the inputs by the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Mode(self) as mode:
                args, kwargs = mode.process_model_inputs(args, kwargs)
                result = mode.process_model_outputs(wrapped.orig_forward(*args, **kwargs))
            runs = self._traced if torch._C._is_tracing() else self._calls
            runs.append(Counter(mode.op_calls))
            if torch._C._is_tracing():
                return traceable(result)
            self._sizes.append(mode.sizes)
            return result

        before = self.model.__dict__["forward"]
        self.model.__dict__["forward"] = forward
        try:
            yield
        finally:
            self.model.__dict__["forward"] = before

    def run(self, example: Any) -> None:
        """Run the model on an example, and on another number of images.

        Args:
            example: one input.
        """
        self._call(example, lambda t: t)
        # A model for one number of images only may fail here in any way: then all sizes count as free.
        with contextlib.suppress(Exception):
            self._call(example, lambda t: t[:1] if len(t) > 1 else torch.cat([t, t]))

    def _call(self, example: Any, change: Any) -> None:
        if isinstance(example, dict):
            self.model(**{name: change(t) for name, t in example.items()})
        else:
            self.model(*(change(t) for t in (example if isinstance(example, tuple) else (example,))))

    def free_sizes(self, number: int) -> tuple[bool, ...] | None:
        """Tell for each size that is read now whether it depends on the number of images; `None` if unknown.

        Args:
            number: how many times sizes were read before.
        """
        if len(self._sizes) < 2 or len(self._sizes[0]) != len(self._sizes[1]) or number >= len(self._sizes[0]):
            return None
        one, other = (sizes[number] for sizes in self._sizes[:2])
        return tuple(a != b for a, b in zip(one, other, strict=True)) if len(one) == len(other) else None

    @contextlib.contextmanager
    def warnings_noted(self) -> Iterator[None]:
        """Note where the tracer's warnings come from, in the place of showing them."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", TracerWarning)
            # OpenVINO calls it, torch 2.13 announces it as deprecated.
            warnings.filterwarnings("ignore", r".torch\.jit\.trace", DeprecationWarning)
            shown = warnings.showwarning

            def note(message: Any, category: Any, *where: Any, **settings: Any) -> None:
                if not issubclass(category, TracerWarning):
                    shown(message, category, *where, **settings)
                elif not self.quiet:
                    frame = _origin(sys._getframe(1))
                    if frame is not None:
                        self._places[f"{frame.f_code.co_filename}:{frame.f_lineno}"] = None

            warnings.showwarning = note
            yield

    def check(self) -> None:
        """Refuse a model whose hooked functions are not called in a trace as they are in a run.

        Raises:
            DeployabilityError: it names the functions.
        """
        hooks = get_hook_storage(self.model).named_hooks(remove_duplicate=False)
        numbered = [decode_hook_name(name)[1].rpartition("/") for name, _ in hooks]
        functions = dict.fromkeys(name for name, _, number in numbered if name and number.isdigit())
        expected = self._calls[0]
        for found in self._traced:
            differ = [
                f"{name} {found[name]} and not {expected[name]} times"
                for name in functions
                if found[name] != expected[name]
            ]
            if differ:
                raise DeployabilityError(
                    "The model should call the same functions while torch traces it as without. Found a trace that "
                    f"calls {', '.join(differ)}, so that it is not known which of the calls are quantized. Look at "
                    "what its forward does where torch._C._is_tracing() is true, or where a size is a tensor."
                )

    def warn(self) -> None:
        """Pass on the warnings of the tracer about the user's own code."""
        if self._places:
            warn(
                "The file should compute what the model computes for every input. Found decisions, or numbers taken "
                f"out of tensors, in the forward: {', '.join(self._places)}. The file holds what they were for "
                "example_input. If they depend on the images or on their number, use torch.where or operations on "
                "tensors there; otherwise compare file and model on other inputs.",
                stacklevel=3,
            )


class _Mode(FunctionHookMode):  # type: ignore[misc]
    """NNCF's hooks; while torch traces, computations with sizes alone are not counted."""

    def __init__(self, runs: _Runs) -> None:
        super().__init__(model=runs.model, hook_storage=get_hook_storage(runs.model))
        self.sizes: list[tuple[int, ...]] = []
        self._runs = runs
        self._read = 0
        self._numbers: dict[int, tuple[Tensor, bool]] = {}  # an id is unique only while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in READS_SIZES or func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            return self._sizes_of(functools.partial(super().__torch_function__, func, types, args, kwargs))
        read = list(tensors_in([args, kwargs]))
        if not read or any(id(t) not in self._numbers for t in read):
            return super().__torch_function__(func, types, args, kwargs)
        if name not in OPERATORS and not name.startswith("__"):
            return super().__torch_function__(func, types, args, kwargs)
        free = any(self._numbers[id(t)][1] for t in read)
        # Numbers stay what they are when one of their names gets another value:  m = n; m += 1
        function = func if func.__name__ == name else getattr(Tensor, name)
        with self._quiet(not free):
            result = function(*args, **kwargs)
        self._numbers |= {id(t): (t, free) for t in tensors_in(result)}
        return result

    def _sizes_of(self, read: Any) -> Any:
        """Read sizes; where they are tensors, remember them."""
        free = self._runs.free_sizes(self._read)
        self._read += 1
        with self._quiet(free is not None and not any(free)):
            result = read()
        found = result if isinstance(result, tuple) else (result,)
        if not torch._C._is_tracing():
            self.sizes.append(tuple(int(s) for s in found))
        known = free if free is not None and len(free) == len(found) else (True,) * len(found)
        self._numbers |= {id(t): (t, f) for t, f in zip(found, known, strict=True) if isinstance(t, Tensor)}
        return result

    @contextlib.contextmanager
    def _quiet(self, quiet: bool) -> Iterator[None]:
        before = self._runs.quiet
        self._runs.quiet = quiet
        try:
            yield
        finally:
            self._runs.quiet = before


def _origin(frame: FrameType | None) -> FrameType | None:
    """Find the code that a call comes from; `None` where it is a host's own.

    Args:
        frame: where the tracer warned.
    """
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module not in BETWEEN and frame.f_code.co_name != "__torch_function__" and module != __name__:
            return None if module.partition(".")[0] in HOSTS else frame
        frame = frame.f_back
    return None
