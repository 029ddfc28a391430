"""Images a second of a finetune in two processes over one, one thread each, in turns in one run.

    python benchmarks/processes.py --real DIR --net resnet20 [--batch 64] [--steps 20] [--rounds 3]

The batch is that of all processes together. `images_a_second` is the quotient of the fastest rounds by the clock, which
only cores without other work show; `by_cpu_time` is what the CPU seconds of a step allow: those of one process over the
larger of two, which is what the clock would show where waiting for each other costs nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import real_networks
import torch

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.training.phases import Step

WARM_UP: Final = 3
IMAGES: Final = 256
MARK: Final = "STEPS "


def work(args: argparse.Namespace) -> None:
    """Finetune, and print seconds and CPU seconds of the steps after the first ones."""
    import nncf

    from qft_plugin.nncf import quantize

    torch.set_num_threads(1)
    real = real_networks.load(args.real, args.net, IMAGES)
    marks: list[tuple[float, float]] = []

    def note(step: Step) -> None:  # noqa: ARG001
        marks.append((time.perf_counter(), time.process_time()))

    finetune = FinetuneConfig(images_fed=(WARM_UP + args.steps) * args.batch, batch_size=args.batch)
    config = QFTConfig(compensate=False, finetune=finetune)
    data = nncf.Dataset(list(real.calibration.tensor().split(64)))
    quantize(real.net, data, config, verbose=False, callback=note)
    (clock, cpu), (clock_end, cpu_end) = marks[WARM_UP - 1], marks[WARM_UP - 1 + args.steps]
    print(MARK + json.dumps([clock_end - clock, cpu_end - cpu]), flush=True)


def measured(command: list[str]) -> list[list[float]]:
    """Run a program and return what its processes have printed."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    # Two processes may write into one line.
    return [json.loads(found) for found in re.findall(re.escape(MARK) + r"(\[.*?\])", done.stdout)]


def main() -> None:
    """Run the measurement, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    script = [__file__, *sys.argv[1:], "--work"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        (one,), both = measured([sys.executable, *script]), measured([sys.executable, *two, *script])
        clock, cpu = (max(times) for times in zip(*both, strict=True))
        rounds.append({"one_s": one[0], "two_s": clock, "one_cpu_s": one[1], "two_cpu_s": cpu})
    best = {key: round(min(r[key] for r in rounds), 3) for key in rounds[0]}
    line = {
        "net": args.net,
        "batch": args.batch,
        "steps": args.steps,
        **best,
        "images_a_second": round(best["one_s"] / best["two_s"], 2),
        "by_cpu_time": round(best["one_cpu_s"] / best["two_cpu_s"], 2),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
