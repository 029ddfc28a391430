"""Time the initial scales of one large kernel: PPQ of its rows and APQ of its rows and columns.

    python benchmarks/initialize.py [--threads 2] [--runs 10]

The last line is one JSON object: for each shape (rows, columns, elements) of a kernel of about a million weights the
least of all runs in milliseconds. Anything else that keeps a core busy while it runs falsifies it.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from qft_plugin.tensors.mmse import apq, ppq

SHAPES = [(1000, 1000, 1), (512, 512, 4)]
HIGH = 7


def least(function: Callable[[], object], runs: int) -> float:
    """Return the least time of all runs, ms."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 1)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    line: dict[str, object] = {"threads": args.threads, "runs": args.runs}
    for shape in SHAPES:
        X = (
            torch.randn(shape)
            * torch.exp(0.5 * torch.randn(shape[0], 1, 1))
            * torch.exp(0.5 * torch.randn(shape[1], 1))
        )
        line["x".join(map(str, shape))] = {
            "ppq_ms": least(lambda X=X: ppq(X.flatten(1), high=HIGH), args.runs),
            "apq_ms": least(lambda X=X: apq(X, high=HIGH), args.runs),
        }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
