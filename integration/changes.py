"""What is done to constants to corrupt them, in place."""

from typing import Final

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
