"""The student of a Brevitas model: its float twin, run with tensors and scales from the offline subgraph."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.brevitas._read import Source
from qft_plugin.brevitas._scalings import ActivationScaling, activation_range
from qft_plugin.errors import ConfigError
from qft_plugin.graph.channel_clip import relu_operands
from qft_plugin.graph.comparison import ComparedInput, Comparison, backbone_output, named_input
from qft_plugin.graph.copies import plain_copy
from qft_plugin.graph.layer_graph import LayerGraph
from qft_plugin.graph.operations import NEW_MEMORY
from qft_plugin.graph.placement import ActivationGrid, Placement, WeightPlace
from qft_plugin.graph.record import Tap, record
from qft_plugin.graph.torch_model import Call, Functional, tensors_in
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.data import Inputs
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution
from qft_plugin.training.student import (
    FakeQuantizer,
    Unfold,
    Watcher,
    compiled_fake_quantize,
    looked_at,
    prediction_of,
    set_grids,
    unfolded,
)

CALIBRATION_BATCH: Final = 64
CALIBRATION_IMAGES: Final = 256
"""Images whose extremes choose the ranges."""


@dataclass(frozen=True)
class Placed:
    """The quantizers of a Brevitas model around a folded network.

    Attributes:
        placement: where they are, and their grids.
        tensors: weights and biases of the folded network by name.
        input_factors: none.
    """

    placement: Placement
    tensors: Mapping[str, Tensor]
    input_factors: Mapping[str, Tensor] = field(default_factory=dict)

    def with_placement(self, placement: Placement) -> "Placed":
        """Return the same with other grids."""
        return replace(self, placement=placement)


@torch.no_grad()
def place(source: Source, tensors: Mapping[str, Tensor], inputs: Inputs, *, calibrate: bool) -> Placed:
    """Describe the quantizers that the model has.

    Args:
        source: the model as it was read.
        tensors: weights and biases of the folded network.
        inputs: the images.
        calibrate: choose the ranges of activations and the scales of weights anew, else keep those of the model.
    """
    if calibrate:
        activations = _calibrated(source, tensors, inputs)
    else:
        activations = {
            name: _grid(scaling, float(scaling.log_s.exp()), int(scaling.zero_point))
            for name, scaling in source.activations.items()
        }
    weights = {}
    for name, scaling in source.weights.items():
        left = scaling.log_L
        weights[name] = WeightPlace(
            per_channel=scaling.per_channel,
            doubly=left is not None,
            scale=None if calibrate else scaling.folded_step(),
            scale_in=None if calibrate or left is None else left.exp(),
        )
    return Placed(Placement(activations, source.on_tensor, {}, weights), tensors)


def _calibrated(source: Source, tensors: Mapping[str, Tensor], inputs: Inputs) -> dict[str, ActivationGrid]:
    """Choose the range of each activation: from the mean of the batches' minima to the mean of their maxima.

    Departure: Brevitas' default is the 99.999th percentile. After the same finetune, on images that neither saw, it was
    worse than ranges that clip less by 0.3 to 0.4 points of agreement (ResNet-20, weights per tensor, one seed).
    """
    twin = copy.deepcopy(source.model)
    function = Functional(twin)
    stand_ins = _stand_ins(twin, source)
    extremes: dict[str, dict[int, Tensor]] = {}
    size = inputs.at_once(CALIBRATION_BATCH)
    for number, (args, kwargs) in enumerate(inputs.batches(size, at_most=CALIBRATION_IMAGES)):
        batch = number * size // CALIBRATION_BATCH

        def watch(name: str, x: Tensor, batch: int = batch) -> None:
            found, seen = torch.stack(x.aminmax()), extremes.setdefault(name, {})
            before = seen.get(batch, found)
            seen[batch] = torch.stack([torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])])

        with looked_at(stand_ins, watch):
            function(tensors, args, kwargs)
    grids = {}
    for name, scaling in source.activations.items():
        seen = torch.stack([*extremes[name].values()]).mean(0)
        scale, zero_point = activation_range(seen, low=scaling.low, high=scaling.high, asymmetric=scaling.asymmetric)
        grids[name] = _grid(scaling, float(scale), zero_point)
    return grids


def _grid(scaling: ActivationScaling, scale: float, zero_point: int) -> ActivationGrid:
    """Describe a quantizer; a zero point at the end of the grid belongs to values of one sign, and stays."""
    shifts = scaling.asymmetric and scaling.low < zero_point < scaling.high
    return ActivationGrid(scale, scaling.low, scaling.high, zero_point, shifts)


def _stand_ins(twin: nn.Module, source: Source) -> dict[str, FakeQuantizer]:
    found = {}
    for name in source.activations:
        module = twin.get_submodule(name)
        assert isinstance(module, FakeQuantizer)
        found[name] = module
    return found


class Student:
    """The fake-quantized network; its weights, biases and scales are an argument of every call."""

    def __init__(
        self, placed: Placed, source: Source, at: Comparison, unfolds: Sequence[Unfold | None], *, compiled: bool
    ) -> None:
        """Copy the twin and give its stand-ins their grids.

        Args:
            placed: the quantizers.
            source: the model as it was read.
            at: where it is compared with the teacher.
            unfolds: the factors that bring each activation there back to the teacher's units.
            compiled: fuse the fake-quantization with `torch.compile`.
        """
        for place in at.inputs:
            if place.op.rsplit("/", 2)[0].replace("/", ".") in source.activations:
                raise ConfigError(
                    f"FinetuneConfig.{place.field} should name what reads an activation. Found {place.asked!r}, a "
                    "quantizer, whose input the hardware never has. Name the module after it, or the operation."
                )
        function = compiled_fake_quantize() if compiled else fake_quantize
        self._twin = copy.deepcopy(source.model)
        self._function = Functional(self._twin)
        self._graph = source.graph
        self._at = at
        self._unfolds = unfolds
        self._quantizers = _stand_ins(self._twin, source)
        for name, module in self._quantizers.items():
            module.set_grid(placed.placement.activations[name], function)
        self._left_to_quantizers = self._relus(source)

    def _relus(self, source: Source) -> dict[str, Callable[[Any], Any]]:
        """Find the ReLUs, and bounded ones, that nothing but a quantizer reads, which computes them as well.

        Nothing else may read, or change, what such a ReLU reads: a quantizer keeps it for the backward pass, and it is
        not changed where the ReLU works in place.
        """
        readers = Counter(name for op in source.graph.ops for name in op.inputs)
        readers.update(source.graph.outputs)
        makers = {name: op for op in source.graph.ops for name in op.outputs}
        found: dict[str, Callable[[Any], Any]] = {}
        for quantizer_op in source.graph.ops:
            quantizer = self._quantizers.get(source.on_tensor.get(quantizer_op.outputs[0], ""))
            op = makers.get(quantizer_op.inputs[0]) if quantizer is not None else None
            if quantizer is None or op is None or relu_operands(op.function, op.args) is None:
                continue
            maker = makers.get(op.inputs[0])
            alone = readers[op.inputs[0]] == 1 and readers[op.outputs[0]] == 1
            if alone and maker is not None and maker.function in NEW_MEMORY and quantizer.starts_at_zero:
                found[op.name] = functools.partial(_after, quantizer, op.function)
        return found

    def __call__(self, solution: Solution, call: Call) -> Prediction:
        """Run the student on one batch, with gradients to everything in `solution`."""
        set_grids(self._quantizers, solution)
        kept = _Kept(self._at.inputs)
        outputs = self._run(solution.tensors, call, kept.watchers(), self._left_to_quantizers)
        prediction = prediction_of(outputs, kept.values(), with_outputs=self._at.outputs)
        return unfolded(prediction, self._unfolds, solution.factors)

    def observe(self, tensors: Mapping[str, Tensor], call: Call, watcher: Watcher) -> None:
        """Run with float activations and show the input that each activation quantizer would have had."""
        with looked_at(self._quantizers, watcher):
            self._run(tensors, call, {})

    def watch(
        self, tensors: Mapping[str, Tensor], call: Call, watchers: Mapping[str, Callable[[Tensor], None]]
    ) -> None:
        """Run with float activations and show each watcher the input of its operation.

        Args:
            tensors: weights and biases by name.
            call: the batch.
            watchers: called with the first activation input, by name of the operation.
        """
        for module in self._quantizers.values():
            module.scale = None
        self._run(tensors, call, watchers)

    def trace(self, solution: Solution, call: Call, watchers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run with quantized activations and show each watcher the input of its operation.

        Args:
            solution: weights, biases and scales.
            call: the batch.
            watchers: called with the first activation input, by name of the operation.
        """
        set_grids(self._quantizers, solution)
        self._run(solution.tensors, call, watchers)

    def looked_at(self, look: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
        """Show a function the input of each activation quantizer in runs with float activations, with its name."""
        return looked_at(self._quantizers, look)

    def _run(
        self,
        tensors: Mapping[str, Tensor],
        call: Call,
        watchers: Mapping[str, Callable[[Tensor], None]],
        instead: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> list[Tensor]:
        args, kwargs = call
        with Tap(watchers, self._graph, instead):
            return list(tensors_in(self._function(tensors, args, kwargs)))


def _after(quantizer: FakeQuantizer, function: str, args: Sequence[Any]) -> Tensor:
    """Leave a ReLU, or a bounded one, to the quantizer after it."""
    read = relu_operands(function, args)
    assert read is not None
    return quantizer.after(*read)


class _Kept:
    """Keeps the compared activations of one run; copies, because what reads one may change it in place."""

    def __init__(self, places: Sequence[ComparedInput]) -> None:
        self._places = places
        self._values: dict[str, Tensor] = {}

    def watchers(self) -> dict[str, Callable[[Tensor], None]]:
        """Return the functions that keep them, by name of the operation.

        It is not kept here: in a circle of references the activations of a step, and all that their gradients needed,
        would live until Python looks for circles, gigabytes later.
        """
        return {place.op: functools.partial(self._keep, place.op) for place in self._places}

    def _keep(self, op: str, x: Tensor) -> None:
        self._values[op] = x.clone()

    def values(self) -> list[Tensor]:
        return [self._values[place.op] for place in self._places]


def teacher(model: nn.Module, source: Source, at: Comparison, call: Call) -> Callable[[Call], Prediction]:
    """Return a float model as a function from the arguments of a call to a prediction.

    It may be of another class than the student: it is compared at its own backbone's output, or where the user said.

    Args:
        model: the float model; it is copied.
        source: the student as it was read.
        at: where the student is compared.
        call: arguments to trace it with.

    Raises:
        ConfigError: a place has another shape in the two networks, or is in one of them only.
    """
    copied = plain_copy(model).model
    graph = record(copied, call)
    places = [_place_in_teacher(graph, place, source.graph) for place in at.inputs]

    def run(call: Call) -> Prediction:
        args, kwargs = call
        kept = _Kept(places)
        with torch.no_grad(), Tap(kept.watchers(), graph):
            outputs = list(tensors_in(copied(*args, **kwargs)))
        return prediction_of(outputs, kept.values(), with_outputs=at.outputs)

    return run


def _place_in_teacher(graph: LayerGraph, place: ComparedInput, student: LayerGraph) -> ComparedInput:
    """Find the activation of the teacher that one of the student is compared with."""
    own = backbone_output(graph) if place.asked is None else named_input(graph, place.asked, field=place.field)
    if own is None or graph.shapes[own.tensor] != student.shapes[place.tensor]:
        found = None if own is None else list(graph.shapes[own.tensor])
        where = "the backbone's output" if place.asked is None else repr(place.asked)
        raise ConfigError(
            f"Teacher and student should have activations of one shape where they are compared. Found {found} in the "
            f"teacher and {list(student.shapes[place.tensor])} in the student, at {where}. Set "
            f"FinetuneConfig.{place.field} to a module that both have."
        )
    return own
