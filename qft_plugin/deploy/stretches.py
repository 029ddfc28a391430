"""The first part of a proof: what a file computes between its quantizers, with random integers in their place."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.file_view import Array, File, FileProduct, FileQuantizer, Stretches
from qft_plugin.deploy.watched import Grid, Product, Run, Seen, Watched, positional
from qft_plugin.graph.torch_model import Call

logger = logging.getLogger("qft_plugin")

CLOSE: Final = 3e-3
"""Largest difference of what a stretch computes, relative to the largest value of the channel: sums of float32 stay
below 1e-4, a normalisation of little variance at 2e-3; one step of one of 4,608 weights of a channel is 5e-3."""

QUIET: Final = 0.01
"""A channel counts as at least this share of the largest one: float32 rounding is relative to what was summed."""

EQUAL: Final = 1e-5
"""Largest relative difference of a constant."""

NEAR: Final = 0.5
"""A tensor whose channels differ by more than this in the median is that of another layer."""

SAMPLED: Final = 6
"""How many places along each axis but that of the channels are looked at first."""

UNLIKE: Final = (float("nan"), -1e3, 1e3)
"""What takes the place of values on which no output depends: something of it would be seen there if one did."""

SPARSE: Final = 0.1
"""Share of values that are not zero where few are: channels that only ever see large sums show themselves."""


Place = tuple[int, tuple[int, ...] | None]
"""The number of a quantizer of a file, and in which order it reads the axes of torch's tensor; `None` for the same."""


@dataclass(frozen=True)
class Missing:
    """What a layer or a quantizer of torch has, and the file has not.

    Attributes:
        x: what the layer computes, or the quantizer reads.
        problem: the difference, in words.
        before: how many other problems came before it.
        closest: the quantizer of the file that reads the most similar numbers.
    """

    x: Tensor
    problem: str
    before: int
    closest: int | None = None


@dataclass
class Findings:
    """What is known so far.

    Attributes:
        problems: the differences, in words.
        quantizers: numbers of the file's quantizers that were found.
        products: numbers of the file's products that were found.
        weights: names of the weights whose integers were found.
        silent: names of the weights that multiplied nothing but zeros.
        absent: the layers that were not found in the file, by name of the weight.
        unmatched: the quantizers of torch that were not found in the file, by number of the call.
        error: the largest difference of a stretch that was accepted.
        places: for each call of an activation quantizer of torch which one of the file's it is.
        path: what the model called.
    """

    problems: list[str] = field(default_factory=list)
    quantizers: set[int] = field(default_factory=set)
    products: set[int] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    absent: dict[str, Missing] = field(default_factory=dict)
    unmatched: dict[int, Missing] = field(default_factory=dict)
    error: float = 0.0
    places: list[Place | None] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def tell(self, problem: str) -> None:
        """Add a difference, once."""
        if problem not in self.problems:
            self.problems.append(problem)


Values = Literal["dense", "sparse", "extreme", "own"]


def compare_stretches(watched: Watched, file: File, call: Call, kind: Values) -> Findings:
    """Compare what file and torch compute between quantizers.

    Args:
        watched: the torch model.
        file: the file.
        call: the arguments of a call.
        kind: what stands in the place of each quantizer: integers of the whole grid, mostly zeros, the ends of the grid
            in whole channels, so that bounds such as that of a ReLU6 are reached, or what the file's own quantizers
            give.
    """
    findings, inputs = Findings(), positional(call)
    values = _values(file, file.run(inputs).quantized, kind)
    computed = file.stretches(inputs, values)

    def activation(seen: Seen) -> Tensor | None:
        place = _find_moved(file, computed, seen, findings) or _find_quantizer(file, computed, seen, findings)
        findings.places.append(place)
        return None if place is None else in_torch(file, place, values[place[0]], seen)

    def product(p: Product) -> None:
        _compare_product(file, computed, p, findings)

    run = watched.run(call, activation=activation, product=product)
    findings.path = run.path
    _compare_outputs(run, computed.outputs, findings)
    for name, integers in run.weights.items():
        flat = integers.flatten().to(torch.int64).cpu().numpy()
        if name not in findings.weights and any(np.array_equal(flat, c) for c in file.constants):
            findings.weights.add(name)
    return findings


