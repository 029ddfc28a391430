"""A network of which some layers are quantized and the others are float, and how far it is from the float network."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from qft_plugin.config import QFTConfig
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import Layer
from qft_plugin.graph.placement import quantizers_before
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.activation_ranges import BATCH
from qft_plugin.job.host import Placed, Problem, Source, Start
from qft_plugin.job.understand import laid_out
from qft_plugin.training.loss import Loss, Prediction, class_divergence, distillation_loss
from qft_plugin.training.solve import Solution, solve

MOST_IMAGES: Final = 128
LEAST_IMAGES: Final = 16

WORK: Final = 1.5e12
"""Products that the runs for all layers may take together, about a minute of one core; above it there are fewer images.
That is 128 images for ResNet-20, and 32 for MobileNetV2 at 224x224."""

ELEMENT: Final = 20
"""Products that cost as much time as what else is done with each value that a layer makes."""

HELD: Final = 2**28
"""Bytes of float outputs of layers that are held at once."""


class Parts:
    """The quantized and the float form of one network, from which others are put together.

    Both are folded with the factors of the end, so that any layer of one fits into the other.

    Attributes:
        layers: those whose weights are quantized, in the order of execution.
        quantized: weights, biases and scales of the quantized network.
        floating: float weights and biases by name, in the same (folded) units.
        reads: names of the quantizers of what each layer reads, by name of its weight. One may serve several layers.
    """

    def __init__(self, start: Start[Placed], problem: Problem[Source], config: QFTConfig) -> None:
        """Solve the network in the present state of its degrees of freedom.

        Args:
            start: the result of `job.start.initialize`, trained or not.
            problem: the result of `job.understand.understand`. Its `source` says what is float.
            config: the settings; those of the loss.
        """
        dof, source = start.dof, problem.source
        self.layers = tuple(layer for layer in dof.map.layers if layer.weight in dof.weight_grids)
        with torch.no_grad():
            self.quantized = solve(dof)
            tensors = {name: source.tensors[name] for name in names_of(dof.map.layers)}
            folded = fold_network(dof.map, start.log_c + dof.log_c, tensors)
            for layer in dof.map.layers:
                factor = start.placed.input_factors.get(layer.weight)
                if factor is not None:
                    W = folded[layer.weight]
                    folded[layer.weight] = W / layer.axes.per_in(factor.to(W), W)
        self.floating = {name: laid_out(t, problem.inputs) for name, t in folded.items()}
        placement = start.placed.placement
        self.reads = {
            layer.weight: tuple(n for n in quantizers_before(source.graph, placement, layer) if n is not None)
            for layer in self.layers
        }
        self._start, self._problem = start, problem
        self._cross_entropy = 0.0 if config.finetune is None else config.finetune.cross_entropy

    def of(self, layers: Collection[str], quantizers: Collection[str]) -> Solution:
        """Return a network of which only a part is quantized.

        Args:
            layers: names of the weights of the layers that are quantized, with their biases.
            quantizers: names of the quantizers of activations that are active.
        """
        own = {name for layer in self.layers if layer.weight in layers for name in names_of([layer])}
        floats = {n: self.floating[n] for n in names_of(self.layers) if n not in own}
        scales = {n: s for n, s in self.quantized.activation_scales.items() if n in quantizers}
        return replace(self.quantized, tensors={**self.quantized.tensors, **floats}, activation_scales=scales)

    def none(self) -> Solution:
        """Return the float network."""
        return self.of((), ())

    def only(self, layer: Layer) -> Solution:
        """Return the network of which one layer is quantized, with what it reads."""
        return self.of({layer.weight}, self.reads[layer.weight])

    def without(self, layer: Layer) -> Solution:
        """Return the network of which all but one layer are quantized, and all but what it reads."""
        others = {other.weight for other in self.layers} - {layer.weight}
        return self.of(others, set(self.quantized.activation_scales) - set(self.reads[layer.weight]))

    @torch.no_grad()
    def run(self, solution: Solution, call: Call) -> Prediction:
        """Run a network on a batch."""
        return self._start.student(solution, call)

    @torch.no_grad()
    def observe(self, call: Call, watcher: Callable[[str, Tensor], None]) -> None:
        """Run the float network on a batch and show what each quantizer of activations would read."""
        self._start.student.observe({**self.quantized.tensors, **self.floating}, call, watcher)

    def difference(self, found: Prediction, expected: Prediction, *, images: int) -> "Difference":
        """Compare the predictions of two networks for one batch of so many images."""
        loss = Loss(self._problem.at.weights(len(expected.features)), self._cross_entropy)
        value = float(distillation_loss(found, expected, loss))
        if found.classes is None or expected.classes is None:
            return Difference(images, value * images, None)
        return Difference(images, value * images, int((found.classes == expected.classes).sum()))

    def exchanged(self, solution: Solution, weight: str, W: Tensor) -> Solution:
        """Return a network with another weight in one layer, real units, folded."""
        return replace(solution, tensors={**solution.tensors, weight: W})

    def cost(self, found: Prediction, expected: Prediction) -> float:
        """Return the divergence of class probabilities, or the loss where there are none."""
        if found.logits is not None and expected.logits is not None and expected.classes is not None:
            return float(class_divergence(found.logits, expected.logits))
        return self.difference(found, expected, images=1).loss

    def batches(self, count: int) -> Iterator[tuple[Call, int]]:
        """Yield the first `count` of the images that networks are judged by in batches, with the size of each."""
        inputs = self._problem.inputs
        first, end = held_out(self._problem)
        end, size = min(end, first + count), self._batch_size()
        for begin in range(first, end, size):
            stop = min(begin + size, end)
            yield inputs.batch(slice(begin, stop)), stop - begin

    def images(self, runs: int) -> int:
        """Return how many images are looked at: fewer where the network is large.

        Args:
            runs: how often the network runs on each of them.
        """
        first, end = held_out(self._problem)
        work = 0.0
        for layer in self.layers:
            products = self.floating[layer.weight].numel() / len(layer.out_index) if layer.is_kernel else 1
            work += self._values(layer) * (products + ELEMENT)
        return min(end - first, MOST_IMAGES, max(LEAST_IMAGES, int(WORK / (runs * work))))

    def _values(self, layer: Layer) -> float:
        """Return how many values a layer makes of one image."""
        recorded = self._problem.inputs.fitting(min(2, len(self._problem.inputs)))
        shapes = self._problem.source.graph.shapes
        return sum(torch.Size(shapes[output]).numel() for output in layer.outputs) / recorded

    def _batch_size(self) -> int:
        """Return how many images run at once: the float outputs of all layers are held."""
        inputs, values = self._problem.inputs, sum(self._values(layer) for layer in self.layers)
        return inputs.fitting(max(1, min(inputs.at_once(BATCH), int(HELD / (4 * values)))))


@dataclass(frozen=True)
class Difference:
    """How far a network is from the float one, over some images.

    Attributes:
        images: how many.
        losses: sum of their losses.
        agreeing: on how many of them both name one class; `None` without classes.
    """

    images: int = 0
    losses: float = 0.0
    agreeing: int | None = 0

    def __add__(self, other: "Difference") -> "Difference":
        """Join the differences over two batches."""
        both = None if self.agreeing is None or other.agreeing is None else self.agreeing + other.agreeing
        return Difference(self.images + other.images, self.losses + other.losses, both)

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.losses / self.images

    @property
    def agreement(self) -> float | None:
        """Share of the images on which both name one class, 0 to 1."""
        return None if self.agreeing is None else self.agreeing / self.images


def held_out(problem: Problem[Source]) -> tuple[int, int]:
    """Return the first and the end of the images that a network is judged by.

    They are held out of training; where none are, or where other processes hold a part of them, the first ones.
    """
    inputs = problem.inputs
    return inputs.judged_on if inputs.own is None else (0, len(inputs))
