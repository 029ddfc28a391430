"""What does not fit the hardware's integers: sums that overflow an accumulator, and biases that are clipped."""

from collections.abc import Mapping

import torch

from qft_plugin.errors import warn
from qft_plugin.tensors.grid import integer_range, signed_peak
from qft_plugin.training.dof import Dof, LayerDof
from qft_plugin.training.integers import DeployedWeight, accumulator_bits
from qft_plugin.training.solve import accumulator_step, scales_of


def check_accumulators(dof: Dof, deployed: Mapping[str, DeployedWeight]) -> None:
    """Warn of every layer whose accumulator could overflow.

    Args:
        dof: the degrees of freedom.
        deployed: the integers of all quantized weights by name.
    """
    width = dof.hardware.accumulator_bits
    if width is None:
        return
    wide = {name: bits for name, bits in accumulator_bits(dof, deployed).items() if bits > width}
    if wide:
        warn(
            f"An accumulator of {width} bits should hold every sum. Found inputs that would overflow it: "
            f"{', '.join(f'{name} needs {bits}' for name, bits in wide.items())}. Use fewer bits for its weights "
            "(QFTConfig.layer_bits) or for its input (layer_activation_bits).",
            stacklevel=3,
        )


@torch.no_grad()
def check_biases(dof: Dof) -> None:
    """Warn of every layer whose bias is clipped by the integers that the hardware holds it in.

    Args:
        dof: the degrees of freedom.
    """
    width = dof.hardware.bias_bits
    if width is None:
        return
    scales, needed = scales_of(dof), {}
    _, high = integer_range(width, signed=True)
    for layer, channels in zip(dof.layers, dof.index.channels(scales.factors), strict=True):
        assert isinstance(layer, LayerDof)
        bias, step = layer.folded_bias(channels), accumulator_step(dof, layer, scales)
        if bias is None or step is None:
            continue
        peak = signed_peak((bias / step).round())
        if peak > high:
            needed[layer.layer.bias] = peak.bit_length() + 1
    if needed:
        warn(
            f"A bias of {width} bits should hold every bias in the scale of its accumulator. Found biases that are "
            f"clipped: {', '.join(f'{name} needs {bits}' for name, bits in needed.items())}. Use more "
            "(HardwareSpec.bias_bits).",
            stacklevel=3,
        )
