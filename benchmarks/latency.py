"""Latency and size of our 4-bit IR over those of NNCF's own 8-bit IR of the same network, in turns in one run.

    python benchmarks/latency.py --real DIR --net mobilenetv2 [--images 128] [--rounds 7]

Nothing trains: neither latency nor size depends on the values of the weights. Each round times both files, one image
at a time, one thread; `latency` is the quotient of the fastest runs of all rounds, since whatever else runs on the
machine only makes a run slower. `size` is that of weights and graph together (`.bin` and `.xml`), `size_of_weights` is
that of the weights alone.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Final

import nncf
import openvino
import real_networks
import torch

from qft_plugin import QFTConfig
from qft_plugin.deploy.latency import measure_latency
from qft_plugin.nncf import save_openvino

REPEATS: Final = 200


def size_of(path: Path) -> int:
    """Return the bytes of an IR, weights and graph."""
    return sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    real = real_networks.load(args.real, args.net, args.images)
    images = real.calibration.tensor()
    example, data = images[:1], nncf.Dataset(list(images.split(32)))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.xml", Path(folder) / "theirs.xml"
        save_openvino(nncf.quantize(real.net, data, algorithm=QFTConfig(finetune=None), verbose=False), ours, example)
        eight = nncf.quantize(real.net, data)
        openvino.save_model(openvino.convert_model(eight, example_input=example), theirs)
        rounds = [
            [measure_latency(path, example, repeats=REPEATS)["fastest_ms"] for path in (ours, theirs)]
            for _ in range(args.rounds)
        ]
        sizes = [size_of(path) for path in (ours, theirs)]
        weights = [path.with_suffix(".bin").stat().st_size for path in (ours, theirs)]
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    line = {
        "net": args.net,
        "ours_ms": round(fastest[0], 4),
        "nncf_8_bit_ms": round(fastest[1], 4),
        "latency": round(fastest[0] / fastest[1], 3),
        "of_each_round": [round(a / b, 3) for a, b in rounds],
        "bytes": sizes,
        "size": round(sizes[0] / sizes[1], 3),
        "size_of_weights": round(weights[0] / weights[1], 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
