"""Quantize a real network and measure it on test images; the last line is one JSON object.

python benchmarks/accuracy.py --real DIR --host nncf --net resnet20 --weights per-channel --images 1024 --seed 0
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import real_networks
import torch
from torch import Tensor

import qft_plugin.nncf
from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig

DATASET_BATCH = 128


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--host", choices=["nncf"], default="nncf")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--weights", choices=["per-channel", "per-tensor"], default="per-channel")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    real = real_networks.load(args.real, args.net, args.images)
    config = QFTConfig(
        hardware=HardwareSpec(rescale="channelwise" if args.weights == "per-channel" else "layerwise"),
        finetune=FinetuneConfig(seed=args.seed),
    )
    dataset = nncf.Dataset(list(real.calibration.split(DATASET_BATCH)))
    wall, cpu = time.perf_counter(), time.process_time()
    quantized = nncf.quantize(real.net, dataset, algorithm=config)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu

    with qft_plugin.nncf.without_compiler():
        found = real_networks.classes(quantized, real.test)
    expected = real_networks.classes(real.net, real.test)
    with tempfile.TemporaryDirectory() as folder:
        report = qft_plugin.nncf.save_openvino(quantized, Path(folder) / "model.xml", real.calibration[:8])
        ir = ir_classes(report.path, real.test)
    line = {
        "net": args.net,
        "host": args.host,
        "weights": args.weights,
        "images": args.images,
        "seed": args.seed,
        "fp_top1": round(real_networks.percent(expected == real.labels), 2),
        "top1": round(real_networks.percent(found == real.labels), 2),
        "drop": round(real_networks.percent(expected == real.labels) - real_networks.percent(found == real.labels), 2),
        "agreement": round(real_networks.percent(found == expected), 2),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "ir_agreement": round(real_networks.percent(ir == found), 3),
        "ir_bytes": report.bytes,
        "int8_convs": report.int8_convolutions,
        "convs": len(report.convolutions),
    }
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


def ir_classes(path: Path, images: Tensor) -> Tensor:
    """Return the class that an IR names for each image, at the precision that its weights ask for."""
    compiled: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = [np.asarray(compiled([part.numpy()])[0]) for part in images.split(real_networks.BATCH)]
    return torch.from_numpy(np.concatenate(outputs)).argmax(1)


if __name__ == "__main__":
    main()