def merged(file: File, findings: Sequence[Findings]) -> Findings:
    """Put together what several probes found.

    What is the same in all of them is a constant, and may be missing.

    Args:
        file: the file.
        findings: of each probe.
    """
    every = Findings(error=max(f.error for f in findings))
    for found in findings:
        every.quantizers |= found.quantizers
        every.products |= found.products
        every.weights |= found.weights
        every.silent |= found.silent
    every.silent -= every.weights
    for found in findings:
        # In the order of the run: what comes first is next to the cause.
        told = [(float(place), problem) for place, problem in enumerate(found.problems)]
        for number, missing in found.unmatched.items():
            if not _is_constant(missing, [f.unmatched.get(number) for f in findings]):
                told.append((missing.before - 0.5, missing.problem))
            if missing.closest is not None:
                every.quantizers.add(missing.closest)
        for name, missing in found.absent.items():
            if not _is_constant(missing, [f.absent.get(name) for f in findings]):
                told.append((missing.before - 0.5, missing.problem))
        for _, problem in sorted(told, key=lambda pair: pair[0]):
            every.tell(problem)
    for number, quantizer in enumerate(file.quantizers):
        if number not in every.quantizers and not any(quantizer.equals(file.quantizers[k]) for k in every.quantizers):
            every.tell(f"Quantizer {quantizer.name} of the file: no quantizer of the model reads what it reads.")
    for number, p in enumerate(file.products):
        if number not in every.products and not every.silent:
            every.tell(f"Product {p.name} of the file: no layer of the model computes it.")
    return every


def _is_constant(missing: Missing, others: Sequence[Missing | None]) -> bool:
    """Whether a tensor was the same in all probes, so that an exporter may have computed it: it depends on no input."""
    return all(o is not None and missing.x.shape == o.x.shape and torch.equal(missing.x, o.x) for o in others)


def forget_unused(watched: Watched, call: Call, findings: Sequence[Findings]) -> None:
    """Let what was not found be, where no output depends on it: an exporter leaves it out.

    Args:
        watched: the torch model.
        call: the arguments of a call.
        findings: of each probe; changed in place.
    """
    numbers = {number for f in findings for number in f.unmatched}
    names = {name for f in findings for name in f.absent}
    if not numbers | names:
        return
    expected = watched.run(call).outputs

    def same(value: float) -> bool:
        def activation(seen: Seen) -> Tensor | None:
            return torch.full_like(seen.x_fq, value) if seen.number in numbers else None

        def product(p: Product) -> Tensor | None:
            return torch.full_like(p.result, value) if p.weight in names else None

        try:
            outputs = watched.run(call, activation=activation, product=product).outputs
        except Exception as error:  # a forward may refuse such values in any way, and so reads them
            logger.info("the model does not run with other values in the place of what the file lacks: %s", error)
            return False
        return all(torch.equal(e, f) for e, f in zip(expected, outputs, strict=True))

    if not all(same(value) for value in UNLIKE):
        return
    for f in findings:
        f.places = [None if number in numbers else place for number, place in enumerate(f.places)]
        f.unmatched.clear()
        f.absent.clear()


def _values(file: File, ran: Sequence[Tensor | None], kind: Values) -> list[Tensor]:
    """Choose what stands in the place of each quantizer; equal quantizers of one tensor get equal values."""
    values: list[Tensor] = []
    for number, (quantizer, own) in enumerate(zip(file.quantizers, ran, strict=True)):
        assert own is not None
        twin = next((k for k in range(number) if quantizer.equals(file.quantizers[k])), None)
        if twin is not None or kind == "own":
            values.append(own if twin is None else values[twin])
            continue
        generator = torch.Generator().manual_seed(number)
        low, high = torch.from_numpy(quantizer.low), torch.from_numpy(quantizer.high)
        step = (high - low) / (quantizer.levels - 1)
        steps = torch.randint(quantizer.levels, tuple(own.shape), generator=generator)
        if kind == "extreme":
            axis = channel_axis(own)
            shape = [size if k in (0, axis) else 1 for k, size in enumerate(own.shape)]
            ends = (quantizer.levels - 1) * torch.randint(2, shape, generator=generator).expand(own.shape)
            # Some others among them: a normalisation of what is constant would divide by next to nothing.
            steps = torch.where(torch.rand(tuple(own.shape), generator=generator) < SPARSE, steps, ends)
        x = low + step * steps
        if kind == "sparse":
            x = torch.where(torch.rand(tuple(own.shape), generator=generator) < SPARSE, x, torch.zeros_like(x))
        values.append(x.to(torch.float32))
    return values


