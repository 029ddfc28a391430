"""The least that a finetuning step can cost on this machine, by the memory that its quantizers have to move.

    python benchmarks/step_limit.py --net resnet18 --batch 16 [--real DIR --net resnet20 --batch 32]

Three things are timed in turn, in one run. *plain*: a float step in eval mode, with BatchNorms and ReLUs. *folded*: the
same without them, which a student has folded or left to its quantizers. *passes*: for each activation that a layer
reads, the fewest passes over memory that fake-quantization can do, at the speed of torch's own multiplication: read it
and write it in the forward pass; read it, read a gradient and write one in the backward pass. The last line is one JSON
object; `limit` is the median of (folded + passes) / plain. Weights are not counted, nor the gradients of scales.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import architectures
import real_networks
import torch
from torch import Tensor, nn

from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.record import record

FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def step_of(net: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a float finetuning step."""
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=0, fused=True)
    with torch.no_grad():
        target = net(images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (net(images) - target).square().mean().backward()
        optimizer.step()

    return step


def without_folded(net: nn.Module, images: Tensor) -> nn.Module:
    """Leave out what a student does not run: BatchNorms become weights and biases, and ReLUs a part of quantizers."""
    with torch.no_grad():
        merge_norms(net, net, record(net, ((images[:2],), {})))
    for parent in list(net.modules()):
        for name, module in parent.named_children():
            if isinstance(module, FOLDED):
                setattr(parent, name, nn.Identity())
            elif isinstance(module, LAYERS) and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(len(module.weight)))
    return net


def activations_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Return every activation that a layer reads, each once."""
    found: dict[int, Tensor] = {}

    def note(_module: nn.Module, args: tuple[Tensor]) -> None:
        found[id(args[0])] = args[0]

    handles = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, LAYERS)]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return list(found.values())


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="folder of real networks")
    names = ", ".join(architectures.ARCHITECTURES)
    parser.add_argument("--net", default="resnet18", help=f"{names}, or the name of a real network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    def load() -> tuple[nn.Module, Tensor]:
        if args.net in architectures.ARCHITECTURES:
            net, images = architectures.build(args.net, args.batch)
        else:
            real = real_networks.load(args.real, args.net, args.batch)
            net, images = real.net, real.calibration.tensor()
        return net.eval(), images[: args.batch].contiguous(memory_format=torch.channels_last)

    plain, folded = step_of(*load()), step_of(without_folded(*load()), load()[1])
    activations = activations_of(load()[0].to(memory_format=torch.channels_last), load()[1])
    gradients = [torch.randn_like(a) for a in activations]

    def passes() -> None:
        for activation, gradient in zip(activations, gradients, strict=True):
            torch.mul(activation, 0.5)
            torch.mul(gradient, activation)

    times: list[list[float]] = []
    for _ in range(args.rounds + 3):
        times.append([])
        for run in (plain, folded, passes):
            began = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - began)
    measured = times[3:]
    medians = [1e3 * statistics.median(column) for column in zip(*measured, strict=True)]
    line = {
        "net": args.net,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        **{f"{name}_ms": round(ms, 2) for name, ms in zip(("plain", "folded", "passes"), medians, strict=True)},
        "activations_mb": round(sum(a.numel() for a in activations) * 4 / 1e6, 1),
        "limit": round(statistics.median((f + q) / p for p, f, q in measured), 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
