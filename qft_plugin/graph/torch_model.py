"""Checks of a torch model before any host looks at it, and how it is called."""

import contextlib
import copy
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from qft_plugin.errors import DataError, ModelError

Call = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""Positional and keyword arguments of one call of the model."""

SAME: Final = 1e-3
"""Largest relative change of an output by rewriting a network; float32 rounding stays below 1e-5 in 100 layers."""


def check_model(model: Any) -> None:
    """Refuse anything but a plain torch model whose parameters have values, before anything else is done.

    Raises:
        ModelError: it says what was found and what to pass instead.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"The model should be a plain torch.nn.Module. Found {kind}. Pass the module before scripting."
        )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model should be a torch.nn.Module: QFT trains it. Found {kind}. Quantize the torch model that it was "
            "converted from, and export the result."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"The model should be a plain torch.nn.Module. Found {kind}. Pass its .module.")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            f"The model should be the module from before torch.compile. Found {kind}. Pass its ._orig_mod."
        )
    parameters = list(model.parameters())
    if any(isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta for p in parameters):
        raise ModelError(
            f"The model's parameters should have values. Found uninitialized or meta parameters in {kind}. "
            "Load its weights, or call a lazy module once."
        )
    if not parameters:
        raise ModelError(f"The model should have parameters. Found none in {kind}.")
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters if p.is_floating_point()}
    if len(devices) != 1 or len(dtypes) != 1:
        raise ModelError(
            f"The model's parameters should be on one device and of one floating dtype. Found {devices} and "
            f"{dtypes}. Move and convert it with model.to(...)."
        )
    if dtypes - {torch.float32, torch.float64}:
        raise ModelError(
            f"The model should be in float32. Found {dtypes}, too coarse for the scales that are trained. "
            "Convert it with model.float() and the images with image.float()."
        )


def check_finite(parameters: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity among weights and biases.

    Raises:
        ModelError: it names the parameter.
    """
    for name, parameter in parameters.items():
        # Detached: one made in inference mode takes part in no graph, whatever it says.
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ModelError(f"Parameter {name}: should be finite. Found NaN or infinity. Load the weights again.")


def accepts(model: nn.Module) -> Callable[..., bool]:
    """Return a function that tells whether the model's forward takes given arguments."""
    signature = inspect.signature(model.forward)

    def test(*args: Any, **kwargs: Any) -> bool:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    return test


def tensors_in(value: Any, wrapper: type[Any] | tuple[()] = ()) -> Iterator[Tensor]:
    """Iterate over the tensors of a model's output, whatever it is made of.

    Args:
        value: the output.
        wrapper: a class that holds a tensor as its `value`, beside others that do not count, such as its scale.
    """
    if isinstance(value, wrapper):
        yield value.value
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_in(v, wrapper)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v, wrapper)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name, None), wrapper)


def traceable(output: Any) -> Any:
    """Return a model's output as it is, or its tensors alone where torch could not trace it.

    A dict and a dataclass become a dict of their tensors, which keeps the names, and everything else a tuple.
    """
    if _is_traceable(output):
        return output
    named = output
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        named = {f.name: getattr(output, f.name, None) for f in dataclasses.fields(output)}
    tensors = tuple(tensors_in(output))
    if isinstance(named, Mapping):
        kept = {str(k): v for k, v in named.items() if isinstance(v, Tensor)}
        if len(kept) == len(tensors):
            return kept
    return tensors


def _is_traceable(output: Any) -> bool:
    if isinstance(output, dict):
        return bool(output) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in output.items())
    if isinstance(output, (list, tuple)):
        return bool(output) and all(_is_traceable(v) and not isinstance(v, dict) for v in output)
    return isinstance(output, Tensor)


