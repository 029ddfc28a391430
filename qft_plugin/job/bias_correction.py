"""Biases that undo the mean error of quantization (Nagel et al. 2019, arXiv 1906.04721, Sec. 4.2, empirical form).

    bias += E[y_float] - E[y_quantized]      for each output channel of each quantized layer

The layers are corrected in the order of execution, in one run over one batch: as soon as a layer's output is computed,
the difference is added to it, so that everything after it sees corrected activations, as in the corrected network.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qft_plugin.graph.layer_graph import Layer
from qft_plugin.graph.record import function_name

logger = logging.getLogger("qft_plugin")

BIAS_IMAGES: Final = 256
"""Images that the means are taken over, in one batch."""


def correctable(layers: Sequence[Layer], quantized: Collection[str]) -> list[Layer]:
    """List the quantized layers with a bias of their own; the log names the others.

    Args:
        layers: all layers.
        quantized: names of the weights that are quantized.
    """
    biases = [layer.bias for layer in layers]
    wanted = [layer for layer in layers if layer.weight in quantized]
    found = [layer for layer in wanted if layer.bias is not None and biases.count(layer.bias) == 1]
    kept = [layer.weight for layer in wanted if layer not in found]
    if kept:
        logger.warning("bias correction leaves out layers without a bias of their own: %s", ", ".join(kept))
    return found


def channel_means(y: Tensor, layer: Layer) -> Tensor:
    """Return the mean of a layer's output in each channel, over images and positions, `[out]`.

    Args:
        y: `[images, out, *space]` of a convolution, `[..., out]` of any other layer.
        layer: the layer.
    """
    space = int(layer.kind[-2]) if layer.kind.startswith("conv") else 0  # conv2d, conv_transpose2d
    return y.movedim(-1 - space, 0).flatten(1).mean(1)


class Outputs(TorchFunctionMode):
    """While active, lets a function replace the output of certain layers, found by their weights.

    The quantizers of a host do not see this: inside its own mode or modules, the layer's call is what it was.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Mapping[str, Tensor], replaced: Callable[[Layer, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self._layers = {id(tensors[layer.weight]): layer for layer in layers}
        self._replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values()):
            layer = self._layers.get(id(value))
            if layer is not None and function_name(func) == layer.kind:
                return self._replaced(layer, result)
        return result


@torch.no_grad()
def output_means(
    layers: Sequence[Layer], tensors: Mapping[str, Tensor], run: Callable[[], object]
) -> dict[str, Tensor]:
    """Return the mean output of each layer in the first of its calls, by name of the weight.

    Args:
        layers: the layers.
        tensors: the weights that the network runs with, the very objects.
        run: runs it.
    """
    means: dict[str, Tensor] = {}

    def look(layer: Layer, y: Tensor) -> Tensor:
        if layer.weight not in means:
            means[layer.weight] = channel_means(y, layer)
        return y

    with Outputs(layers, tensors, look):
        run()
    hidden = [layer.weight for layer in layers if layer.weight not in means]
    if hidden:
        logger.warning("bias correction leaves out layers that run with another weight: %s", ", ".join(hidden))
    return means


@torch.no_grad()
def corrections(
    layers: Sequence[Layer], tensors: Mapping[str, Tensor], run: Callable[[], object], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Find what to add to each bias, with the corrections of earlier layers in effect where a later one is measured.

    A layer that is called several times is corrected by its first call; the later ones run with this correction.

    Args:
        layers: the layers to correct.
        tensors: the weights that the quantized network runs with, the very objects.
        run: runs it, on the images that the means were taken over.
        means: the result of `output_means` for the float network, in the same (folded) units.

    Returns:
        E[y_float] - E[y_quantized], `[out]`, by name of the weight.
    """
    found: dict[str, Tensor] = {}

    def correct(layer: Layer, y: Tensor) -> Tensor:
        if layer.weight not in found:
            found[layer.weight] = means[layer.weight] - channel_means(y, layer)
        change = found[layer.weight]
        return y + (change.view(-1, *(1,) * int(layer.kind[-2])) if layer.kind.startswith("conv") else change)

    with Outputs([layer for layer in layers if layer.weight in means], tensors, correct):
        run()
    return found
