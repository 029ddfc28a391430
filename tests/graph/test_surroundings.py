"""What surrounds a job, and models that compute something else each time."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qft_plugin.errors import ModelError, OutOfMemoryError
from qft_plugin.graph.surroundings import REPEATS, check_repeatable, undisturbed, varies


def test_random_numbers_go_on() -> None:
    """Those of torch, numpy and Python, whatever is raised inside."""

    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002  (the state of users' code)

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = drawn()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    with pytest.raises(ZeroDivisionError), undisturbed():
        assert sum(drawn()) / 0
    assert drawn() == expected


def test_outside_any_autocast() -> None:
    """It goes on after it."""
    x = torch.randn(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with undisturbed():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("error", [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    torch.OutOfMemoryError("CUDA out of memory."),
])  # fmt: skip
def test_a_lack_of_memory_under_another_name(error: Exception) -> None:
    """It is found in what an error came from."""

    def run() -> None:
        try:
            raise error
        except Exception as found:
            raise ModelError("The model should run.") from found

    with pytest.raises(OutOfMemoryError, match=r"enough memory\. Found .*batch_size"), undisturbed():
        run()


def test_other_errors_come_through() -> None:
    """As they are."""
    error = RuntimeError("no such operator")
    with pytest.raises(RuntimeError) as caught, undisturbed():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("draw", [
    lambda: torch.rand(()).item(),
    lambda: np.random.rand(),  # noqa: NPY002  (the state of users' code, which a test seeds)
    lambda: random.random(),
], ids=["torch", "numpy", "python"])  # fmt: skip
def test_what_is_rarely_random(draw: object) -> None:
    """It is run on while random numbers are drawn, and only once more where none are."""
    runs = []

    def rarely() -> list[Tensor]:
        runs.append(draw())  # type: ignore[operator]
        return [torch.tensor(float(len(runs) == REPEATS))]

    assert varies(rarely)
    assert len(runs) == REPEATS
    assert not varies(lambda: runs.append(0) or [torch.ones(2)])  # type: ignore[func-returns-value]
    assert len(runs) == REPEATS + 2


class Lowered(nn.Module):
    """A layer that may run under an autocast of its own."""

    def __init__(self, dtype: torch.dtype, *, enabled: bool) -> None:
        super().__init__()
        self.layer, self.dtype, self.enabled = nn.Linear(4, 3), dtype, enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.enabled):
            return self.layer(x).to(self.dtype).relu().float()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_in_the_forward_is_named(dtype: torch.dtype) -> None:
    """With the function and the type; a type that the forward converts to by itself is its own matter."""
    call = ((torch.randn(2, 4),), {})
    model = Lowered(dtype, enabled=True)
    with pytest.raises(ModelError, match=rf"float32\. Found linear in {dtype}, by a torch\.autocast"):
        check_repeatable(model, call, [model(*call[0])])
    model.enabled = False
    check_repeatable(model, call, [model(*call[0])])
