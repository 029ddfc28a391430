"""AIMET's AdaRound at its own budget on a network and images of ours: the peer that takes longest.

    python benchmarks/aimet_peers.py --real DIR --net resnet20 --weights per-channel [--iterations N]

Needs `aimet-torch` in an environment of its own, beside torch, numpy and what `nets.py` imports. 4-bit weights, first
and last layer and all activations 8-bit, cross-layer equalization, rounding learned layer by layer. The last line is
one JSON object.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import real_networks
import torch
from torch import Tensor, nn

BATCH = 32


def written_config(folder: str, *, per_channel: bool) -> str:
    """Write AIMET's settings for a CPU: symmetric weights, 8-bit activations after every operation."""
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "per_channel_quantization": str(per_channel),
            "strict_symmetric": "False",
            "unsigned_symmetric": "False",
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {},
        "supergroups": [
            {"op_list": ["Conv", "Relu"]},
            {"op_list": ["Conv", "Clip"]},
            {"op_list": ["Add", "Relu"]},
        ],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    }
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def quantized(net: nn.Module, batches: list[Tensor], *, per_channel: bool, iterations: int | None) -> nn.Module:
    """Equalize, learn the rounding of every 4-bit layer, and calibrate the activations."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    example = batches[0][:1]
    model = prepare_model(net)
    equalize_model(model, tuple(example.shape), dummy_input=example)
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    eight = {layers[0], layers[-1]}
    modules: dict[str, Any] = dict(model.named_modules())
    with tempfile.TemporaryDirectory() as folder:
        config = written_config(folder, per_channel=per_channel)
        rounded = Adaround.apply_adaround(
            model,
            example,
            AdaroundParameters(batches, len(batches), default_num_iterations=iterations),
            path=folder,
            filename_prefix="adaround",
            default_param_bw=4,
            param_bw_override_list=[(modules[name], 8) for name in eight],
            default_quant_scheme=QuantScheme.post_training_tf_enhanced,
            default_config_file=config,
        )
        sim = QuantizationSimModel(
            rounded,
            dummy_input=example,
            quant_scheme=QuantScheme.post_training_tf_enhanced,
            default_param_bw=4,
            default_output_bw=8,
            config_file=config,
        )
        for name, module in sim.model.named_modules():
            if name in eight:
                module.param_quantizers["weight"].bitwidth = 8
        sim.set_and_freeze_param_encodings(str(Path(folder) / "adaround.encodings"))
    with torch.no_grad():
        sim.compute_encodings(lambda m, _: [m(x) for x in batches], None)
    return sim.model


def main() -> None:
    """Quantize and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--weights", default="per-channel", choices=("per-channel", "per-tensor"))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--iterations", type=int, help="of each layer; without it AIMET's own 15,000")
    args = parser.parse_args()

    torch.manual_seed(0)
    real = real_networks.load(args.real, args.net, args.images)
    batches = [part.tensor() for part in real.calibration.split(BATCH)]
    expected = real_networks.classes(real.net, real.test)
    began, cpu = time.perf_counter(), time.process_time()
    model = quantized(real.net, batches, per_channel=args.weights == "per-channel", iterations=args.iterations)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = real_networks.classes(model, real.test)
    top1 = [real_networks.percent(c == real.labels) for c in (expected, found)]
    line = {
        "method": "AIMET, CLE + AdaRound",
        "net": args.net,
        "weights": args.weights,
        "iterations": args.iterations or 15_000,
        "agreement": round(real_networks.percent(found == expected), 2),
        "drop": round(top1[0] - top1[1], 2),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu),
    }
    assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
