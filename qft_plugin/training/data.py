"""Unlabeled inputs: read once from any iterable, checked, and kept as tensors that can be cut into batches."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import DataError
from qft_plugin.graph.torch_model import Call, conversion_to
from qft_plugin.training.distributed import ALONE, World
from qft_plugin.training.rows import Rows

HEAD_IMAGES: Final = 1_024
"""Where several processes train, every one of them keeps this many of the first images, to choose the same start."""

HELD_OUT_SHARE: Final = 8
"""One image of so many is held out of training, to choose the state that is kept on images that it has not seen."""

MOST_HELD_OUT: Final = 512

JUDGED: Final = 512
"""Where no image is held out, the state to return is chosen by the loss on this many of the finetuning images."""

LEAST_IMAGES: Final = 128
"""With fewer images all are trained on, and choose the state as well: sixteen of them say little."""

BATCH_BYTES: Final = 10 * 2**20
"""Largest size of the inputs of a batch where nothing trains: 16 images of 224x224. The activations of networks take
tens of times as much, and larger blocks of memory are slower, too: torch takes them from the system and gives them back
in every operation."""


@dataclass(frozen=True)
class Inputs:
    """All inputs, one row per image; in one of several processes the first images only, and `own` beside them.

    Attributes:
        args: positional inputs of the model, each `[images, ...]`.
        kwargs: inputs by keyword, likewise.
        sizes: images in each item of the dataset.
        device: where batches are put.
        channels_last: batches of images are laid out channels-last (NHWC in memory), which CPUs convolve faster.
        world: the processes that train together.
        own: where they are several, every image i with i % size == rank; `None` where there is one process.
        marks: likewise, a number for each item that tells it from others.
        largest: the largest batch that the model takes; `None` for any.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    sizes: tuple[int, ...]
    device: torch.device
    channels_last: bool = False
    world: World = ALONE
    own: "Inputs | None" = None
    marks: tuple[float, ...] = ()
    largest: int | None = None

    def __len__(self) -> int:
        """Return the number of images that are held here."""
        return int(next(iter([*self.args, *self.kwargs.values()])).shape[0])

    @property
    def total(self) -> int:
        """How many images all processes have together."""
        return len(self) if self.own is None else sum(self.sizes)

    @property
    def trained_on(self) -> int:
        """How many of all images, the first ones, are trained on."""
        total = self.total
        return total if total < LEAST_IMAGES else total - min(MOST_HELD_OUT, total // HELD_OUT_SHARE)

    @property
    def judged_on(self) -> tuple[int, int]:
        """The first of all images that a state is judged by, and the one after the last: those that are held out.

        Where none is held out, these are the first `JUDGED` finetuning images.
        """
        return (self.trained_on, self.total) if self.trained_on < self.total else (0, min(self.total, JUDGED))

    @property
    def share(self) -> "Inputs":
        """The images that this process trains on."""
        return self if self.own is None else self.own

    def batch(self, index: Tensor | slice) -> Call:
        """Return one batch as arguments of the model."""
        return tuple(self._cut(t, index) for t in self.args), {k: self._cut(t, index) for k, t in self.kwargs.items()}

    def batches(self, size: int, *, at_most: int | None = None) -> Iterator[Call]:
        """Iterate over the images in order, in batches of `size`, the last one smaller."""
        count = len(self) if at_most is None else min(len(self), at_most)
        size = self.fitting(size)
        for start in range(0, count, size):
            yield self.batch(slice(start, min(start + size, count)))

    def at_once(self, most: int) -> int:
        """Return how many images should be in a batch where nothing trains: `most`, or a half, a quarter, ... of it.

        A model that takes fewer gets no more.

        Args:
            most: where images are small.
        """
        most = self.fitting(most)
        image = sum(t[:1].numel() * t.element_size() for t in (*self.args, *self.kwargs.values()))
        while most > 1 and most * image > BATCH_BYTES:
            most //= 2
        return most

    def fitting(self, size: int) -> int:
        """Return the size of a batch, or of the largest one that the model takes."""
        return size if self.largest is None else min(size, self.largest)

    def first(self, count: int = 2) -> Call:
        """Return the first images as arguments of the model."""
        return self.batch(slice(0, self.fitting(min(count, len(self)))))

    def one_by_one(self) -> "Inputs":
        """Return the same inputs for a model that takes a single image only."""
        return replace(self, largest=1, own=None if self.own is None else self.own.one_by_one())

    def laid_out(self, *, channels_last: bool) -> "Inputs":
        """Return the same inputs with another memory layout of the batches."""
        own = None if self.own is None else self.own.laid_out(channels_last=channels_last)
        return replace(self, channels_last=channels_last, own=own)

    def item_of(self, image: int) -> str:
        """Say where in the dataset an image is.

        Args:
            image: its number, over all processes.
        """
        for number, size in enumerate(self.sizes):
            if image < size:
                return f"Dataset item {number}" if size == 1 else f"Dataset item {number}, image {image} of it,"
            image -= size
        raise IndexError(image)

    def own_image(self, row: int) -> int:
        """Return the number, over all processes, of an image that this process trains on.

        Args:
            row: where its share has it.
        """
        return row if self.own is None else row * self.world.size + self.world.rank

    def _cut(self, rows: Tensor, index: Tensor | slice) -> Tensor:
        # Mixed layouts are the slowest of all, so the layout is always made explicit.
        images = self.channels_last and rows.dim() == 4 and rows.is_floating_point()
        layout = torch.channels_last if images else torch.contiguous_format
        return rows[index].to(self.device).contiguous(memory_format=layout)


def as_call(sample: Any, *, accepts: Callable[..., bool]) -> Call:
    """Turn one item of a dataset into arguments of the model, the way NNCF and plain torch loops do.

    Args:
        sample: a tensor, alone or in a list, a tuple of positional inputs, or a dict of inputs by keyword.
        accepts: whether the model's signature takes these arguments.

    Raises:
        DataError: the item is of another kind, or has labels beside the images.
    """
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, list) and len(sample) == 1 and isinstance(sample[0], Tensor):
        return (sample[0],), {}  # what a DataLoader makes of a dataset of single tensors
    values = list(sample.values()) if isinstance(sample, dict) else sample
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, Tensor) for v in values):
        args: tuple[Tensor, ...] = () if isinstance(sample, dict) else tuple(values)
        kwargs: dict[str, Tensor] = dict(sample) if isinstance(sample, dict) else {}
        if not isinstance(sample, list) and accepts(*args, **kwargs):
            return args, kwargs
        kinds = ", ".join(_words(v) for v in values)
        raise DataError(
            f"Dataset: an item should hold the model's inputs only. Found a {type(sample).__name__} of ({kinds}), "
            "which the model does not take; labels are not needed. Pass a function that picks the inputs, or the "
            "inputs alone: batch[0] of each batch of a loader."
        )
    raise DataError(
        f"Dataset: an item should be a tensor, a tuple of tensors or a dict of tensors. Found {type(sample).__name__}. "
        "Pass a function that turns an item into the model's inputs."
    )


