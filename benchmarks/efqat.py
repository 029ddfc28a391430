"""Time the backward pass of a finetune of which a part trains (EfQAT), against the one in which everything does.

    python benchmarks/efqat.py --host brevitas --net resnet50 [--batch 16] [--steps 10]

All finetunes run at once and take turns, a step each, so that every round shares the machine's mood. The last line is
one JSON object: milliseconds of the full backward pass, and for each mode and ratio how many times faster it is, as
medians over the rounds.
"""

import argparse
import functools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import architectures
import step_time
import torch
from torch import Tensor

from qft_plugin import EfQAT, FinetuneConfig, QFTConfig

WARM_UP = 2
PARTS = [("cwpl", 0.0), ("cwpl", 0.05), ("cwpl", 0.25), ("cwpn", 0.05), ("cwpn", 0.25), ("lwpn", 0.05), ("lwpn", 0.25)]
"""Modes and ratios; a ratio of 0 is the same in all modes, and the limit of what can be gained."""


class Turns:
    """Finetunes in threads of which one runs at a time, and hands on after each step."""

    def __init__(self, jobs: dict[str, EfQAT | None]) -> None:
        """Prepare the threads' turns."""
        self.names = list(jobs)
        self.turn = {name: threading.Semaphore(0) for name in jobs}
        self.times: dict[str, list[float]] = {name: [] for name in jobs}

    def hand_on(self, name: str) -> None:
        """Let the next one run."""
        following = self.names[(self.names.index(name) + 1) % len(self.names)]
        self.turn[following].release()

    def step_done(self, name: str) -> None:
        """Hand on and wait for the next turn."""
        self.hand_on(name)
        self.turn[name].acquire()

    def run(self, name: str, quantize: Callable[[Callable[[Any], None]], object]) -> None:
        """Run one finetune."""
        self.turn[name].acquire()
        quantize(lambda _: self.step_done(name))
        self.hand_on(name)


def measure(host: str, net: str, batch: int, steps: int) -> dict[str, list[float]]:
    """Return the milliseconds of each backward pass of each finetune."""
    jobs: dict[str, EfQAT | None] = {"all": None}
    jobs |= {f"{mode} {ratio}": EfQAT(mode=mode, ratio=ratio) for mode, ratio in PARTS}
    turns, original = Turns(jobs), Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        original(self, *args, **kwargs)
        turns.times[threading.current_thread().name].append(1e3 * (time.perf_counter() - start))

    def quantize(train: EfQAT | None, callback: Callable[[Any], None]) -> None:
        model, inputs = architectures.build(net, 2 * batch)
        finetune = FinetuneConfig(images_fed=(WARM_UP + steps) * batch, batch_size=batch, train=train)
        config = QFTConfig(finetune=finetune, compensate=False)  # a start that takes no time
        step_time.HOSTS[host](model, list(inputs.split(batch)), config, callback)

    threads = [
        threading.Thread(target=turns.run, args=(name, functools.partial(quantize, train)), name=name)
        for name, train in jobs.items()
    ]
    Tensor.backward = backward  # type: ignore[assignment,method-assign]
    try:
        for thread in threads:
            thread.start()
        turns.turn["all"].release()
        for thread in threads:
            thread.join()
    finally:
        Tensor.backward = original  # type: ignore[method-assign]
    return {name: ms[WARM_UP:] for name, ms in turns.times.items()}


def main() -> None:
    """Run all jobs in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=list(step_time.HOSTS), default="brevitas")
    parser.add_argument("--net", choices=list(architectures.ARCHITECTURES), default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    times = measure(args.host, args.net, args.batch, args.steps)
    faster = {
        name: round(statistics.median(whole / part for whole, part in zip(times["all"], ms, strict=True)), 2)
        for name, ms in times.items()
        if name != "all"
    }
    sys.stdout.flush()
    line = {
        "net": args.net,
        "host": args.host,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "backward_ms": round(statistics.median(times["all"]), 1),
        "faster": faster,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
