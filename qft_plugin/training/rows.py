"""Tensors with a row for each image, collected batch by batch: in memory, or above a limit in a mapped file."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_plugin.errors import ConfigError


class Rows:
    """Collects batches of rows: in memory up to a limit, above it in a file that is mapped into memory.

    The file has no name, so that nothing is left of it however the process ends.
    """

    def __init__(self, memory_limit: int) -> None:
        """Start empty; nothing is written before more than `memory_limit` bytes have come."""
        self._limit = memory_limit
        self._bytes = 0
        self._chunks: list[Tensor] = []
        self._file: Any = None
        self._count = 0
        self._like: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Add a batch, `[rows, ...]`; all batches agree in dtype and in the shape of a row.

        Raises:
            ConfigError: the temporary file cannot be written.
        """
        rows = rows.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._like = rows[:0].clone()  # a view would hold the batch
        self._count += rows.shape[0]
        self._bytes += rows.numel() * rows.element_size()
        self._chunks.append(rows)
        if self._bytes > self._limit:
            with self._room():
                if self._file is None:
                    # Not a context manager: the file outlives this method and is closed in `finish`.
                    self._file = tempfile.TemporaryFile(prefix="qft_", suffix=".rows")  # noqa: SIM115
                for chunk in self._chunks:
                    self._file.write(chunk.flatten().view(torch.uint8).numpy().tobytes())
            self._chunks.clear()

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Say which setting sends images to a folder that has no room for them.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
            raise ConfigError(
                "FinetuneConfig.memory_limit should hold the images and the teacher's activations, or the folder of "
                f"temporary files what is above it. Found {type(error).__name__}: {error.strerror}, after "
                f"{self._bytes / 2**20:,.1f} MiB with a limit of {self._limit / 2**20:,.1f} MiB for this tensor. Raise "
                "the limit, make room there, or name another folder by the environment variable TMPDIR."
            ) from error

    def finish(self) -> Tensor:
        """Return all rows as one tensor, `[rows, ...]`, memory-mapped where they did not fit.

        Raises:
            ConfigError: the temporary file cannot be written.
        """
        assert self._like is not None
        if self._file is None:
            return self._joined()
        shape = (self._count, *self._like.shape[1:])
        with self._room():
            self._file.flush()
        # The mapping keeps the content; what is changed in memory stays there.
        content = np.memmap(self._file, np.uint8, mode="c")
        self.discard()
        return torch.from_numpy(content).view(self._like.dtype).view(shape)

    def _joined(self) -> Tensor:
        """Return the batches as one tensor; each is given up when it has been copied, so that none is held twice."""
        if len(self._chunks) == 1:
            return self._chunks.pop()
        assert self._like is not None
        rows = self._like.new_empty(self._count, *self._like.shape[1:])
        end = self._count
        while self._chunks:
            chunk = self._chunks.pop()
            rows[end - len(chunk) : end] = chunk
            end -= len(chunk)
        return rows

    def discard(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Kept:
    """An activation of all images; one in float32 takes half its memory, relative to the largest number of each image.

    Rounded to 11 bits, it differs from itself by a normalised L2 of about 4e-8, a ten thousandth and less of what a
    student of 4 bits differs by.

    Attributes:
        values: `[images, ...]`.
        largest: by what each image's values were divided, `[images, 1, ...]`; `None` where they are kept as they were.
    """

    values: Tensor
    largest: Tensor | None

    def rows(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return some images' activations on a device, in their own precision."""
        values = self.values[index].to(device)
        if self.largest is None:
            return values
        largest = self.largest[index].to(device)
        return values.to(largest.dtype).mul_(largest)

    def peaks(self) -> Tensor:
        """Return the largest magnitude of each image, `[images]`."""
        if self.largest is not None:
            return self.largest.flatten()
        return self.values.flatten(1).abs().amax(1) if self.values.dim() > 1 else self.values.abs()


class KeptRows:
    """Collects an activation batch by batch, as `Rows` do."""

    def __init__(self, like: Tensor, memory_limit: int, *, halve: bool) -> None:
        """Start empty.

        Args:
            like: a batch, `[rows, ...]`.
            memory_limit: bytes to hold in memory.
            halve: keep float32 in half its memory.
        """
        self._values = Rows(memory_limit)
        self._largest = Rows(memory_limit) if halve and like.dtype == torch.float32 else None

    def append(self, rows: Tensor) -> None:
        """Add a batch, `[rows, ...]`."""
        if self._largest is not None:
            largest = rows.reshape(len(rows), -1).abs().amax(1).clamp(min=torch.finfo(rows.dtype).tiny)
            largest = largest.view(-1, *(1,) * (rows.dim() - 1))
            self._largest.append(largest)
            rows = (rows / largest).to(torch.float16)
        self._values.append(rows)

    def finish(self) -> Kept:
        """Return all rows."""
        return Kept(self._values.finish(), None if self._largest is None else self._largest.finish())

    def discard(self) -> None:
        """Close the files."""
        self._values.discard()
        if self._largest is not None:
            self._largest.discard()
