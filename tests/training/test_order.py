"""The images of each step: every image once in an epoch, in batches that divide evenly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.errors import ConfigError
from qft_plugin.training.order import STRATA, orders, strata_of


@given(batch_size=st.integers(1, 200), size=st.integers(1, 40))
def test_strata_divide_every_batch_and_are_those_of_one_process_where_they_can_be(batch_size: int, size: int) -> None:
    """The number of strata divides the batch and is a multiple of the number of processes; it is that of one process
    where the number of processes divides gcd(batch size, 8); where no such number exists, that is an error.
    """
    if batch_size % size:
        with pytest.raises(ConfigError, match=rf"batch_size should be a multiple.* {size},.*Found batches of"):
            strata_of(batch_size, size)
        return
    strata = strata_of(batch_size, size)
    assert batch_size % strata == strata % size == 0
    if math.gcd(batch_size, STRATA) % size == 0:
        assert strata == strata_of(batch_size, 1)


@given(parts=st.integers(1, 6), strata=st.integers(1, 9), extra=st.integers(0, 50), seed=st.integers(0, 99))
def test_every_epoch_shows_every_image_once_in_even_batches(parts: int, strata: int, extra: int, seed: int) -> None:
    """An epoch has as many whole batches as fit, without an image twice, in a new order each time; every batch has
    equally many images of each stratum, so that processes that own some strata have equal shares.
    """
    batch_size = parts * strata
    count = batch_size + extra
    found = orders(count, batch_size, strata=strata, seed=seed)
    epochs = [[next(found) for _ in range(count // batch_size)] for _ in range(2)]
    for epoch in epochs:
        shown = torch.cat(epoch).tolist()
        assert len(set(shown)) == len(shown) == count // batch_size * batch_size
        assert set(shown) <= set(range(count))
        for batch in epoch:
            assert torch.equal(torch.bincount(batch % strata), torch.full((strata,), parts))
            assert torch.equal(batch, batch.sort().values)
    again = orders(count, batch_size, strata=strata, seed=seed)
    assert all(torch.equal(batch, next(again)) for epoch in epochs for batch in epoch)


def test_orders_differ_between_epochs_and_seeds() -> None:
    """Another epoch, and another seed, is another order."""
    found = orders(64, 16, strata=8, seed=0)
    first, second = ([next(found).tolist() for _ in range(4)] for _ in range(2))
    assert first != second
    assert first[0] != next(orders(64, 16, strata=8, seed=1)).tolist()
