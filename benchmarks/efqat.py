"""Time the backward pass of a finetune of which a part trains (EfQAT), against the one in which everything does.

    python benchmarks/efqat.py --host brevitas --net resnet50 [--batch 16] [--rounds 10]

All finetunes have copies of one start and take turns, a pass each, so that every round shares the machine's mood. The
last line is one JSON object: milliseconds of the full backward pass, and for each mode and ratio how many times faster
it is, as medians over the rounds; `plain_limit` is what the plain float network gains where no kernel has a gradient.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import replace
from unittest import mock

import architectures
import step_time
import torch

from qft_plugin import EfQAT, FinetuneConfig, QFTConfig
from qft_plugin.job import run
from qft_plugin.job.host import Placed, Problem, Source, Start
from qft_plugin.training.efqat import PartialTraining
from qft_plugin.training.loss import Loss, distillation_loss
from qft_plugin.training.teacher import Targets

WARM_UP = 2
PARTS = [("cwpl", 0.0), ("cwpl", 0.05), ("cwpl", 0.25), ("cwpn", 0.05), ("cwpn", 0.25), ("lwpn", 0.05), ("lwpn", 0.25)]
"""Modes and ratios; a ratio of 0 is the same in all modes, and the limit of what can be gained."""


def measure(host: str, net: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each backward pass of each finetune."""
    parts: dict[str, EfQAT | None] = {"all": None}
    parts |= {f"{mode} {ratio}": EfQAT(mode=mode, ratio=ratio) for mode, ratio in PARTS}
    times: dict[str, list[float]] = {name: [] for name in parts}

    def train(
        start: Start[Placed],
        problem: Problem[Source],
        targets: Targets,
        config: QFTConfig,
        *,
        callback: object,  # noqa: ARG001
    ) -> None:
        """Stand in for the training: run the backward passes of all finetunes, from copies of one start."""
        assert config.finetune is not None
        starts = {name: replace(start, dof=copy.deepcopy(start.dof)) for name in parts}
        for name, part in parts.items():
            if part is not None:
                PartialTraining(starts[name].dof, part)
        call = problem.inputs.batch(slice(0, batch))
        wanted = targets.rows(slice(0, batch), problem.inputs.device)
        loss = Loss(problem.at.weights(len(wanted.features)), 0.0)
        for _ in range(WARM_UP + rounds):
            for name, own in starts.items():
                found = distillation_loss(run.predicted(own, config.finetune, call), wanted, loss)
                begin = time.perf_counter()
                found.backward()
                times[name].append(1e3 * (time.perf_counter() - begin))
                own.dof.zero_grad()

    model, inputs = architectures.build(net, 2 * batch)
    finetune = FinetuneConfig(images_fed=batch, batch_size=batch)
    config = QFTConfig(finetune=finetune, compensate=False, equalize=False)  # a start that takes less time
    with mock.patch.object(run, "train", train):
        step_time.HOSTS[host](model, list(inputs.split(batch)), config, lambda _: None)
    return {name: ms[WARM_UP:] for name, ms in times.items()}


def plain_limit(net: str, batch: int, rounds: int) -> float:
    """Return how many times faster the float network's backward pass is without the gradients of its kernels."""
    model, images = architectures.build(net, batch)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
    kernels = [p for p in model.parameters() if p.dim() > 1]
    ratios = []
    for _ in range(WARM_UP + rounds):
        times = []
        for trains in (True, False):
            for p in kernels:
                p.requires_grad_(trains)
            loss = model(images).square().mean()
            start = time.perf_counter()
            loss.backward()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[WARM_UP:])


def main() -> None:
    """Run all jobs in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=list(step_time.HOSTS), default="brevitas")
    parser.add_argument("--net", choices=list(architectures.ARCHITECTURES), default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    times = measure(args.host, args.net, args.batch, args.rounds)
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
        "plain_limit": round(plain_limit(args.net, args.batch, args.rounds), 2),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
