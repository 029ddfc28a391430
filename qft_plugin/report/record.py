"""What a report records, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """What quantization does to one layer, and by it to the network; measured on `Analysis.images`.

    *Relative* is the L2 norm of the difference to the float network over the L2 norm of the float network's values.

    Attributes:
        weight: relative error of the weight.
        output_alone: relative error of the output where the layer alone is quantized (its weight and its input);
            `None` for a layer that computes the weight that it runs with.
        output_accumulated: relative error of the output in the quantized network; likewise.
        loss_only: loss of the network where this layer alone is quantized.
        loss_without: loss of the network where all layers but this one are quantized.
        agreement_only: share of images, 0 to 1, on which the network names the class of the float network where this
            layer alone is quantized; `None` for a network that does not return one tensor [images, classes].
        agreement_without: likewise where all layers but this one are quantized.
        clipped: share of the values of its input, 0 to 1, that are beyond the ends of their grid.
        dead: share of its weights, 0 to 1, whose integer is 0.
    """

    weight: float
    output_alone: float | None
    output_accumulated: float | None
    loss_only: float
    loss_without: float
    agreement_only: float | None
    agreement_without: float | None
    clipped: float | None
    dead: float


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """Distributions of one layer's weight, for pictures.

    Attributes:
        integers: how many weights have each integer, from the smallest integer of the grid to the largest.
        low: the smallest integer.
        before: how many float weights, in units of their own final step, fall into each of `len(before)` bins of equal
            width from `low - 1` to the largest integer + 1; what is beyond counts in the first and the last.
        scales_before: steps of the weight where training began, real per step, one or one for each output channel.
        scales_after: likewise at the end.
        granularity: relative error of the float weight on 4-bit grids that are fitted to it, by `"per-tensor"`,
            `"per-channel"` and `"doubly per-channel"` (Fig. 3).
    """

    integers: tuple[int, ...]
    low: int
    before: tuple[int, ...]
    scales_before: tuple[float, ...]
    scales_after: tuple[float, ...]
    granularity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the network.

    Attributes:
        name: of the user's module, `"features.3.conv"`.
        weight: name of the parameter, `"features.3.conv.weight"`.
        kind: of the operation, `"conv2d"`, `"linear"`, ...
        shape: of the weight.
        bits: of the weight; `None` where it stayed in floating point.
        activation_bits: of its input; `None` where that is not quantized.
        scales: how many steps its weight has, over all its axes; 0 where it stayed in floating point.
        reason: why it stayed in floating point, or has more bits than `QFTConfig.weight_bits`; empty else.
        errors: measured by `layer_errors`; `None` before.
        figures: likewise.
    """

    name: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    activation_bits: int | None
    scales: int
    reason: str = ""
    errors: LayerErrors | None = None
    figures: LayerFigures | None = None

    @property
    def weights(self) -> int:
        """How many weights it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of the network, for a picture of its graph.

    Attributes:
        name: of the operation.
        function: `"conv2d"`, `"add"`, ...
        inputs: names of the nodes that it reads.
        layer: name of its `Layer`; empty for an operation without a weight.
        bits: of the integers that it reads; `None` where they are floats.
    """

    name: str
    function: str
    inputs: tuple[str, ...]
    layer: str = ""
    bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a job did, and how good its result is.

    Attributes:
        host: `"nncf"` or `"brevitas"`.
        versions: of the packages that took part, by name.
        model: class of the user's model.
        images: how many images the job read.
        held_out: how many of them it did not train on, by which it chose the state that it kept; 0 where there were
            too few to hold any out: loss and agreement are then those on images that were trained on.
        compared_at: names of the activations that the loss compares.
        start_loss: loss before the first step; `None` without a finetune.
        final_loss: loss of the result, on the same images; never larger.
        losses: of the batch of each step.
        agreement: share of images, 0 to 1, on which the result names the class of the float network; on the images of
            the loss. `None` for a network that does not return one tensor [images, classes].
        start_agreement: likewise before the first step.
        layers: all convolutions, linear layers and embeddings, quantized or not, and what else has a quantized weight
            (a normalisation under NNCF), in the order of execution.
        nodes: all operations, in the order of execution.
        warnings: what the job warned of, in order.
        seconds: of each phase by its name, in order.
        peak_memory: the most memory that the process has had, bytes.
        analysed: how many images the errors of the layers were measured on; 0 before.
        decisions: what was decided on the way to a target, in order, as sentences; empty without one.
    """

    host: str
    versions: Mapping[str, str]
    model: str
    images: int
    held_out: int
    compared_at: tuple[str, ...]
    start_loss: float | None
    final_loss: float | None
    losses: tuple[float, ...]
    agreement: float | None
    start_agreement: float | None
    layers: tuple[Layer, ...]
    nodes: tuple[Node, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    analysed: int = 0
    decisions: tuple[str, ...] = ()

    @property
    def gained(self) -> bool:
        """Whether the finetune made the loss smaller; false without one."""
        return self.start_loss is not None and self.final_loss is not None and self.final_loss < self.start_loss
