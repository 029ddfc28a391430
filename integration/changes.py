"""What is done to a file to corrupt it, whatever its format; constants are changed in place."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

LITTLE: Final = 1.01
"""A scale that is 1 % off."""

MUCH: Final = 0.5
"""What is added to a bias, as a share of the largest one."""


def middle(x: np.ndarray) -> int:
    return len(x) // 2


def double_one(x: np.ndarray) -> None:
    x[middle(x)] *= 2


def little_one(x: np.ndarray) -> None:
    x[middle(x)] *= np.float32(LITTLE)


def double_all(x: np.ndarray) -> None:
    x *= 2


def negate_one(x: np.ndarray) -> None:
    x[middle(x)] *= -1


def add_to_one(x: np.ndarray) -> None:
    x[middle(x)] += MUCH * np.abs(x).max()


def one_factor(x: np.ndarray) -> None:
    x[middle(x)] *= 1.5


def lower_all(x: np.ndarray) -> None:
    x *= np.float32(0.9)


def swap_two(x: np.ndarray) -> None:
    """Swap the first with the one that differs most from it."""
    other = int(np.abs(x - x[0]).reshape(len(x), -1).max(1).argmax())
    x[[0, other]] = x[[other, 0]]


def one_integer(x: np.ndarray) -> None:
    """Change one 4-bit integer by one."""
    flat = x.reshape(-1)
    flat[middle(flat)] += 1 if flat[middle(flat)] < 7 else -1


@dataclass(frozen=True)
class Way:
    """A way to corrupt a file.

    Attributes:
        where: lists the places of a graph where it can be done.
        change: does it, in a graph at one of these places.
    """

    where: Callable[[Any], Iterator[Any]]
    change: Callable[[Any, Any], None]


Changing = Callable[[Callable[[np.ndarray], None]], Callable[[Any, Any], None]]
"""Makes a change of a graph out of one of an array."""


def ways_of_weights(layers: Callable[[Any], Iterator[Any]], scales: Changing, integers: Changing) -> Mapping[str, Way]:
    """List the ways to corrupt a weight.

    Args:
        layers: lists the layers of a graph.
        scales: changes the scales of a layer's weight.
        integers: changes its integers.
    """
    return {
        "weight scale of one channel doubled": Way(layers, scales(double_one)),
        "weight scale of one channel 1 % off": Way(layers, scales(little_one)),
        "weight scales doubled": Way(layers, scales(double_all)),
        "two weight scales swapped": Way(layers, scales(swap_two)),
        "sign of one weight scale flipped": Way(layers, scales(negate_one)),
        "integers of one channel negated": Way(layers, integers(negate_one)),
        "one integer off by one": Way(layers, integers(one_integer)),
        "integers of two channels swapped": Way(layers, integers(swap_two)),
    }
