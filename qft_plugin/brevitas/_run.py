"""The functions for users of Brevitas: initialize, finetune, quantize."""

import logging
import os
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from qft_plugin.brevitas._host import Brevitas
from qft_plugin.brevitas._link import shared_factors
from qft_plugin.brevitas._read import check, made_in_inference_mode
from qft_plugin.brevitas._twin import is_quantized_layer, weight_scaling
from qft_plugin.brevitas._version import check_version
from qft_plugin.checks import check_callback
from qft_plugin.config import QFTConfig
from qft_plugin.errors import ConfigError, ModelError, warn
from qft_plugin.graph.channel_affine import Rescaled
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.surroundings import undisturbed
from qft_plugin.graph.torch_model import check_finite, check_model
from qft_plugin.job.checkpoint import kept_in
from qft_plugin.job.run import Callback, run
from qft_plugin.job.target import run_to_target
from qft_plugin.report.display import shown
from qft_plugin.training.distributed import joined
from qft_plugin.training.finetune import FinetuneResult

logger = logging.getLogger("qft_plugin")

BY_QUANTIZERS: Final = (
    "weight_bits",
    "small_layer_bits",
    "small_layer_share",
    "layer_bits",
    "layer_activation_bits",
    "bounded",
    "average_bits",
    "target_agreement",
    "evaluate",
    "max_drop",
)
BY_QUANTIZERS_OF_HARDWARE: Final = ("rescale", "doubly_per_channel", "activation_bits")
"""Settings that a model says itself by the quantizers that it has."""


