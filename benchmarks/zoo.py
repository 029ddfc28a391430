"""Quantizes, saves and proves the networks of `zoo_networks.py` under a host, and writes one line of JSON for each.

    python benchmarks/zoo.py --host nncf --out zoo.jsonl [--only "timm/res*"] [--jobs 2]
    python benchmarks/zoo.py --table zoo.jsonl

Every network gets a process and a time limit of its own, so that one that hangs or dies costs one line. Networks that
are in the file already are left out: a run that was broken off goes on where it ended.

- outcome: `"ok"` (quantized, saved, proven, and the file runs on a batch of another size), `"refused"` (an error that
  this library raises on purpose), or `"crashed"` (any other); `at`, `error`, `message` and `frame` say where.
- relative L2 errors of all outputs on inputs that nothing else has seen: `torch_to_float` of the quantized
  model, `file_to_torch` and `file_to_float` of its file in OpenVINO, `host_to_float` of the host's own 8 bits.
- `report`: every number of the report of the saved file.
"""

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import zoo_networks
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig, QFTError
from qft_plugin.deploy.openvino import INT8
from qft_plugin.graph import PINNED, DofMap
from qft_plugin.model import tensors_in

BATCH: Final = 8
IMAGES: Final = 16
EXAMPLE: Final = 2
"""Images of the example that a file is saved with; the file then runs on `BATCH` others."""
LONGEST_MESSAGE: Final = 400

Say = Callable[..., None]
"""Passes on what is known so far, as keyword arguments."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How each network is measured.

    Attributes:
        steps: of the finetune.
        check: prove the file.
    """

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

    def save(self, model: nn.Module, folder: Path, example: Any, *, check: bool) -> Any:
        """Save and prove; return the report."""
        from qft_plugin.nncf import save_openvino

        return save_openvino(model, folder / "model.xml", example, check=check)

    def own(self, task: Task) -> nn.Module:
        """Quantize with NNCF's 8 bits."""
        import nncf

        return nncf.quantize(task.model, nncf.Dataset(task.calibration), subset_size=len(task.calibration))

    def convert(self, quantized: nn.Module, task: Task) -> None:
        """Convert what `own` returned as NNCF's users do."""
        import openvino

        openvino.convert_model(quantized, example_input=task.example)


class UnderBrevitas:
    """Quantizes with `qft_plugin.brevitas.quantize` and saves as QCDQ."""

    PRELOAD = ("brevitas.nn", "brevitas.graph.quantize", "brevitas.export", "openvino", "qft_plugin.brevitas")

    def quantize(self, task: Task, config: QFTConfig) -> tuple[nn.Module, DofMap]:
        """Return a quantized model, folded, and what was free."""
        from qft_plugin import brevitas

        linked = brevitas.quantize(task.model, task.calibration, config=config)
        return brevitas.fold(linked), brevitas.dof_map_of(linked)

    def outputs(self, model: nn.Module, item: Any) -> Tensor:
        """Run a quantized model."""
        return outputs(model, item)

    def save(self, model: nn.Module, folder: Path, example: Any, *, check: bool) -> Any:
        """Save and prove; return the report."""
        from qft_plugin.brevitas import save_qcdq

        return save_qcdq(model, folder / "model.onnx", example, check=check)

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
            say(host_to_float=error(outputs(quantized, work.test), work.expected))
            stage = "convert"
            host.convert(quantized, work)
        say(host_outcome="ok")
    except Exception as found:
        say(host_outcome=" ".join(f"{stage}: {type(found).__name__}: {found}".split())[:LONGEST_MESSAGE])


