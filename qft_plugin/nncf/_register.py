"""`nncf.quantize` with one more argument: `algorithm`."""

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import nncf
import nncf.quantization
import nncf.quantization.quantize_model
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedBiasCorrectionParameters,
    AdvancedQuantizationParameters,
    AdvancedSmoothQuantParameters,
    OverflowFix,
    QuantizationParameters,
)
from torch import nn

from qft_plugin.checks import check_callback
from qft_plugin.config import QFTConfig
from qft_plugin.errors import ConfigError, HostError
from qft_plugin.graph.surroundings import undisturbed
from qft_plugin.job.checkpoint import kept_in
from qft_plugin.job.run import Job
from qft_plugin.job.target import run_to_target
from qft_plugin.nncf._host import NNCF
from qft_plugin.nncf._read import check_model
from qft_plugin.nncf._request import Request
from qft_plugin.nncf._version import check_version
from qft_plugin.report.display import shown
from qft_plugin.training.distributed import joined, world_of
from qft_plugin.training.phases import Step

PLACES: Final = (nncf, nncf.quantization, nncf.quantization.quantize_model)
"""Every module in which NNCF looks `quantize` up (2.17 to 3.4)."""

MARK: Final = "__qft_original__"
DOCUMENTATION: Final = """
    :param algorithm: `None` runs NNCF's own post-training quantization. `"qft"`, or a `qft_plugin.QFTConfig`, finetunes
        weights, biases and all scales without labels and returns a model with 4-bit weights; `mode` should be `None`
        then, and bias correction and overflow fix, whose work the finetune does, should be left at their defaults.
    :param callback: called with a `qft_plugin.nncf.Step` after each step of that finetune.
    :param verbose: show its phases on stderr while they run, and its report at the end.
    :param checkpoint: a folder in which its work is kept every minute and when it is interrupted; the same call goes on
        from there, to the same result. `None` keeps nothing. It needs safetensors.
"""


def register() -> None:
    """Add the argument `algorithm` to `nncf.quantize`; does nothing where that has been done already."""
    for place in PLACES:
        original = place.quantize
        if not hasattr(original, MARK):
            place.quantize = _wrapped(original)


def unregister() -> None:
    """Give NNCF its own `quantize` back."""
    for place in PLACES:
        place.quantize = getattr(place.quantize, MARK, place.quantize)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize(
        model: Any,
        calibration_dataset: Any,
        *,
        algorithm: Any = None,
        callback: Any = None,
        verbose: bool = True,
        checkpoint: Any = None,
        **host: Any,
    ) -> Any:
        if algorithm is None:
            for name, given in (("callback", callback), ("checkpoint", checkpoint)):
                if given is not None:
                    raise ConfigError(f'{name} should come with algorithm="qft". Found no algorithm.')
            if verbose is not True:
                raise ConfigError(
                    f'verbose should come with algorithm="qft". Found {verbose!r} and no algorithm: NNCF itself has no '
                    "such argument. Leave it out."
                )
            return original(model, calibration_dataset, **host)
        asked = _Asked(algorithm, callback, verbose, checkpoint)
        return _quantize(original, model, calibration_dataset, asked, host).model

    signature = inspect.signature(original)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (("algorithm", None), ("callback", None), ("verbose", True), ("checkpoint", None))
    ]
    quantize.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra]
    )
    before, mark, after = (original.__doc__ or "").partition("    :return:")
    quantize.__doc__ = before + DOCUMENTATION.lstrip("\n") + mark + after
    setattr(quantize, MARK, original)
    return quantize


@dataclass(frozen=True)
class _Asked:
    """The arguments that are this package's own: see `quantize`."""

    algorithm: Any
    callback: Callable[[Step], None] | None
    verbose: bool
    checkpoint: str | os.PathLike[str] | None


def quantize(
    model: nn.Module,
    calibration_dataset: Any,
    config: QFTConfig | None = None,
    *,
    verbose: bool = True,
    **host: Any,
) -> Job:
    """Do what `nncf.quantize(..., algorithm=config)` does, and return the DoF map and the losses with the model.

    Args:
        model: float torch model; it is never changed.
        calibration_dataset: `nncf.Dataset` of unlabeled inputs.
        config: the settings; `None` for the defaults.
        verbose: show the phases on stderr while they run, and the report at the end.
        **host: the other arguments of `nncf.quantize`, and `callback` and `checkpoint`.
    """
    original = getattr(nncf.quantize, MARK, nncf.quantize)
    asked = _Asked(config or QFTConfig(), host.pop("callback", None), verbose, host.pop("checkpoint", None))
    return _quantize(original, model, calibration_dataset, asked, host)


@undisturbed()
def _quantize(original: Callable[..., Any], model: Any, dataset: Any, asked: _Asked, host: dict[str, Any]) -> Job:
    check_callback(asked.callback)
    config, request = checked_request(original, dataset, _config(asked.algorithm), host)
    with opened(model, request, verbose=asked.verbose) as opened_host:
        processes = world_of(next(model.parameters()).device).size
        with kept_in(asked.checkpoint, processes=processes) as keeper:
            return run_to_target(opened_host, config, callback=asked.callback, keeper=keeper)