def in_float32(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """Return a copy of a float64 model, and its example, in float32, as runtimes compute.

    Args:
        model: a quantized model; in another dtype it is returned as it is.
        example_input: a tensor, a tuple of tensors or a dict of tensors.
    """
    if not any(p.dtype == torch.float64 for p in model.parameters()):
        return model, example_input

    def lower(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: lower(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(lower(v) for v in value)
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value

    return copy.deepcopy(model).float(), lower(example_input)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a model by its name."""
    module, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(module), attribute)
    assert isinstance(found, Tensor)
    return found


def conversion_to(like: Tensor, found: Tensor) -> str:
    """Say how an image becomes one of the model's dtype: bytes alone are brought to values from 0 to 1.

    Args:
        like: a parameter of the model.
        found: the image.
    """
    divided = " / 255" if found.dtype == torch.uint8 else ""
    return f"Convert it as for inference, for example image.to({like.dtype}){divided}."


def replace_modules(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules into the places of others, wherever these stand in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a child may stand under two names
            if child is not None and child in replaced and parent is not replaced[child]:
                setattr(parent, name, replaced[child])


@torch.no_grad()
def not_called(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """List the modules of these names that the forward of a model does not call.

    Args:
        model: the model; it is run once.
        names: of modules of it.
        call: arguments to run it with.
    """
    called: set[nn.Module] = set()
    modules = {name: model.get_submodule(name) for name in names}
    handles = [module.register_forward_pre_hook(lambda m, _: called.add(m)) for module in modules.values()]
    try:
        model(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, module in modules.items() if module not in called]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Take away for a while what only a training calls, and what torch refuses to trace."""
    names = ("_backward_hooks", "_backward_pre_hooks")
    held = [(module, name, getattr(module, name)) for module in model.modules() for name in names]
    for module, name, hooks in held:
        setattr(module, name, type(hooks)())
    try:
        yield
    finally:
        for module, name, hooks in held:
            setattr(module, name, hooks)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Let the random numbers of torch, numpy and Python go on as if none had been drawn.

    New layers draw weights, which are replaced, and a model or a dataset may draw what it likes.
    """
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  (the state that users' code shares)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Draw the same random numbers each time, so that two networks with a dropout that is active can be compared."""
    with random_state_kept():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  (the state that users' code shares)
        random.seed(0)
        yield


def first_outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """Run a float model for the first time and list the tensors of its output.

    Raises:
        DataError: it cannot be run on these images.
        ModelError: it returns no tensor, or NaN, or changes its input.
    """
    args, kwargs = call
    inputs = (*args, *kwargs.values())
    versions = [version_of(t) for t in inputs]
    try:
        with repeatable():
            outputs = list(tensors_in(model(*args, **kwargs)))
    except Exception as error:  # a model may fail in any way on an input that it was not made for
        shapes = [f"{t.dtype} {list(t.shape)}" for t in inputs]
        raise DataError(
            f"The model should run on the dataset's images. Found {type(error).__name__}: {error}, with the first "
            f"images as input {', '.join(shapes)}. Check shape, dtype and preprocessing against model(image)."
        ) from error
    if [version_of(t) for t in inputs] != versions:
        # The dataset's images are used again and again, and a batch may be a view of them.
        raise ModelError(
            "The model should leave its inputs as they are. Found that its forward changes one of them in place. Use "
            "operations that are not in place there (x - mean instead of x.sub_(mean)), or start with x = x.clone()."
        )
    if not outputs:
        raise ModelError("The model should return tensors. Found none in its output.")
    for output in outputs:
        if output.is_floating_point() and not bool(torch.isfinite(output).all()):
            raise ModelError(
                "The float model should compute finite numbers. Found NaN or infinity for the first images. "
                "Check the weights and the preprocessing."
            )
    return outputs


class Functional:
    """A module as a function of its parameters and buffers.

    `torch.func.functional_call` looks in every call for parameters that have several names; here they are found once.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find the names; the module should get no other parameters later.

        Args:
            module: the module.
        """
        self._module = module
        # A module may stand under several names too; a tensor of it is put into its place once.
        places: dict[int, list[str]] = {}
        for prefix, owner in module.named_modules():
            for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                places.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
        every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._places = {name: places[id(tensor)] for name, tensor in every if places[id(tensor)] != [name]}

    def __call__(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module with other tensors in the place of its own.

        Args:
            tensors: by one of their names.
            args: positional arguments of the module.
            kwargs: keyword arguments of the module.
        """
        held: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            held.update(dict.fromkeys(self._places.get(name, (name,)), tensor))
        return torch.func.functional_call(self._module, held, args, dict(kwargs), tie_weights=False)


def largest_change(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest change of an output from one network to another, relative to its largest value."""
    worst = 0.0
    for e, f in zip(expected, found, strict=True):
        if e.is_floating_point() and e.numel():
            error = float((e - f).abs().max()) / max(float(e.abs().max()), 1e-6)
            worst = error if error != error else max(worst, error)  # NaN stays
    return worst


def version_of(t: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of the inference mode are not counted."""
    return 0 if t.is_inference() else t._version
