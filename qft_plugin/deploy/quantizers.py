"""Which quantizer of a file is which one of torch's: the one that reads the same numbers."""

import itertools
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from qft_plugin.deploy.channels import CLOSE, EQUAL, NEAR, channel_errors, listed, sampled, shown
from qft_plugin.deploy.file_view import Array, File, FileQuantizer, Stretches
from qft_plugin.deploy.findings import Findings, Missing, Place
from qft_plugin.deploy.watched import Grid, Seen


def find_quantizer(
    file: File, computed: Stretches, seen: Seen, findings: Findings, *, known: Place | None = None
) -> Place | None:
    """Find the quantizer of the file that reads what torch's reads, and compare their constants.

    Args:
        file: the file.
        computed: its stretches.
        seen: the call of torch's.
        findings: gets the result.
        known: which one it was in another probe, or `None`. It is that one again if that fits: where nothing but zeros
            is read, others fit as well.

    Returns:
        The quantizer, or the one that reads the most similar numbers; `None` where none reads a tensor of that size.
    """
    x = seen.x.detach().float().cpu()
    if known is not None and _fits(file, computed, x, seen.grid, known):
        findings.quantizers.add(known[0])
        return known
    errors = _candidates(file, computed, x, seen.grid)
    problems = {k: _grid_problem(file.quantizers[k], seen.grid) for k, e in errors.items() if float(e.max()) <= CLOSE}
    if not any(problem is None and computed.read[k].shape == x.shape for k, problem in problems.items()):
        moved = _find_moved(file, computed, x, seen.grid, findings.quantizers)
        if moved is not None:
            findings.quantizers.add(moved[0])
            return moved
    if problems:
        # One tensor may have several quantizers: the one with the same grid, if any. Dead parts of a network read
        # equal zeros: each one its own.
        number = min(problems, key=lambda k: (problems[k] is not None, k in findings.quantizers, k))
        findings.quantizers.add(number)
        findings.error = max(findings.error, float(errors[number].max()))
        if problems[number] is not None:
            findings.tell(f"{seen.place}: {problems[number]} in {file.quantizers[number].name} of the file.")
        return number, None
    if not errors:
        problem = f"{seen.place}: should be in the file. Found no quantizer of a tensor of shape {list(x.shape)}."
        findings.unmatched[seen.number] = Missing(x, problem, len(findings.problems))
        return None
    number = min(errors, key=lambda k: (int((errors[k] > CLOSE).sum()), float(errors[k].max())))
    wrong = (errors[number] > CLOSE).nonzero().flatten().tolist()
    findings.unmatched[seen.number] = Missing(
        x,
        f"{seen.place}: what it reads should be computed in the file. Found that the closest, of "
        f"{file.quantizers[number].name}, differs in {listed(wrong)} of {errors[number].numel()} channels by up to "
        f"{float(errors[number].max()):.2g} of the channel's largest value.",
        len(findings.problems),
        number,
    )
    return number, None


def _candidates(file: File, computed: Stretches, x: Tensor, grid: Grid) -> dict[int, Tensor]:
    """Return by how much quantizers that read as many numbers differ in each channel, `[channels]`, by their number."""
    numbers = [k for k, read in enumerate(computed.read) if read.numel() == x.numel()]
    sample = sampled(x, grid.scale)

    def errors_of(k: int, part: tuple[slice, ...] = ()) -> Tensor:
        return _read_errors(x[part], file.quantizers[k], computed.read[k].reshape(x.shape)[part], grid)

    # Most are of another layer, and a few values tell.
    numbers = [k for k in numbers if errors_of(k, sample).median() < NEAR] or numbers
    return {k: errors_of(k) for k in numbers}


def _fits(file: File, computed: Stretches, x: Tensor, grid: Grid, place: Place) -> bool:
    """Whether a quantizer of the file reads what torch's does, and makes the same of it."""
    number, order = place
    read, quantizer = computed.read[number], file.quantizers[number]
    if read.numel() != x.numel() or _grid_problem(quantizer, grid) is not None:
        return False
    there = x.reshape(read.shape) if order is None else x.permute(order)
    return there.shape == read.shape and float(_read_errors(there, quantizer, read, grid).max()) <= CLOSE


