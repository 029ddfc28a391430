"""Images that a quantized model carries with it, so that its files can be proved on more than an example."""

import inspect
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.errors import DataError
from qft_plugin.graph.torch_model import Call, accepts, evaluating
from qft_plugin.training.data import Inputs, as_call

KEPT: Final = "_qft_images"
"""Attribute of a quantized model; it is no part of its state dict."""

COUNT: Final = 8
"""How many images are kept."""


def keep_images(model: nn.Module, inputs: Inputs) -> None:
    """Keep the first images with a quantized model.

    Args:
        model: the model; it gets an attribute.
        inputs: the images that it was quantized with.
    """
    args, kwargs = inputs.first(COUNT)
    call = tuple(t.detach().clone() for t in args), {name: t.detach().clone() for name, t in kwargs.items()}
    model.__dict__[KEPT] = call


def hand_images_on(model: nn.Module, other: nn.Module) -> None:
    """Keep the images of one model with another one, which was made from it."""
    if KEPT in model.__dict__:
        other.__dict__[KEPT] = model.__dict__[KEPT]


def kept_images(model: nn.Module) -> list[Call]:
    """Return the images that are kept with a model, as one call; none where there are none."""
    call = model.__dict__.get(KEPT)
    return [] if call is None else [call]


def call_of(model: nn.Module, item: Any) -> Call:
    """Turn one input into the arguments of a model, in the order of its forward.

    Args:
        model: the model.
        item: a tensor, a tuple of tensors or a dict of tensors.

    Raises:
        DataError: the model does not take it.
    """
    args, kwargs = as_call(item, accepts=accepts(model))
    names = [n for n in inspect.signature(model.forward).parameters if n in kwargs]
    names += [n for n in kwargs if n not in names]
    return args, {name: kwargs[name] for name in names}


def example_of(model: nn.Module, example_input: Any) -> Call:
    """Turn the example of an export into the arguments of a model, after it was checked.

    Beside what the model's forward says there are the images that it was quantized with: the number of inputs, their
    axes and dtypes are those. Other sizes are right wherever the model runs on them.

    Args:
        model: a quantized model.
        example_input: what the user has passed.

    Raises:
        DataError: it names `example_input`, what it should be, and what was found.
    """
    kept = model.__dict__.get(KEPT)
    wanted = "one input, as for the model"
    if kept is not None:
        wanted = f"like the images that the model was quantized with, {_of(kept, any_number=True)}"
    remedy = "Pass a batch as the model takes it: a tensor, a tuple of tensors or a dict of tensors."

    def wrong(found: str) -> DataError:
        return DataError(f"example_input should be {wanted}. Found {found}. {remedy}")

    values = list(example_input.values()) if isinstance(example_input, dict) else example_input
    values = [values] if isinstance(values, Tensor) else values
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, Tensor) for v in values):
        kinds = sorted({type(v).__name__ for v in values}) if isinstance(values, (list, tuple)) else []
        of = f" of {', '.join(kinds) or 'nothing'}" if isinstance(values, (list, tuple)) else ""
        raise wrong("None" if example_input is None else f"{_a(type(example_input).__name__)}{of}")
    if isinstance(example_input, list) and len(values) > 1:
        raise wrong(f"a list of {len(values)} tensors")
    try:
        args, kwargs = call = call_of(model, example_input)
    except DataError:
        raise wrong(f"{_of(_loose(example_input))}, which its forward does not take") from None
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for t in (*args, *kwargs.values()):
        if like is not None and t.device != like.device:
            raise wrong(f"{_of(call)} on {t.device}, while the model is on {like.device}")
        if kept is None and like is not None and t.is_floating_point() and t.dtype != like.dtype:
            raise wrong(f"{_of(call)}, while the model is in {_dtype(like)}")
    # Inputs by position may be passed by keyword here: then the run below decides.
    if kept is not None and len(args) == len(kept[0]) and kwargs.keys() == kept[1].keys():
        pairs = [*zip(args, kept[0], strict=True), *((t, kept[1][name]) for name, t in kwargs.items())]
        if any(t.dim() != k.dim() or t.dtype != _lowered(k, like) for t, k in pairs):
            raise wrong(_of(call))
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    except Exception as error:  # a model may fail in any way on an input that it was not made for
        raise wrong(f"{_of(call)}, on which the model raises {type(error).__name__}: {error}") from error
    return call


def _a(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _loose(item: Any) -> Call:
    """Return tensors as a call, whatever the model takes."""
    if isinstance(item, dict):
        return (), item
    return (item,) if isinstance(item, Tensor) else tuple(item), {}


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _lowered(kept: Tensor, like: Tensor | None) -> torch.dtype:
    """Return the dtype that an input should have for a model that may have been brought to another precision."""
    return like.dtype if like is not None and kept.is_floating_point() else kept.dtype


def _of(call: Call, *, any_number: bool = False) -> str:
    """Describe the tensors of a call.

    Args:
        call: the arguments.
        any_number: say of the first axis that it is that of the images.
    """
    args, kwargs = call

    def one(t: Tensor) -> str:
        sizes = [str(size) for size in t.shape]
        return f"{_dtype(t)} [{', '.join(['images', *sizes[1:]] if any_number else sizes)}]"

    return ", ".join([*(one(t) for t in args), *(f"{name}: {one(t)}" for name, t in kwargs.items())])


def calls_of(model: nn.Module, items: Iterable[Any]) -> list[Call]:
    """Turn batches of inputs into the arguments of a model."""
    return [call_of(model, item) for item in items]
