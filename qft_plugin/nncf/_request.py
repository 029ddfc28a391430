"""The user's request to NNCF: the dataset, and how NNCF places and calibrates its own quantizers."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
from nncf.common.logging.track_progress import track
from torch import nn

from qft_plugin.config import HardwareSpec
from qft_plugin.errors import DataError, ModelError
from qft_plugin.job.activation_ranges import BATCH, RANGE_IMAGES
from qft_plugin.nncf._graph import example_of
from qft_plugin.training.data import Inputs


@dataclass(frozen=True)
class Request:
    """The user's request to NNCF.

    Attributes:
        original: NNCF's own `quantize`.
        dataset: the calibration dataset.
        settings: the other arguments of NNCF's own `quantize`.
        hardware: constraints of the target.
        own_items: NNCF calibrates on the items of the dataset as they are; otherwise on the first images in batches,
            since only the signs of its estimates are used.
    """

    original: Callable[..., Any]
    dataset: Any
    settings: dict[str, Any]
    hardware: HardwareSpec
    own_items: bool

    def items(self) -> Iterable[Any]:
        """Iterate over the model's inputs.

        Raises:
            DataError: the dataset is not NNCF's.
        """
        if not isinstance(self.dataset, nncf.Dataset):
            raise DataError(
                f"calibration_dataset should be an nncf.Dataset. Found {type(self.dataset).__name__}. "
                "Wrap it: nncf.Dataset(loader, lambda batch: batch[0])."
            )
        items: Iterable[Any] = self.dataset.get_inference_data()
        return items

    @property
    def calibration_items(self) -> int:
        """How many items of the dataset NNCF calibrates on, at most."""
        default = inspect.signature(self.original).parameters["subset_size"].default
        return int(self.settings.get("subset_size", default))

    @property
    def runs_on_cpu(self) -> bool:
        """Whether the model is meant for OpenVINO's CPU plugin."""
        device = self.settings.get("target_device", nncf.TargetDevice.ANY)
        return device in (nncf.TargetDevice.ANY, nncf.TargetDevice.CPU)

    def place(self, model: nn.Module, inputs: Inputs) -> nn.Module:
        """Let NNCF place and calibrate its quantizers on the images that were read.

        Raises:
            ModelError: an operation of the model ran on none of these images.
        """
        if self.own_items:
            sizes: Sequence[int] = inputs.sizes if inputs.own is None else inputs.sizes[: self.calibration_items]
            replay = _Again(inputs, sizes, self.dataset.get_batch_size())
        else:
            # Every item costs memory: NNCF keeps small statistics of each, which glibc puts between large free blocks.
            count, size = min(len(inputs), RANGE_IMAGES), inputs.at_once(BATCH)
            replay = _Again(inputs, [min(size, count - start) for start in range(0, count, size)], min(size, count))
        # NNCF warns of a dataset with fewer items than it would look at, but these batches are no items of the user's.
        settings = {"subset_size": min(len(replay), self.calibration_items), **self.settings}
        try:
            with _without_bars():
                quantized: nn.Module = self.original(model, nncf.Dataset(replay), **settings)
        except nncf.InternalError as error:
            if "Statistics were not collected" not in str(error):
                raise
            raise ModelError(
                f"The model should run the same operations each time it is called. NNCF's message: {error}. So this "
                "operation ran when the model was read, and on none of the calibration images. Look for an `if` in its "
                "forward that depends on random numbers, or on the input."
            ) from error
        return quantized


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Leave NNCF's own progress bars out, which would be drawn over the line of the phase that runs."""
    original = track.__init__

    def quiet(bars: Any, *args: Any, **kwargs: Any) -> None:
        original(bars, *args, **kwargs)
        bars.progress.disable = True

    track.__init__ = quiet
    try:
        yield
    finally:
        track.__init__ = original


class _Again:
    """The images of the user's dataset again: a generator can be read once only."""

    def __init__(self, inputs: Inputs, sizes: Sequence[int], batch_size: int | None) -> None:
        self._inputs, self._sizes = inputs, sizes
        self.batch_size = batch_size  # NNCF chooses the form of its statistics by it

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for size in self._sizes:
            yield example_of(self._inputs.batch(slice(start, start + size)))
            start += size

    def __len__(self) -> int:
        return len(self._sizes)
