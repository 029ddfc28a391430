"""Brevitas' layers in the places of torch's own."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import brevitas.nn as qnn
from torch import Tensor, nn

from qft_plugin.brevitas._quantizers import (
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    QFTInt8ActPerTensorFloat,
    QFTUint8ActPerTensorFloat,
)
from qft_plugin.config import QFTConfig
from qft_plugin.graph.torch_model import replace_modules

QUANTIZED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.ConvTranspose3d: qnn.QuantConvTranspose3d,
    nn.Linear: qnn.QuantLinear,
}

RANGE_BATCH: Final = 64
RANGE_IMAGES: Final = 256
"""Images that decide which activations are never negative."""


def activation_quantizer(*, signed: bool) -> Any:
    """Return the quantizer of an activation, by whether it is ever negative."""
    return QFTInt8ActPerTensorFloat if signed else QFTUint8ActPerTensorFloat


def quantize_layers(
    model: nn.Module, names: Sequence[str], config: QFTConfig, inputs: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Replace layers by Brevitas' with the bit widths and the granularity of the settings, in place.

    Args:
        model: the model.
        names: of the layers.
        config: the settings.
        inputs: by name of the layer, the settings of what quantizes its input. A layer without a quantizer of its own
            that names another as `"like"` reads through that one's.
    """
    layers = {name: model.get_submodule(name) for name in names}
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    bits = config.weight_bits_of({name: W.numel() for name, W in weights.items() if isinstance(W, Tensor)})
    made: dict[str, Any] = {}
    for name, layer in layers.items():
        # No exporter has a scale per output channel for a grouped transposed kernel, whose second axis they share.
        shares = "Transpose" in type(layer).__name__ and layer.groups != 1
        per_channel = config.hardware.rescale == "channelwise" and not shares
        quantizer = QFTInt4WeightPerChannelFloat if per_channel else QFTInt4WeightPerTensorFloat
        if config.hardware.doubly_per_channel and not shares:
            quantizer = QFTInt4WeightDoublyPerChannelFloat
        kind = QUANTIZED[type(layer)]
        taken = {p: getattr(layer, p) for p in inspect.signature(kind).parameters if p != "bias" and hasattr(layer, p)}
        before = dict((inputs or {}).get(name, {}))
        like = before.pop("like", None)
        made[name] = kind(
            **taken,
            bias=layer.bias is not None,
            weight_quant=quantizer,
            weight_bit_width=bits[f"{name}.weight"],
            **before,
        )
        made[name].weight, made[name].bias = layer.weight, layer.bias
        if like is not None:
            # Passed to the constructor, a quantizer that exists makes Brevitas warn of settings that are its own.
            made[name].input_quant = made[like].input_quant
            made[like].input_quant.add_tracked_module(made[name])
    replace_modules(model, {layer: made[name] for name, layer in layers.items()})
