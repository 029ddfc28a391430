"""The proof that a file holds the constants of a quantized network, and that each of its layers computes the same.

Rounding is chaotic: a network of some depth differs from itself, summed in another order, by as much as a wrong file
would. So outputs prove nothing. The proof is of each stretch of the network between two quantizers:

1. *The file* (`stretches`). Each of its quantizers is cut out, and random integers of the whole grid are put in its
   place; torch's quantizers are made to return the same ones. Then nothing is rounded and nothing accumulates, and
   whatever a quantizer reads must agree to float32 rounding. A quantizer of torch is that one of the file which reads
   the same numbers: its place is found by what comes before it, whatever names an exporter gave. Products with
   quantized weights are found likewise, and their integers and scales compared one by one.
2. *The runtime* (`roundings`). The file is run as it is on images, and torch's quantizers return what the runtime's
   did. A value may differ by one step where torch's own is on a tie between two integers.
3. *End to end*. How much file and torch differ, beside how much torch in float64 differs from torch in float32. This
   is reported, and refuses nothing.
"""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qft_plugin.deploy.file_view import File
from qft_plugin.deploy.findings import Findings, forget_unused, merged
from qft_plugin.deploy.roundings import FAR, Rounding, compare_roundings, run_in
from qft_plugin.deploy.stretches import Values, compare_stretches
from qft_plugin.deploy.watched import Watched, positional
from qft_plugin.errors import ParityError, warn
from qft_plugin.graph.torch_model import Call

logger = logging.getLogger("qft_plugin")

UNEXPLAINED: Final = 1e-3
"""Share of a quantizer's values that may differ without a tie: ties in front of a fused addition move a few."""

LONGEST_NAME: Final = 60
"""Characters of a file's name in a line."""

LISTED: Final = 5
"""How many differences a message lists."""

REPORT: Final = "Please report the model."

OVERFLOW: Final = (
    "On a CPU without VNNI OpenVINO adds products in pairs in 16 bits, which overflow where weights use all of 8 bits: "
    "give such layers 7 (QFTConfig.small_layer_bits, layer_bits, weight_bits). Else please report the model."
)
"""What to do where OpenVINO computes something else in integers."""


@dataclass(frozen=True)
class Difference:
    """How two networks differ on the same images.

    Attributes:
        relative: largest relative L2 difference of an output; NaN where nothing was compared.
        same_class: share of images for which both name the same class; NaN where there are no classes.
        images: how many images were compared.
    """

    relative: float = math.nan
    same_class: float = math.nan
    images: int = 0


