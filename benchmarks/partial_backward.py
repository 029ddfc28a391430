"""Time the backward pass of a fake-quantized network of which a part trains, against the one in which all does.

    python benchmarks/partial_backward.py [--ratios 0 0.05 0.25] [--steps 10]

Times are those of the processor, so that other work on the machine counts less; each network is one thread's work. The
last line is one JSON object: milliseconds of a forward and a backward pass with everything trained, and for each ratio
the quotient of the backward passes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qft_plugin import EfQAT
from qft_plugin.config import QFTConfig
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.record import record
from qft_plugin.tensors.mmse import weight_scale
from qft_plugin.tensors.partial_gradients import PartialBackward
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.efqat import PartialTraining
from qft_plugin.training.solve import solve

WARM_UP = 3


def convolutions(widths: tuple[int, ...]) -> nn.Module:
    """Stack 3x3 convolutions and ReLUs, three of each width, the first with stride 2."""
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        for stride in (2, 1, 1):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def separable() -> nn.Module:
    """Stack depthwise 3x3 and 1x1 convolutions of 64 channels."""
    pairs = [(nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), *(m for pair in pairs for m in pair))


def linear() -> nn.Module:
    """Stack the linear layers of a transformer of width 512."""
    pairs = [(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*(m for pair in pairs for m in pair))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions, 64 to 256 channels": (lambda: convolutions((64, 128, 256)), (16, 3, 64, 64)),
    "convolutions, 16 to 64 channels": (lambda: convolutions((16, 32, 64)), (32, 3, 64, 64)),
    "separable convolutions, 64 channels": (separable, (16, 3, 64, 64)),
    "linear layers, 512 and 2048": (linear, (8, 128, 512)),
}


def laid_out(t: Tensor) -> Tensor:
    """Put the channels of images and their kernels last, as the finetune does on CPUs."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def times(model: nn.Module, x: Tensor, ratio: float | None, steps: int) -> tuple[float, float]:
    """Return the median milliseconds of a forward and a backward pass."""
    dof_map = map_dof(record(model, ((x[:1],), {})))
    tensors = {name: laid_out(p.detach()) for name, p in model.named_parameters()}
    grids = {
        layer.weight: WeightGrid(
            4, weight_scale(tensors[layer.weight], layer.axes, bits=4, per_channel=True), None, None
        )
        for layer in dof_map.layers
    }
    dof = Dof(dof_map, tensors, grids, {}, config=QFTConfig(train_cross_layer=ratio is None))
    if ratio is not None:
        PartialTraining(dof, EfQAT(ratio=ratio))
    trained = [p for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1) for p in g["params"]]
    found = []
    for _ in range(WARM_UP + steps):
        begin = time.process_time()
        solution = solve(dof)
        with PartialBackward(solution.partial):
            loss = torch.func.functional_call(model, solution.tensors, x).square().mean()
        middle = time.process_time()
        torch.autograd.backward(loss, inputs=trained)
        found.append((middle - begin, time.process_time() - middle))
        for p in trained:
            p.grad = None
    forward, backward = (1e3 * statistics.median(part) for part in zip(*found[WARM_UP:], strict=True))
    return forward, backward


def main() -> None:
    """Measure every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.05, 0.25])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    for name, (make, shape) in NETWORKS.items():
        model, x = make(), laid_out(torch.randn(shape))
        forward, backward = times(model, x, None, args.steps)
        parts = {str(ratio): round(backward / times(model, x, ratio, args.steps)[1], 2) for ratio in args.ratios}
        results[name] = {"forward_ms": round(forward, 1), "backward_ms": round(backward, 1), "faster": parts}
        print(name, results[name], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