def _measure_ours(work: Task, host: Any, options: Options, say: Say) -> None:
    settings = FinetuneConfig(images_fed=options.steps * BATCH, batch_size=BATCH)
    with timed(say, "quantize"):
        quantized, dof_map = host.quantize(work, QFTConfig(finetune=settings))
    free, layers = free_inputs(dof_map)
    say(free_inputs=free, layer_inputs=layers)
    with timed(say, "torch"):
        found = host.outputs(quantized, work.test)
    say(torch_to_float=error(found, work.expected))
    with tempfile.TemporaryDirectory() as folder:
        with timed(say, "save"):
            report = host.save(quantized, Path(folder), work.example, check=options.check)
        for kind in ("convolutions", "linear"):
            run_as = list(getattr(report, kind, {}).values())
            say(**{kind: len(run_as), f"int8_{kind}": sum(precision in INT8 for precision in run_as)})
        say(report=numbers(report))
        with timed(say, "file"):
            ran = outputs_of_file(report.path, work.test)
    say(file_to_torch=error(ran, found), file_to_float=error(ran, work.expected))


def described(found: BaseException) -> dict[str, str]:
    """Say what an error is, and where in this package it came from."""
    frames = traceback.extract_tb(found.__traceback__)
    ours = [f for f in frames if "qft_plugin/" in f.filename]
    lines = [line for line in str(found).splitlines() if line.strip()] or [""]
    facts = {"error": type(found).__name__, "message": lines[0].strip()[:LONGEST_MESSAGE]}
    if ours:
        facts["frame"] = f"{ours[-1].filename.rpartition('qft_plugin/')[2]}:{ours[-1].lineno} {ours[-1].name}"
    return facts


def _child(name: str, host: str, options: Options, pipe: Any) -> None:
    """Measure one network in a process of its own."""
    warnings.simplefilter("ignore")
    # The hosts draw progress bars.
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silent, stream.fileno())
    measure(name, HOSTS[host](), options, lambda **facts: pipe.send(facts))
    pipe.close()


class Measurement:
    """One network that is being measured in a process of its own."""

    def __init__(self, name: str, host: str, options: Options, limit: float) -> None:
        """Start it.

        Args:
            name: of the network.
            host: key of `HOSTS`.
            options: how it is measured.
            limit: seconds after which it is ended.
        """
        self.facts: dict[str, Any] = {"host": host, "name": name, "family": zoo_networks.NETWORKS[name].family}
        self.ended = False
        self._limit, self._end = limit, time.monotonic() + limit
        # A copy of this process has all libraries imported already, which would take longer than most networks do.
        context = multiprocessing.get_context("fork")
        self.pipe, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(name, host, options, sending))
        self._process.start()
        sending.close()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.monotonic())

    def listen(self) -> None:
        """Take what it has passed on since, and end it where its time is up."""
        try:
            while self.pipe.poll():
                new = self.pipe.recv()
                if new.get("outcome", "ok") != "ok":
                    self.facts["at"] = self.facts["stage"]
                self.facts |= new
        except EOFError:
            self._process.join()
            self._conclude(f"exit code {self._process.exitcode}")
            return
        if self.left == 0:
            self._process.kill()
            self._process.join()
            self._conclude(f"time: over {self._limit:g} s")

    def _conclude(self, ending: str) -> None:
        """Say where it ended, if that was too early."""
        self.ended = True
        stage = self.facts.pop("stage", "start")
        if "outcome" not in self.facts:
            self.facts |= {"outcome": "crashed", "error": "died", "message": ending, "at": stage}
        elif self.facts.get("at") != "build":
            self.facts.setdefault("host_outcome", ending)


LIBRARIES: Final = ("timm", "transformers", "segmentation_models_pytorch", "monai.networks.nets")


