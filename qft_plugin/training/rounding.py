"""Lossy elements: they make integers of a float weight while the student trains.

All elements take a kernel in the folded network and the step of each of its weights, and give what the student
computes with. A job's position, `progress`, goes from 0 to 1; at 1 every element is hard: it gives the step times
`integers`, the deployed weight.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from qft_plugin.config import Rounding, Sparsity
from qft_plugin.errors import ModelError
from qft_plugin.tensors.fake_quantize import fake_quantize, fake_quantize_folded, multiplied
from qft_plugin.tensors.grid import integer_range, to_integer
from qft_plugin.tensors.sparsity import Mask, masked

logger = logging.getLogger("qft_plugin")

INSIDE: Final = 0.49
"""How far from its integer, in steps, a float weight may be that must round to it."""

ZETA: Final = 1.1
GAMMA: Final = -0.1
"""AdaRound's stretched sigmoid runs from `GAMMA` to `ZETA`, so that 0 and 1 are reached."""

PACE: Final = 4.0
"""How many times further a step of the optimizer moves a soft integer than it would move a weight. One short training
must be able to carry it over a whole step before the learning rate falls; at 1 hardly any rounding changed."""

STRETCH: Final = 4 * PACE / (ZETA - GAMMA)
"""V over its stored value; the slope of h(V) in its middle is (zeta - gamma) / 4."""

UNDECIDED: Final = 1e-3
"""How far at least the soft rounding starts from its middle and from its ends, so that it starts on the right side."""

WARM_UP: Final = 0.2
"""Share of the training without AdaRound's regulariser."""

DECIDED: Final = 0.6
"""Position of the training where beta has fallen to its last value, while the learning rate is still large."""

FIRST_BETA: Final = 8.0
LAST_BETA: Final = 2.0

BLENDED: Final = 0.8
"""Position of the training from which on a blended weight is the quantized one; biases and scales finish on it."""


def moved_to(integers: Tensor, W: Tensor, step: Tensor) -> Tensor:
    """Return the float weight nearest to another that rounds to given integers.

    Args:
        integers: of the shape of `W`, held in float.
        W: a float weight, real units.
        step: broadcasts against `W`, real per step.
    """
    return (integers + (W / step - integers).clamp_(-INSIDE, INSIDE)) * step


class NearestRounding(nn.Module):
    """Round to the nearest integer with the straight-through estimator (Eq. 1); the interface of all elements.

    Attributes:
        low: smallest integer.
        high: largest integer.
        mask: chooses the weights that are kept, `None` where all are.
        trains_weight: whether the float weight trains; else the element has parameters in its place.
    """

    trains_weight = True

    def __init__(self, W: Tensor, *, low: int, high: int, mask: Mask | None) -> None:
        """Start where the weight is.

        Args:
            W: the weight in units of its initial step.
            low: smallest integer.
            high: largest integer.
            mask: chooses the weights that are kept.
        """
        super().__init__()
        self.low, self.high, self.mask = low, high, mask

    def kept(self, W: Tensor, step: Tensor) -> Tensor | None:
        """Choose by magnitude the float weights that are kept; `None` where all are or the element itself chooses."""
        return None if self.mask is None else self.mask((W / step).detach())

    def forward(self, W: Tensor, step: Tensor, progress: float) -> Tensor:
        """Return the weight that the student computes with.

        Args:
            W: the folded float weight, 0 where it is not kept, real units.
            step: broadcasts against `W`, real per step.
            progress: position of the training, 0 to 1.
        """
        return fake_quantize(W, step, low=self.low, high=self.high)

    def folded(self, W: Tensor, units: Sequence[Tensor], step: Tensor, progress: float) -> Tensor:
        """Return the same of a weight that factors are still to be multiplied into.

        Args:
            W: the stored float weight.
            units: what it is multiplied by, in this order, to be the folded one, real units.
            step: broadcasts against `W`, real per step.
            progress: position of the training, 0 to 1.
        """
        if type(self) is NearestRounding and self.mask is None:
            return fake_quantize_folded(W, units, step, low=self.low, high=self.high)
        folded = multiplied(W, units)
        kept = self.kept(folded, step)
        if kept is not None:
            # A weight that is dropped hears of its gradient, the factors do not.
            folded = multiplied(masked(W, kept), units)
        used: Tensor = self(folded, step, progress)
        return used

    @torch.no_grad()
    def integers(self, W: Tensor, step: Tensor) -> Tensor:
        """Return the integers, held in float, that are deployed.

        Args:
            W: the folded float weight, real units.
            step: broadcasts against `W`, real per step.
        """
        integers = to_integer(W, step, low=self.low, high=self.high)
        kept = self.kept(W, step)
        return integers if kept is None else integers.masked_fill_(~kept, 0)

    @torch.no_grad()
    def near(self, W: Tensor, step: Tensor) -> Tensor:
        """Return a float weight that rounds to the integers: the one that trained, moved where it does not.

        Args:
            W: the folded float weight, real units.
            step: broadcasts against `W`, real per step.
        """
        if self.mask is None and self.trains_weight:
            return W
        return moved_to(self.integers(W, step), W, step)


