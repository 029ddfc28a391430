"""The contract of a host (NNCF, Brevitas, or another framework): its part of a job, as types that mypy checks.

A host is an object with the methods of `Host`; `job.run.run` calls them in the order in which they stand there. They
pass on to each other a `Source` (the network as it was read), a `Placed` (the host's quantizers in the folded
network) and a `Student` (the network that trains). The job itself never looks into a host's own types.

Names connect everything: a weight or bias has its name in `Source.tensors`, an operation and an activation have theirs
in `Source.graph`, and a quantizer of activations has one that the host makes up, in `Placed.placement`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.comparison import Comparison
from qft_plugin.graph.layer_graph import DofMap, LayerGraph
from qft_plugin.graph.placement import Placement
from qft_plugin.graph.torch_model import Call
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof
from qft_plugin.training.integers import DeployedWeight
from qft_plugin.training.keeping import FORGETFUL, Keeper
from qft_plugin.training.loss import Network, Prediction
from qft_plugin.training.solve import Solution
from qft_plugin.training.student import Unfold, Watcher

Watchers = Mapping[str, Callable[[Tensor], None]]
"""Functions that are shown the first activation that an operation reads, by name of the operation."""

Steps = Literal["tensor", "channel", "doubly"]
"""What has a step of its own in a weight: the whole, each output channel, or that times each input channel."""

T = TypeVar("T")


class Source(Protocol):
    """A network as its host read it. It is not changed later."""

    @property
    def model(self) -> nn.Module:
        """A float copy of the user's network in eval mode, with the names of `tensors`, which computes `graph`.

        All that can be folded is folded: within rounding it is the function of the user's network.
        """
        ...

    @property
    def graph(self) -> LayerGraph:
        """The calls of `model` on the first images; shapes have the axis of the images."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers of `model` by name, detached, real units."""
        ...

    @property
    def dof_map(self) -> DofMap:
        """The result of `job.understand.proven_map` for `model`, `graph` and `tensors`."""
        ...

    @property
    def weight_bits(self) -> Mapping[str, int] | None:
        """Bit width of each weight that the host quantizes, by name; `None` where the settings choose them.

        With `None` they choose those of activations too.
        """
        ...

    @property
    def weight_steps(self) -> Mapping[str, Steps] | None:
        """Granularity of each weight that the host quantizes, by name; `None` where the settings choose it."""
        ...

    @property
    def addend_factors(self) -> frozenset[str]:
        """Names of the weights that are factors in front of an addition; they start at 1."""
        ...

    @property
    def kept_in_float(self) -> Mapping[str, str]:
        """Why the host has no quantizer for a weight, in a few words, by its name, where there is such a reason."""
        ...

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """By name of a weight that is pruned, a tensor of its shape that is true where it is not 0 for good."""
        ...


class Placed(Protocol):
    """A host's quantizers in the folded network."""

    @property
    def placement(self) -> Placement:
        """Where they are: the grid of each activation quantizer, and the granularity that each weight can have."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The weights and biases that `Host.place` was given, as the host holds them now, real units."""
        ...

    @property
    def input_factors(self) -> Mapping[str, Tensor]:
        """By what the host multiplies what a layer reads, `[in]`, by name of the weight, which it has divided by it.

        These factors are not trained. They are there for the layers only that the host multiplies the inputs of.
        """
        ...

    def with_placement(self: T, placement: Placement) -> T:
        """Return the same with other grids of the same quantizers; called before there is a student."""
        ...


class Student(Protocol):
    """The network with quantized activations; weights, biases and scales are an argument of every call.

    Whatever runs is the folded network: activations are in its units, x / c, but for the result of `__call__`.
    """

    def __call__(self, solution: Solution, call: Call, /) -> Prediction:
        """Run with quantized activations, with gradients to everything in `solution`; called in every step.

        Args:
            solution: the tensors of `Placed.tensors` by name (weights quantized already), and all scales; a quantizer
                that it has no scale for passes values on (`training.student.set_grids` sees to that).
            call: the batch.

        Returns:
            The activations at `Problem.at`, in the units of the teacher (`training.student.unfolded` brings them back).
        """
        ...

    def observe(self, tensors: Mapping[str, Tensor], call: Call, watcher: Watcher, /) -> None:
        """Run with float activations and show the input that each activation quantizer would have had.

        Args:
            tensors: weights and biases by name.
            call: the batch.
            watcher: called with the name of the quantizer and the activation, which may change after it has returned.
        """
        ...

    def looked_at(self, look: Watcher, /) -> AbstractContextManager[None]:
        """Show a function the inputs that `observe` shows, of the runs of `watch` inside the context."""
        ...

    def watch(self, tensors: Mapping[str, Tensor], call: Call, watchers: Watchers, /) -> None:
        """Run with float activations and show each watcher the input of its operation.

        Args:
            tensors: weights and biases by name.
            call: the batch.
            watchers: for names of operations in `Layer.calls`.
        """
        ...

    def trace(self, solution: Solution, call: Call, watchers: Watchers, /) -> None:
        """Run with quantized activations and show each watcher the input of its operation.

        A watcher may write into the tensors of its operation in place: the operation then computes with them.

        Args:
            solution: as in `__call__`.
            call: the batch.
            watchers: for names of operations of the graph; one that the host does not run itself is left out.
        """
        ...


