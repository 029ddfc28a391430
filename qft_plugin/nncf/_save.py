"""Out of NNCF to OpenVINO."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from qft_plugin.deploy.dropout import check_not_random, without_dropout
from qft_plugin.deploy.files import CONVERTING, check_module
from qft_plugin.deploy.images import call_of, calls_of, example_of, kept_images
from qft_plugin.deploy.openvino import OpenVINOReport, Storage, checked_target, save
from qft_plugin.deploy.watched import Grid, Quantizer, Watched
from qft_plugin.errors import DeployabilityError
from qft_plugin.graph.surroundings import undisturbed
from qft_plugin.graph.torch_model import evaluating, in_float32, without_backward_hooks
from qft_plugin.nncf._convert import converted
from qft_plugin.nncf._read import HOOKS_ATTRIBUTE
from qft_plugin.nncf._write import without_compiler
from qft_plugin.packages import require
from qft_plugin.report.display import shown
from qft_plugin.report.progress import phase
from qft_plugin.training.distributed import once


@once
@undisturbed()
def save_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any = None,
    *,
    weights: Storage = "i4",
    check: bool = True,
    images: Iterable[Any] | None = None,
    verbose: bool = True,
) -> OpenVINOReport:
    """Save a quantized model as OpenVINO IR, and prove that the file computes the same.

    Args:
        model: the result of `nncf.quantize`.
        path: of the XML file; the weights go beside it as `.bin`.
        example_input: one input, as for the model: a tensor, a tuple of tensors or a dict of tensors. The first axis
            (images) stays free in the file.
        weights: `"i4"` stores 4-bit weights in 4 bits and runs them in int8; `"i4_plain"` is for NPUs and runs in f32
            on CPUs; `"i8"` stores 8 bits.
        check: prove constants and layers of the written file before it takes its place (docs/proof.md).
        images: batches of other inputs to prove it with, each as for the model; `None` takes the first images that the
            model was quantized with.
        verbose: show the phases on stderr while they run.

    Returns:
        Sizes, differences, and the precision that each layer runs in on this CPU.

    Raises:
        DataError: `example_input` is missing, or the model does not take it.
        HostError: OpenVINO is missing.
        DeployabilityError: the model is not quantized by NNCF, cannot be traced, or the path cannot be written.
        ParityError: the file differs from the model; nothing is written.
    """
    require("openvino", extra="nncf")
    check_module(model)
    if HOOKS_ATTRIBUTE not in dict(model.named_children()):
        raise DeployabilityError(
            f"The model should come from nncf.quantize. Found a {type(model).__name__} without quantizers. "
            "Quantize it first; a float model is converted with openvino.convert_model."
        )
    target = checked_target(path, weights)
    model, example_input = in_float32(model, example_input)
    with (
        shown(verbose),
        evaluating(model),
        without_backward_hooks(model),
        torch.no_grad(),
        without_compiler(),
        without_dropout(),
    ):
        example = example_of(model, example_input)
        check_not_random(model, example)
        # A list of one tensor, as a loader makes it, is that tensor.
        with phase("converting"), CONVERTING:
            ir = converted(model, example[0][0] if isinstance(example_input, list) else example_input)
        others = kept_images(model) if images is None else calls_of(model, images)
        return save(
            ir, target, storage=weights, watched=watched(model) if check else None, example=example, images=others
        )


def watched(model: nn.Module) -> Watched:
    """Return a model of NNCF with what a proof must know of its quantizers."""
    quantizers = [
        Quantizer(hook, _layer_name(name), _reader(hook))
        for name, hook in get_hook_storage(model).named_hooks()
        if isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer))
    ]
    return Watched(model, quantizers)


def _layer_name(hook: str) -> str:
    """Name the call that a hook belongs to."""
    op: str = decode_hook_name(hook)[1]
    return op.lstrip("/")


def _reader(hook: Any) -> Any:
    def read(args: tuple[Any, ...]) -> tuple[Tensor, Grid]:
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]  # values and indices of a pool
        low, high, scale, zero_point = hook.get_parameters_for_torch_fq()
        # NNCF flattens the scales; they stand on the axes that they were made for.
        shape = tuple(hook.scale_shape) if scale.numel() > 1 else ()
        scale, zero_point = scale.detach().reshape(shape), zero_point.detach().to(scale).reshape(shape)
        return x, Grid(scale, zero_point, int(low), int(high))

    return read


def weight_integers(model: nn.Module, example_input: Any) -> dict[str, Tensor]:
    """Return the integers of every weight that NNCF's quantizers quantize, by name of the weight.

    Args:
        model: the result of `nncf.quantize`.
        example_input: one input, as for the model.
    """
    with evaluating(model), torch.no_grad():
        return watched(model).run(call_of(model, example_input)).weights