@undisturbed()
def initialize(
    model: nn.Module,
    data: Iterable[Any],
    config: QFTConfig | None = None,
    *,
    verbose: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    """Choose where a finetune of a linked model starts, in place: ranges, MMSE scales, equalization, compensation.

    A model that is not linked is linked first, on the first images, and a log line (INFO) says so.

    Args:
        model: layers of `brevitas.nn` with quantizers of this package.
        data: batches of unlabeled inputs: tensors, tuples of tensors, or dicts of tensors.
        config: the settings; bit widths and granularity are those of the model's quantizers.
        verbose: show the phases on stderr while they run, and the report at the end.
        checkpoint: a folder in which the work is kept every minute and when it is interrupted; the same call goes on
            from there, to the same result. `None` keeps nothing. It needs safetensors.
    """
    config = checked_config(config, model)
    with torch.inference_mode(False), torch.no_grad(), joined(model) as world, shown(verbose and world.is_first):
        check_version()
        check(model)
        _say_if_not_linked("initialize", model)
        with kept_in(checkpoint, processes=world.size) as keeper:
            run(Brevitas(model, data, None, calibrates=True), config, keeper=keeper)


@undisturbed()
def finetune(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    config: QFTConfig | None = None,
    *,
    callback: Callback | None = None,
    verbose: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FinetuneResult:
    """Train all degrees of freedom of a linked model against its float teacher, in place.

    The model changes only at the end, to the best state that was seen; an interruption leaves it as it was. A model
    that is not linked is linked first, on the first images, and a log line (INFO) says so.

    Training starts from the scales and weights that the model has. Without `initialize` these are weights that are
    rounded to nearest, and scales of activations that someone else has chosen or trained; where they have seen a first
    batch or nothing yet, a `QFTWarning` says so.

    Args:
        model: layers of `brevitas.nn` with quantizers of this package.
        teacher: the float model; it may be of another class, as long as it takes the same inputs.
        data: batches of unlabeled inputs: tensors, tuples of tensors, or dicts of tensors.
        config: the settings; `config.finetune` should not be `None`.
        callback: called with a `qft_plugin.brevitas.Step` after each step.
        verbose: show the phases on stderr while they run, and the report at the end.
        checkpoint: a folder in which the work is kept every minute and when it is interrupted; the same call goes on
            from there, to the same result. `None` keeps nothing. It needs safetensors.

    Returns:
        How it went: the losses before, on the way, and at the end.

    Raises:
        ConfigError: a setting contradicts the model, or teacher and student cannot be compared.
    """
    check_callback(callback)
    config = checked_config(config, model)
    if config.finetune is None:
        raise ConfigError(
            "QFTConfig.finetune should be a FinetuneConfig. Found None. Call initialize for a start alone."
        )
    check_model(teacher)
    proxies = [m.weight_quant for m in teacher.modules() if weight_scaling(m) is not None]
    if not all(getattr(proxy, "disable_quant", False) for proxy in proxies):
        warn(
            "finetune: teacher should be the float network. Found one with quantizers of qft_plugin.brevitas, whose "
            "errors the student learns too. Pass the network without them.",
            stacklevel=2,
        )
    with torch.inference_mode(False), torch.enable_grad(), joined(model) as world, shown(verbose and world.is_first):
        check_version()
        check(model)
        _say_if_not_linked("finetune", model)
        with kept_in(checkpoint, processes=world.size) as keeper:
            host = Brevitas(model, data, teacher, calibrates=False)
            result = run(host, config, callback=callback, keeper=keeper).result
    assert result is not None
    return result


@undisturbed()
def quantize(
    model: nn.Module,
    data: Iterable[Any],
    example_input: Any = None,
    config: QFTConfig | None = None,
    *,
    callback: Callback | None = None,
    verbose: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Turn a float model into a finetuned, linked Brevitas model: preprocess, swap, link, initialize, finetune.

    Every convolution and linear module gets a weight quantizer and its input an 8-bit activation quantizer. So does a
    subclass that calls its function once, whatever it computes around it or its weight from. Others (functions that
    are called with a parameter, weights that depend on the image or that something else reads) stay in floating point,
    and a log line names them with the reason. ReLU6 and all other functions stay exact.

    What reads a quantized activation is taken from the graph of `torch.fx`. A model that `torch.fx` cannot trace, or
    of which it makes another one, keeps its own forward: each layer in it gets a quantizer of its input, layers that
    read one activation share it, and additions read what they have read.

    Args:
        model: float torch model; it is never changed.
        data: batches of unlabeled inputs: tensors, tuples of tensors, or dicts of tensors.
        example_input: one input to trace the model with; `None` takes the first images.
        config: the settings.
        callback: called with a `qft_plugin.brevitas.Step` after each step.
        verbose: show the phases on stderr while they run, and the report at the end.
        checkpoint: a folder in which the work is kept every minute and when it is interrupted; the same call goes on
            from there, to the same result. `None` keeps nothing. It needs safetensors.

    Returns:
        A linked model; `fold` makes it an ordinary one.

    Raises:
        ModelError: the model holds nothing to quantize, is random in eval mode, or needs a graph for the hardware.
        DataError: the data cannot be used.
        HostError: Brevitas is missing, too old, or runs in its TorchScript mode.
    """
    check_version()
    check_callback(callback)
    config = config_beside(example_input, config)
    check_model(model)
    if any(weight_scaling(m) is not None for m in model.modules()):
        raise ModelError(
            f"quantize: the model should be a float network. Found quantizers of qft_plugin.brevitas in "
            f"{type(model).__qualname__}. Pass the network without them, or call initialize and finetune on this one."
        )
    others = [name for name, m in model.named_modules() if is_quantized_layer(m)]
    if others:
        raise ModelError(
            "quantize: the model should be a float network. Found weight quantizers of Brevitas in "
            f"{', '.join(others)}. Pass the network from before it was quantized."
        )
    with torch.inference_mode(False), torch.enable_grad(), joined(model) as world, shown(verbose and world.is_first):
        if made_in_inference_mode(model):
            model = copy_of(model)  # a copy that is made here is an ordinary one
        check_finite(dict(model.named_parameters()))
        host = Brevitas(model, data, model, calibrates=True, swaps=True, example_input=example_input)
        with kept_in(checkpoint, processes=world.size) as keeper:
            return run_to_target(host, config, callback=callback, keeper=keeper).model


def _say_if_not_linked(function: str, model: nn.Module) -> None:
    if shared_factors(model) is None:
        logger.info("%s: the model is not linked yet; that is done first, on the first images of the data", function)


def config_beside(example_input: Any, config: Any) -> QFTConfig:
    """Return the settings, the defaults where there are none, unless something else stands in their place.

    Args:
        example_input: what was given as an input.
        config: what was given as settings.

    Raises:
        ConfigError: one of the two is another thing.
    """
    if isinstance(example_input, QFTConfig):
        raise ConfigError(
            "example_input should be an input of the model. Found a QFTConfig. Pass the settings by name: config=..."
        )
    if config is not None and not isinstance(config, QFTConfig):
        raise ConfigError(
            f"config should be a QFTConfig. Found {type(config).__name__}. Make one: QFTConfig(...), or "
            "qft_plugin.config_from_dict of a dict of settings."
        )
    return config or QFTConfig()


def checked_config(config: QFTConfig | None, model: Any) -> QFTConfig:
    """Refuse what only a model itself decides."""
    config, default = config_beside(None, config), QFTConfig()
    for names, found, usual in (
        (BY_QUANTIZERS, config, default),
        (BY_QUANTIZERS_OF_HARDWARE, config.hardware, default.hardware),
    ):
        for name in names:
            if getattr(found, name) != getattr(usual, name):
                raise ConfigError(
                    f"{type(found).__name__}.{name} should be left at its default: the model's quantizers decide. "
                    f"Found {getattr(found, name)!r}. Choose another quantizer or pass weight_bit_width to the layer."
                )
    asked = config.hardware.elementwise_rescale == "channel"
    if asked and isinstance(model, nn.Module) and not any(isinstance(m, Rescaled) for m in model.modules()):
        raise ConfigError(
            "The model should have a factor in front of each addition with HardwareSpec.elementwise_rescale='channel'. "
            "Found none. Pass the addends through qft_plugin.brevitas.Rescaled(nn.Identity(), channels, axis=-3, "
            "like=weight) modules, or call quantize on the float model, which puts them there."
        )
    return config