def _find_moved(file: File, computed: Stretches, seen: Seen, findings: Findings) -> Place | None:
    """Find the quantizer of the file that reads what torch's reads with its axes in another order.

    OpenVINO may move a quantizer in front of a transposition, as in an attention that makes its queries, keys and
    values at once.
    """
    x = seen.x.detach().float().cpu()
    reads = [k for k, read in enumerate(computed.read) if sorted(read.shape) == sorted(x.shape)]
    moved = [k for k in reads if computed.read[k].shape != x.shape]
    if not moved or any(_matches(file.quantizers[k], computed.read[k], x, seen.grid) for k in reads if k not in moved):
        return None
    for k in moved:
        for order in itertools.permutations(range(x.dim())):
            same = tuple(x.shape[axis] for axis in order) == tuple(computed.read[k].shape)
            if same and _matches(file.quantizers[k], computed.read[k], x.permute(order), seen.grid):
                findings.quantizers.add(k)
                return k, order
    return None


def _matches(quantizer: FileQuantizer, read: Tensor, x: Tensor, grid: Grid) -> bool:
    """Whether a quantizer of the file reads given numbers, and has the grid of torch's."""
    if _grid_problem(quantizer, grid) is not None:
        return False
    return float(_read_errors(x, quantizer, read.reshape(x.shape), grid).max()) <= CLOSE


def _find_quantizer(file: File, computed: Stretches, seen: Seen, findings: Findings) -> Place | None:
    """Find the quantizer of the file that reads what torch's reads, and compare their constants."""
    x = seen.x.detach().float().cpu()
    same_shape = [k for k, read in enumerate(computed.read) if read.numel() == x.numel()]
    sample = _sampled(x, seen.grid.scale)

    def errors_of(k: int, part: tuple[slice, ...] = ()) -> Tensor:
        return _read_errors(x[part], file.quantizers[k], computed.read[k].reshape(x.shape)[part], seen.grid)

    # Most are of another layer, and a few values tell.
    same_shape = [k for k in same_shape if errors_of(k, sample).median() < NEAR] or same_shape
    errors = {k: errors_of(k) for k in same_shape}
    close = [k for k in same_shape if float(errors[k].max()) <= CLOSE]
    if close:
        # One tensor may have several quantizers: the one with the same grid, if any.
        number = min(close, key=lambda k: (_grid_problem(file.quantizers[k], seen.grid) is not None, k))
        findings.quantizers.add(number)
        findings.error = max(findings.error, float(errors[number].max()))
        problem = _grid_problem(file.quantizers[number], seen.grid)
        if problem is not None:
            findings.tell(f"{seen.place}: {problem} in {file.quantizers[number].name} of the file.")
        return number, None
    if not same_shape:
        problem = f"{seen.place}: should be in the file. Found no quantizer of a tensor of shape {list(x.shape)}."
        findings.unmatched[seen.number] = Missing(x, problem, len(findings.problems))
        return None
    number = min(same_shape, key=lambda k: (int((errors[k] > CLOSE).sum()), float(errors[k].max())))
    wrong = (errors[number] > CLOSE).nonzero().flatten().tolist()
    findings.unmatched[seen.number] = Missing(
        x,
        f"{seen.place}: what it reads should be computed in the file. Found that the closest, of "
        f"{file.quantizers[number].name}, differs in {_some(wrong)} of {errors[number].numel()} channels by up to "
        f"{float(errors[number].max()):.2g} of the channel's largest value.",
        len(findings.problems),
        number,
    )
    return number, None


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
    errors = _errors(x, read)
    if float(errors.max()) <= CLOSE:
        return errors
    ends = [end.float().cpu() for end in grid.ends]
    return torch.minimum(errors, _errors(x.clamp(*ends), read.clamp(*ends)))


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
        value: what comes out of it.
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
                f"its {what} value should be {_shown(e)} (scale {_shown(grid.scale.detach().flatten())}, zero point "
                f"{_shown(grid.zero_point.detach().flatten())}). Found {_shown(f)}"
            )
    return None


