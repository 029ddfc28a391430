"""Images that a quantized model carries with it, so that its files can be proved on more than an example."""

import inspect
from collections.abc import Iterable
from typing import Any, Final

from torch import nn

from qft_plugin.graph.torch_model import Call, accepts
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


def calls_of(model: nn.Module, items: Iterable[Any]) -> list[Call]:
    """Turn batches of inputs into the arguments of a model."""
    return [call_of(model, item) for item in items]
