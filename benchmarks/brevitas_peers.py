"""Compare with Brevitas' own post-training quantization on the same network and images, in one run.

    python benchmarks/brevitas_peers.py --real DIR --net resnet20 --images 1024 [--skip learned]

Uses the recipes of `brevitas_examples`, which is in Brevitas' wheel (it needs `tqdm`, and `accelerate` for the learned
round): 4-bit weights, 8-bit activations, first layer 8-bit. The last lines are one JSON object for each method.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import real_networks
import torch
from torch import Tensor, fx, nn

from qft_plugin import HardwareSpec, QFTConfig
from qft_plugin.brevitas import fold, quantize

BATCH = 64
LEARNED_ROUND_ITERATIONS = 1000
"""The recipe's own number, for each layer."""

LEARNED_ROUND_BATCH = 16
"""The recipe's own number is 1."""

Batches = list[tuple[Tensor, Tensor]]


def traceable(net: nn.Module) -> nn.Module:
    """Trace a network and give a global pool a form that Brevitas' preprocessing takes."""
    traced = fx.symbolic_trace(copy.deepcopy(net).eval())
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and "avg_pool2d" in str(node.target):
            traced.add_submodule("global_pool", nn.AdaptiveAvgPool2d(1))
            with traced.graph.inserting_after(node):
                node.replace_all_uses_with(traced.graph.call_module("global_pool", (node.args[0],)))
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def prepared(net: nn.Module, batches: Batches, granularity: str, method: str) -> nn.Module:
    """Equalize, swap in Brevitas' quantizers and calibrate them."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    model = preprocess_for_quantize(traceable(net), trace_model=False, equalize_iters=20, equalize_merge_bias=True)
    model = ptq_common.quantize_model(
        model,
        backend="layerwise",
        weight_bit_width=4,
        act_bit_width=8,
        bias_bit_width=32,
        weight_quant_granularity=granularity,
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="float_scale",
        quant_format="int",
        weight_narrow_range=True,
        weight_param_method=method,
    )
    model(batches[0][0])
    ptq_common.calibrate(batches, model)
    return model


def rounded_to_nearest(net: nn.Module, batches: Batches, granularity: str) -> nn.Module:
    """Equalization and bias correction."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    model = prepared(net, batches, granularity, method="stats")
    ptq_common.apply_bias_correction(batches, model)
    return model


def gptq(net: nn.Module, batches: Batches, granularity: str) -> nn.Module:
    """GPTQ with MSE scales, equalization and bias correction."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    model = prepared(net, batches, granularity, method="mse")
    ptq_common.apply_gptq(batches, model, act_order=True)
    ptq_common.apply_bias_correction(batches, model)
    return model


def learned_round(net: nn.Module, batches: Batches, granularity: str) -> nn.Module:
    """Learned round, layer by layer, with equalization and bias correction."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common
    from brevitas_examples.imagenet_classification.ptq.learned_round_utils import apply_learned_round

    model = prepared(net, batches, granularity, method="mse")
    settings = SimpleNamespace(
        learned_round="hard_sigmoid",
        learned_round_mode="layerwise",
        learned_round_loss="regularised_mse",
        learned_round_lr_scheduler=None,
        learned_round_lr=1e-3,
        learned_round_batch_size=LEARNED_ROUND_BATCH,
        learned_round_iters=LEARNED_ROUND_ITERATIONS,
    )
    apply_learned_round(model, batches, settings)
    ptq_common.apply_bias_correction(batches, model)
    return model


def qft(net: nn.Module, batches: Batches, granularity: str) -> nn.Module:
    """QFT, folded."""
    rescale = "channelwise" if granularity == "per_channel" else "layerwise"
    config = QFTConfig(hardware=HardwareSpec(rescale=rescale))
    return fold(quantize(net, [x for x, _ in batches], config=config))


METHODS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "nearest": ("equalization + bias correction", rounded_to_nearest),
    "gptq": ("GPTQ + MSE scales + equalization + bias correction", gptq),
    "learned": (f"learned round ({LEARNED_ROUND_ITERATIONS} iterations)", learned_round),
    "qft": ("QFT", qft),
}


def main() -> None:
    """Run all methods in both granularities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--weights", nargs="*", default=["per_channel", "per_tensor"], help="granularities")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(METHODS))
    args = parser.parse_args()

    real = real_networks.load(args.real, args.net, args.images)
    # The recipes expect labels beside the images; none of these methods looks at them.
    batches = [(part.tensor(), torch.zeros(len(part), dtype=torch.int64)) for part in real.calibration.split(BATCH)]
    expected = real_networks.classes(real.net, real.test)
    fp_top1 = real_networks.percent(expected == real.labels)
    for key, (name, method) in METHODS.items():
        if key in args.skip:
            continue
        for granularity in args.weights:
            wall, cpu = time.perf_counter(), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = method(real.net, batches, granularity).eval()
            seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
            found = real_networks.classes(model, real.test)
            line = {
                "method": name,
                "weights": granularity.replace("_", "-"),
                "drop": round(fp_top1 - real_networks.percent(found == real.labels), 2),
                "agreement": round(real_networks.percent(found == expected), 2),
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu_seconds, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