def _compare_product(file: File, computed: Stretches, p: Product, findings: Findings) -> None:
    """Find the product of the file that computes what a layer computes, and compare integers and scales."""
    expected = p.result.detach().float().cpu()
    if not bool(expected.any()):
        findings.silent.add(p.weight)
        return
    integers = p.integers.flatten().to(torch.int64).cpu().numpy()
    candidates = [
        k
        for k, result in enumerate(computed.products)
        if result.numel() == expected.numel() and file.products[k].integers.size == integers.size
    ]
    sample = _sampled(expected)
    near = [
        k
        for k in candidates
        if _fit(expected[sample], computed.products[k].reshape(expected.shape)[sample], p.axis)[1].median() < NEAR
    ]
    candidates = near or candidates
    fits = {k: _fit(expected, computed.products[k].reshape(expected.shape), p.axis) for k in candidates}
    problems = {k: _weight_problem(file.products[k], p, integers) for k in candidates}

    def order(k: int) -> tuple[int, bool, float, bool]:
        # What reads the same in all places fits several products: the one with the same integers, if any.
        residual = fits[k][1]
        return int((residual > CLOSE).sum()), problems[k] is not None, float(residual.max()), k in findings.products

    number = min(candidates, key=order, default=None)
    if number is None or float((fits[number][1] > CLOSE).double().mean()) > 0.5:
        problem = f"Layer {p.weight}: should be in the file as a product with its integers. Found none."
        findings.absent[p.weight] = Missing(expected, problem, len(findings.problems))
        return
    findings.products.add(number)
    findings.weights.add(p.weight)
    difference = problems[number]
    if difference is not None:
        findings.tell(f"Weight {p.weight}: {difference}, in {file.products[number].name} of the file.")


def _weight_problem(product: FileProduct, p: Product, integers: np.ndarray) -> str | None:
    """Say how two quantized weights differ, `None` where they are equal.

    An exporter may merge a factor of each channel into the scales, such as that of a BatchNorm; that it does so in
    every channel tells it from a scale that is wrong. What the factor is, the stretch has proved.
    """
    rows = _rows(p).numpy()
    wrong = (product.integers != integers)[rows].any(1)
    if wrong.any():
        return (
            f"its integers should be in the file. Found {int((product.integers != integers).sum())} of {integers.size} "
            f"that differ, in channels {_some(wrong.nonzero()[0].tolist())}"
        )
    values, expected = product.values[rows], p.W_fq.detach().double().flatten().cpu().numpy()[rows]
    largest = np.abs(values).argmax(1)[:, np.newaxis]
    its, mine = (np.take_along_axis(t, largest, 1)[:, 0] for t in (values, expected))
    known = its != 0
    ratios = np.divide(mine, its, out=np.ones_like(mine), where=known)
    inside = np.abs(expected - ratios[:, np.newaxis] * values).max(1) > EQUAL * np.abs(expected).max(1)
    if inside.any():
        return (
            f"its scales should be the model's. Found other ones inside channels {_some(inside.nonzero()[0].tolist())}"
        )
    off = (np.abs(ratios - 1) > EQUAL).nonzero()[0]
    if len(off) and 2 * len(off) < known.sum():
        return (
            f"its scale should be the model's. Found that it differs in channels {_some(off.tolist())}, by up to "
            f"{np.abs(ratios - 1).max():.2g}"
        )
    return None


