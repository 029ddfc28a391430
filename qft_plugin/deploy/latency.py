"""How long a file takes for one image in OpenVINO on the CPU."""

import os
import statistics
import time
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from qft_plugin.deploy.files import runs
from qft_plugin.errors import DataError, DeployabilityError
from qft_plugin.packages import require

WARM_UP: Final = 5
"""Runs before the first that counts: the first ones allocate memory and choose kernels."""


def measure_latency(
    path: str | os.PathLike[str], example: Any, *, threads: int = 1, repeats: int = 50
) -> dict[str, float]:
    """Time a file for one image in OpenVINO on this machine's CPU.

    The runtime's own settings are used but for the number of threads: what is not in integers may run in bfloat16 where
    the CPU has it. Nothing else should run meanwhile.

    Args:
        path: an IR (`*.xml`) or an ONNX file: ours, the float model's, or the host's own.
        example: one input as for the model: a tensor, a tuple of tensors, or a dict of tensors by the names of the
            file's inputs; of more than one image the first is taken.
        threads: how many threads the runtime has.
        repeats: how many runs are timed.

    Returns:
        `"median_ms"`, `"fastest_ms"` and `"slowest_ms"` of the runs, milliseconds; `"runs"` and `"threads"`.

    Raises:
        DeployabilityError: there is no such file, or OpenVINO cannot load or run it for one image.
        DataError: the example is of another kind.
        HostError: OpenVINO is not installed.
    """
    file = Path(path)
    if file.suffix not in (".xml", ".onnx") or not file.is_file():
        raise DeployabilityError(
            f"measure_latency: path should be an .xml or .onnx file. Found {os.fspath(path)!r}. Save the model first."
        )
    if min(threads, repeats) < 1:
        raise DeployabilityError(
            f"measure_latency: threads and repeats should be at least 1. Found {threads} and {repeats}. Give more."
        )
    images = _first_image(example)
    require("openvino", extra="export")
    import openvino

    with runs("OpenVINO"):
        core = openvino.Core()
        model = core.read_model(file)
        if len(model.inputs) != len(images):
            raise DataError(
                f"measure_latency: example should have the {len(model.inputs)} inputs of {file.name}. "
                f"Found {len(images)}. Pass what the file was saved with."
            )
        model.reshape({key: list(image.shape) for key, image in images.items()})
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        values = {key: image.detach().cpu().numpy() for key, image in images.items()}
        spent = []
        for number in range(WARM_UP + repeats):
            begin = time.perf_counter()
            request.infer(values)
            if number >= WARM_UP:
                spent.append(1e3 * (time.perf_counter() - begin))
    return {
        "median_ms": statistics.median(spent),
        "fastest_ms": min(spent),
        "slowest_ms": max(spent),
        "runs": repeats,
        "threads": threads,
    }


def _first_image(example: Any) -> dict[int | str, Tensor]:
    """Return the first image of each input, by its place or name."""
    named: dict[int | str, Any]
    if isinstance(example, dict):
        named = dict(example)
    else:
        named = dict(enumerate(example if isinstance(example, (list, tuple)) else (example,)))
    if not named or not all(isinstance(t, Tensor) and t.dim() for t in named.values()):
        raise DataError(
            "measure_latency: example should be a tensor, a tuple of tensors or a dict of tensors, each with an axis "
            f"of images. Found {type(example).__name__}. Pass what the file was saved with."
        )
    return {key: t[:1].contiguous() for key, t in named.items()}