@dataclass(frozen=True)
class Proof:
    """The result of a proof of a file, and how the file differs from torch.

    Attributes:
        weights: how many quantized weights are in the file, each equal in every integer; biases are not counted.
        quantizers: how many quantizers of activations are in the file, each with the model's scale and zero point.
        stretch_error: largest difference of a stretch between quantizers, relative to the largest value of its
            channel.
        ties: share of the rounded values that the runtime rounds the other way.
        roundings: the quantizers of which the runtime rounds values that are on no tie, worst first.
        from_torch: how the file in its runtime differs from torch.
        torch_from_itself: how torch in float64 differs from torch in float32.
        layers: name of the torch weight of each product of the file that was found, by its name in the file.
    """

    weights: int = 0
    quantizers: int = 0
    stretch_error: float = math.nan
    ties: float = math.nan
    roundings: tuple[Rounding, ...] = ()
    from_torch: Difference = Difference()
    torch_from_itself: Difference = Difference()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Say in one short line what was proved."""
        found = f"{self.weights} weights, {self.quantizers} quantizers, {self.from_torch.relative:.3g} from torch"
        return f"Proof({found if self.weights or self.quantizers else 'nothing was checked'})"

    def __str__(self) -> str:
        """Say in one sentence how far the file is from torch."""
        return (
            f"the file differs from torch by {self.from_torch.relative:.3g}; "
            f"torch differs from itself, in float64, by {self.torch_from_itself.relative:.3g}"
        )


class Proved:
    """The part of a report that comes from the proof of the file."""

    path: Path
    bytes: int
    proof: Proof

    def __repr__(self) -> str:
        """Say in one short line what the file is."""
        name = self.path.name
        short = name if len(name) <= LONGEST_NAME else f"...{name[-LONGEST_NAME:]}"
        return f"{type(self).__name__}({short}, {self.bytes / 2**20:.2f} MiB, {self.proof!r})"

    @property
    def weights(self) -> int:
        """How many quantized weights were compared, each equal in every integer; 0 where nothing was checked."""
        return self.proof.weights

    @property
    def relative_error(self) -> float:
        """Largest relative L2 difference of an output from torch; NaN where nothing was checked."""
        return self.proof.from_torch.relative


@torch.no_grad()
def prove(
    watched: Watched, file: File, example: Call, images: Sequence[Call] = (), *, others: Sequence[File] = ()
) -> tuple[Proof, ...]:
    """Prove that a file computes what a quantized torch model computes.

    Args:
        watched: the model.
        file: the file.
        example: the arguments that the file was made with.
        images: the arguments of other calls: other images, and other numbers of images.
        others: the same file in other runtimes, with its quantizers in the same order.

    Returns:
        The proof in each runtime.

    Raises:
        ParityError: a constant or a layer differs, or the model takes another path for other images; it names them.
    """
    watched.run(example)  # tensors that a model makes once and keeps are made here
    first = watched.run(example)
    taken = [_Taken(example, first.outputs)]
    few = example
    for call in _others(file, example, images):
        small = _few(call, example)
        for part in (small, call):
            found = _taken(watched, file, part, first.path)
            if found is not None:
                few = small if part is small and few is example else few
                taken.append(found)
    probes: list[tuple[Call, Values]] = [
        (_map(example, _noisy), "dense"),
        (_map(few, _noisy), "sparse"),
        (_map(few, _noisy), "extreme"),
        (few, "own"),
    ]
    seen: list[Findings] = []
    for call, kind in probes:
        seen.append(compare_stretches(watched, file, call, kind, seen[0].places if seen else ()))
    if any(s.path != first.path for s in seen):
        # It branches on values, and random ones take it elsewhere: the file's own ones must do.
        logger.info("the model branches on its values: the file is compared on images alone")
        seen = [compare_stretches(watched, file, t.call, "own") for t in taken]
    forget_unused(watched, example, seen)
    every = merged(file, seen)
    _refuse(every.problems)
    whole = [t for t in taken if t.call is not few or few is example]
    plain = [t.expected for t in whole]
    itself = difference(plain, _in_double(watched, [t.call for t in whole]))
    proofs = []
    for runtime in (file, *others):
        outputs = {id(t.call): t.found for t in whole if t.found is not None} if runtime is file else {}
        roundings: list[Rounding] = []
        for call in (example, few):
            ran = run_in(runtime, call)
            outputs[id(call)] = ran.outputs
            roundings += compare_roundings(watched, runtime, call, ran, seen[0].places)
        _judge(roundings, runtime.runtime)
        differ, values = (sum(getattr(r, name) for r in roundings) for name in ("differ", "values"))
        left = {id(t.call): t.call for t in whole if id(t.call) not in outputs}
        outputs |= {name: run_in(runtime, call).outputs for name, call in left.items()}
        proofs.append(
            Proof(
                weights=sum(not name.endswith("bias") for name in every.weights),
                quantizers=len(every.quantizers),
                stretch_error=every.error,
                ties=differ / max(values, 1),
                roundings=_unexplained(roundings),
                from_torch=difference(plain, [outputs[id(t.call)] for t in whole]),
                torch_from_itself=itself,
                layers={file.products[number].name: name for number, name in sorted(every.products.items())},
            )
        )
    return tuple(proofs)


def _others(file: File, example: Call, images: Sequence[Call]) -> Sequence[Call]:
    """Return calls with other numbers of images than the example's, where the file takes them."""
    if not file.free_batch:
        return ()
    return images or (_map(example, _one_more),)


def _few(call: Call, example: Call) -> Call:
    """Return the first images of a call: two, or three where the example has two."""
    sizes = {t.shape[0] for t in positional(example) if t.dim()}
    count = 3 if sizes == {2} else 2
    return _map(call, lambda t: t[:count] if t.dim() else t)


@dataclass(frozen=True)
class _Taken:
    """A call that the model and the file take.

    Attributes:
        call: its arguments.
        expected: the outputs of the model.
        found: those of the file; `None` where it was not run yet.
    """

    call: Call
    expected: Sequence[Tensor]
    found: Sequence[Tensor] | None = None


