"""What `zoo.py` does with one network under one host: quantize, save, prove, run the file; and the host itself."""

import contextlib
import copy
import dataclasses
import math
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import zoo_networks
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig, QFTError
from qft_plugin.graph.layer_graph import PINNED, DofMap
from qft_plugin.graph.torch_model import tensors_in

BATCH: Final = 8
IMAGES: Final = 16
EXAMPLE: Final = 2
"""Images of the example that a file is saved with; the file then runs on `BATCH` others."""
LONGEST_MESSAGE: Final = 400
INT8: Final = ("i8", "u8")

Say = Callable[..., None]
"""Passes on what is known so far, as keyword arguments."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How each network is measured.

    Attributes:
        weight_bits: of all but the first and the last layer and the smallest ones.
        steps: of the finetune.
        check: prove the file.
    """

    weight_bits: int
    steps: int
    check: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A float network and its data.

    Attributes:
        model: in eval mode.
        calibration: batches.
        example: the input that a file is saved with.
        test: what errors are measured on.
        expected: the float outputs for it.
    """

    model: nn.Module
    calibration: list[Any]
    example: Any
    test: Any
    expected: Tensor


def task(name: str) -> Task:
    """Make a network and its data."""
    model, items = zoo_networks.built(name)
    calibration, test = [items(BATCH) for _ in range(IMAGES // BATCH)], items(BATCH)
    expected = outputs(model, test)
    assert bool(torch.isfinite(expected).all()), f"{name} should compute finite numbers"
    return Task(model, calibration, items(EXAMPLE), test, expected)


def flat(values: Iterable[Tensor]) -> Tensor:
    """Return all floating outputs as one vector."""
    return torch.cat([t.detach().double().flatten() for t in values if t.is_floating_point()])


@torch.no_grad()
def outputs(model: nn.Module, item: Any) -> Tensor:
    """Run a torch model, and return all of its outputs as one vector."""
    return flat(tensors_in(zoo_networks.call(model, item)))


def outputs_of_file(path: Path, item: Any) -> Tensor:
    """Run an IR or ONNX file in OpenVINO on the CPU, and return all of its outputs as one vector."""
    import openvino

    # On CPUs with bf16 units the default would round everything that is not quantized.
    compiled: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled([t.numpy() for t in tensors_in(item)])
    return flat(torch.tensor(result[o]) for o in compiled.outputs)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 difference of two vectors.

    Raises:
        ValueError: it is none, since there are more or fewer numbers, or NaN.
    """
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        finite = int(torch.isfinite(found).sum())
        raise ValueError(f"The outputs should be {len(expected)} finite numbers. Found {len(found)}, {finite} finite.")
    return float((found - expected).norm() / expected.norm())


class UnderNNCF:
    """Quantizes with `nncf.quantize` and saves as IR."""

    FILE = "model.xml"
    PRELOAD = ("nncf", "openvino", "qft_plugin.nncf")

    def quantize(self, task: Task, config: QFTConfig) -> tuple[nn.Module, DofMap]:
        """Return a quantized model and what was free."""
        import nncf

        import qft_plugin.nncf

        job = qft_plugin.nncf.quantize(task.model, nncf.Dataset(task.calibration), config)
        return job.model, job.dof_map

    def outputs(self, model: nn.Module, item: Any) -> Tensor:
        """Run a quantized model."""
        from qft_plugin.nncf import without_compiler

        with without_compiler():
            return outputs(model, item)

    def save(self, model: nn.Module, path: Path, example: Any, *, check: bool) -> Any:
        """Save and prove; return the report."""
        from qft_plugin.nncf import save_openvino

        return save_openvino(model, path, example, check=check)

    def own(self, task: Task) -> nn.Module:
        """Quantize with NNCF's 8 bits."""
        import nncf

        return nncf.quantize(task.model, nncf.Dataset(task.calibration), subset_size=len(task.calibration))

    def own_outputs(self, quantized: nn.Module, item: Any) -> Tensor:
        """Run what `own` returned."""
        return outputs(quantized, item)

    def convert(self, quantized: nn.Module, task: Task) -> None:
        """Convert what `own` returned as NNCF's users do."""
        import openvino

        openvino.convert_model(quantized, example_input=task.example)


