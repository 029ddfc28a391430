"""Time one finetuning step against one plain float finetuning step of the same network, in pairs in one run.

    python benchmarks/step_time.py --real DIR --net resnet20 --batch 32 [--compile]

The plain step trains the float network in eval mode (its BatchNorms use their statistics) with the same batch, the
same optimizer and a squared error on its output. The last line is one JSON object; `ratio` is the median over pairs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import nncf
import real_networks
import torch

import qft_plugin.nncf  # noqa: F401  (registers the algorithm)
from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.finetune import Step

WARM_UP = 5


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="fuse the fake-quantization with torch.compile")
    args = parser.parse_args()

    real = real_networks.load(args.real, args.net, 512)
    images = real.calibration[: args.batch].contiguous(memory_format=torch.channels_last)
    plain = real_networks.load(args.real, args.net, 1).net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0, fused=True)
    with torch.no_grad():
        target = plain(images)
    qft_times: list[float] = []
    plain_times: list[float] = []
    last = 0.0

    def after_step(_: Step) -> None:
        """Time the step that just ended, then a plain one: a pair shares the machine's mood."""
        nonlocal last
        now = time.perf_counter()
        qft_times.append(now - last)
        optimizer.zero_grad(set_to_none=True)
        (plain(images) - target).square().mean().backward()
        optimizer.step()
        plain_times.append(time.perf_counter() - now)
        last = time.perf_counter()

    total = WARM_UP + args.pairs
    config = QFTConfig(
        finetune=FinetuneConfig(images_fed=total * args.batch, batch_size=args.batch, compile=args.compile)
    )
    nncf.quantize(real.net, nncf.Dataset(list(real.calibration.split(128))), algorithm=config, callback=after_step)
    pairs = list(zip(qft_times, plain_times, strict=True))[WARM_UP:]
    line = {
        "net": args.net,
        "batch": args.batch,
        "compile": args.compile,
        "threads": torch.get_num_threads(),
        "pairs": len(pairs),
        "qft_ms": round(1e3 * statistics.median(q for q, _ in pairs), 2),
        "plain_ms": round(1e3 * statistics.median(p for _, p in pairs), 2),
        "ratio": round(statistics.median(q / p for q, p in pairs), 3),
    }
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
