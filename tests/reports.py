"""A small report for tests of how one is shown and kept."""

from typing import Any

from qft_plugin.report.data import Layer, Report


def layer(name: str, bits: int | None = 4, **changes: Any) -> Layer:
    """Return a convolution."""
    reason, scales = "" if bits else f"why {name}", 8 if bits else 0
    said = {"reason": reason, "scales": scales, "shape": (8, 3, 3, 3), "activation_bits": 8, **changes}
    return Layer(name=name, weight=f"{name}.weight", kind="conv2d", bits=bits, **said)


REPORT = Report(
    host="nncf",
    versions={"torch": "2.13.0"},
    model="ResNet",
    images=512,
    held_out=64,
    compared_at=("the input of avgpool",),
    start_loss=0.5,
    final_loss=0.25,
    losses=(0.5, 0.3),
    agreement=0.75,
    start_agreement=0.5,
    layers=(layer("a"), layer("b", 8), layer("c", None)),
    warnings=("Something.",),
    seconds={"images": 1.0, "finetune": 2.5},
    peak_memory=3 * 2**30,
)
