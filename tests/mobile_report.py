"""A made-up report of MobileNetV2: the network's own layers and operations, with numbers as a job would find them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from qft_plugin.report.data import Layer, LayerErrors, LayerFigures, Node, Report

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repetitions and stride of each stage."""

LAYERS = 53

LATENCY = {"QFT 4-bit": 1.21, "float": 3.04, "NNCF 8-bit": 1.3}


class _Network:
    """Writes down layers and operations in the order of execution."""

    def __init__(self) -> None:
        self.layers: list[tuple[str, str, tuple[int, ...]]] = []
        self.nodes: list[tuple[str, str, tuple[str, ...], str]] = []

    def op(self, function: str, *inputs: str, layer: str = "") -> str:
        number = sum(node[1] == function for node in self.nodes)
        self.nodes.append((f"{layer or 'net'}/{function}/{number}", function, inputs, layer))
        return self.nodes[-1][0]

    def layer(self, name: str, kind: str, shape: tuple[int, ...], x: str) -> str:
        self.layers.append((name, kind, shape))
        return self.op(kind, x, layer=name)

    def conv(self, name: str, shape: tuple[int, ...], x: str) -> str:
        return self.op("relu6", self.layer(name, "conv2d", shape, x))


def _mobilenet() -> _Network:
    net, channels, number = _Network(), 32, 0
    x = net.conv("features.0.0", (32, 3, 3, 3), "input")
    for expansion, out, repeats, stride in BLOCKS:
        for repeat in range(repeats):
            number += 1
            start, inner, name = x, channels * expansion, f"features.{number}.conv"
            if expansion > 1:
                x = net.conv(f"{name}.0.0", (inner, channels, 1, 1), x)
            x = net.conv(f"{name}.{int(expansion > 1)}.0", (inner, 1, 3, 3), x)
            x = net.layer(f"{name}.{1 + int(expansion > 1)}", "conv2d", (out, inner, 1, 1), x)
            if channels == out and (stride == 1 or repeat):
                x = net.op("add", start, x)
            channels = out
    x = net.conv("features.18.0", (1280, 320, 1, 1), x)
    x = net.op("dropout", net.op("flatten", net.op("adaptive_avg_pool2d", x)))
    net.layer("classifier.1", "linear", (1000, 1280), x)
    return net


def _figures(random: np.random.Generator, shape: tuple[int, ...], bits: int) -> LayerFigures:
    high = 2 ** (bits - 1) - 1
    ranges = high / 2.6 * np.exp(random.normal(0, 0.15, 4000))
    weights = np.clip(random.normal(0, 1, 4000) * ranges + random.normal(0, 0.1, 4000), -high - 0.9, high + 0.9)
    integers = np.clip(np.round(weights + random.normal(0, 0.25, 4000)), -high, high)
    scale = math.prod(shape) / 4000
    before = np.exp(random.normal(-4, 0.7, shape[0]))
    tensor = float(random.uniform(0.12, 0.22))
    return LayerFigures(
        integers=tuple(int(scale * n) for n in np.bincount((integers + high).astype(int), minlength=2 * high + 1)),
        low=-high,
        before=tuple(int(scale * n) for n in np.histogram(weights, 64, (-high - 1, high + 1))[0]),
        scales_before=tuple(map(float, before)),
        scales_after=tuple(map(float, before * np.exp(random.normal(0.01, 0.04, shape[0])))),
        granularity={"per-tensor": tensor, "per-channel": 0.8 * tensor, "doubly per-channel": 0.72 * tensor},
    )


def _errors(random: np.random.Generator, number: int, bits: int, depthwise: bool) -> LayerErrors:
    coarse = 1.0 if bits == 4 else 0.06
    cost = coarse * float(random.lognormal(-8.2, 0.9)) * (5 if depthwise else 1)
    return LayerErrors(
        weight=coarse * float(random.uniform(0.09, 0.14)),
        output_alone=coarse * float(random.uniform(0.04, 0.12)) + 0.004,
        output_accumulated=0.03 + 0.17 * (number / LAYERS) ** 0.6 + float(random.uniform(0, 0.03)),
        loss_only=cost,
        loss_without=0.0162 - min(0.01, cost),
        agreement_only=1 - min(0.1, 14 * cost),
        agreement_without=0.905 + min(0.05, 9 * cost),
        clipped=float(random.uniform(0, 0.002)),
        dead=float(random.uniform(0.05, 0.22)) if bits == 4 else 0.01,
    )


def mobile_report(*, analysed: bool = True) -> Report:
    """Make the report; without `analysed` the layers have neither errors nor figures."""
    random = np.random.default_rng(3)
    net = _mobilenet()
    layers = []
    for number, (name, kind, shape) in enumerate(net.layers):
        small = number == 0 or math.prod(shape) < 300
        bits = 8 if small else 4
        layers.append(
            Layer(
                name=name,
                weight=f"{name}.weight",
                kind=kind,
                shape=shape,
                bits=bits,
                activation_bits=8,
                scales=shape[0],
                reason="one of the smallest layers, up to 1 % of the weights" if small else "",
                errors=_errors(random, number, bits, shape[1] == 1) if analysed else None,
                figures=_figures(random, shape, bits) if analysed else None,
            )
        )
    nodes = tuple(
        Node(name=name, function=function, inputs=inputs, layer=layer, bits=None if function == "dropout" else 8)
        for name, function, inputs, layer in net.nodes
    )
    steps = np.arange(768)
    losses = 0.0155 + 0.05 * np.exp(-steps / 60) * (1 + 0.2 * np.sin(steps / 9)) + random.normal(0, 0.0016, 768)
    return Report(
        host="brevitas",
        versions={"qft_plugin": "0.1.0", "brevitas": "0.13.4", "torch": "2.13.0", "python": "3.11.7"},
        model="MobileNetV2",
        images=1000,
        held_out=128,
        compared_at=("adaptive_avg_pool2d/0",),
        start_loss=0.0713,
        final_loss=0.0162,
        losses=tuple(map(float, losses)),
        agreement=0.906,
        start_agreement=0.812,
        layers=tuple(layers),
        nodes=nodes,
        warnings=(
            "features.1.conv.0.0: 12 of 32 channels are 0 for every image. They were left as they are. Look whether "
            "the network was pruned.",
        ),
        seconds={"images": 4.1, "read": 2.2, "start": 96.0, "teacher": 61.0, "finetune": 468.0, "write": 5.2},
        peak_memory=4_100_000_000,
        analysed=64 if analysed else 0,
    )


def saved_file() -> SimpleNamespace:
    """Make the report of a QCDQ file, with the fields of `QCDQReport`."""
    itself = SimpleNamespace(relative=0.0925, same_class=1.0, images=8)
    proof = SimpleNamespace(
        weights=LAYERS,
        quantizers=64,
        stretch_error=3.1e-6,
        ties=2.3e-6,
        from_torch=SimpleNamespace(relative=0.0924, same_class=0.875, images=8),
        torch_from_itself=itself,
    )
    report = mobile_report(analysed=False)
    return SimpleNamespace(
        path=Path("models/mobilenet_v2.onnx"),
        bytes=3_742_118,
        proof=proof,
        openvino=proof,
        convolutions={layer.name: "u8" for layer in report.layers if layer.kind == "conv2d"},
        linear={"classifier.1": "u8"},
    )


if __name__ == "__main__":
    print(mobile_report().save_html(sys.argv[1], file=saved_file(), latency=LATENCY))
