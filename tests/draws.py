"""How random networks are drawn by Hypothesis, and how many of them."""

import os
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from random_nets import (
    ACTIVATIONS,
    JOINS,
    MOVES,
    NORMS,
    POOLS,
    Act,
    Again,
    Convolve,
    Gate,
    Join,
    Move,
    Net,
    Norm,
    Pool,
    Step,
)

ASKED = int(os.environ.get("QFT_EXAMPLES") or 0)
"""How many random networks are drawn; 0 for a few that are the same in every run."""


def examples(usual: int, *, share: float = 1, part: int = 0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that sets how many examples a property gets.

    Args:
        usual: how many in a run that asks for none; they are the same every time.
        share: of those that `QFT_EXAMPLES` asks for. They are drawn from the seed `QFT_SEED`, which a failure prints.
        part: which of several parts of a property this is; each has networks of its own.
    """
    # One example is a whole job, or a network in float64: slow, but none of it is the strategy's.
    chosen = settings(
        max_examples=max(int(share * ASKED), 1) if ASKED else usual,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    number = int(os.environ["QFT_SEED"]) if ASKED else 0
    return lambda test: seed(f"{number} {part}")(chosen(test))


def note_seed() -> None:
    """Print the seed of the run where an example fails."""
    note(f"QFT_SEED={os.environ.get('QFT_SEED')}")


_ON = st.sampled_from([0, 0, 0, 0, 1, 2, 3])


def _kind(made: type[Step], kinds: Sequence[str]) -> st.SearchStrategy[Step]:
    return st.builds(made, on=_ON, kind=st.sampled_from(kinds))


def steps(without: frozenset[str] = frozenset()) -> st.SearchStrategy[Step]:
    """Draw a step.

    Args:
        without: kinds, or names of classes, that are not drawn.
    """

    def left(kinds: Sequence[str]) -> list[str]:
        return [kind for kind in kinds if kind not in without]

    convolution = st.builds(
        Convolve,
        on=_ON,
        out=st.sampled_from([4, 6, 8]),
        kernel=st.sampled_from([1, 3]),
        stride=st.sampled_from([1, 1, 2]),
        dilation=st.sampled_from([1, 1, 2]),
        groups=st.sampled_from(["whole", "whole", "halves", "depthwise"]),
        bias=st.booleans(),
        transposed=st.sampled_from([False, False, False, True]),
    )
    joined = st.builds(Join, on=_ON, other=st.integers(0, 3), kind=st.sampled_from(left(JOINS)))
    others = [
        _kind(Norm, left(NORMS)),
        _kind(Act, left(list(ACTIVATIONS))),
        _kind(Pool, left(POOLS)),
        joined,
        joined,
        _kind(Move, left(MOVES)),
        st.builds(Gate, on=_ON, hard=st.booleans()),
    ]
    if "Again" not in without:
        others.append(st.builds(Again, on=_ON))
    return st.one_of(convolution, convolution, convolution, *others)


def nets(*, most: int = 8, without: frozenset[str] = frozenset(), unused: bool = False) -> st.SearchStrategy[Net]:
    """Draw a network.

    Args:
        most: how many steps it has at most.
        without: kinds, or names of classes, of steps that are not drawn.
        unused: whether it may run steps whose values nothing uses.
    """
    return st.builds(
        Net,
        steps=st.lists(steps(without), min_size=1, max_size=most).map(tuple),
        head=st.sampled_from(["pooled", "flattened", "convolution", "two"]),
        dims=st.sampled_from([2, 2, 2, 1, 3]),
        seed=st.integers(0, 2**16),
        unused=st.booleans() if unused else st.just(False),
    )
