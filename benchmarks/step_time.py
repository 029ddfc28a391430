"""Time one finetuning step against one plain float finetuning step of the same network, in pairs in one run.

    python benchmarks/step_time.py --real DIR --host both --net resnet20 --batch 32 [--compile] [--precision bfloat16]
    python benchmarks/step_time.py --host both --net resnet18 --batch 16 --pairs 10

The plain step trains the float network in eval mode (its BatchNorms use their statistics) with the same batch, the
same optimizer and a squared error on its output. The last line is one JSON object; `ratio` is the median over pairs,
`memory` that of the largest amount of memory that one step allocates beside what is held between steps, and
`brevitas_over_nncf` the quotient of the two hosts' ratios.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import real_networks
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.training.phases import Step

WARM_UP = 5


class Pairs:
    """Called after each step: times it, then times a plain step, so that a pair shares the machine's mood."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        """Prepare the plain step.

        Args:
            net: the float network; it is trained.
            images: one batch.
        """
        self.net = net.to(memory_format=torch.channels_last)
        self.images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0, fused=True)
        with torch.no_grad():
            self.target = self.net(self.images)
        self.times: list[tuple[float, float]] = []
        self.last = 0.0
        self.memory: dict[str, float] = {}
        self._profile: profile | None = None

    def __call__(self, step: Step) -> None:
        """Take both times, and in two of the first steps the memory instead."""
        now = time.perf_counter()
        if self._profile is not None:
            self.memory["qft_mb"] = peak_mb(self._profile)
            self._profile = None
        self._plain_step()
        after = time.perf_counter()
        self.times.append((now - self.last, after - now))
        if step.number == WARM_UP - 2:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as plain:
                self._plain_step()
            self.memory["plain_mb"] = peak_mb(plain)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        self.last = time.perf_counter()

    def _plain_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.net(self.images) - self.target).square().mean().backward()
        self.optimizer.step()

    def line(self) -> dict[str, float]:
        """Return the medians in milliseconds and the median ratio."""
        pairs = self.times[WARM_UP:]
        return {
            "qft_ms": round(1e3 * statistics.median(q for q, _ in pairs), 2),
            "plain_ms": round(1e3 * statistics.median(p for _, p in pairs), 2),
            "ratio": round(statistics.median(q / p for q, p in pairs), 3),
            **self.memory,
            "memory": round(self.memory["qft_mb"] / self.memory["plain_mb"], 3),
        }


def peak_mb(profiled: profile) -> float:
    """Return the largest amount of memory, MB, that a profiled step held beside what was held before."""
    if profiled.profiler is None or profiled.profiler.kineto_results is None:
        profiled.stop()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return round(max(itertools.accumulate(size for _, size in changes)) / 1e6, 1)


def under_nncf(net: nn.Module, batches: list[Tensor], config: QFTConfig, callback: Callable[[Step], None]) -> Any:
    """Finetune under NNCF."""
    import nncf

    import qft_plugin.nncf  # noqa: F401  (registers the algorithm)

    return nncf.quantize(net, nncf.Dataset(batches), algorithm=config, callback=callback)


def under_brevitas(net: nn.Module, batches: list[Tensor], config: QFTConfig, callback: Callable[[Step], None]) -> Any:
    """Finetune under Brevitas."""
    from qft_plugin.brevitas import quantize

    return quantize(net, batches, config=config, callback=callback)


HOSTS = {"nncf": under_nncf, "brevitas": under_brevitas}


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="folder of real networks")
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="nncf")
    names = ", ".join(architectures.ARCHITECTURES)
    parser.add_argument("--net", default="resnet18", help=f"{names}, or the name of a real network")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="fuse the fake-quantization with torch.compile")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of QFT's layers")
    args = parser.parse_args()

    def load() -> tuple[nn.Module, Tensor]:
        if args.net in architectures.ARCHITECTURES:
            return architectures.build(args.net, max(4 * args.batch, 64))
        if args.real is None:
            parser.error(f"--net {args.net} needs --real DIR")
        real = real_networks.load(args.real, args.net, 512)
        return real.net, real.calibration.tensor()

    net, images = load()
    total = WARM_UP + args.pairs
    finetune = FinetuneConfig(
        images_fed=total * args.batch, batch_size=args.batch, compile=args.compile, precision=args.precision
    )
    config = QFTConfig(finetune=finetune)
    results = {}
    for host in HOSTS if args.host == "both" else [args.host]:
        pairs = Pairs(load()[0], images[: args.batch])
        HOSTS[host](net, list(images.split(32)), config, pairs)
        results[host] = pairs.line()
    line: dict[str, Any] = {
        "net": args.net,
        "batch": args.batch,
        "compile": args.compile,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "pairs": args.pairs,
        **results,
    }
    if len(results) > 1:
        line["brevitas_over_nncf"] = round(results["brevitas"]["ratio"] / results["nncf"]["ratio"], 3)
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