class UnderBrevitas:
    """Quantizes with `qft_plugin.brevitas.quantize` and saves as QCDQ."""

    FILE = "model.onnx"
    PRELOAD = ("brevitas.nn", "brevitas.graph.quantize", "brevitas.export", "openvino", "qft_plugin.brevitas")

    def quantize(self, task: Task, config: QFTConfig) -> tuple[nn.Module, DofMap]:
        """Return a quantized model, folded, and what was free."""
        from qft_plugin import brevitas

        linked = brevitas.quantize(task.model, task.calibration, config=config)
        return brevitas.fold(linked), brevitas.dof_map_of(linked)

    def outputs(self, model: nn.Module, item: Any) -> Tensor:
        """Run a quantized model."""
        return outputs(model, item)

    def save(self, model: nn.Module, path: Path, example: Any, *, check: bool) -> Any:
        """Save and prove; return the report."""
        from qft_plugin.brevitas import save_qcdq

        return save_qcdq(model, path, example, check=check)

    def own(self, task: Task) -> nn.Module:
        """Quantize with Brevitas' graph quantization, at its defaults of 8 bits."""
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.graph.quantize import preprocess_for_quantize, quantize

        with torch.no_grad():
            quantized: nn.Module = quantize(preprocess_for_quantize(copy.deepcopy(task.model)))
            with calibration_mode(quantized):
                for batch in task.calibration:
                    zoo_networks.call(quantized, batch)
        return quantized

    def own_outputs(self, quantized: nn.Module, item: Any) -> Tensor:
        """Run what `own` returned, which may make tensors with their scale."""
        from brevitas.quant_tensor import QuantTensor

        def plain(value: Any) -> Any:
            if isinstance(value, QuantTensor):
                return value.value
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

        with torch.no_grad():
            return flat(tensors_in(plain(zoo_networks.call(quantized, item))))

    def convert(self, quantized: nn.Module, task: Task) -> None:
        """Export what `own` returned as QCDQ."""
        from brevitas.export import export_onnx_qcdq

        with tempfile.TemporaryDirectory() as folder:
            arguments = tuple(tensors_in(task.example))
            export_onnx_qcdq(quantized, args=arguments, export_path=f"{folder}/model.onnx", dynamo=False)


HOSTS: Final = {"nncf": UnderNNCF, "brevitas": UnderBrevitas}


def free_inputs(dof_map: DofMap) -> tuple[int, int]:
    """Return how many layers read an activation whose scales are free in every channel, and of how many.

    As in `networks.py`, layers that read the input of the network are left out.
    """
    edges = {e.name: e for e in dof_map.edges}
    layers = [la for la in dof_map.layers if la.is_kernel]
    inner = [la for la in layers if all(edges[name].reason != "input of the network" for name in la.inputs)]
    return sum(not bool((la.in_index == PINNED).any()) for la in inner), len(inner)


def numbers(report: Any) -> dict[str, float]:
    """Return every finite number of a report, fields and properties, by name."""
    names = [f.name for f in dataclasses.fields(report)]
    names += [name for name, value in vars(type(report)).items() if isinstance(value, property)]
    found = {name: getattr(report, name, None) for name in names}
    return {
        n: v for n, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


@contextlib.contextmanager
def timed(say: Say, name: str) -> Iterator[None]:
    """Pass on the seconds that a stage takes, of all threads together too, and its name while it lasts."""
    say(stage=name)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        say(**{f"{name}_seconds": round(seconds[0], 1), f"{name}_cpu": round(seconds[1], 1)})


def measure(name: str, host: Any, options: Options, say: Say) -> None:
    """Measure one network, up to the first error of ours; the host's own quantization is measured in any case."""
    try:
        with timed(say, "build"):
            work = task(name)
    except Exception as found:
        say(outcome="crashed", **described(found))
        return
    try:
        _measure_ours(work, host, options, say)
        say(outcome="ok")
    except QFTError as found:
        say(outcome="refused", **described(found))
    except Exception as found:
        say(outcome="crashed", **described(found))
    say(peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    _measure_own(work, host, say)


def _measure_own(work: Task, host: Any, say: Say) -> None:
    stage = "quantize"
    try:
        with timed(say, "host"):
            quantized = host.own(work)
            say(host_to_float=error(host.own_outputs(quantized, work.test), work.expected))
            stage = "convert"
            host.convert(quantized, work)
        say(host_outcome="ok")
    except Exception as found:
        say(host_outcome=" ".join(f"{stage}: {type(found).__name__}: {found}".split())[:LONGEST_MESSAGE])


def _measure_ours(work: Task, host: Any, options: Options, say: Say) -> None:
    settings = FinetuneConfig(images_fed=options.steps * BATCH, batch_size=BATCH)
    with timed(say, "quantize"):
        quantized, dof_map = host.quantize(work, QFTConfig(weight_bits=options.weight_bits, finetune=settings))
    free, layers = free_inputs(dof_map)
    say(free_inputs=free, layer_inputs=layers)
    with timed(say, "torch"):
        found = host.outputs(quantized, work.test)
    say(torch_to_float=error(found, work.expected))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / host.FILE
        with timed(say, "save"):
            report = host.save(quantized, path, work.example, check=options.check)
        for kind in ("convolutions", "linear"):
            run_as = list(getattr(report, kind, {}).values())
            say(**{kind: len(run_as), f"int8_{kind}": sum(precision in INT8 for precision in run_as)})
        say(report=numbers(report))
        with timed(say, "file"):
            ran = outputs_of_file(path, work.test)
    say(file_to_torch=error(ran, found), file_to_float=error(ran, work.expected))


def described(found: BaseException) -> dict[str, str]:
    """Say what an error is, and where in this package it came from."""
    frames = traceback.extract_tb(found.__traceback__)
    ours = [f for f in frames if "qft_plugin/" in f.filename]
    facts = {"error": type(found).__name__, "message": " ".join(str(found).split())[:LONGEST_MESSAGE]}
    if ours:
        facts["frame"] = f"{ours[-1].filename.rpartition('qft_plugin/')[2]}:{ours[-1].lineno} {ours[-1].name}"
    return facts
