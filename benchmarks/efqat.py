"""Time the backward pass of a finetune of which a part trains (EfQAT), against the one in which everything does.

    python benchmarks/efqat.py --host brevitas --net resnet50 [--batch 16] [--steps 4] [--rounds 3]

The jobs take turns, so that each round shares the machine's mood. The last line is one JSON object: milliseconds of the
full backward pass, and for each mode and ratio how many times faster it is (medians over all rounds).
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import architectures
import step_time
import torch
from torch import Tensor

from qft_plugin import EfQAT, FinetuneConfig, QFTConfig

WARM_UP = 2
PARTS = [("cwpl", 0.0), ("cwpl", 0.05), ("cwpl", 0.25), ("cwpn", 0.05), ("cwpn", 0.25), ("lwpn", 0.05), ("lwpn", 0.25)]
"""Modes and ratios; a ratio of 0 is the same in all modes, and the limit of what can be gained."""


@contextlib.contextmanager
def timed_backward() -> Iterator[list[float]]:
    """Collect the seconds of every backward pass while this is active."""
    found: list[float] = []
    original = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        original(self, *args, **kwargs)
        found.append(time.perf_counter() - start)

    Tensor.backward = backward  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        Tensor.backward = original  # type: ignore[method-assign]


def backward_ms(host: str, net: str, train: EfQAT | None, batch: int, steps: int) -> list[float]:
    """Finetune for a few steps and return the milliseconds of each backward pass."""
    model, inputs = architectures.build(net, 2 * batch)
    finetune = FinetuneConfig(images_fed=(WARM_UP + steps) * batch, batch_size=batch, train=train)
    with timed_backward() as found:
        config = QFTConfig(finetune=finetune, compensate=False)  # a start that takes no time
        step_time.HOSTS[host](model, list(inputs.split(batch)), config, lambda _: None)
    return [1e3 * seconds for seconds in found[WARM_UP:]]


def main() -> None:
    """Run all jobs in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=list(step_time.HOSTS), default="brevitas")
    parser.add_argument("--net", choices=list(architectures.ARCHITECTURES), default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jobs: dict[str, EfQAT | None] = {"all": None}
    jobs |= {f"{mode} {ratio}": EfQAT(mode=mode, ratio=ratio) for mode, ratio in PARTS}
    times: dict[str, list[list[float]]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, train in jobs.items():
            times[name].append(backward_ms(args.host, args.net, train, args.batch, args.steps))
    medians = {name: [statistics.median(ms) for ms in rounds] for name, rounds in times.items()}
    faster = {
        name: round(statistics.median(a / p for a, p in zip(medians["all"], part, strict=True)), 2)
        for name, part in medians.items()
        if name != "all"
    }
    sys.stdout.flush()
    line = {
        "net": args.net,
        "host": args.host,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "backward_ms": round(statistics.median(medians["all"]), 1),
        "faster": faster,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
