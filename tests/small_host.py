"""A host of a few lines: plain torch layers, each with a quantizer in front of it that a hook calls."""

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import DofMap, LayerGraph
from qft_plugin.graph.placement import ActivationGrid, Placement, WeightPlace
from qft_plugin.graph.record import Tap, record
from qft_plugin.graph.torch_model import Call, Functional, tensors_in
from qft_plugin.job.host import Problem, Start, Watchers
from qft_plugin.job.run import Job, run
from qft_plugin.job.start import initialize
from qft_plugin.job.understand import proven_map
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.data import Inputs
from qft_plugin.training.integers import DeployedWeight
from qft_plugin.training.loss import Network, Prediction
from qft_plugin.training.solve import Solution, solve
from qft_plugin.training.student import (
    QUANTIZER_OP,
    FakeQuantizer,
    Unfold,
    Watcher,
    looked_at,
    prediction_of,
    set_grids,
    unfolded,
)

SIGNED = ActivationGrid(0.05, -127, 127)


@dataclass(frozen=True)
class SmallSource:
    """The model with quantizers that pass values on, and what it computes."""

    model: nn.Module
    graph: LayerGraph
    tensors: Mapping[str, Tensor]
    dof_map: DofMap
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    kept_in_float: Mapping[str, str] = field(default_factory=dict)
    weight_bits: None = None
    weight_steps: None = None
    addend_factors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SmallPlaced:
    """One quantizer for what each layer reads, one for its weight."""

    placement: Placement
    tensors: Mapping[str, Tensor]
    input_factors: Mapping[str, Tensor] = field(default_factory=dict)

    def with_placement(self, placement: Placement) -> "SmallPlaced":
        return replace(self, placement=placement)


def quantizers_of(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizer)}


class SmallNetwork:
    """The teacher, or the student, which has grids and is called with tensors."""

    def __init__(self, problem: Problem[SmallSource], unfolds: Sequence[Unfold | None] = ()) -> None:
        self._problem, self._unfolds = problem, unfolds
        self.model = copy.deepcopy(problem.source.model)
        self.quantizers, self._function = quantizers_of(self.model), Functional(self.model)

    def run(self, tensors: Mapping[str, Tensor], call: Call, watchers: Watchers) -> list[Tensor]:
        with Tap(watchers, self._problem.source.graph):
            return list(tensors_in(self._function(tensors, *call)))

    def predict(self, tensors: Mapping[str, Tensor], call: Call) -> Prediction:
        at, seen = self._problem.at, dict[str, Tensor]()
        keep = {place.op: functools.partial(seen.__setitem__, place.op) for place in at.inputs}
        outputs = self.run(tensors, call, keep)
        return prediction_of(outputs, [seen[place.op] for place in at.inputs], with_outputs=at.outputs)

    def __call__(self, solution: Solution, call: Call) -> Prediction:
        set_grids(self.quantizers, solution)
        return unfolded(self.predict(solution.tensors, call), self._unfolds, solution.factors)

    def observe(self, tensors: Mapping[str, Tensor], call: Call, watcher: Watcher) -> None:
        with looked_at(self.quantizers, watcher):
            self.run(tensors, call, {})

    def looked_at(self, look: Watcher) -> AbstractContextManager[None]:
        return looked_at(self.quantizers, look)

    def watch(self, tensors: Mapping[str, Tensor], call: Call, watchers: Watchers) -> None:
        for quantizer in self.quantizers.values():
            quantizer.scale = None
        self.run(tensors, call, watchers)

    def trace(self, solution: Solution, call: Call, watchers: Watchers) -> None:
        set_grids(self.quantizers, solution)
        self.run(solution.tensors, call, watchers)


@dataclass(frozen=True)
class SmallHost:
    """Quantizes every convolution and linear layer that is a module."""

    model: nn.Module
    batches: Sequence[Tensor]
    head_items: int = 0
    name: str = "small"

    def asked(self) -> Mapping[str, str]:
        return {}

    def items(self) -> Iterable[Any]:
        return self.batches

    def read(self, inputs: Inputs, config: QFTConfig) -> SmallSource:
        model, call = copy.deepcopy(self.model), inputs.first()
        for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
            layer.add_module("quantizer", FakeQuantizer())
            layer.register_forward_pre_hook(lambda module, args: (module.quantizer(args[0]),))
        graph, tensors = record(model, call), {name: p.detach() for name, p in model.named_parameters()}
        return SmallSource(model, graph, tensors, proven_map(model, graph, tensors, call))

    def teacher(self, problem: Problem[SmallSource]) -> Network | None:
        return functools.partial(SmallNetwork(problem).predict, problem.source.tensors)

    def initialize(self, problem: Problem[SmallSource], config: QFTConfig) -> Start[SmallPlaced]:
        return initialize(self, problem, config)

    def place(self, source: SmallSource, tensors: Mapping[str, Tensor], inputs: Inputs) -> SmallPlaced:
        after = {op.outputs[0]: op.name.rsplit("/", 2)[0].replace("/", ".") for op in source.graph.ops}
        quantizers = {op.outputs[0]: after[op.outputs[0]] for op in source.graph.ops if op.function == QUANTIZER_OP}
        weights = {layer.weight: WeightPlace(per_channel=True) for layer in source.dof_map.layers if layer.is_kernel}
        return SmallPlaced(Placement(dict.fromkeys(quantizers.values(), SIGNED), quantizers, {}, weights), tensors)

    def student(
        self,
        problem: Problem[SmallSource],
        placed: SmallPlaced,
        unfolds: Sequence[Unfold | None],
        *,
        compiled: bool,
    ) -> SmallNetwork:
        student = SmallNetwork(problem, unfolds)
        for name, grid in placed.placement.activations.items():
            student.quantizers[name].set_grid(grid, fake_quantize)
        return student

    def write(
        self, problem: Problem[SmallSource], start: Start[SmallPlaced], deployed: Mapping[str, DeployedWeight]
    ) -> nn.Module:
        solution, student = solve(start.dof), SmallHost.student(self, problem, start.placed, (), compiled=False)
        set_grids(student.quantizers, solution)
        for name, tensor in solution.tensors.items():
            student.model.get_parameter(name).data.copy_(tensor.detach())
        return student.model


def quantized(model: nn.Module, batches: Sequence[Tensor], config: QFTConfig) -> Job:
    """Run a whole job; that this type checks says that the host keeps the contract."""
    return run(SmallHost(model, batches), config)
