"""The second part of a proof: the roundings of a runtime, where torch reads the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from qft_plugin.deploy.file_view import File, Ran
from qft_plugin.deploy.findings import Place
from qft_plugin.deploy.quantizers import in_torch
from qft_plugin.deploy.watched import Seen, Watched, positional
from qft_plugin.graph.torch_model import Call

TIE: Final = 0.01
"""How near to the middle between two integers, in steps, a value is on a tie: float32 sums may end on either side."""

FAR: Final = 8
"""Steps that a rounding which a runtime adds or leaves out does not reach: what is added in coarser steps before a
quantizer moves it by a few."""

ON_TIE: Final = 1e-4
"""Likewise of values that nobody looks at: only these move what comes after them. Where scales are powers of two many
are on exact ties."""


@dataclass(frozen=True)
class Rounding:
    """How the values of one quantizer differ between a runtime and torch, which read the same.

    Attributes:
        place: where it is, by the names of the model.
        values: how many values were compared.
        differ: how many of them differ.
        unexplained: how many of these although torch's own value is on no tie.
        far: how many differ by more than `FAR` steps.
        steps: the largest difference in steps.
        moved: how many values in front of an addition, which were not looked at, are on a tie: each may move a value
            here, which then is on no tie of its own. Where a mean comes between, here are far fewer values than there.
        from_tie: how far from the middle between two integers torch's own value was at most, of those that differ by
            one step on a tie.
    """

    place: str
    values: int
    differ: int
    unexplained: int
    far: int
    steps: int
    from_tie: float
    moved: int = 0

    @property
    def unexplained_share(self) -> float:
        """Share of the values that differ although torch's own is on no tie."""
        return self.unexplained / max(self.values, 1)


def run_in(file: File, call: Call) -> Ran:
    """Run a file in its runtime, and look at all quantizers but those that are hidden.

    Args:
        file: the file.
        call: the arguments of a call.
    """
    return file.run(positional(call), hidden=hidden_in(file))


def compare_roundings(
    watched: Watched, file: File, call: Call, ran: Ran, places: Sequence[Place | None]
) -> list[Rounding]:
    """Let torch's quantizers return the outputs of those of a runtime.

    Args:
        watched: the torch model.
        file: the file.
        call: the arguments of a call.
        ran: its result in the runtime, as `run_in` returns it.
        places: for each call of an activation quantizer of torch which one of the file's it is.

    Returns:
        The differences at each quantizer that was looked at.
    """
    hidden = hidden_in(file)
    found: list[Rounding] = []
    moved = 0

    def activation(seen: Seen) -> Tensor | None:
        nonlocal moved
        place = places[seen.number] if seen.number < len(places) else None
        number = None if place is None else place[0]
        if number in hidden:
            steps = seen.grid.steps(seen.x)
            moved = max(moved, int(((steps - steps.floor() - 0.5).abs() < ON_TIE).sum()))
        value = None if number is None else ran.quantized[number]
        if place is None or value is None or value.numel() != seen.x.numel():
            return None
        value = in_torch(file, place, value, seen)
        found.append(replace(_rounding(seen, value), moved=moved))
        return value

    watched.run(call, activation=activation)
    return found


def hidden_in(file: File) -> frozenset[int]:
    """Return the quantizers that must not be looked at, so that a runtime fuses the additions that read them."""
    return frozenset(k for k, quantizer in enumerate(file.quantizers) if quantizer.added)


def _rounding(seen: Seen, value: Tensor) -> Rounding:
    grid = seen.grid
    theirs, ours = grid.integers(value), grid.integers(seen.x_fq)
    away = (theirs - ours).abs()
    differs = away > 0
    steps = grid.steps(seen.x)[differs]
    gap = (steps - (theirs + ours)[differs] / 2).abs()
    tied = (away[differs] == 1) & (gap <= TIE)
    return Rounding(
        seen.place,
        value.numel(),
        int(differs.sum()),
        int((~tied).sum()),
        int((away > FAR).sum()),
        int(away.max()) if away.numel() else 0,
        float(gap[tied].max()) if bool(tied.any()) else 0.0,
    )