@contextlib.contextmanager
def opened(model: Any, request: Request, *, verbose: bool) -> Iterator[NNCF]:
    """Check the user's model, and return it as the host of a job that runs inside the block.

    Args:
        model: the user's model.
        request: the user's request to NNCF.
        verbose: show the phases of the job.

    Raises:
        HostError: NNCF is too old.
        ModelError: it is no model that can be quantized.
    """
    # Calibration code often stands inside no_grad or inference_mode, but this one trains.
    with torch.inference_mode(False), torch.enable_grad(), joined(model) as world, shown(verbose and world.is_first):
        check_version()
        check_model(model)
        # One process keeps all images anyway; NNCF says then what is wrong with its setting.
        head_items = request.calibration_items if request.own_items and world.size > 1 else 0
        yield NNCF(model, request, head_items)


def checked_request(
    original: Callable[..., Any], dataset: Any, config: QFTConfig, host: dict[str, Any]
) -> tuple[QFTConfig, Request]:
    """Check the user's settings against each other; returns those of the job, and what NNCF is asked for.

    Args:
        original: NNCF's own `quantize`.
        dataset: the calibration dataset.
        config: the settings.
        host: the other arguments of NNCF's own `quantize`.

    Raises:
        HostError: a setting cannot be honoured.
    """
    config = _with_range(config, host.get("advanced_parameters"))
    settings = _host_settings(original, host, config)
    own_items = config.activation_range == "host" or "subset_size" in settings
    return config, Request(original, dataset, settings, config.hardware, own_items=own_items)


def _config(algorithm: Any) -> QFTConfig:
    if isinstance(algorithm, QFTConfig):
        return algorithm
    if algorithm == "qft":
        return QFTConfig()
    raise ConfigError(f'algorithm should be "qft", a QFTConfig, or None for NNCF\'s own. Found {algorithm!r}.')


def _with_range(config: QFTConfig, advanced: Any) -> QFTConfig:
    """Leave the ranges of activations to NNCF where the user said how it estimates them and nothing else."""
    name = "activations_range_estimator_params"
    usual = getattr(AdvancedQuantizationParameters(), name)
    asked = config.activation_range is None and getattr(advanced, name, usual) != usual
    return replace(config, activation_range="host") if asked else config


def _host_settings(original: Callable[..., Any], host: dict[str, Any], config: QFTConfig) -> dict[str, Any]:
    """Check the user's settings for NNCF, and turn off what the finetune does better.

    Raises:
        HostError: a setting cannot be honoured.
        TypeError: an argument is none of NNCF's, in the words of Python.
    """
    inspect.signature(original).bind(None, None, **host)
    if host.get("mode") is not None:
        raise HostError(
            f'mode should be None with algorithm="qft". Found {host["mode"]}. Set the bit widths in a QFTConfig.'
        )
    if host.get("fast_bias_correction", True) is not True:
        raise HostError(
            'fast_bias_correction should be left at True with algorithm="qft", which trains every bias '
            f"itself; without a finetune, QFTConfig.bias_correction corrects them. Found "
            f"{host['fast_bias_correction']}."
        )
    given = host.get("advanced_parameters")
    advanced = AdvancedQuantizationParameters() if given is None else copy.deepcopy(given)
    default = AdvancedQuantizationParameters()
    refused = {
        "activations_range_estimator_params": (
            config.activation_range != "host"
            and advanced.activations_range_estimator_params != default.activations_range_estimator_params,
            f"QFTConfig.activation_range is {config.activation_range!r}",
        ),
        "overflow_fix": (advanced.overflow_fix not in (None, OverflowFix.DISABLE), "4-bit weights cannot overflow"),
        "bias_correction_params": (
            advanced.bias_correction_params != AdvancedBiasCorrectionParameters(),
            "every bias is trained",
        ),
        "weights_range_estimator_params": (
            advanced.weights_range_estimator_params != default.weights_range_estimator_params,
            "weight scales start at their MMSE and are trained",
        ),
        "weights_quantization_params": (
            advanced.weights_quantization_params != default.weights_quantization_params,
            "QFTConfig has weight_bits, layer_bits and hardware.rescale for this",
        ),
    }
    for name, (found, why) in refused.items():
        if found:
            raise HostError(
                f'advanced_parameters.{name} should be left at its default with algorithm="qft": {why}. '
                f"Found {getattr(advanced, name)!r}."
            )
    # NNCF gives what a depthwise layer reads a scale for each channel, which no accumulator of integers has. Here the
    # cross-layer factors do that, and train.
    activations = advanced.activations_quantization_params or QuantizationParameters()
    if activations.per_channel is None:
        advanced.activations_quantization_params = replace(activations, per_channel=False)
    # Likewise SmoothQuant, for what the linear layers of transformers read: its factors do not train, and what they
    # multiply costs time. Who sets an alpha of their own gets it.
    if advanced.smooth_quant_alpha is None and advanced.smooth_quant_alphas == default.smooth_quant_alphas:
        advanced.smooth_quant_alphas = AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    advanced.overflow_fix = OverflowFix.DISABLE
    advanced.disable_bias_correction = True
    return {**host, "advanced_parameters": advanced}
