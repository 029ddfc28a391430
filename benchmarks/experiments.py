"""The paper's tables and figures on real networks: one JSON file for each experiment and network.

python benchmarks/experiments.py --real DIR --net resnet20 --out benchmarks/results [--only NAME ...] [--images-fed N]

A point that a file has already is not measured again, so that an interrupted run goes on where it was. The figures are
drawn from the files by `benchmarks/figures.py`.
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import real_networks
import torch
from torch import Tensor, nn

from qft_plugin import DeployabilityError, EfQAT, FinetuneConfig, HardwareSpec, ParityError, QFTConfig
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.operations import LAYERS
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.mmse import rounding_errors

logger = logging.getLogger("experiments")

DATASET_BATCH = 128
LAYERWISE, CHANNELWISE = HardwareSpec(rescale="layerwise"), HardwareSpec()
WEIGHT_ONLY = HardwareSpec(activation_bits=None, doubly_per_channel=True)
SKEW = 8.0
HOSTS = {"brevitas": "Brevitas", "nncf": "NNCF"}

Point = tuple[str, str, QFTConfig, int]


def granularity(hardware: HardwareSpec) -> str:
    """Name the granularity of the weights' scales."""
    return "per-tensor" if hardware.rescale == "layerwise" else "per-channel"


def experiments(base: QFTConfig, images: int) -> dict[str, list[Point]]:
    """List the points of every experiment: a label, the host, the settings, and the number of images."""
    finetune = base.finetune or FinetuneConfig()

    def tuned(hardware: HardwareSpec, *, images: int = images, config: dict | None = None, **settings: Any) -> Point:
        changed = replace(base, hardware=hardware, finetune=replace(finetune, **settings), **(config or {}))
        return "", "brevitas", changed, images

    def untrained(hardware: HardwareSpec, **config: Any) -> QFTConfig:
        return replace(base, hardware=hardware, finetune=None, **{"equalize": False, "compensate": False, **config})

    both = (CHANNELWISE, LAYERWISE)
    steps = {
        "MMSE": {},
        "MMSE + CLE": {"equalize": True},
        "MMSE + CLE + bias correction": {"equalize": True, "bias_correction": True},
        "compensated rounding + CLE": {"equalize": True, "compensate": True},
    }
    found: dict[str, list[Point]] = {
        "table1_ours": [(f"QFT {granularity(h)}, {HOSTS[host]}", host, *tuned(h)[2:]) for host in HOSTS for h in both],
        "table2_heuristics": [
            (f"{name}, {granularity(h)}", "brevitas", untrained(h, **config), images)
            for h in both
            for name, config in steps.items()
        ],
        "fig5_images": [(f"{count}", *tuned(LAYERWISE, images=count)[1:]) for count in (64, 256, 1024, 4096)],
        "fig6_cross_entropy": [
            (f"{share}", *tuned(LAYERWISE, cross_entropy=share)[1:]) for share in (0.0, 0.1, 0.5, 0.9, 1.0)
        ],
        "fig7_learning_rate": [
            (f"{rate}", *tuned(LAYERWISE, learning_rate=rate)[1:]) for rate in (0.0003, 0.001, 0.003, 0.01, 0.03)
        ],
        "fig8_fig9_cle_and_training": [
            (
                f"{granularity(h)}: {'CLE' if cle else 'no CLE'}, {'S_a trained' if train else 'S_a fixed'}",
                *tuned(h, config={"equalize": cle, "train_cross_layer": train})[1:],
            )
            for h in both
            for cle in (False, True)
            for train in (False, True)
        ],
        "fig12_doubly_per_channel": [
            (f"W4A32 {name}, scales {'trained' if train else 'frozen'}", *tuned(h, config={"train_scales": train})[1:])
            for name, h in {
                "per-tensor": HardwareSpec(rescale="layerwise", activation_bits=None),
                "per-channel": HardwareSpec(activation_bits=None),
                "doubly per-channel": WEIGHT_ONLY,
            }.items()
            for train in (False, True)
        ],
        "efqat_ratio": [
            (f"{ratio}", *tuned(CHANNELWISE, train=EfQAT(ratio=ratio))[1:])
            for ratio in (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
        ],
        "efqat_modes": [
            (f"{mode}, ratio {ratio}", *tuned(CHANNELWISE, train=EfQAT(mode=mode, ratio=ratio))[1:])
            for mode in ("cwpl", "cwpn", "lwpn")
            for ratio in (0.05, 0.25)
        ],
        "relu6": [
            (f"{granularity(h)}: {kind}", *tuned(h, config={"bounded": kind})[1:])
            for h in both
            for kind in ("exact", "relu")
        ],
    }
    return found


def skewed(net: nn.Module, example: Tensor) -> nn.Module:
    """Multiply inner channels by random factors in [1/8, 8] and divide in the next layer: the same function.

    Wherever scales are free, ReLU6 left out, whose bounds a float network cannot scale.
    """
    import copy

    from qft_plugin.graph.batch_norms import merge_norms
    from qft_plugin.graph.dof_map import map_dof
    from qft_plugin.graph.folding import names_of
    from qft_plugin.graph.record import record
    from qft_plugin.graph.torch_model import tensor_of

    net = copy.deepcopy(net).eval()
    call = ((example,), {})
    with torch.no_grad():
        merge_norms(net, net, record(net, call))
        dof_map = map_dof(record(net, call))
        generator = torch.Generator().manual_seed(0)
        log_c = torch.log(torch.tensor(SKEW)) * (2 * torch.rand(dof_map.size, generator=generator) - 1)
        tensors = {name: tensor_of(net, name) for name in names_of(dof_map.layers)}
        for name, tensor in fold_network(dof_map, log_c, tensors).items():
            tensor_of(net, name).copy_(tensor)
    return net


def kernel_errors(net: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the relative rounding error of each 4-bit kernel by granularity (Fig. 3): no images are needed."""
    for name, module in net.named_modules():
        kind = {nn.Conv2d: "conv2d", nn.Linear: "linear"}.get(type(module))
        if kind not in LAYERS:
            continue
        errors = rounding_errors(module.weight.detach(), Axes(kind, getattr(module, "groups", 1)))
        yield {"label": name, "weights": module.weight.numel(), **errors}


@functools.cache
def float_classes(real: real_networks.RealNetwork) -> Tensor:
    """Return the class that the float network names for each test image."""
    return real_networks.classes(real.net, real.test)


def measure(
    host: str, net: nn.Module, real: real_networks.RealNetwork, config: QFTConfig, images: int, runtime: str
) -> dict:
    """Quantize and compare with the float network on the test images."""
    batches = [part.tensor() for part in real.calibration[:images].split(DATASET_BATCH)]
    wall, cpu = time.perf_counter(), time.process_time()
    model = QUANTIZE[host](net, batches, config)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    ran = without_compiler(model) if host == "nncf" else model
    if runtime == "openvino":
        try:
            ran = on_openvino(host, model, real.calibration[:8].tensor())
        except (DeployabilityError, ParityError) as error:
            # A scale for each input channel has no place in the file, and a network that is quantized badly enough
            # makes so much of a single value that rounds the other way that the file is refused.
            logger.warning("test images run in torch: %s", error)
    expected, found = float_classes(real), real_networks.classes(ran, real.test)
    top1, fp_top1 = (real_networks.percent(c == real.labels) for c in (found, expected))
    return {
        "agreement": round(real_networks.percent(found == expected), 2),
        "drop": round(fp_top1 - top1, 2),
        "images": images,
        "seconds": round(seconds[0], 1),
        "cpu_seconds": round(seconds[1], 1),
    }


def with_brevitas(net: nn.Module, batches: list[Tensor], config: QFTConfig) -> nn.Module:
    """Quantize with Brevitas; returns the folded model."""
    from qft_plugin import brevitas

    return brevitas.fold(brevitas.quantize(net, batches, config=config))


def with_nncf(net: nn.Module, batches: list[Tensor], config: QFTConfig) -> nn.Module:
    """Quantize with NNCF."""
    import nncf

    import qft_plugin.nncf  # noqa: F401

    model: nn.Module = nncf.quantize(net, nncf.Dataset(batches), algorithm=config)
    return model


def without_compiler(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a model of NNCF as a function that does not compile NNCF's extension."""
    import qft_plugin.nncf as host

    def run(x: Tensor) -> Tensor:
        with host.without_compiler():
            return model(x)

    return run


def on_openvino(host: str, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Save a quantized model and return its file as a function: int8 kernels are several times faster than torch."""
    with tempfile.TemporaryDirectory() as folder:
        if host == "nncf":
            from qft_plugin.nncf import save_openvino

            path = save_openvino(model, Path(folder) / "model.xml", example).path
        else:
            from qft_plugin.brevitas import save_qcdq

            path = save_qcdq(model, Path(folder) / "model.onnx", example).path
        return real_networks.on_openvino(path)


QUANTIZE = {"brevitas": with_brevitas, "nncf": with_nncf}


def settings_of(host: str, network: str, config: QFTConfig, images: int) -> str:
    """Name what makes a point: experiments share points, such as the defaults."""
    return hashlib.sha256(repr((host, network, config, images)).encode()).hexdigest()[:12]


class Results:
    """The points of one experiment in a file that is whole at any time."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Read what was measured before, here and in the other experiments."""
        self.path = path
        self.data = json.loads(path.read_text()) if path.exists() else {**facts, "points": []}
        others = (json.loads(p.read_text()) for p in path.parent.glob(f"*_{facts['net']}.json"))
        alike = [d for d in others if all(d.get(key) == facts[key] for key in ("test_images", "runtime"))]
        self.known = {point["settings"]: point for data in alike for point in data["points"] if "settings" in point}

    def has(self, label: str) -> bool:
        """Whether a point was measured."""
        return any(point["label"] == label for point in self.data["points"])

    def measure(
        self, label: str, host: str, config: QFTConfig, images: int, real: real_networks.RealNetwork, net: nn.Module
    ) -> None:
        """Measure a point that neither this file nor another of the network has."""
        if self.has(label):
            return
        settings = settings_of(host, "original" if net is real.net else "skewed", config, images)
        runtime = self.data["runtime"]
        numbers = self.known.get(settings) or measure(host, net, real, config, images, runtime)
        self.add({**numbers, "settings": settings, "label": label})

    def add(self, point: dict[str, Any]) -> None:
        """Add a point and write the file."""
        self.data["points"].append(point)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(draft, self.path)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig().images_fed)
    parser.add_argument("--test-images", type=int, default=10_000, help="evenly spaced; tables should use all")
    parser.add_argument("--runtime", choices=["torch", "openvino"], default="torch", help="what runs the test images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of experiments")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    real = real_networks.load(args.real, args.net, FinetuneConfig().max_images)
    every = len(real.test) // args.test_images  # a folder may have its images in the order of their classes
    real = replace(real, test=real.test[::every], labels=real.labels[::every])
    base = QFTConfig(finetune=FinetuneConfig(images_fed=args.images_fed))
    listed = experiments(base, args.images)
    facts = {
        "net": args.net,
        "images_fed": args.images_fed,
        "test_images": len(real.test),
        "runtime": args.runtime,
        "seed": 0,
    }
    names = args.only or [*listed, "fig3_granularity", "skew"]

    def results(name: str) -> Results:
        command = f"python benchmarks/experiments.py --real DIR --net {args.net} --images-fed {args.images_fed}"
        command += "" if len(real.test) == 10_000 else f" --test-images {args.test_images}"
        command += "" if args.runtime == "torch" else f" --runtime {args.runtime}"
        return Results(args.out / f"{name}_{args.net}.json", {**facts, "command": f"{command} --only {name}"})

    for name in names:
        file = results(name)
        if name == "fig3_granularity":
            for point in kernel_errors(real.net):
                if not file.has(point["label"]):
                    file.add(point)
        elif name == "skew":
            changed = skewed(real.net, real.test[:2].tensor())
            for label, host, net, config in skew_points(base, real.net, changed):
                file.measure(label, host, config, args.images, real, net)
        else:
            for label, host, config, images in listed[name]:
                file.measure(label, host, config, images, real, real.net)
        print(json.dumps(file.data), flush=True)


def skew_points(base: QFTConfig, net: nn.Module, changed: nn.Module) -> Iterator[tuple[str, str, nn.Module, QFTConfig]]:
    """Yield what is measured on the network and on the skewed one: the defaults under both hosts, and less."""
    for hardware in (CHANNELWISE, LAYERWISE):
        config = replace(base, hardware=hardware)
        without = replace(config, equalize=False, train_cross_layer=False)
        for host in QUANTIZE:
            yield f"{host} {granularity(hardware)}: original", host, net, config
            yield f"{host} {granularity(hardware)}: skewed", host, changed, config
        yield f"brevitas {granularity(hardware)}: skewed, no CLE, S_a fixed", "brevitas", changed, without


if __name__ == "__main__":
    main()
