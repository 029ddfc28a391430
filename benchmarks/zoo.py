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
from pathlib import Path
from typing import Any, Final

import torch
import zoo_networks
from zoo_measure import BATCH, HOSTS, Options, measure
from zoo_table import page, read


def _child(name: str, host: str, options: Options, pipe: Any) -> None:
    """Measure one network in a process of its own."""
    warnings.simplefilter("ignore")
    # The hosts draw progress bars.
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silent, stream.fileno())
    measure(name, HOSTS[host](), options, lambda **facts: pipe.send(facts))
    pipe.close()


OWN_LIMIT: Final = 90.0
"""Seconds for the host's own quantization: Brevitas' equalization does not end on some residual networks."""


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
                if "outcome" in new:
                    self._end = min(self._end, time.monotonic() + OWN_LIMIT)
                self.facts |= new
        except EOFError:
            self._process.join()
            self._conclude(f"exit code {self._process.exitcode}")
            return
        if self.left == 0:
            self._process.kill()
            self._process.join()
            limit = OWN_LIMIT if "outcome" in self.facts else self._limit
            self._conclude(f"time: over {limit:g} s")

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
            told = f"{line['outcome']} {line.get('at', '')} {line.get('message', '')[:100]}".strip()
            seconds = sum(v for k, v in line.items() if k.endswith("_seconds"))
            print(f"{done}/{len(names)} {host} {line['name']}: {told} ({seconds:.0f} s)", flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        running = [m for m in running if not m.ended]


def main() -> None:
    """Measure networks, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--only", action="append", help="pattern of names, such as 'timm/res*'; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="how many networks at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=4, help=f"of the finetune, {BATCH} images each")
    parser.add_argument("--weight-bits", type=int, default=4, help="8 gives errors to compare with the host's own")
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
        options = Options(args.weight_bits, args.steps, not args.no_check)
        run(names, host, options, jobs=args.jobs, limit=args.limit, out=args.out)


if __name__ == "__main__":
    main()