def _find_moved(file: File, computed: Stretches, x: Tensor, grid: Grid, taken: AbstractSet[int]) -> Place | None:
    """Find the quantizer of the file that reads what torch's reads with its axes in another order.

    OpenVINO may move a quantizer in front of a transposition, as in an attention that makes its queries, keys and
    values at once. Where the axes are of one size, the shape does not show it.
    """
    for k in sorted(range(len(computed.read)), key=lambda k: k in taken):
        read = computed.read[k]
        if sorted(read.shape) != sorted(x.shape) or _grid_problem(file.quantizers[k], grid) is not None:
            continue
        for order in itertools.permutations(range(x.dim())):
            there = x.permute(order)
            if there.shape == read.shape and float(_read_errors(there, file.quantizers[k], read, grid).max()) <= CLOSE:
                return k, order
    return None


def _read_errors(x: Tensor, quantizer: FileQuantizer, read: Tensor, grid: Grid) -> Tensor:
    """Return how much what a quantizer of the file reads differs in each channel from what torch's reads, `[channels]`.

    OpenVINO removes a ReLU or a bound that the range of the quantizer after it has anyway, and may merge a factor into
    what the quantizer reads. So a channel may be equal as it is, or inside the range.
    """
    low, high, read_low, read_high = (
        torch.from_numpy(end if end.size > 1 else end.reshape(())).float()
        for end in (quantizer.low, quantizer.high, quantizer.read_low, quantizer.read_high)
    )
    read = read.float()
    merged_before = not (torch.allclose(low, read_low, rtol=EQUAL) and torch.allclose(high, read_high, rtol=EQUAL))
    if merged_before and not _is_scaled(quantizer, grid):
        read = low + (read - read_low) / (read_high - read_low) * (high - low)
    errors = channel_errors(x, read)
    if float(errors.max()) <= CLOSE:
        return errors
    ends = [end.float().cpu() for end in grid.ends]
    return torch.minimum(errors, channel_errors(x.clamp(*ends), read.clamp(*ends)))


def _is_scaled(quantizer: FileQuantizer, grid: Grid) -> bool:
    """Whether a factor after the quantizer was merged into what comes out of it: it reads as torch's does."""
    ends = [end.detach().double().cpu() for end in grid.ends]
    extent = float((ends[1] - ends[0]).abs().max())

    def equal(low: Array, high: Array) -> bool:
        found = (torch.from_numpy(end).reshape(-1) for end in (low, high))
        return all(
            e.numel() in (1, f.numel()) and bool(((e.reshape(-1) - f).abs() <= EQUAL * extent).all())
            for e, f in zip(ends, found, strict=True)
        )

    return equal(quantizer.read_low, quantizer.read_high) and not equal(quantizer.low, quantizer.high)


def in_torch(file: File, place: Place, value: Tensor, seen: Seen) -> Tensor:
    """Return what comes out of a quantizer of the file as torch's would give it, in the shape of what torch's reads.

    Args:
        file: the file.
        place: which of its quantizers it is.
        value: its output.
        seen: the call of torch's.
    """
    quantizer, order = file.quantizers[place[0]], place[1]
    if _is_scaled(quantizer, seen.grid):
        low, high, read_low, read_high = (
            torch.from_numpy(end) for end in (quantizer.low, quantizer.high, quantizer.read_low, quantizer.read_high)
        )
        value = read_low + (value - low) / (high - low) * (read_high - read_low)
    if order is not None:
        value = value.permute([order.index(axis) for axis in range(len(order))])
    return value.to(seen.x).reshape(seen.x.shape).contiguous()  # a forward may view it


def _grid_problem(quantizer: FileQuantizer, grid: Grid) -> str | None:
    """Say how the grids of two quantizers differ, `None` where they are equal."""
    levels = grid.high - grid.low + 1
    if quantizer.levels != levels:
        return f"its values should be {levels} different ones. Found {quantizer.levels}"
    ends = (quantizer.low, quantizer.high)
    if _is_scaled(quantizer, grid):
        ends = (quantizer.read_low, quantizer.read_high)
    for what, expected, found in zip(("smallest", "largest"), grid.ends, ends, strict=True):
        e, f = expected.detach().cpu().flatten(), torch.from_numpy(found).flatten()
        extent = float((grid.ends[1] - grid.ends[0]).abs().max())
        if (e.numel() != f.numel() and 1 not in (e.numel(), f.numel())) or not bool(
            ((e - f).abs() <= EQUAL * extent).all()
        ):
            return (
                f"its {what} value should be {shown(e)} (scale {shown(grid.scale.detach().flatten())}, zero point "
                f"{shown(grid.zero_point.detach().flatten())}). Found {shown(f)}"
            )
    return None
