"""Dropout that a forward calls in eval mode too, which no exporter of a file keeps."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin.errors import DeployabilityError, warn
from qft_plugin.graph.record import function_name
from qft_plugin.graph.surroundings import varies
from qft_plugin.graph.torch_model import Call, tensors_in

ACTIVE_BY_DEFAULT: Final = {
    **dict.fromkeys(["dropout", "dropout1d", "dropout2d", "dropout3d"], True),
    **dict.fromkeys(["alpha_dropout", "feature_alpha_dropout"], False),
}
"""Each dropout, and whether it is active where a call does not say."""


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Leave out every dropout, and tell of those that were active: a model can then be exported and compared."""
    mode = _WithoutDropout()
    with mode:
        yield
    if mode.active:
        warn(
            "The model should compute the same in eval mode each time. Found a dropout that is active in eval mode, "
            "called with training=True. The file leaves it out. Call functional.dropout(x, p, self.training), or "
            "nn.Dropout, if it is for training only.",
            stacklevel=3,
        )


def check_not_random(model: nn.Module, call: Call, wrapper: type[Any] | tuple[()] = ()) -> None:
    """Refuse a model that a file cannot be made of, before any work: one that is random, where dropout is left out.

    Args:
        model: in eval mode, inside `without_dropout`.
        call: arguments to run it with.
        wrapper: see `tensors_in`.

    Raises:
        DeployabilityError: it computes something else each time.
    """
    args, kwargs = call
    if varies(lambda: list(tensors_in(model(*args, **kwargs), wrapper))):
        raise DeployabilityError(
            "The model should compute the same in eval mode each time, as a file does. Found that it does not, though "
            "every dropout is left out: its forward draws random numbers. Leave that out where self.training is "
            "false, or hand the random numbers in as an input."
        )


class _WithoutDropout(TorchFunctionMode):
    """Returns what a dropout reads; a host's own modes, which are entered later, see the call as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        active = ACTIVE_BY_DEFAULT.get(function_name(func))
        if active is None:
            return func(*args, **(kwargs or {}))
        words = {**dict(zip(("input", "p", "training"), args, strict=False)), **(kwargs or {})}
        self.active |= bool(words.get("training", words.get("train", active))) and words.get("p", 0.5) > 0
        x: Tensor = words["input"]
        return x
