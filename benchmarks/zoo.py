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
import fnmatch
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import zoo_networks
from zoo_measure import BATCH, HOSTS, Options, measure


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
        self._process = context.Process(target=_child, args=(name, host, options, sending), daemon=True)
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
