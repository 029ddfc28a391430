"""Quantize a real network and measure it on test images; the last line is one JSON object.

python benchmarks/accuracy.py --real DIR --host nncf --net resnet20 --weights per-channel --images 1024 --seed 0

`file` is what counts: the exported file (IR, or QCDQ under Brevitas) in OpenVINO, against the float network. Beside it
stand the torch model (under Brevitas the folded one), the host's own 8-bit quantization, how far the file is from the
torch model, and how far the torch model is from itself (float64 against float32). `qonnx_agreement` compares QONNX' own
executor with the torch model.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_networks
import torch
from real_networks import SELF_IMAGES, Images, RealNetwork
from torch import Tensor

from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig

DATASET_BATCH = 128
QONNX_BATCH = 20


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
    parser.add_argument("--qonnx-images", type=int, default=1000, help="test images for QONNX' executor, which is slow")
    args = parser.parse_args()

    real = real_networks.load(args.real, args.net, args.images)
    config = QFTConfig(
        hardware=HardwareSpec(rescale="channelwise" if args.weights == "per-channel" else "layerwise"),
        finetune=FinetuneConfig(seed=args.seed, images_fed=args.images_fed, precision=args.precision),
    )
    measure = under_nncf if args.host == "nncf" else under_brevitas
    found = measure(real, config, real.test[: args.qonnx_images])
    own, own_facts = (nncf_8_bit if args.host == "nncf" else brevitas_8_bit)(real)
    expected = real_networks.classes(real.net, real.test)
    fp_top1 = real_networks.percent(expected == real.labels)

    def against_float(found: Tensor) -> dict[str, float]:
        top1 = real_networks.percent(found == real.labels)
        agreement = real_networks.percent(found == expected)
        return {"top1": round(top1, 2), "drop": round(fp_top1 - top1, 2), "agreement": round(agreement, 2)}

    line = {
        "net": args.net,
        "host": args.host,
        "weights": args.weights,
        "images": len(real.calibration),
        "images_fed": args.images_fed,
        "precision": args.precision,
        "seed": args.seed,
        "test_images": len(real.test),
        "fp_top1": round(fp_top1, 2),
        "file": against_float(found.file.argmax(1)),
        "torch": against_float(found.model.argmax(1)),
        "host_8_bit": {**against_float(own), **own_facts},
        "file_against_torch": real_networks.difference(found.file, found.model),
        "torch_against_itself": {**found.itself, "images": min(SELF_IMAGES, len(real.test))},
        **found.facts,
        "peak_rss_mb": peak_rss_mb(),
    }
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


@dataclass(frozen=True)
class Found:
    """What was measured on one quantized network.

    Attributes:
        model: outputs of the torch model for all test images.
        file: outputs of the exported file in OpenVINO.
        itself: how far the torch model is from itself.
        facts: what else was measured.
    """

    model: Tensor
    file: Tensor
    itself: dict[str, float]
    facts: dict[str, Any]


def peak_rss_mb() -> int:
    """Return the most memory that this process has had so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run something; return its result, its seconds, and the most memory until its end."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return result, {**{name: round(value, 1) for name, value in seconds.items()}, "quantize_peak_rss_mb": peak_rss_mb()}


def under_nncf(real: RealNetwork, config: QFTConfig, _: Images) -> Found:
    """Quantize under NNCF, and save an IR."""
    import nncf

    import qft_plugin.nncf

    dataset = nncf.Dataset(real.calibration.split(DATASET_BATCH), Images.tensor)
    quantized, facts = timed(lambda: nncf.quantize(real.net, dataset, algorithm=config))
    with qft_plugin.nncf.without_compiler():
        computed = real_networks.outputs(quantized, real.test)
        itself = real_networks.self_difference(quantized, real.test[:SELF_IMAGES])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        report = qft_plugin.nncf.save_openvino(quantized, path, real.calibration[:8].tensor())
        file = real_networks.outputs(real_networks.on_openvino(report.path), real.test)
    facts |= {"ir_bytes": report.bytes, "int8_convs": report.int8_convolutions, "convs": len(report.convolutions)}
    return Found(computed, file, itself, facts)


def nncf_8_bit(real: RealNetwork) -> tuple[Tensor, dict[str, float]]:
    """Quantize by NNCF's own defaults; returns the classes that its IR names."""
    import nncf
    import openvino

    dataset = nncf.Dataset(real.calibration.split(DATASET_BATCH), Images.tensor)
    quantized, facts = timed(lambda: nncf.quantize(real.net, dataset))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(openvino.convert_model(quantized, example_input=real.calibration[:1].tensor()), path)
        return real_networks.classes(real_networks.on_openvino(path), real.test), facts


def under_brevitas(real: RealNetwork, config: QFTConfig, qonnx_images: Images) -> Found:
    """Quantize under Brevitas, fold, and save QCDQ and QONNX."""
    from qft_plugin import brevitas
    from qft_plugin.deploy import qonnx

    batches = (part.tensor() for part in real.calibration.split(DATASET_BATCH))
    quantized, facts = timed(lambda: brevitas.quantize(real.net, batches, config=config))
    folded = brevitas.fold(quantized)
    computed = real_networks.outputs(folded, real.test)
    itself = real_networks.self_difference(folded, real.test[:SELF_IMAGES])
    example = real.calibration[:8].tensor()
    with tempfile.TemporaryDirectory() as folder:
        report = brevitas.save_qcdq(folded, Path(folder) / "qcdq.onnx", example)
        file = real_networks.outputs(real_networks.on_openvino(report.path), real.test)
        path = Path(folder) / "qonnx.onnx"
        parts = [part for part in qonnx_images.rows.split(QONNX_BATCH) if len(part) == QONNX_BATCH]
        if parts:  # the file is for one number of images
            brevitas.save_qonnx(folded, path, example.new_zeros(QONNX_BATCH, *example.shape[1:]))
            saved = qonnx.load(path)
            ran = torch.cat(
                [qonnx.in_executor(saved)([Images(p, qonnx_images.normalise).tensor()], [])[0] for p in parts]
            )
            same = ran.argmax(1) == computed[: len(ran)].argmax(1)
            facts |= {"qonnx_agreement": round(real_networks.percent(same), 3), "qonnx_images": len(ran)}
    facts |= {"qcdq_bytes": report.bytes, "int8_convs": report.int8_convolutions, "convs": len(report.convolutions)}
    return Found(computed, file, itself, facts)


def brevitas_8_bit(real: RealNetwork) -> tuple[Tensor, dict[str, float]]:
    """Quantize layer by layer with Brevitas' defaults and bias correction; returns the classes that its QCDQ names."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas_peers import traceable

    from qft_plugin.brevitas import save_qcdq

    @torch.no_grad()
    def quantized() -> Any:
        batches = real.calibration.split(DATASET_BATCH)
        model = layerwise_quantize(preprocess_for_quantize(traceable(real.net), trace_model=False))
        for mode in (calibration_mode, bias_correction_mode):
            with mode(model):
                for part in batches:
                    model(part.tensor())
        return model.eval()

    model, facts = timed(quantized)
    with tempfile.TemporaryDirectory() as folder:
        report = save_qcdq(model, Path(folder) / "qcdq.onnx", real.calibration[:1].tensor(), check=False)
        return real_networks.classes(real_networks.on_openvino(report.path), real.test), facts


if __name__ == "__main__":
    main()
