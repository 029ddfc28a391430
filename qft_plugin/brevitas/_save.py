"""Out of Brevitas: QONNX, and QCDQ that CPUs run in int8."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from brevitas.core.quant import IntQuant
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from qft_plugin.brevitas._twin import is_quantized_layer
from qft_plugin.deploy import qcdq, qcdq_defects, qonnx
from qft_plugin.deploy.dropout import check_not_random, without_dropout
from qft_plugin.deploy.files import CONVERTING, check_module, checked_path, refused, written_to
from qft_plugin.deploy.images import calls_of, example_of, kept_images
from qft_plugin.deploy.watched import Grid, Quantizer, Watched
from qft_plugin.errors import DeployabilityError
from qft_plugin.files import draft_of, put
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.surroundings import undisturbed
from qft_plugin.graph.torch_model import Call, evaluating, in_float32, tensors_in, without_backward_hooks
from qft_plugin.packages import require
from qft_plugin.report.display import shown
from qft_plugin.report.progress import phase
from qft_plugin.training.distributed import once

OPSET: Final = 14
"""The first with torch's attention function; quantization per channel, and Brevitas' exporters, begin with 13."""


@once
@undisturbed()
def save_qonnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any = None,
    *,
    check: bool = True,
    verbose: bool = True,
) -> qonnx.QONNXReport:
    """Save a Brevitas model as QONNX, and prove by QONNX' own executor that the file computes the same.

    A linked model keeps its scales per channel, a folded one has constant scales per tensor or per output channel.

    Args:
        model: any Brevitas model.
        path: of the file, `*.onnx`.
        example_input: one input, as for the model; the file is for its shape.
        check: prove constants and layers before the file takes its place (docs/proof.md).
        verbose: show the phases on stderr while they run.

    Raises:
        DataError: `example_input` is missing, or the model does not take it.
        HostError: a package for the export is missing.
        DeployabilityError: the path cannot be written, or torch or QONNX cannot export or run the model.
        ParityError: the file differs from the model; nothing is written.
    """
    require("onnx", "qonnx", extra="brevitas,export")
    check_module(model)
    import onnx

    with (
        shown(verbose),
        _exported(_exporter("export_qonnx"), model, path, example_input, check=check, free_batch=False) as made,
    ):
        file = onnx.load(made.draft)
        qcdq_defects.count_axes_from_first(file)
        qonnx.widen_bias_constants(file)
        qonnx.read_once(file)
        onnx.save(file, made.draft)
        report = qonnx.inspect_file(made.draft, watched=made.watched, example=made.example)
    return replace(report, path=made.target)


@once
@undisturbed()
def save_qcdq(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any = None,
    *,
    check: bool = True,
    images: Iterable[Any] | None = None,
    verbose: bool = True,
) -> qcdq.QCDQReport:
    """Save a Brevitas model as QCDQ in standard ONNX, and prove that ONNX Runtime and OpenVINO compute the same.

    The clips after the weights, which Brevitas exports and which keep OpenVINO from int8, are removed. Signed
    quantizers whose scale OpenVINO loses beside a concatenation become unsigned ones with a zero point. Other
    constructs that it computes wrong values from are said in other words.

    Args:
        model: any Brevitas model whose weights have scales per tensor or per output channel, such as `fold` returns.
        path: of the file, `*.onnx`.
        example_input: one input, as for the model; its first axis (images) stays free in the file.
        check: prove constants and layers before the file takes its place (docs/proof.md).
        images: batches of other inputs to prove it with, each as for the model; `None` takes the first images that the
            model was quantized with.
        verbose: show the phases on stderr while they run.

    Raises:
        DataError: `example_input` is missing, or the model does not take it.
        HostError: a package for the export is missing.
        DeployabilityError: the scale of a weight differs by input channel, which QCDQ cannot express (it names the
            layers), the path cannot be written, or torch cannot export the model or a runtime the file.
        ParityError: the file differs from the model; nothing is written.
    """
    require("onnx", "openvino", *(["onnxruntime"] if check else []), extra="brevitas,export")
    import onnx

    check_module(model)
    doubly = [name for name, layer in _quantized_layers(model) if _differs_by_input(layer)]
    if doubly:
        raise DeployabilityError(
            "QCDQ should have one scale per tensor or per output channel. Found scales that differ by input channel in "
            f"the weights of {', '.join(doubly)}. Call qft_plugin.brevitas.fold first; a doubly per-channel quantizer "
            "can be saved as QONNX only."
        )
    with (
        shown(verbose),
        _exported(_exporter("export_onnx_qcdq"), model, path, example_input, check=check, free_batch=True) as made,
    ):
        file = onnx.load(made.draft)
        qcdq_defects.count_axes_from_first(file)
        qcdq.strip_weight_clips(file)
        qcdq_defects.skip_before_convolutions(file)
        qcdq_defects.shift_signed_quantizers(file)
        qcdq_defects.bias_shared_products(file)
        qcdq_defects.upsample_in_float(file)
        qcdq_defects.widen_reductions(file)
        onnx.save(file, made.draft)
        others = kept_images(model) if images is None else calls_of(model, images)
        report = qcdq.inspect_file(made.draft, watched=made.watched, example=made.example, images=others)
    return replace(report, path=made.target)


def _exporter(name: str) -> Callable[..., Any]:
    """Import a function of Brevitas' exporters.

    It is late: exporting needs packages that training does not. Brevitas warns of one that would speed up rotations of
    weights, of which a user of these functions makes none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fast_hadamard_transform package not found", UserWarning)
        from brevitas import export
    found: Callable[..., Any] = getattr(export, name)
    return found