def run(names: list[str], host: str, options: Options, *, jobs: int, limit: float, out: Path | None) -> None:
    """Measure networks, several at a time, and append a line for each."""
    for library in (*LIBRARIES, *HOSTS[host].PRELOAD):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    torch.set_num_threads(1)
    waiting, running, done = names[::-1], [], 0
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Measurement(waiting.pop(), host, options, limit))
        multiprocessing.connection.wait([m.pipe for m in running], min(m.left for m in running))
        for measurement in running:
            measurement.listen()
        for line in [m.facts for m in running if m.ended]:
            done += 1
            told = f"{line['outcome']} {line.get('at', '')} {line.get('message', '')}".strip()
            seconds = sum(v for k, v in line.items() if k.endswith("_seconds"))
            print(f"{done}/{len(names)} {host} {line['name']}: {told} ({seconds:.0f} s)", flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        running = [m for m in running if not m.ended]


def page(lines: list[dict[str, Any]]) -> str:
    """Write counts for each family, and a table of all networks, in markdown."""
    by_name: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault((line["family"], line["name"]), {})[line["host"]] = line
    order = {family: number for number, family in enumerate(n.family for n in zoo_networks.NETWORKS.values())}
    rows = sorted(by_name.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0][1]))
    head = "| network |" + "".join(f" {TITLES[h]} | error | own 8 bits | int8 | free | s |" for h in HOSTS)
    body = (f"| {name} |" + "".join(_cells(of_host.get(h)) for h in HOSTS) for (_, name), of_host in rows)
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([*_counts(lines), "", head, rule, *body, ""])


TITLES: Final = {"nncf": "NNCF", "brevitas": "Brevitas"}
OUTCOMES: Final = ("ok", "refused", "crashed")


def _counts(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "| host | family | networks | ok | refused | crashed | the host's own 8 bits | of these, not ours |"
    yield "|---|---|---|---|---|---|---|---|"
    for host in HOSTS:
        of_host = [line for line in lines if line["host"] == host]
        families = {line["family"]: None for line in of_host}
        for family in [*sorted(families), "all"] if of_host else []:
            group = [line for line in of_host if family in (line["family"], "all")]
            found = Counter(line["outcome"] for line in group)
            own = [line for line in group if line.get("host_outcome") == "ok"]
            not_ours = sum(line["outcome"] != "ok" for line in own)
            counts = " | ".join(str(found[outcome]) for outcome in OUTCOMES)
            yield f"| {TITLES[host]} | {family} | {len(group)} | {counts} | {len(own)} | {not_ours} |"


def _cells(line: dict[str, Any] | None) -> str:
    if line is None:
        return " | | | | | |"
    ours = line.get("file_to_float", line.get("torch_to_float"))
    own = line.get("host_to_float") if line.get("host_outcome") == "ok" else None
    errors = " | ".join("" if e is None else f"{e:.3f}" for e in (ours, own))
    int8 = _of(line, ("int8_convolutions", "int8_linear"), ("convolutions", "linear"))
    free = _of(line, ("free_inputs",), ("layer_inputs",))
    seconds = line.get("quantize_seconds", 0) + line.get("save_seconds", 0)
    return f" {line['outcome']} | {errors} | {int8} | {free} | {seconds:.0f} |"


def _of(line: dict[str, Any], some: tuple[str, ...], all_of_them: tuple[str, ...]) -> str:
    if not all(name in line for name in some):
        return ""
    return f"{sum(line[name] for name in some)} of {sum(line[name] for name in all_of_them)}"


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file that need not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Measure networks, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--only", action="append", help="pattern of names, such as 'timm/res*'; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="how many networks at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=4, help=f"of the finetune, {BATCH} images each")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a network may take under a host")
    parser.add_argument("--no-check", action="store_true", help="save without the proof")
    parser.add_argument("--out", type=Path, help="file of JSON lines that is added to")
    parser.add_argument("--table", type=Path, help="print the table of a file of JSON lines, and do nothing else")
    args = parser.parse_args()
    if args.table is not None:
        sys.stdout.write(page(read(args.table)))
        return
    chosen = [n for n in zoo_networks.NETWORKS if any(fnmatch.fnmatch(n, p) for p in args.only or ["*"])]
    done = {(line["host"], line["name"]) for line in (read(args.out) if args.out is not None else [])}
    for host in HOSTS if args.host == "both" else [args.host]:
        names = [name for name in chosen if (host, name) not in done]
        run(names, host, Options(args.steps, not args.no_check), jobs=args.jobs, limit=args.limit, out=args.out)


if __name__ == "__main__":
    main()
