"""The network and the images that a command names: a function of the user's, an ONNX file, a folder."""

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from qft_plugin.cli.images import Preparation, image_folder
from qft_plugin.cli.saying import wrong_use
from qft_plugin.errors import DataError, ModelError, QFTError
from qft_plugin.graph.torch_model import Call, accepts, check_model, evaluating
from qft_plugin.training.data import as_call

FUNCTION: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_model_name(name: str) -> None:
    """End the command where a name can be no model."""
    if not name.endswith(".onnx") and not FUNCTION.fullmatch(name):
        wrong_use(f"MODEL should be package.module:function or a file .onnx. Found {name!r}.")


def check_data_name(name: str) -> None:
    """End the command where a name can be no data."""
    if not Path(name).is_dir() and not FUNCTION.fullmatch(name):
        wrong_use(f"--data should be a folder of images or package.module:function. Found {name!r}, which is neither.")


def batches_of(name: str, prepare: Preparation, *, batch_size: int, images: int | None) -> tuple[Iterable[Any], Any]:
    """Open the data, and read its first batch.

    Args:
        name: a folder of images, or `package.module:function`.
        prepare: makes a tensor of an image of a folder.
        batch_size: images in a batch of a folder.
        images: how many images of a folder are taken; `None` for all.

    Returns:
        All batches, and the first of them.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if Path(name).is_dir():
        batches: Any = image_folder(Path(name), prepare, batch_size=batch_size, at_most=images)
    else:
        batches = _called(name, DataError, "an iterable of batches")
        if not isinstance(batches, Iterable):
            raise DataError(
                f"{name} should return an iterable of batches. Found {type(batches).__name__}. Return a list or a "
                "DataLoader of the model's inputs."
            )
    iterator: Iterator[Any] = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError(f"{name} should give at least one batch. Found none. Look at what it reads.") from None
    # What can be read once only goes on after the batch that was read.
    return (itertools.chain([first], iterator) if iterator is batches else batches), first


def model_of(name: str, first: Any) -> tuple[nn.Module, Call]:
    """Load a network, and run it on the first batch.

    Args:
        name: `package.module:function`, or a file `.onnx`.
        first: the first batch.

    Returns:
        The network, and the arguments that it was run on: those of one image where it takes no more.

    Raises:
        ModelError: it cannot be loaded, or not be run.
    """
    if name.endswith(".onnx"):
        from qft_plugin.onnx_import.load import from_onnx

        model: Any = from_onnx(name, first[0] if isinstance(first, list) and len(first) == 1 else first)
    else:
        model = _called(name, ModelError, "the model")
    check_model(model)
    call = as_call(first, accepts=accepts(model))
    return model, _run(model, call)


@torch.no_grad()
def _run(model: nn.Module, call: Call) -> Call:
    with evaluating(model):
        try:
            model(*call[0], **call[1])
        except Exception as error:
            one = tuple(t[:1] for t in call[0]), {k: t[:1] for k, t in call[1].items()}
            try:
                model(*one[0], **one[1])
            except Exception:
                shapes = ", ".join(str(list(t.shape)) for t in (*call[0], *call[1].values()))
                raise ModelError(
                    f"The model should run on the first batch, {shapes}. Found {type(error).__name__}: {error}. "
                    "Look at the size (--size) and the number of channels (--grey) of the images."
                ) from error
            return one
    return call


def _called(name: str, kind: Callable[[str], QFTError], what: str) -> Any:
    """Call a function of the user's by its name; the current folder can be imported from."""
    module_name, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise kind(
            f"{name} should be a function that can be imported from {Path.cwd()}. Found {type(error).__name__}: "
            f"{error}. Look at its name, or go to the folder that it is in."
        ) from error
    if not callable(found) or isinstance(found, nn.Module):
        raise kind(
            f"{name} should be a function without arguments that returns {what}. Found {type(found).__name__}. "
            "Write one: def make(): ..."
        )
    return found()