class AlphaBlend(NearestRounding):
    """Blend the float weight into the quantized one (alpha-blending, Liu and Mattina 2019, 1903.01061).

        W_used = (1 - alpha) * W + alpha * step * clip(round(W / step), low, high)

    The weight's gradient is that of the first term alone, so nothing has to pass through the rounding; the integers
    count as constants, and the gradient of the step is that of what it multiplies, alpha * integers.

        alpha = 1 - (1 - progress / 0.8)^3      1 from 0.8 on

    so that the start is a float kernel and the end a quantized one, on which biases and scales finish (chosen by
    trial among ramps that are straight or end elsewhere).

    Departure: cross-layer factors do not train with this element. They leave a float network as it is and change the
    rounding only, and that is where no gradient passes; the rest of their gradient is wrong.
    """

    def forward(self, W: Tensor, step: Tensor, progress: float) -> Tensor:
        """Return the blended weight; the arguments are those of `NearestRounding.forward`."""
        quantized = to_integer(W.detach(), step.detach(), low=self.low, high=self.high) * step
        return torch.lerp(W, quantized, alpha(progress)) if progress < BLENDED else quantized


def alpha(progress: float) -> float:
    """Return the share of the quantized weight in a blend at a position of the training, both 0 to 1."""
    return 1 - (1 - min(1.0, progress / BLENDED)) ** 3


