"""Quantize a real network and measure it on test images; the last line is one JSON object.

python benchmarks/accuracy.py --real DIR --host nncf --net resnet20 --weights per-channel --images 1024 --seed 0

Under Brevitas the model that is measured is the folded one; `qonnx_agreement` compares it with QONNX' own executor and
`qcdq_ir_agreement` with OpenVINO on its QCDQ export.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_networks
from torch import Tensor

from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig

DATASET_BATCH = 128


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--host", choices=["nncf", "brevitas"], default="nncf")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--weights", choices=["per-channel", "per-tensor"], default="per-channel")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig.images_fed)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    real = real_networks.load(args.real, args.net, args.images)
    config = QFTConfig(
        hardware=HardwareSpec(rescale="channelwise" if args.weights == "per-channel" else "layerwise"),
        finetune=FinetuneConfig(seed=args.seed, images_fed=args.images_fed, precision=args.precision),
    )
    measure = under_nncf if args.host == "nncf" else under_brevitas
    found, facts = measure(real, list(real.calibration.split(DATASET_BATCH)), config)
    expected = real_networks.classes(real.net, real.test)
    fp_top1, top1 = (real_networks.percent(c == real.labels) for c in (expected, found))
    line = {
        "net": args.net,
        "host": args.host,
        "weights": args.weights,
        "images": args.images,
        "images_fed": args.images_fed,
        "precision": args.precision,
        "seed": args.seed,
        "fp_top1": round(fp_top1, 2),
        "top1": round(top1, 2),
        "drop": round(fp_top1 - top1, 2),
        "agreement": round(real_networks.percent(found == expected), 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **facts,
    }
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run something; return its result and its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return result, {name: round(value, 1) for name, value in seconds.items()}


def under_nncf(real: real_networks.RealNetwork, batches: list[Tensor], config: QFTConfig) -> tuple[Tensor, dict]:
    """Return the class of each test image and what else was measured."""
    import nncf

    import qft_plugin.nncf

    quantized, facts = timed(lambda: nncf.quantize(real.net, nncf.Dataset(batches), algorithm=config))
    with qft_plugin.nncf.without_compiler():
        found = real_networks.classes(quantized, real.test)
    with tempfile.TemporaryDirectory() as folder:
        report = qft_plugin.nncf.save_openvino(quantized, Path(folder) / "model.xml", real.calibration[:8])
        ir = real_networks.classes(real_networks.on_openvino(report.path), real.test)
    return found, {
        **facts,
        "ir_agreement": round(real_networks.percent(ir == found), 3),
        "ir_bytes": report.bytes,
        "int8_convs": report.int8_convolutions,
        "convs": len(report.convolutions),
    }


def under_brevitas(real: real_networks.RealNetwork, batches: list[Tensor], config: QFTConfig) -> tuple[Tensor, dict]:
    """Return the class of each test image and what else was measured."""
    from qft_plugin import brevitas
    from qft_plugin.deploy import qonnx

    quantized, facts = timed(lambda: brevitas.quantize(real.net, batches, config=config))
    folded = brevitas.fold(quantized)
    found = real_networks.classes(folded, real.test)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qonnx.onnx"
        brevitas.save_qonnx(folded, path, real.test[: real_networks.BATCH])
        file = qonnx.load(path)
        executed = real_networks.classes(lambda x: qonnx.run(file, [x])[0], real.test)
        report = brevitas.save_qcdq(folded, Path(folder) / "qcdq.onnx", real.calibration[:8])
        ir = real_networks.classes(real_networks.on_openvino(report.path), real.test)
    return found, {
        **facts,
        "qonnx_agreement": round(real_networks.percent(executed == found), 3),
        "qcdq_ir_agreement": round(real_networks.percent(ir == found), 3),
        "qcdq_bytes": report.bytes,
        "int8_convs": report.int8_convolutions,
        "convs": len(report.convolutions),
    }


if __name__ == "__main__":
    main()
