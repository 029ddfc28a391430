"""A file as a proof sees it, whatever its format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class FileQuantizer:
    """A quantizer of activations in a file.

    Attributes:
        name: in the file.
        source: name of the tensor that it reads.
        low: smallest real value that comes out; broadcasts, as the others do.
        high: largest real value that comes out.
        read_low: the input for which it gives `low`; another value than `low` where a factor was merged into it.
        read_high: likewise of `high`.
        levels: how many different values can come out.
        added: everything that reads it is an addition, which a runtime may fuse into the layer before.
    """

    name: str
    source: str
    low: Array
    high: Array
    read_low: Array
    read_high: Array
    levels: int
    added: bool = False

    def equals(self, other: "FileQuantizer") -> bool:
        """Whether another quantizer reads the same tensor and makes the same of it."""
        return (
            (self.source, self.levels) == (other.source, other.levels)
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )


@dataclass(frozen=True)
class FileProduct:
    """A convolution or a matrix product with constant integers in a file.

    Attributes:
        name: in the file.
        integers: of its constant, flat, in the order of torch's weight.
        values: their real values, likewise.
    """

    name: str
    integers: Integers
    values: Array


@dataclass(frozen=True)
class Stretches:
    """The tensors that a file computes between its quantizers.

    Attributes:
        read: the input of each quantizer.
        products: the output of each product, without the bias.
        outputs: of the network.
    """

    read: Sequence[Tensor]
    products: Sequence[Tensor]
    outputs: Sequence[Tensor]


@dataclass(frozen=True)
class Ran:
    """The result of a file in a runtime.

    Attributes:
        outputs: of the network.
        quantized: the output of each quantizer, `None` where nobody looked.
    """

    outputs: Sequence[Tensor]
    quantized: Sequence[Tensor | None]


class File(Protocol):
    """A file that was read back.

    Attributes:
        runtime: who runs it, for messages.
        free_batch: whether it takes any number of images.
        quantizers: its quantizers of activations.
        products: its products with constant integers.
        constants: all other integers that it holds, flat.
    """

    runtime: str
    free_batch: bool
    quantizers: Sequence[FileQuantizer]
    products: Sequence[FileProduct]
    constants: Sequence[Integers]

    def stretches(self, inputs: Sequence[Tensor], quantized: Sequence[Tensor]) -> Stretches:
        """Compute each stretch of the network, with given values in the place of each quantizer's."""

    def run(self, inputs: Sequence[Tensor], *, hidden: frozenset[int] = frozenset()) -> Ran:
        """Run the file as it is, and look at the outputs of the quantizers that are not hidden."""


def as_array(value: Any) -> Array:
    """Return a constant in float64."""
    return np.asarray(value, dtype=np.float64)
