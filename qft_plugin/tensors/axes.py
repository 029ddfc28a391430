"""Where the channels of a weight are: the step from the paper's W[m, n] to torch's axes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Axes:
    """The meaning of a weight's axes.

    The paper writes W[m, n] with m = in, n = out; torch orders a weight `[out, in/groups, *k]`, a transposed
    convolution's `[in, out/groups, *k]`. The first axis counts all channels of its side, group after group; the second
    one counts those inside each group. The weight of a normalisation has one axis only.

    Attributes:
        kind: the layer's torch function, `"linear"`, `"conv2d"`, `"conv_transpose2d"`, ...
        groups: number of groups.
    """

    kind: str
    groups: int = 1

    @property
    def transposed(self) -> bool:
        """Whether the input channels are on the first axis."""
        return self.kind.startswith("conv_transpose")

    def channels(self, W: Tensor) -> tuple[int, int]:
        """Return the number of input and of output channels of a weight with two axes or more."""
        first, second = W.shape[0], W.shape[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    def per_in(self, v: Tensor, W: Tensor) -> Tensor:
        """Put a vector over input channels onto the axes of a weight, so that it broadcasts against it.

        Args:
            v: one value per input channel, `[in]`.
            W: the weight.
        """
        return self._on_first(v, W) if self.transposed else self._on_second(v, W)

    def per_out(self, v: Tensor, W: Tensor) -> Tensor:
        """Put a vector over output channels onto the axes of a weight, so that it broadcasts against it.

        Args:
            v: one value per output channel, `[out]`.
            W: the weight.
        """
        return self._on_second(v, W) if self.transposed else self._on_first(v, W)

    def on_weight(self, scale: Tensor, scale_in: Tensor | None, W: Tensor) -> Tensor:
        """Put the scales of a kernel onto its axes, so that they broadcast against it.

        Args:
            scale: `[]` or `[out]`.
            scale_in: `[in]`, or `None`.
            W: the weight.
        """
        step = self.per_out(scale, W) if scale.dim() else scale
        return step if scale_in is None else step * self.per_in(scale_in, W)

    def in_slices(self, W: Tensor) -> Tensor:
        """Arrange a weight as one row per input channel, `[in, elements]`."""
        return (W if self.transposed else self._exchanged(W)).flatten(1)

    def out_slices(self, W: Tensor) -> Tensor:
        """Arrange a weight as one row per output channel, `[out, elements]`."""
        return self.by_output(W).flatten(1)

    def by_output(self, W: Tensor) -> Tensor:
        """Bring the output channels of a weight to the first axis: `[out, in/groups, *k]`."""
        return self._exchanged(W) if self.transposed else W

    def from_output(self, V: Tensor) -> Tensor:
        """Bring `[out, in/groups, *k]` back to torch order; the inverse of `by_output`."""
        return self._exchanged(V) if self.transposed else V

    def _exchanged(self, W: Tensor) -> Tensor:
        """Exchange the first two axes inside each group: its own inverse."""
        return W.reshape(self.groups, W.shape[0] // self.groups, *W.shape[1:]).transpose(1, 2).flatten(0, 1)

    def _on_first(self, v: Tensor, W: Tensor) -> Tensor:
        return v if W.dim() == 1 else v.reshape(-1, 1, *(1,) * (W.dim() - 2))

    def _on_second(self, v: Tensor, W: Tensor) -> Tensor:
        if W.dim() == 1:
            return v
        tail = (1,) * (W.dim() - 2)
        if self.groups == 1:
            return v.reshape(1, -1, *tail)
        inside = v.reshape(self.groups, 1, -1).expand(self.groups, W.shape[0] // self.groups, W.shape[1])
        return inside.reshape(W.shape[0], W.shape[1], *tail)
