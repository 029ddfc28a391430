"""Findings of a comparison of a file with torch, and how several of them are merged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from qft_plugin.deploy.file_view import File
from qft_plugin.deploy.watched import Product, Seen, Watched
from qft_plugin.graph.torch_model import Call

logger = logging.getLogger("qft_plugin")

UNLIKE: Final = (float("nan"), -1e3, 1e3)
"""Put in the place of values on which no output should depend: an output that does would change."""

Place = tuple[int, tuple[int, ...] | None]
"""The number of a quantizer of a file, and in which order it reads the axes of torch's tensor; `None` for the same."""


@dataclass(frozen=True)
class Missing:
    """A layer or a quantizer of torch that the file lacks.

    Attributes:
        x: the output of the layer, or the input of the quantizer.
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
    """The findings so far.

    Attributes:
        problems: the differences, in words.
        quantizers: numbers of the file's quantizers that were found.
        products: numbers of the file's products that were found, each with the name of its weight.
        weights: names of the weights whose integers were found.
        silent: names of the weights that multiplied nothing but zeros.
        absent: the calls of layers that were not found in the file, by number of the call.
        wrong: the calls of layers whose constants differ in the product of the file that fits best, likewise; one that
            the file lacks may be like another by chance, where it makes few numbers.
        unmatched: the quantizers of torch that were not found in the file, by number of the call.
        error: the largest difference of a stretch that was accepted.
        places: for each call of an activation quantizer of torch which one of the file's it is.
        path: the functions that the model called.
    """

    problems: list[str] = field(default_factory=list)
    quantizers: set[int] = field(default_factory=set)
    products: dict[int, str] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    absent: dict[int, Missing] = field(default_factory=dict)
    wrong: dict[int, Missing] = field(default_factory=dict)
    unmatched: dict[int, Missing] = field(default_factory=dict)
    error: float = 0.0
    places: list[Place | None] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def tell(self, problem: str) -> None:
        """Add a difference, once."""
        if problem not in self.problems:
            self.problems.append(problem)


def merged(file: File, findings: Sequence[Findings]) -> Findings:
    """Merge the findings of several probes.

    A tensor that is the same in all of them is a constant, and may be missing.

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
    numbers, calls = _varying([f.unmatched for f in findings]), _varying([f.absent for f in findings])
    for found in findings:
        # In the order of the run: the first is next to the cause.
        told = [(float(place), problem) for place, problem in enumerate(found.problems)]
        told += [(m.before - 0.5, m.problem) for number, m in found.unmatched.items() if number in numbers]
        told += [(m.before - 0.5, m.problem) for number, m in found.absent.items() if number in calls]
        told += [(m.before - 0.5, m.problem) for m in found.wrong.values()]
        every.quantizers |= {m.closest for m in found.unmatched.values() if m.closest is not None}
        for _, problem in sorted(told, key=lambda pair: pair[0]):
            every.tell(problem)
    for number, quantizer in enumerate(file.quantizers):
        if number not in every.quantizers and not any(quantizer.equals(file.quantizers[k]) for k in every.quantizers):
            every.tell(f"Quantizer {quantizer.name} of the file: no quantizer of the model reads what it reads.")
    for number, p in enumerate(file.products):
        if number not in every.products and not every.silent:
            every.tell(f"Product {p.name} of the file: no layer of the model computes it.")
    return every


def _varying(missing: Sequence[Mapping[int, Missing]]) -> set[int]:
    """List what is missing and differs between probes; the same in all, an exporter may have computed it."""

    def is_constant(key: int) -> bool:
        first, *others = (m.get(key) for m in missing)
        return first is not None and all(o is not None and torch.equal(first.x, o.x) for o in others)

    return {key for m in missing for key in m if not is_constant(key)}


def forget_unused(watched: Watched, call: Call, findings: Sequence[Findings]) -> None:
    """Forget missing layers and quantizers on which no output depends: an exporter leaves them out.

    Args:
        watched: the torch model.
        call: the arguments of a call.
        findings: of each probe; changed in place.
    """
    numbers = _varying([f.unmatched for f in findings])
    calls = _varying([f.absent for f in findings]).union(*(f.wrong for f in findings))
    if not numbers | calls:
        return
    expected = watched.run(call).outputs

    def same(value: float) -> bool:
        def activation(seen: Seen) -> Tensor | None:
            return torch.full_like(seen.x_fq, value) if seen.number in numbers else None

        def product(p: Product) -> Tensor | None:
            return torch.full_like(p.result, value) if p.number in calls else None

        try:
            outputs = watched.run(call, activation=activation, product=product).outputs
        except Exception as error:  # a forward may refuse such values in any way, and so reads them
            logger.info("the model does not run with other values in the place of missing layers: %s", error)
            return False
        return all(torch.equal(e, f) for e, f in zip(expected, outputs, strict=True))

    if not all(same(value) for value in UNLIKE):
        return
    for f in findings:
        f.places = [None if number in numbers else place for number, place in enumerate(f.places)]
        f.unmatched = {number: missing for number, missing in f.unmatched.items() if number not in numbers}
        f.absent = {number: missing for number, missing in f.absent.items() if number not in calls}
        f.wrong = {number: missing for number, missing in f.wrong.items() if number not in calls}
