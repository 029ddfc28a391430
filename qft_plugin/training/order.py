"""Which images each step has: every epoch in a new order, the same for one process and for several."""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from qft_plugin.errors import ConfigError

STRATA: Final = 8
"""How many processes can train on the very batches of one process, at most."""


def strata_of(batch_size: int, size: int) -> int:
    """Return into how many strata the images are divided, so that every batch has equally many images of each.

    Image i is in stratum i % strata. The number is the same for one process and for all numbers of processes that
    divide it: these train on the same batches.

    Args:
        batch_size: images in the batch of one step, over all processes.
        size: number of processes.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    strata = math.gcd(batch_size, STRATA)
    if strata % size == 0:
        return strata
    if batch_size % size == 0:
        return size
    raise ConfigError(
        f"FinetuneConfig.batch_size should be a multiple of the number of processes, {size}, and so should the number "
        f"of images be where they are fewer. Found batches of {batch_size}. Change one of them, best so that the "
        f"number of processes divides the greatest common divisor of batch size and {STRATA}."
    )


def orders(count: int, batch_size: int, *, strata: int, seed: int) -> Iterator[Tensor]:
    """Yield the images of each step: every epoch in a new order, a last incomplete batch left out.

    Args:
        count: number of images.
        batch_size: images of a step, at most `count` and a multiple of `strata`.
        strata: each batch has equally many images i of each i % strata.
        seed: of the orders.

    Returns:
        Endlessly, `[batch_size]`, rising.
    """
    generator = torch.Generator().manual_seed(seed)
    part = batch_size // strata
    while True:
        images = [torch.randperm(len(range(s, count, strata)), generator=generator) * strata + s for s in range(strata)]
        for step in range(count // batch_size):
            # Sorted, so that reading from a mapped file moves forwards; the order inside a batch does not matter.
            yield torch.cat([i[step * part : (step + 1) * part] for i in images]).sort().values