def rectified_sigmoid(V: Tensor) -> Tensor:
    """Return AdaRound's share of the way up.  Eq. (23) there:  h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)."""
    return (V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class SoftRounding(NearestRounding):
    """Learn for each weight whether it is rounded up or down (AdaRound, Nagel et al. 2020, 2004.10568).

        W_used = step * (base + h(V))        base = clip(floor(W / step), low, high - 1) at the start

    V starts where the weight is and trains in its place; the steps multiply outside, so that their gradient is that
    of what they multiply. Where h(V) >= 1/2 at the end the integer is base + 1, else base. V is stored in such a unit
    that the learning rate of weights suits it.

    Departure: AdaRound fixes the step, trains layer by layer and clips base + h(V); here steps and biases train with
    all V together, and a base that is clipped in advance keeps every weight on the grid.

    Departure: beta falls from 8 to 2 by the middle of the training instead of from 20 over all of it, because hundreds
    of steps at a falling learning rate, instead of ten thousand at a constant one, leave no time to decide late.

    Departure: which weights are 0 is decided at the start too. A mask that is chosen anew in every step swaps weights
    that were decided for others that were not, and the loss of sparse networks was up to three times as large.

    Departure: the base is taken once, of the equalized and folded weight at the start. A kernel of fixed integers does
    not follow the cross-layer factors any more, which would only rescale compared activations, so they do not train.
    """

    trains_weight = False
    base: Tensor
    dropped: Tensor | None

    def __init__(self, W: Tensor, *, low: int, high: int, mask: Mask | None) -> None:
        """Start from the nearest integers."""
        super().__init__(W, low=low, high=high, mask=mask)
        W = W.detach()
        nearest = W.round().clamp_(low, high)
        base = W.floor().clamp_(low, high - 1)
        up = nearest > base
        share = (W - base).clamp_(UNDECIDED, 1 - UNDECIDED)
        share = torch.where(up, share.clamp(min=0.5 + UNDECIDED), share.clamp(max=0.5 - UNDECIDED))
        self.register_buffer("base", base)
        self.register_buffer("dropped", None if mask is None else ~mask(W))
        self.V = nn.Parameter(torch.logit((share - GAMMA) / (ZETA - GAMMA)) / STRETCH)

    def share(self) -> Tensor:
        """Return how far each weight is from its base to the next integer, 0 to 1."""
        return rectified_sigmoid(self.V * STRETCH)

    def kept(self, W: Tensor, step: Tensor) -> Tensor | None:
        """Return `None`: the kept weights were chosen at the start."""
        return None

    def forward(self, W: Tensor, step: Tensor, progress: float) -> Tensor:
        """Return the softly rounded weight; the arguments are those of `NearestRounding.forward`."""
        if progress >= 1:
            return self.integers(W, step) * step
        soft = self.base + self.share()
        return (soft if self.dropped is None else soft.masked_fill(self.dropped, 0)) * step

    @torch.no_grad()
    def integers(self, W: Tensor, step: Tensor) -> Tensor:
        """Return the integers, held in float; they depend on neither the float weight nor the step."""
        integers = self.base + (self.V >= 0)
        return integers if self.dropped is None else integers.masked_fill_(self.dropped, 0)


ELEMENTS: Final[dict[Rounding, type[NearestRounding]]] = {
    "ste": NearestRounding,
    "blend": AlphaBlend,
    "soft": SoftRounding,
}


def element_of(W: Tensor, *, bits: int, rounding: Rounding = "ste", mask: Mask | None = None) -> NearestRounding:
    """Make the element of a layer.

    Args:
        W: the weight in units of its initial step.
        bits: bit width; the grid is symmetric and narrow.
        rounding: the setting.
        mask: chooses the weights that are kept, `None` where all are.
    """
    low, high = integer_range(bits, signed=True, narrow=True)
    return ELEMENTS[rounding](W, low=low, high=high, mask=mask)


def undecided(elements: Iterable[nn.Module], progress: float) -> Tensor | None:
    """Return AdaRound's regulariser, the mean over all weights of  1 - |2 h(V) - 1|^beta  (Eq. 24 there has the sum).

    After a warm-up in which nothing is asked for, beta falls in a straight line and stays at its last value.

    Args:
        elements: those of all layers; only soft rounding is ever undecided.
        progress: position of the training, 0 to 1.

    Returns:
        `[]`, 0 where everything is decided and 1 where nothing is; `None` where there is nothing to decide.
    """
    soft = [element for element in elements if isinstance(element, SoftRounding)]
    if not soft or not WARM_UP <= progress < 1:
        return None
    fallen = min(1.0, (progress - WARM_UP) / (DECIDED - WARM_UP))
    beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * fallen
    terms = [1 - (2 * element.share() - 1).abs().pow(beta) for element in soft]
    return torch.stack([t.sum() for t in terms]).sum() / math.fsum(t.numel() for t in terms)


def check_masks(elements: Mapping[str, NearestRounding], sparsity: Sparsity) -> None:
    """Name the layers that a mask does not fit.

    Args:
        elements: by name of the weight.
        sparsity: the setting.

    Raises:
        ModelError: it fits none.
    """
    dense = [name for name, element in elements.items() if element.mask is None]
    if sparsity is None or not dense:
        return
    why = "2:4 needs four input channels (in each group), and normalisations are never sparse"
    if len(dense) == len(elements):
        raise ModelError(
            f"QFTConfig.sparsity={sparsity!r} should fit at least one quantized weight. Found none among "
            f"{', '.join(dense)}: {why}. Set it to None."
        )
    logger.warning("not sparse: %s. %s", ", ".join(dense), why)