def _taken(watched: Watched, file: File, call: Call, path: Sequence[str]) -> _Taken | None:
    """Run both; `None` where the model or the file does not take this number of images.

    Raises:
        ParityError: the model takes another path for this call than for the example.
    """
    shapes = ", ".join(str(list(t.shape)) for t in positional(call))
    try:
        run = watched.run(call)
    except Exception as error:  # a model may fail in any way on a number of images that it was not made for
        logger.info("not proved for inputs of shape %s, which the model does not take: %s", shapes, error)
        return None
    if run.path != path:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, run.path, strict=False))
        place = len(list(same))
        there, here = (names[place] if place < len(names) else "nothing more" for names in (path, run.path))
        raise ParityError(
            f"The forward should take one path: a file is a trace of one. Found that for inputs of shape {shapes} it "
            f"calls {here} where it calls {there} for the example (call {place}): it branches on the number of images "
            "or on their values. Use torch.where in the place of Python's if, or save a file for each branch."
        )
    try:
        found = run_in(file, call).outputs
    except Exception as error:  # each runtime has errors of its own
        warn(
            f"The file should run for any number of images. Found that it does not for inputs of shape {shapes}, as "
            f"the model does: {str(error).splitlines()[-1]}. The forward probably computes with the number of images "
            "as a Python number. The file is right for the shape of the example.",
            stacklevel=2,
        )
        return None
    return _Taken(call, run.outputs, found)


def _refuse(problems: Sequence[str], remedy: str = REPORT) -> None:
    if problems:
        more = f" And {len(problems) - LISTED} more." if len(problems) > LISTED else ""
        raise ParityError(
            f"The file should compute what the model computes. {' '.join(problems[:LISTED])}{more} {remedy}"
        )


def _unexplained(roundings: Sequence[Rounding]) -> tuple[Rounding, ...]:
    found = [r for r in roundings if r.unexplained > UNEXPLAINED * r.values + 2 * r.moved]
    return tuple(sorted(found, key=lambda r: -r.unexplained_share))


def _judge(roundings: Sequence[Rounding], runtime: str) -> None:
    """Refuse differences that are no roundings, and warn of roundings that no tie explains."""
    _refuse(
        [
            f"{r.place}: {runtime} should compute what the model does from the same numbers. Found {r.far} of "
            f"{r.values} values that differ by more than {FAR} steps, by up to {r.steps}."
            for r in roundings
            if r.far > UNEXPLAINED * r.values
        ],
        OVERFLOW if runtime == "OpenVINO" else REPORT,
    )
    found = _unexplained(roundings)
    if found:
        places = "; ".join(f"{r.place} ({100 * r.unexplained_share:.2g} % of the values)" for r in found[:LISTED])
        warn(
            f"{runtime} should round where the model rounds. Found values that differ by a step or more although the "
            f"model's are on no tie: {places}. The constants of the file are right; this runtime leaves out or adds a "
            "rounding next to these layers, or (OpenVINO on CPUs without VNNI) sums products of two activations "
            "in 16 bits. Look at the agreement of the file with the float network.",
            stacklevel=3,
        )


def difference(expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> Difference:
    """Compare the outputs of two networks.

    Args:
        expected: all outputs for each call.
        found: likewise of the other network; empty where there are none.
    """
    if not found or not expected[0]:
        return Difference()
    worst, same, images = 0.0, [], 0
    for k, first in enumerate(expected[0]):
        if first.is_floating_point():
            e, f = (
                torch.cat([call[k].detach().cpu().double().flatten() for call in calls]) for calls in (expected, found)
            )
            worst = max(worst, float((e - f).norm() / e.norm().clamp(min=1e-30)))
    for e_call, f_call in zip(expected, found, strict=True):
        e, f = e_call[0].cpu(), f_call[0].cpu()
        images += e.shape[0] if e.dim() else 1
        if e.dim() == 2 and e.shape[1] > 1 and e.is_floating_point():
            same.append(e.argmax(1) == f.argmax(1))
    classes = float(torch.cat(same).double().mean()) if same else math.nan
    return Difference(worst, classes, images)


def _in_double(watched: Watched, calls: Sequence[Call]) -> list[list[Tensor]]:
    """Run a model in float64; empty where it cannot."""
    try:
        double = copy.deepcopy(watched.model).double()
        return [watched.outputs(double(*args, **kwargs)) for args, kwargs in (_map(c, _doubled) for c in calls)]
    except RuntimeError as error:  # a forward may name its dtype
        logger.info("torch is not compared with itself: the model does not run in float64 (%s)", error)
        return []


def _map(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    args, kwargs = call
    return tuple(function(t) for t in args), {name: function(t) for name, t in kwargs.items()}


def _doubled(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _one_more(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]]) if t.dim() else t


def _noisy(t: Tensor) -> Tensor:
    """Add noise, so that zeros or ones as an example hide nothing; indices and masks stay."""
    if not t.is_floating_point():
        return t
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=t.dtype).to(t.device)
    spread = float(t.std()) if t.numel() > 1 else 0.0
    return t + noise * (spread if spread > 0 else 1.0)
