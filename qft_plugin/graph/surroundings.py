"""What surrounds a job: random numbers, precision and memory; and models that compute something else each time."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin.errors import ModelError, OutOfMemoryError
from qft_plugin.graph.record import function_name
from qft_plugin.graph.torch_model import SAME, Call, first_outputs, largest_change, random_state_kept

REPEATS: Final = 8
"""How often a model that draws random numbers is run: one run may happen to drop nothing."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute outside any `torch.autocast` around the caller, and let random numbers go on as before.

    A network in lower precision differs from itself by more than what a rewriting of it may change, and a file of it
    would hold casts that no runtime knows.

    Raises:
        OutOfMemoryError: there was no memory, whatever was made of that on the way.
    """
    with contextlib.ExitStack() as around:
        around.enter_context(random_state_kept())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                around.enter_context(torch.autocast(device, enabled=False))
        try:
            yield
        except Exception as error:
            cause = _lack_of_memory(error)
            if cause is None or isinstance(error, OutOfMemoryError):
                raise
            raise OutOfMemoryError(
                f"There should be enough memory. Found {type(cause).__name__}: {cause}. Pass fewer or smaller images "
                "at a time. In a finetune, a smaller FinetuneConfig.batch_size takes less; a smaller memory_limit "
                "keeps images in a file, and a smaller max_images leaves some out."
            ) from error


def _lack_of_memory(error: BaseException) -> BaseException | None:
    """Find in an error and what it came from one that says that memory was missing."""
    found: BaseException | None = error
    while found is not None:
        says = any(words in str(found) for words in ("allocate memory", "out of memory", "bad alloc"))
        if isinstance(found, MemoryError) or (isinstance(found, (RuntimeError, OSError)) and says):
            return found
        found = found.__cause__ or found.__context__
    return None


@torch.no_grad()
def varies(run: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether a computation has another result when it is done again; it is, as long as it draws random numbers.

    Args:
        run: computes something.
    """
    first = run()
    for _ in range(REPEATS):
        before = _drawn()
        if _change(first, run()) > SAME:  # NaN, which differs from itself, is told elsewhere
            return True
        if before == _drawn():
            break
    return False


def check_repeatable(model: nn.Module, call: Call, expected: Sequence[Tensor]) -> None:
    """Refuse a model that computes something else from the same images and random numbers, or in 16 bits.

    One that draws from the generators of torch, numpy or Python draws the same each time that it is compared.

    Args:
        model: in eval mode.
        call: arguments to run it with.
        expected: the result of `first_outputs` for them.

    Raises:
        ModelError: it computes something else when it is run again, or there is a `torch.autocast` in its forward.
    """
    with _Lowered() as lowered:
        found = first_outputs(model, call)
    if lowered.found is not None:
        raise ModelError(
            f"The model should compute in float32. Found {lowered.found}, by a torch.autocast in its forward. Leave it "
            'out there; to train faster in 16 bits, set FinetuneConfig(precision="bfloat16").'
        )
    change = _change(expected, found)
    if not change <= SAME:
        raise ModelError(
            "The model should compute the same in eval mode when it is run again on the same images. Found a relative "
            f"difference of {change:.3g}. Its forward may draw random numbers from a generator of its own, or keep "
            "something from one call to the next: leave that out, or do it in front of the model."
        )


class _Lowered(TorchFunctionMode):
    """Finds the first call that a `torch.autocast` lets compute in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        coarse = isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16)
        if coarse and self.found is None and torch.is_autocast_enabled(result.device.type):
            self.found = f"{function_name(func)} in {result.dtype}"
        return result


def _change(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    same = [tuple(t.shape) for t in expected] == [tuple(t.shape) for t in found]
    return largest_change(expected, found) if same else float("inf")


def _drawn() -> tuple[Any, ...]:
    """Return the states of all generators that a forward may draw from without having one of its own."""
    numbers: Any = np.random.get_state()  # noqa: NPY002  (the state that users' code shares)
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count()))]
    return (*(bytes(state.numpy()) for state in states), random.getstate(), bytes(numbers[1]), numbers[2:])
