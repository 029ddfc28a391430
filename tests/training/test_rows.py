"""Rows in memory or in a file: the same, in order, and no file is left."""

import errno
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.errors import ConfigError
from qft_plugin.training.rows import Rows

PLENTY = 2**30


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0, 60, PLENTY])
def test_rows_in_memory_and_in_a_file_are_the_same(folder: Path, dtype: torch.dtype, limit: int) -> None:
    """Whatever the limit, all rows come back in order; a file has no name while it is written."""
    batches = [(torch.randn(n, 3, 2) * 9).to(dtype) for n in (4, 1, 7)]
    rows = Rows(limit)
    for batch in batches:
        rows.append(batch)
    assert not list(folder.iterdir())
    found = rows.finish()
    assert found.dtype == dtype
    assert torch.equal(found, torch.cat(batches))
    assert sys.platform != "linux" or mapped(found) == (limit != PLENTY)
    found[0] = 0  # what is mapped can be changed, and is
    assert not found[0].any()


def mapped(rows: torch.Tensor) -> bool:
    """Whether rows are in a file that is mapped into memory: one without a name."""
    start = rows.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends = [int(end, 16) for end in line.split()[0].split("-")]
        if ends[0] <= start < ends[1]:
            return "(deleted)" in line or "/memfd:" in line
    return False


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    row=st.lists(st.integers(1, 3), max_size=3),
    limit=st.integers(0, 400),
)
def test_rows_of_any_shape(sizes: list[int], row: list[int], limit: int) -> None:
    """Rows of any shape, scalars included, survive any limit, also from batches that are not contiguous."""
    batches = [torch.randn(*row, n).movedim(-1, 0) for n in sizes]
    rows = Rows(limit)
    for batch in batches:
        rows.append(batch)
    assert torch.equal(rows.finish(), torch.cat(batches))


def test_a_discarded_collection_leaves_no_file(folder: Path) -> None:
    """Giving up closes the file; without one there is nothing to close."""
    for limit in (0, PLENTY):
        rows = Rows(limit)
        rows.append(torch.ones(2, 2))
        rows.discard()
    assert not list(folder.iterdir())


def test_rows_give_up_each_batch_when_it_is_copied() -> None:
    """No batch is held any more once the rows are joined, and they stand in the order that they came in."""
    rows = Rows(PLENTY)
    for number in range(3):
        rows.append(torch.full((number + 1, 2), float(number)))
    chunks = [weakref.ref(chunk) for chunk in rows._chunks]
    copied: list[int] = []
    new = torch.Tensor.__setitem__

    def copy(rows: torch.Tensor, where: slice, chunk: torch.Tensor) -> None:
        new(rows, where, chunk)
        copied.append(sum(c() is not None for c in chunks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__setitem__", copy)
        joined = rows.finish()
    assert copied == [3, 2, 1]
    assert joined[:, 0].tolist() == [0, 1, 1, 2, 2, 2]


def test_rows_do_not_carry_a_graph() -> None:
    """What is kept needs no gradient."""
    rows = Rows(PLENTY)
    rows.append(torch.ones(2, requires_grad=True) * 2)
    assert not rows.finish().requires_grad


class Full:
    """A file on a disk without room."""

    def write(self, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_a_full_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting that sends images there is named, and where the folder is chosen; nothing came before the limit."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    rows = Rows(4 * 2**20)
    rows.append(torch.zeros(2**20))
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.memory_limit.*No space left.*after 5\.0 MiB.*TMPDIR"):
        rows.append(torch.zeros(2**18))
