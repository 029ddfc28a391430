"""Out of Brevitas: QONNX, and QCDQ that CPUs run in int8."""

import contextlib
import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from qft_plugin.data import as_call
from qft_plugin.deploy import qcdq, qonnx
from qft_plugin.deploy.files import checked_path, draft_of
from qft_plugin.distributed import once
from qft_plugin.errors import DeployabilityError
from qft_plugin.model import accepts, evaluating

OPSET: Final = 14
"""The first with torch's attention function; quantization per channel, and Brevitas' exporters, begin with 13."""


@once
def save_qonnx(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any, *, check: bool = True
) -> qonnx.QONNXReport:
    """Save a Brevitas model as QONNX, and prove by QONNX' own executor that the file computes the same.

    A linked model keeps its scales per channel, a folded one has constant scales per tensor or per output channel.

    Args:
        model: any Brevitas model.
        path: of the file, `*.onnx`.
        example_input: one input, as for the model; the file is for its shape.
        check: compare integers and outputs before the file takes its place.

    Raises:
        DeployabilityError: the path cannot be written.
        ParityError: the file differs from the model; nothing is written.
    """
    # Imported late: exporting needs packages that training does not, and warns of some that are missing.
    import onnx
    from brevitas.export import export_qonnx

    with _exported(export_qonnx, model, path, example_input, check=check, free_batch=False) as made:
        file = onnx.load(made.draft)
        qonnx.widen_bias_constants(file)
        onnx.save(file, made.draft)
        report = qonnx.inspect_file(made.draft, integers=made.integers, inputs=made.inputs, outputs=made.outputs)
    return replace(report, path=made.target)


@once
def save_qcdq(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any, *, check: bool = True
) -> qcdq.QCDQReport:
    """Save a Brevitas model as QCDQ in standard ONNX, and prove that ONNX Runtime and OpenVINO compute the same.

    The clips behind the weights, which Brevitas exports and which keep OpenVINO from int8, are removed, and signed
    quantizers behind a concatenation, whose scale OpenVINO loses, become unsigned ones with a zero point.

    Args:
        model: any Brevitas model whose weights have scales per tensor or per output channel, such as `fold` returns.
        path: of the file, `*.onnx`.
        example_input: one input, as for the model; its first axis (images) stays free in the file.
        check: compare integers and outputs before the file takes its place.

    Raises:
        DeployabilityError: the scale of a weight differs by input channel, which QCDQ cannot express (it names the
            layers), or the path cannot be written.
        ParityError: the file differs from the model; nothing is written.
    """
    import onnx
    from brevitas.export import export_onnx_qcdq

    doubly = [name for name, layer in _quantized_layers(model) if _differs_by_input(layer)]
    if doubly:
        raise DeployabilityError(
            "QCDQ should have one scale per tensor or per output channel. Found scales that differ by input channel in "
            f"the weights of {', '.join(doubly)}. Call qft_plugin.brevitas.fold first; a doubly per-channel quantizer "
            "can be saved as QONNX only."
        )
    with _exported(export_onnx_qcdq, model, path, example_input, check=check, free_batch=True) as made:
        file = onnx.load(made.draft)
        qcdq.strip_weight_clips(file)
        qcdq.shift_behind_concatenations(file)
        onnx.save(file, made.draft)
        report = qcdq.inspect_file(made.draft, integers=made.integers, inputs=made.inputs, outputs=made.outputs)
    return replace(report, path=made.target)


@dataclass(frozen=True)
class _Exported:
    """A file that was exported but not yet proven, and what it is to be compared with."""

    target: Path
    draft: Path
    integers: dict[str, Tensor] | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


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
    args, kwargs = as_call(example_input, accepts=accepts(model))
    model, args, kwargs = _in_float32(model, args, kwargs)
    # The file has its inputs in the order of the forward's arguments.
    names = [n for n in inspect.signature(model.forward).parameters if n in kwargs]
    names += [n for n in kwargs if n not in names]
    inputs = (*args, *(kwargs[n] for n in names))
    with evaluating(model), torch.no_grad(), _attention_in_parts(), draft_of(target) as draft:
        called: set[nn.Module] = set()
        handles = [m.register_forward_hook(lambda m, *_: called.add(m)) for _, m in _quantized_layers(model)]
        try:
            outputs = tuple(_tensors(model(*args, **kwargs)))
        finally:
            for handle in handles:
                handle.remove()
        ran = {f"{name}.weight" for name, layer in _quantized_layers(model) if layer in called}
        integers = {name: t for name, t in weight_integers(model).items() if name in ran} if check else None
        axes = {f"input_{i}": {0: "batch"} for i in range(len(inputs))} if free_batch else None
        # The exporter of torch 2.9 and later keeps weights in float and refuses quantized biases.
        export(
            _Exportable(copy.deepcopy(model), names),
            args=inputs,
            export_path=str(draft),
            dynamo=False,
            opset_version=OPSET,
            input_names=[f"input_{i}" for i in range(len(inputs))],
            dynamic_axes=axes,
        )
        yield _Exported(target, draft, integers, inputs, outputs)
        os.replace(draft, target)


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


def _in_float32(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model in float64, and its inputs, in float32, which runtimes compute in; any other as it is."""
    if all(p.dtype != torch.float64 for p in model.parameters()):
        return model, args, kwargs

    def single(t: Tensor) -> Tensor:
        return t.float() if t.dtype == torch.float64 else t

    return copy.deepcopy(model).float(), tuple(map(single, args)), {name: single(t) for name, t in kwargs.items()}


class _Exportable(nn.Module):
    """A copy of a model around which exporters may do what they like; it takes inputs by position and returns tensors.

    One that fails leaves its handlers in the model, and torch's takes the `graph` of an fx module for one of its own.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Keep the model.

        Args:
            model: what is exported.
            names: of its inputs by keyword, which come last.
        """
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        positional = len(inputs) - len(self.names)
        kwargs = dict(zip(self.names, inputs[positional:], strict=True))
        return tuple(_tensors(self.model(*inputs[:positional], **kwargs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of an output; a `QuantTensor`, which is a tuple too, counts as one."""
    if isinstance(value, QuantTensor):
        yield value.value
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name, None))


def _quantized_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantWeightBiasInputOutputLayer) and module.weight_quant.is_quant_enabled
    ]


def _differs_by_input(layer: Any) -> bool:
    """Whether the scale of a weight has more than one value on an axis other than that of the output channels."""
    scale = layer.weight_quant.scale()
    out = layer.output_channel_dim
    return any(size > 1 for axis, size in enumerate(scale.shape) if scale.dim() > 1 and axis != out)
