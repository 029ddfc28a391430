"""Reading a dataset: every kind of item, and every mistake by the number of its item."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import DataError
from qft_plugin.training.data import Inputs, as_call, check_batches, read_inputs

LIKE = torch.zeros(1)
PLENTY = 2**30


def read(items: Any, *, max_images: int = 100, memory_limit: int = PLENTY) -> Inputs:
    """Read a dataset for a float32 model that takes anything."""
    settings = FinetuneConfig(max_images=max_images, memory_limit=memory_limit)
    return read_inputs(items, accepts=anything, like=LIKE, settings=settings)


@pytest.mark.parametrize(("size", "expected"), [(32, 64), (224, 16), (4000, 1)])
def test_batches_of_large_images_are_smaller(size: int, expected: int) -> None:
    """Where nothing trains, a batch has as many images as fit, in halves of what was asked for, and one at least."""
    inputs = Inputs((torch.empty(1, 3, size, size),), {}, (1,), torch.device("cpu"))
    assert inputs.at_once(64) == expected


def test_a_generator_without_a_length_and_with_any_batches() -> None:
    """Batches of different sizes are joined in order, and their sizes are remembered."""

    def items() -> Iterator[Tensor]:
        yield from (torch.full((n, 2), float(n)) for n in (3, 1, 4))

    inputs = read(items())
    assert inputs.sizes == (3, 1, 4)
    assert len(inputs) == 8
    assert inputs.args[0][:, 0].tolist() == [3, 3, 3, 1, 4, 4, 4, 4]


def test_a_loader_may_reuse_its_buffer() -> None:
    """Each image is kept as it was when it was read, also where the loader fills one buffer again and again."""

    def items() -> Iterator[Tensor]:
        buffer = torch.empty(1, 2)
        for n in range(3):
            yield buffer.fill_(n)

    assert read(items()).args[0][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("limit", "sizes"), [(1, (1,)), (4, (4,)), (5, (4, 1)), (8, (4, 4)), (99, (4, 4, 4))])
def test_reading_stops_at_the_limit(limit: int, sizes: tuple[int, ...]) -> None:
    """Not one image more than `max_images` is kept, and not one item more than needed is read."""
    taken = []

    def items() -> Iterator[Tensor]:
        for n in range(3):
            taken.append(n)
            yield torch.arange(4.0).unsqueeze(1) + 4 * n

    inputs = read(items(), max_images=limit)
    assert inputs.sizes == sizes
    assert len(taken) == len(sizes)
    assert inputs.args[0].flatten().tolist() == list(range(sum(sizes)))


def test_tuples_and_dicts_become_arguments() -> None:
    """Tuples are positional, dicts go by keyword; token ids may be integers."""
    inputs = read([(torch.ones(2, 3), torch.arange(2)), (torch.ones(1, 3), torch.arange(1))])
    assert [tuple(t.shape) for t in inputs.args] == [(3, 3), (3,)]
    assert not inputs.kwargs
    inputs = read([{"ids": torch.arange(4), "mask": torch.ones(4)}])
    assert not inputs.args
    assert set(inputs.kwargs) == {"ids", "mask"}


def test_batches_cut_all_inputs_alike() -> None:
    """Batches come in order, the last one smaller; an index picks images from every input."""
    inputs = read([(torch.arange(5.0), torch.arange(5.0) * 10)])
    assert [args[0].tolist() for args, _ in inputs.batches(2)] == [[0, 1], [2, 3], [4]]
    assert [args[1].tolist() for args, _ in inputs.batches(2, at_most=3)] == [[0, 10], [20]]
    args, kwargs = inputs.batch(torch.tensor([4, 1]))
    assert [a.tolist() for a in args] == [[4, 1], [40, 10]]
    assert kwargs == {}


def test_images_are_laid_out_as_asked() -> None:
    """Channels-last changes the memory layout of images only, not the values."""
    inputs = read([(torch.randn(2, 3, 4, 4), torch.randn(2, 5))])
    (image, other), _ = inputs.laid_out(channels_last=True).batch(slice(0, 2))
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    assert other.is_contiguous()
    assert torch.equal(image, inputs.args[0])
    assert inputs.batch(slice(0, 2))[0][0].is_contiguous()


def anything(*args: Any, **kwargs: Any) -> bool:
    return True


def one_input(*args: Any, **kwargs: Any) -> bool:
    return len(args) + len(kwargs) == 1


def test_as_call_hands_the_inputs_on() -> None:
    """A tensor, a tuple and a dict become positional and keyword arguments."""
    x = torch.ones(2)
    assert as_call(x, accepts=one_input) == ((x,), {})
    assert as_call((x, x), accepts=anything) == ((x, x), {})
    assert as_call({"a": x}, accepts=one_input) == ((), {"a": x})


@pytest.mark.parametrize(
    ("item", "accepts", "words"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, dtype=torch.int64)),
            one_input,
            r"tuple of \(float32 \[2, 3\], int64 \[2\]\)",
        ),
        ([torch.ones(2, 3), torch.ones(2)], anything, r"list of .*labels"),
        ({"image": torch.ones(2), "label": torch.ones(2)}, one_input, "dict of"),
        ("a path", anything, "Found str"),
        (3, anything, "Found int"),
        ((), anything, "Found tuple"),
        ({}, anything, "Found dict"),
        ((torch.ones(2), 3), anything, "Found tuple"),
        ({"a": None}, anything, "Found dict"),
        (None, anything, "Found NoneType"),
    ],
)
def test_as_call_refuses_what_the_model_does_not_take(item: Any, accepts: Any, words: str) -> None:
    """Labels beside the images and things that are no tensors are refused with what was found and what to do."""
    with pytest.raises(DataError, match=words) as caught:
        as_call(item, accepts=accepts)
    assert "Pass a function" in str(caught.value)


GOOD = torch.ones(2, 3)
WRONG_ITEMS: list[tuple[Any, str]] = [
    (torch.tensor(1.0), "first axis of images"),
    (torch.ones(0, 3), "first axis of images"),
    ((torch.ones(2, 3), torch.ones(4, 3)), "first axis of images"),
    (torch.ones(2, 3, device="meta"), "device"),
    ((torch.ones(2, 3) * 200).to(torch.uint8), "dtype.*uint8.*/ 255"),
    (torch.ones(2, 3).double(), "dtype.*float64"),
    (torch.ones(2, 3).half(), "dtype.*float16"),
    (torch.full((2, 3), math.nan), "finite"),
    (torch.tensor([[0.0, 0.0, math.inf]]), "finite"),
]


@pytest.mark.parametrize(("item", "words"), WRONG_ITEMS)
def test_a_wrong_item_is_named(item: Any, words: str, folder: Path) -> None:
    """An item that the model cannot be run on is refused by its number, and half-written files go."""
    with pytest.raises(DataError, match=rf"item 0.*{words}"):
        read([item])
    if isinstance(item, Tensor):
        with pytest.raises(DataError, match=rf"item 1.*{words}"):
            read([GOOD, item], memory_limit=0)
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([GOOD, torch.ones(2, 4)], r"item 1, input 0.*float32 \[0, 3\].*float32 \[2, 4\]"),
        ([GOOD, torch.ones(2, 3, 1)], "item 1, input 0"),
        ([torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)], "item 1, input 0.*int32"),
        ([GOOD, GOOD, (GOOD, GOOD)], r"item 2.*\[0\].*\[0, 1\]"),
        ([{"a": GOOD}, {"b": GOOD}], r"item 1.*\['a'\].*\['b'\]"),
        ([{"a": GOOD}, {"a": torch.ones(2, 4)}], "item 1, input 'a'"),
    ],
)
def test_items_must_be_alike(items: list[Any], words: str) -> None:
    """A change of shape, dtype or names in the middle of a dataset is refused by the number of the item."""
    with pytest.raises(DataError, match=words):
        read(items)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (torch.zeros(4, 3, 2, 2), r"Found one Tensor of shape \[4, 3, 2, 2\]\. Pass a list of batches"),
        (torch.zeros(4, 3).numpy(), r"Found one ndarray of shape \[4, 3\]"),
        ("images", r"Found 'images'\. Pass a list or a DataLoader"),
        (Path("images"), r"Found .*Path"),
        (None, r"Found None"),
        (3, r"Found 3"),
    ],
)
def test_what_is_no_iterable_of_batches(items: object, words: str) -> None:
    """It is refused by what it is, not by what its items would be."""
    with pytest.raises(DataError, match=rf"Dataset: should be an iterable of batches.*{words}"):
        check_batches(items)
    check_batches([])
    check_batches(torch.utils.data.TensorDataset(torch.zeros(2, 3)))  # has no __iter__, but can be iterated over
    check_batches(iter([]))


def test_an_empty_dataset_is_refused() -> None:
    """A used-up generator is the usual reason, and the message says so."""
    used = iter([GOOD])
    read(used)
    with pytest.raises(DataError, match=r"at least one batch.*generator"):
        read(used)


def test_an_error_of_the_loader_is_passed_on(folder: Path) -> None:
    """The user's own exception comes through unchanged, and no file is left behind."""

    def items() -> Iterator[Tensor]:
        yield GOOD
        raise KeyError("my own bug")

    with pytest.raises(KeyError, match="my own bug"):
        read(items(), memory_limit=0)
    assert not list(folder.iterdir())
