"""Compensation over a whole network: layer after layer, on the inputs that the quantized layers before it give."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from qft_plugin.graph.layer_graph import Layer, LayerGraph, Op
from qft_plugin.job.activation_ranges import BATCH
from qft_plugin.job.gptq_inputs import can_compensate, input_rows, rows_wanted
from qft_plugin.job.health import Ranges
from qft_plugin.job.host import Problem, Source, Student
from qft_plugin.report.progress import phase
from qft_plugin.tensors.gptq import Compensation, moments_of, moved_between, parts_of
from qft_plugin.tensors.grid import largest_integer, to_integer
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof, LayerDof
from qft_plugin.training.keeping import Keeper, Saved, named, taken
from qft_plugin.training.rows import KeptRows
from qft_plugin.training.solve import scales_of, solve

logger = logging.getLogger("qft_plugin")

COMPENSATION_IMAGES: Final = 1_024
"""Images on which rounding errors compensate each other."""

ONE_CALL: Final = 2 * 2**30
"""Bytes of activations that one call with all these images may need; above it there are fewer images."""

HELD: Final = 2**30
"""Bytes of inputs of float layers that are held in memory."""

LIVE: Final = 3
"""How many activations of the largest size are held at once: what a layer reads and gives, and what it skips."""

SEARCHED: Final = 1 << 20
"""Weights of the largest kernel whose step is chosen with its integers: each step that is tried costs as much again."""

PART: Final = "compensation"
"""The name under which the chosen weights are kept."""

TENSORS: Final = "tensors/"
MULTIPLES: Final = "multiples/"

FEW: Final = 16
"""With fewer images in one call the inputs of the quantized layers say too little about those of other images."""


@dataclass(frozen=True)
class Changes:
    """What compensation has chosen.

    Attributes:
        tensors: weights and biases by name, real units.
        multiples: by what the step of a weight is multiplied, by its name, `[]` or `[out]`.
    """

    tensors: dict[str, Tensor]
    multiples: dict[str, Tensor]


@torch.no_grad()
def compensated(
    student: Student, problem: Problem[Source], dof: Dof, tensors: Mapping[str, Tensor], ranges: Ranges
) -> Changes:
    """Let the rounding errors of all layers compensate each other on the images.

    The float network runs once. Then the quantized one runs, with all images at once, and whenever it comes to a layer,
    that layer's weight is chosen so that on the inputs that it really has, its outputs are those of the float layer.
    The means of its outputs are the bias's business, where it has one: the weights answer for the rest.

    A model that takes a few images at a time only is compensated on the inputs of the float network.

    Layers that an earlier run of the same job has chosen stay as they are.

    Args:
        student: the network.
        problem: its graph and images, and what keeps the layers that are done.
        dof: the degrees of freedom, weights as they are now.
        tensors: weights and biases by name, real units, of the folded float network.
        ranges: notes the activations of the float network.

    Returns:
        The weights and biases that change, and the steps.
    """
    every, inputs = _kernels(problem, dof, tensors), problem.inputs
    found, done = _earlier(problem.keeper, tensors)
    kernels = [kernel for kernel in every if kernel.layer.weight not in done]
    if not kernels:
        return found
    solution = solve(dof)
    live = {name: tensor.clone() for name, tensor in solution.tensors.items()}
    for kernel in every:
        if kernel.layer.weight in done and kernel.layer.weight in found.tensors:
            kernel.use(kernel.rounded(found), live, found)
    count = images_at_once(problem.source.graph, inputs)
    at_once = count >= FEW
    size = count if at_once else inputs.at_once(BATCH)
    calls = [*inputs.batches(size, at_most=count if at_once else _seen(inputs))]
    floating = _Floating(kernels, len(calls))
    try:
        with problem.keeper.interruptible(), phase("compensation", total=len(kernels)) as advance:

            def is_done(kernel: _Kernel) -> None:
                done.append(kernel.layer.weight)
                advance()
                problem.keeper.tick(PART, lambda: _saved(found, done))

            for call in calls:
                ranges.run(student, tensors, call, _watchers(kernels, floating.note))
            if at_once:

                def quantized(kernel: _Kernel, x: Tensor) -> None:
                    _choose(kernel, kernel.rows(x), floating.taken(kernel), live, found)
                    is_done(kernel)

                student.trace(replace(solution, tensors=live), calls[0], _watchers(kernels, quantized))
            else:
                for kernel in kernels:
                    _choose(kernel, floating.taken(kernel), None, live, found)
                    is_done(kernel)
    finally:
        floating.discard()
    problem.keeper.save(PART, _saved(found, done))
    return found


def _saved(found: Changes, done: Sequence[str]) -> Saved:
    """Return what the next run needs of the layers that are done."""
    return Saved({"layers": list(done)}, {**named(TENSORS, found.tensors), **named(MULTIPLES, found.multiples)})


def _earlier(keeper: Keeper, tensors: Mapping[str, Tensor]) -> tuple[Changes, list[str]]:
    """Return what an earlier run of the same job has chosen, and for which layers.

    Args:
        keeper: has it.
        tensors: weights and biases by name, which say where and how tensors lie in memory.
    """
    saved = keeper.saved(PART)
    if saved is None:
        return Changes({}, {}), []
    changed = {name: torch.empty_like(tensors[name]).copy_(t) for name, t in taken(TENSORS, saved.tensors).items()}
    multiples = {name: t.to(tensors[name].device) for name, t in taken(MULTIPLES, saved.tensors).items()}
    return Changes(changed, multiples), list(saved.facts["layers"])


def images_at_once(graph: LayerGraph, inputs: Inputs) -> int:
    """Return how many images are compensated on: as many as one call may have.

    Args:
        graph: the network, recorded with `inputs.first()`.
        inputs: all images.
    """
    recorded = inputs.fitting(min(2, len(inputs)))
    largest = max(torch.Size(shape).numel() for shape in graph.shapes.values()) / recorded
    bytes_each = 4 * LIVE * largest
    return inputs.fitting(max(1, min(_seen(inputs), int(ONE_CALL / bytes_each))))


def _seen(inputs: Inputs) -> int:
    """Return how many images may be looked at: not those that are held out of training."""
    return min(COMPENSATION_IMAGES, len(inputs), inputs.trained_on)


@dataclass(frozen=True)
class _Kernel:
    """A layer whose weight is chosen.

    Attributes:
        dof: its degrees of freedom.
        op: the first operation that uses it.
        W: its float weight, folded, real units.
        bias: its own float bias, likewise, which answers for the means; `None` where it has none, or shares one.
        step: of the weight, real per step, broadcasts against `W`.
        high: its largest integer.
        steps: of the weight: how many there are, where they are chosen anew; 0 where they are not.
    """

    dof: LayerDof
    op: Op
    W: Tensor
    bias: Tensor | None
    step: Tensor
    high: int
    steps: int

    @property
    def layer(self) -> Layer:
        """What the weight means."""
        return self.dof.layer

    def rows(self, x: Tensor, calls: int = 1) -> Tensor:
        """Return some of the inputs that meet the weights of one output, `[rows, groups, in/groups * k]`.

        Args:
            x: what the operation reads.
            calls: how many calls have such inputs.
        """
        count = -(-rows_wanted(self.W[0].numel()) // calls)
        generator = torch.Generator().manual_seed(0)
        return input_rows(x, self.op, self.layer, self.W, count=count, generator=generator).transpose(0, 1)

    def choose(self, x: Tensor, y: Tensor | None, live: dict[str, Tensor], found: Changes) -> None:
        """Choose the weight, its step and the bias, both in the network that runs and in the result.

        Args:
            x: inputs of the quantized layer, from `rows`.
            y: those of the float layer; `None` where they are the same.
            live: tensors of the network that runs.
            found: the result.

        Raises:
            LinAlgError: the moments of the inputs are not positive definite.
        """
        parts = parts_of(self.W, rows=len(x))
        x = x.transpose(0, 1)
        y = x if y is None else y.transpose(0, 1)
        x_mean, y_mean = (torch.zeros_like(t[:, :1]) if self.bias is None else t.mean(1, keepdim=True) for t in (x, y))
        alike, x, y = y is x, x - x_mean, y - y_mean
        moved = None if alike else moved_between(x, y, parts)
        by = Compensation(self.W, moments_of(x, parts), groups=self.layer.groups, moved=moved)
        name = self.layer.weight
        if self.steps:
            found.multiples[name] = by.multiples(self.W, self.step, high=self.high, alike=self.steps == 1)
        found.tensors[name] = by.kernel(self.W, self._chosen_step(found), high=self.high)
        rounded = self.rounded(found)
        if self.bias is not None and self.layer.bias is not None:
            got, wanted = (
                t.reshape(self.layer.groups, -1, parts.columns) @ mean.transpose(1, 2)
                for t, mean in ((rounded, x_mean), (self.W, y_mean))
            )
            found.tensors[self.layer.bias] = self.bias + (wanted - got).flatten()
        self.use(rounded, live, found)

    def use(self, rounded: Tensor, live: dict[str, Tensor], found: Changes) -> None:
        """Let the network that runs have the weight and the bias that were chosen.

        Args:
            rounded: the weight, from `rounded`.
            live: tensors of the network that runs.
            found: the choice.
        """
        live[self.layer.weight].copy_(rounded)
        if self.bias is not None and self.layer.bias is not None:
            live[self.layer.bias].copy_(found.tensors[self.layer.bias])

    def _chosen_step(self, found: Changes) -> Tensor:
        multiple = found.multiples.get(self.layer.weight)
        if multiple is None:
            return self.step
        return self.step * (self.layer.axes.per_out(multiple, self.W) if multiple.dim() else multiple)

    def rounded(self, found: Changes) -> Tensor:
        """Return the weight that was chosen on its grid, real units."""
        step = self._chosen_step(found)
        return to_integer(found.tensors[self.layer.weight], step, low=-self.high, high=self.high).mul_(step)


def _kernels(problem: Problem[Source], dof: Dof, tensors: Mapping[str, Tensor]) -> list[_Kernel]:
    """List the layers whose weights are chosen."""
    ops, scales = {op.name: op for op in problem.source.graph.ops}, scales_of(dof)
    biases = Counter(layer.bias for layer in dof.map.layers if layer.bias is not None)
    free = dof.hardware.rescale_factor == "float"  # else a step is one that the hardware can hold
    found = []
    for module in dof.quantized():
        layer, name = module.layer, module.layer.weight
        W = tensors[name]
        # A weight that stays 0 cannot compensate anything.
        if not can_compensate(layer) or name in problem.source.kept:
            continue
        found.append(
            _Kernel(
                module,
                ops[layer.calls[0]],
                W,
                tensors[layer.bias] if layer.bias is not None and biases[layer.bias] == 1 else None,
                module.step(scales.weights[name]),
                largest_integer(dof.weight_grids[name].bits),
                module.log_F.numel() if free and dof.weight_grids[name].bits < 8 and W.numel() <= SEARCHED else 0,
            )
        )
    return found


def _watchers(
    kernels: Sequence[_Kernel], watch: Callable[[_Kernel, Tensor], None]
) -> dict[str, Callable[[Tensor], None]]:
    def shown(kernel: _Kernel, x: Tensor) -> None:
        # Function modes (the hooks of NNCF are one) have no business in here, and would cost ten times the arithmetic.
        with torch._C.DisableTorchFunction():
            watch(kernel, x)

    return {kernel.op.name: functools.partial(shown, kernel) for kernel in kernels}


class _Floating:
    """The inputs of the float layers, in half their memory, and above a limit in mapped files."""

    def __init__(self, kernels: Sequence[_Kernel], calls: int) -> None:
        self._kernels, self._calls = kernels, calls
        self._rows: dict[str, KeptRows] = {}

    def note(self, kernel: _Kernel, x: Tensor) -> None:
        """Keep what a layer reads in one call."""
        rows = kernel.rows(x, self._calls)
        name = kernel.layer.weight
        if name not in self._rows:
            self._rows[name] = KeptRows(rows, HELD // len(self._kernels), halve=True)
        self._rows[name].append(rows)

    def taken(self, kernel: _Kernel) -> Tensor:
        """Return what a layer has read, and forget it."""
        W = kernel.W
        return self._rows.pop(kernel.layer.weight).finish().rows(slice(None), W.device).to(W.dtype)

    def discard(self) -> None:
        """Remove all files."""
        for rows in self._rows.values():
            rows.discard()


def _choose(kernel: _Kernel, x: Tensor, y: Tensor | None, live: dict[str, Tensor], found: Changes) -> None:
    try:
        kernel.choose(x, y, live, found)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # the moments are not positive definite
        logger.warning("%s starts from rounding to nearest: %s", kernel.layer.weight, error)