@dataclass(frozen=True)
class _Exported:
    """A file that was exported but not yet proven, and what it is to be compared with."""

    target: Path
    draft: Path
    watched: Watched | None
    example: Call


@contextlib.contextmanager
def _exported(
    export: Callable[..., Any],
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    check: bool,
    free_batch: bool,
) -> Iterator[_Exported]:
    """Export a model to a draft; the draft takes the place of the target where nothing was raised."""
    target = checked_path(path, ".onnx")
    if not any(is_quantized_layer(m) or isinstance(m, IntQuant) for m in model.modules()):
        raise DeployabilityError(
            f"The model should have quantizers of Brevitas. Found none in {type(model).__qualname__}. Pass what "
            "quantize or fold returned."
        )
    model, example_input = in_float32(model, example_input)
    args, kwargs = example_of(model, example_input)
    inputs = (*args, *kwargs.values())
    with (
        evaluating(model),
        without_backward_hooks(model),
        torch.no_grad(),
        _attention_in_parts(),
        without_dropout(),
        written_to(target),
        draft_of(target) as draft,
    ):
        check_not_random(model, (args, kwargs), QuantTensor)
        axes = {f"input_{i}": {0: "batch"} for i in range(len(inputs))} if free_batch else None
        # The exporter of torch 2.9 and later keeps weights in float and refuses quantized biases.
        with (
            phase("converting"),
            CONVERTING,
            refused("torch.onnx should export the model.", "Replace the operation that it names."),
        ):
            export(
                _Exportable(copy_of(model), tuple(kwargs)),
                args=inputs,
                export_path=str(draft),
                dynamo=False,
                opset_version=OPSET,
                input_names=[f"input_{i}" for i in range(len(inputs))],
                dynamic_axes=axes,
            )
        yield _Exported(target, draft, watched(model) if check else None, (args, kwargs))
        put(draft, target)


def watched(model: nn.Module) -> Watched:
    """Return a model of Brevitas with what a proof must know of its quantizers."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, IntQuant):
            names.setdefault(module, name)
    quantizers = [Quantizer(module, _layer_name(name), _reader(module)) for module, name in names.items()]
    return Watched(model, quantizers, QuantTensor)


def _layer_name(path: str) -> str:
    """Name a quantizer by its layer and what of it is quantized."""
    parts = path.split(".")
    end = next((k for k, part in enumerate(parts) if part.endswith("_quant")), len(parts) - 1)
    return ".".join(parts[: end + 1])


def _reader(module: Any) -> Any:
    def read(args: tuple[Any, ...]) -> tuple[Tensor, Grid]:
        scale, zero_point, bits, x = args
        return x, Grid(scale, zero_point, int(module.min_int(bits)), int(module.max_int(bits)))

    return read


@contextlib.contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Let `nn.MultiheadAttention` compute in eval mode what it computes in training, which can be exported."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@torch.no_grad()
def weight_integers(model: nn.Module) -> dict[str, Tensor]:
    """Return the integers of every weight that a Brevitas model quantizes, held in float, by name of the weight."""
    integers = {}
    for name, layer in _quantized_layers(model):
        quantized = layer.weight_quant(layer.weight)
        integers[f"{name}.weight"] = (quantized.value / quantized.scale + quantized.zero_point).round()
    return integers


class _Exportable(nn.Module):
    """A copy of a model around which exporters may do what they like; it takes inputs by position and returns tensors.

    One that fails leaves its handlers in the model, and torch's takes the `graph` of an fx module for one of its own.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Keep the model.

        Args:
            model: the one that is exported.
            names: of its inputs by keyword, which come last.
        """
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        positional = len(inputs) - len(self.names)
        kwargs = dict(zip(self.names, inputs[positional:], strict=True))
        return tuple(tensors_in(self.model(*inputs[:positional], **kwargs), QuantTensor))


def _quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if is_quantized_layer(module)]


def _differs_by_input(layer: Any) -> bool:
    """Whether the scale of a weight has more than one value on an axis other than that of the output channels."""
    scale = layer.weight_quant.scale()
    out = layer.output_channel_dim
    return any(size > 1 for axis, size in enumerate(scale.shape) if scale.dim() > 1 and axis != out)