def _words(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def check_batches(items: object) -> None:
    """Refuse what is no iterable of batches, or is one whose items are surely none.

    Raises:
        DataError: it says what to pass.
    """
    if isinstance(items, (Tensor, np.ndarray)):
        raise DataError(
            f"Dataset: should be an iterable of batches. Found one {type(items).__name__} of shape "
            f"{list(items.shape)}. Pass a list of batches, as list(images.split(64)) of a tensor."
        )
    if isinstance(items, (str, os.PathLike)) or not (isinstance(items, Iterable) or hasattr(items, "__getitem__")):
        raise DataError(
            f"Dataset: should be an iterable of batches of images. Found {items!r:.80}. Pass a list or a DataLoader; "
            "the command qft reads folders of images."
        )


def read_inputs(
    items: Iterable[Any],
    *,
    accepts: Callable[..., bool],
    like: Tensor,
    settings: FinetuneConfig,
    world: World = ALONE,
    head_items: int = 0,
) -> Inputs:
    """Read the images of a dataset once, checking every one of them.

    Args:
        items: the dataset; it may have no length, and batches of any size.
        accepts: whether the model's signature takes given arguments.
        like: a parameter of the model; the inputs must agree with its dtype and device.
        settings: at which image to stop reading, and how many bytes to hold in memory per input.
        world: the processes that train together. Every one of them reads and checks the whole dataset; of several,
            each keeps the first images and its own.
        head_items: how many items the first images have at least; `HEAD_IMAGES` is the least number of images.

    Raises:
        DataError: the dataset is empty, holds something that the model cannot be run on (it names the item), or has
            fewer images than there are processes.
    """
    rows: dict[int | str, Rows] = {}
    own: dict[int | str, Rows] = {}
    first: dict[int | str, Tensor] = {}
    sizes: list[int] = []
    marks: list[float] = []
    count = 0
    try:
        for number, item in enumerate(items):
            args, kwargs = as_call(item, accepts=accepts)
            named: dict[int | str, Tensor] = dict(enumerate(args))
            named.update(kwargs)
            _check_item(number, named, first, like)
            take = min(next(iter(named.values())).shape[0], settings.max_images - count)
            head = take if world.size == 1 or number < head_items else min(take, max(0, HEAD_IMAGES - count))
            for key, value in named.items():
                first.setdefault(key, value[:0])
                rows.setdefault(key, Rows(settings.memory_limit)).append(value[:head])
                if world.size > 1:
                    mine = value[(world.rank - count) % world.size : take : world.size]
                    own.setdefault(key, Rows(settings.memory_limit)).append(mine)
            if world.size > 1:
                marks.append(float(sum(v[:take].mean(dtype=torch.float64) for v in named.values())))
            count += take
            sizes.append(take)
            if count >= settings.max_images:
                break
        if count == 0:
            raise DataError(
                "Dataset: should yield at least one batch of inputs. Found none. If it is a generator, "
                "it may have been used up: pass something that can be iterated again, such as a list or a DataLoader."
            )
        if count < world.size:
            raise DataError(
                f"Dataset: should have an image for each of the {world.size} processes at least. Found {count}. "
                "Pass more images, or start fewer processes."
            )
        done, done_own = ({key: r.finish() for key, r in kept.items()} for kept in (rows, own))
    except BaseException:
        for r in (*rows.values(), *own.values()):
            r.discard()
        raise
    inputs = Inputs(*_arguments(done), tuple(sizes), like.device)
    if world.size == 1:
        return inputs
    share = Inputs(*_arguments(done_own), (len(range(world.rank, count, world.size)),), like.device)
    return replace(inputs, world=world, own=share, marks=tuple(marks))


def _arguments(named: dict[int | str, Tensor]) -> Call:
    positional = tuple(named[key] for key in sorted(k for k in named if isinstance(k, int)))
    return positional, {k: v for k, v in named.items() if isinstance(k, str)}


def _check_item(number: int, named: dict[int | str, Tensor], first: dict[int | str, Tensor], like: Tensor) -> None:
    sizes = {t.shape[0] if t.dim() else None for t in named.values()}
    if len(sizes) > 1 or None in sizes or 0 in sizes:
        shapes = [list(t.shape) for t in named.values()]
        raise DataError(
            f"Dataset item {number}: should have a first axis of images, at least 1, equal in all inputs. "
            f"Found shapes {shapes}. Add the batch axis, for example with image.unsqueeze(0)."
        )
    if first and set(first) != set(named):
        raise DataError(
            f"Dataset item {number}: should have the inputs {list(first)} of the items before it. Found {list(named)}."
        )
    for key, value in named.items():
        where = f"Dataset item {number}, input {key!r}"
        if value.device != like.device:
            raise DataError(
                f"{where}: should be on the model's device {like.device}. Found {value.device}. "
                "Move it there in the function that you pass to the dataset."
            )
        if value.dtype == torch.uint8 or (value.is_floating_point() and value.dtype != like.dtype):
            raise DataError(
                f"{where}: should be of the model's dtype {like.dtype}. Found {value.dtype}. "
                f"{conversion_to(like, value)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"{where}: should be finite. Found NaN or infinity. Look at how it is preprocessed.")
        before = first.get(key)
        if before is not None and (value.shape[1:] != before.shape[1:] or value.dtype != before.dtype):
            raise DataError(
                f"{where}: should be like the items before it, {_words(before)} per batch. "
                f"Found {_words(value)}. Resize or crop all images to one size."
            )