SourceT = TypeVar("SourceT", bound=Source)
PlacedT = TypeVar("PlacedT", bound=Placed)
SourceT_co = TypeVar("SourceT_co", bound=Source, covariant=True)
PlacedT_co = TypeVar("PlacedT_co", bound=Placed, covariant=True)


@dataclass(frozen=True)
class Problem(Generic[SourceT_co]):
    """A network and its images, understood; the result of `job.understand.understand`.

    Attributes:
        source: the network as its host read it.
        inputs: the images, in the fastest layout.
        at: where teacher and student are compared.
        keeper: keeps the work now and then, and has what an earlier run of the same job has kept.
    """

    source: SourceT_co
    inputs: Inputs
    at: Comparison
    keeper: Keeper = FORGETFUL


@dataclass(frozen=True)
class Start(Generic[PlacedT_co]):
    """Where a finetune starts; the result of `job.start.initialize`. Training changes `dof` and nothing else.

    Attributes:
        placed: the host's quantizers around the folded network.
        student: the host's student.
        dof: the degrees of freedom; their cross-layer factors are relative to `log_c`.
        log_c: logarithm of the factor of every variable that is folded into the student already, `[dof_map.size]`.
    """

    placed: PlacedT_co
    student: Student
    dof: Dof
    log_c: Tensor


class Host(Protocol[SourceT, PlacedT]):
    """The methods of a host that a job calls, in this order; one host serves one job, of one model and one dataset."""

    @property
    def name(self) -> str:
        """Name of the package of the framework."""
        ...

    @property
    def model(self) -> nn.Module:
        """The user's model, checked by the host; images are checked against its forward, dtype and device."""
        ...

    @property
    def head_items(self) -> int:
        """How many of the first items of the dataset every one of several processes keeps, at least."""
        ...

    def asked(self) -> Mapping[str, str]:
        """Return what the user asked the host for beside model, images and settings: equal words for equal requests.

        A checkpoint of another request is not gone on with. It is called before the model is read.
        """
        ...

    def items(self) -> Iterable[Any]:
        """Return the user's dataset: tensors, tuples of tensors or dicts of tensors. It is iterated over once.

        Raises:
            DataError: it is no dataset of this host.
        """
        ...

    def read(self, inputs: Inputs, config: QFTConfig, /) -> SourceT:
        """Describe the user's model, of which copies may be changed.

        Args:
            inputs: the images; `inputs.first()` to run it with.
            config: the settings.

        Raises:
            ModelError: it cannot be quantized, computes NaN, or is random in eval mode.
        """
        ...

    def teacher(self, problem: Problem[SourceT], /) -> Network | None:
        """Return the float network as a function from a batch to its activations at `problem.at`.

        `None` where nothing trains in this job although the settings have a finetune: another job will train.

        Raises:
            ConfigError: it has no such activations.
        """
        ...

    def initialize(self, problem: Problem[SourceT], config: QFTConfig, /) -> Start[PlacedT]:
        """Choose where the finetune starts.

        That is `job.start.initialize(self, problem, config)`, or where the model holds a start already,
        `job.start.start(self, problem, ...)` with it. Both call `place` and then `student`.
        """
        ...

    def place(self, source: SourceT, tensors: Mapping[str, Tensor], inputs: Inputs, /) -> PlacedT:
        """Put the host's quantizers into a copy of `source.model` and calibrate those of activations.

        Args:
            source: the result of `read`.
            tensors: weights and biases of all layers of the map with the initial cross-layer factors folded in, by
                name, real units.
            inputs: the images.
        """
        ...

    def student(
        self, problem: Problem[SourceT], placed: PlacedT, unfolds: Sequence[Unfold | None], /, *, compiled: bool
    ) -> Student:
        """Make the network that trains.

        Args:
            problem: the network, and where it is compared.
            placed: the result of `place`, with the bit widths of the settings.
            unfolds: the factors that bring each activation at `problem.at` back to the teacher's units.
            compiled: fuse the fake-quantization (`training.student.compiled_fake_quantize`).
        """
        ...

    def write(
        self, problem: Problem[SourceT], start: Start[PlacedT], deployed: Mapping[str, DeployedWeight], /
    ) -> nn.Module:
        """Put the trained degrees of freedom into a model of the host's own kind, and keep the first images with it.

        Args:
            problem: the network and the images.
            start: holds the degrees of freedom at the end, and the factors that they are relative to.
            deployed: the integers and steps of all quantized weights by name, solved from `start.dof`.

        Returns:
            The model, in eval mode: its integers are those of the student.
        """
        ...
