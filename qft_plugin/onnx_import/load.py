"""Read an ONNX file as a torch module that computes the same."""

import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.errors import DataError, ModelError, ParityError, warn
from qft_plugin.onnx_import.build import build, refuse_unknown
from qft_plugin.onnx_import.file import (
    CLOSE,
    MORE,
    Array,
    Input,
    Traced,
    inputs_of,
    moving_in,
    read,
    relative,
    run,
    trace,
)
from qft_plugin.onnx_import.module import ONNXModel

REAL: Final = 4
"""How many images of an example are compared."""


def from_onnx(path: str | os.PathLike[str], example_input: Any = None) -> ONNXModel:
    """Read a float ONNX model as a torch module, and prove that both compute the same.

    The module has ordinary layers of torch, which a host quantizes as those of a torch model; weights keep the names
    that the file has for them. Calculations with shapes are done once: the module takes images of one size, and any
    number of them. Where the file is for a fixed number of images, that is made free where the outputs for each image
    stay the same, and else kept, with a warning.

    Args:
        path: of the file.
        example_input: inputs that the two are compared on too: a tensor, a tuple of tensors, or tensors by the names
            of the inputs. Needed where the file leaves the size of an image open.

    Returns:
        The module, in eval mode. It returns a tensor, or a tuple of tensors in the order of its `output_names`.

    Raises:
        HostError: `onnx` or `onnxruntime` is not installed.
        ModelError: the file cannot be read or run, is quantized already, or has operations without a counterpart.
        DataError: the example does not fit the inputs of the file.
        ParityError: the module computes something else than ONNX Runtime; the first operation that differs is named.
    """
    model = read(path)
    inputs = inputs_of(model)
    example = _example(example_input, inputs)
    refuse_unknown(model, moving_in(model))
    sizes = {i.shape[0] for i in inputs if i.shape} - {None}
    count = max(MORE, *(2 * size for size in sizes if size is not None), 0)
    traced = trace(model, _random(inputs, example, count, seed=0))
    made = build(traced)
    fixed = traced.images[0] if traced.images[0] == traced.images[1] else None
    # Other images than those that constants were found with.
    _prove(made, traced, _random(inputs, example, fixed or MORE, seed=1), "random images")
    if example is not None:
        rows = next(iter(example.values())).shape[0]
        real = {name: _rows(value, fixed or min(rows, REAL)) for name, value in example.items()}
        _prove(made, traced, real, "the example")
    if fixed is not None:
        warn(
            f"{os.fspath(path)} should take any number of images. Found one for {fixed} at a time, and what it "
            f"computes changes where that is made free, so the model takes {fixed}. Export it with a free first axis.",
            stacklevel=2,
        )
    return made


def _prove(made: ONNXModel, traced: Traced, images: Mapping[str, Array], what: str) -> None:
    expected = run(traced.model, images)
    try:
        found = _outputs(made, images)
    except Exception as error:
        raise ParityError(
            f"The torch module should run where ONNX Runtime runs. Found that on {what} it raises "
            f"{type(error).__name__}: {error}. Quantize the torch model that the file was exported from, and please "
            "report the file."
        ) from error
    errors = {n: relative(f, e) for n, f, e in zip(made.output_names, found, expected, strict=True)}
    if max(errors.values()) < CLOSE:
        return
    listed = ", ".join(f"{name} by {error:.2g}" for name, error in errors.items() if error >= CLOSE)
    raise ParityError(
        f"The torch module should compute what ONNX Runtime computes, within {CLOSE:g} of each output's L2 norm. "
        f"Found that on {what} it differs in {listed}; {_first_difference(traced)}. Quantize the torch model that the "
        "file was exported from, and please report the file."
    )


def _first_difference(traced: Traced) -> str:
    """Say which operation is the first to differ, on the images that the file was traced with."""
    made = build(traced, everything=True)
    found = _outputs(made, {name: traced.fewer[name] for name in made.input_names})
    for name, value in zip(made.output_names, found, strict=True):
        if relative(value, traced.fewer[name]) >= CLOSE:
            node = next(node for node in traced.model.graph.node if name in node.output)
            return f"the first operation that does is {node.op_type} ({node.name or name})"
    return "no single operation does on random images"


@torch.no_grad()
def _outputs(made: ONNXModel, images: Mapping[str, Array]) -> list[Array]:
    result = made(*(torch.from_numpy(np.ascontiguousarray(images[name])) for name in made.input_names))
    return [t.numpy() for t in ((result,) if isinstance(result, Tensor) else result)]


def _example(example_input: Any, inputs: list[Input]) -> dict[str, Array] | None:
    """Return the example by the names of the inputs.

    Raises:
        DataError: it has other inputs, another type, or another shape.
    """
    if example_input is None:
        return None
    if isinstance(example_input, Mapping):
        given = dict(example_input)
    else:
        values = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        given = dict(zip((i.name for i in inputs), values, strict=False)) if len(values) == len(inputs) else {}
    wanted = ", ".join(f"{i.name} {_words(i.shape)}" for i in inputs)
    if set(given) != {i.name for i in inputs} or not all(isinstance(v, Tensor) and v.dim() for v in given.values()):
        raise DataError(f"example_input should hold the inputs of the file: {wanted}. Found {_found(example_input)}.")
    for i in inputs:
        shape = tuple(given[i.name].shape)
        fits = len(shape) == len(i.shape) and all(b in (None, a) for a, b in zip(shape[1:], i.shape[1:], strict=True))
        if not fits:
            raise DataError(
                f"example_input should fit the inputs of the file: {wanted}. Found {list(shape)} for {i.name}. Resize "
                "or crop the images to the size that the file is for."
            )
    return {i.name: given[i.name].detach().cpu().numpy().astype(i.dtype) for i in inputs}


def _random(inputs: list[Input], example: Mapping[str, Array] | None, count: int, *, seed: int) -> dict[str, Array]:
    """Make random images of the size that the file, or the example, has; whole numbers are 0.

    Raises:
        ModelError: the size is open.
    """
    generator = np.random.default_rng(seed)
    made = {}
    for i in inputs:
        shape = i.shape[1:] if example is None else example[i.name].shape[1:]
        if not i.shape or None in shape:
            raise ModelError(
                f"The size of an image should be known. Found the input {i.name} with the shape {_words(i.shape)}. "
                "Pass an example_input, or export the model for one size."
            )
        size = (count, *(s for s in shape if s is not None))
        whole = not np.issubdtype(i.dtype, np.floating)
        made[i.name] = (np.zeros(size) if whole else generator.standard_normal(size)).astype(i.dtype)
    return made


def _rows(value: Array, count: int) -> Array:
    """Return the first rows, over again where there are too few."""
    return np.concatenate([value] * -(-count // len(value)))[:count]


def _words(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _found(example_input: Any) -> str:
    if isinstance(example_input, Mapping):
        return f"inputs called {', '.join(map(str, example_input))}"
    if isinstance(example_input, Tensor):
        return f"one of shape {list(example_input.shape)}"
    return f"a {type(example_input).__name__}"