def _rows(p: Product) -> Tensor:
    """Return the places of each output channel in the flat weight, `[out, per channel]`."""
    places = torch.arange(p.integers.numel()).reshape(p.integers.shape)
    if p.out_axis == 0:
        return places.flatten(1)
    groups = p.result.shape[p.axis] // places.shape[1]
    return (
        places.reshape(groups, places.shape[0] // groups, places.shape[1], -1).transpose(1, 2).flatten(0, 1).flatten(1)
    )


def _compare_outputs(run: Run, found: Sequence[Tensor], findings: Findings) -> None:
    if len(run.outputs) != len(found):
        findings.tell(f"The file should have {len(run.outputs)} outputs. Found {len(found)}.")
        return
    for number, (e, f, layer) in enumerate(zip(run.outputs, found, run.layers, strict=True)):
        e = e.detach().cpu()
        place = f"Output {number}" + (f", after layer {layer}" if layer else "")
        if e.numel() != f.numel():
            findings.tell(f"{place}: should have shape {list(e.shape)}. Found {list(f.shape)}.")
            continue
        f = f.reshape(e.shape)
        if not e.is_floating_point():
            share = float((e.to(torch.int64) != f.to(torch.int64)).double().mean()) if e.numel() else 0.0
            error = 0.0 if share <= QUIET else share
        else:
            error = float(_errors(e.double(), f.double()).max()) if e.numel() else 0.0
        if error <= CLOSE:
            findings.error = max(findings.error, error)
        else:
            findings.tell(
                f"{place}: should be the model's, from what the last quantizers give. Found a difference of "
                f"{error:.2g} of the largest value."
            )


def channel_axis(t: Tensor) -> int:
    """Return the axis of the channels: the first after the images, the last one of tokens."""
    return 1 if t.dim() in (2, 4, 5) else max(t.dim() - 1, 0)


def _sampled(t: Tensor, scale: Tensor | None = None) -> tuple[slice, ...]:
    """Return an index of a few places of all channels, and of all that have scales of their own."""
    kept = {channel_axis(t)}
    if scale is not None:
        kept |= {t.dim() - scale.dim() + k for k, size in enumerate(scale.shape) if size > 1}
    steps = [1 if k in kept else max(1, -(-size // SAMPLED)) for k, size in enumerate(t.shape)]
    return tuple(slice(None, None, step) for step in steps)


def _errors(expected: Tensor, found: Tensor) -> Tensor:
    """Return the largest difference in each channel, relative to the largest value there, `[channels]`."""
    both = torch.isfinite(expected) & torch.isfinite(found)
    same = (expected == found) | (torch.isnan(expected) & torch.isnan(found))
    gap = torch.where(both, (expected - found).abs(), torch.where(same, 0.0, torch.inf))
    size = torch.where(torch.isfinite(expected), expected.abs(), 0.0)
    axis = channel_axis(expected)
    if expected.dim() > 1:
        gap = gap.movedim(axis, 0).flatten(1).amax(1)
        size = size.movedim(axis, 0).flatten(1).amax(1)
    else:
        gap, size = gap.amax().reshape(1), size.amax().reshape(1)
    return gap / (size + QUIET * size.max()).clamp(min=1e-30)


def _fit(expected: Tensor, found: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Fit one factor for each channel; returns the factors and the largest relative difference that is left."""
    e, f = (t.movedim(axis, 0).flatten(1) for t in (expected, found))
    ratio = (e * f).sum(1) / (f * f).sum(1).clamp(min=1e-30)
    size = e.abs().amax(1)
    left = (e - ratio.unsqueeze(1) * f).abs().amax(1) / (size + QUIET * size.max()).clamp(min=1e-30)
    return ratio, left


def _some(channels: Sequence[int]) -> str:
    """List some numbers."""
    return ", ".join(str(c) for c in channels[:5]) + (f" and {len(channels) - 5} more" if len(channels) > 5 else "")


def _shown(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.6g}" for v in values.flatten()[:3])
    return f"{shown}, ..." if values.numel() > 3 else shown
