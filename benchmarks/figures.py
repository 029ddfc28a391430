"""Draws the figures of docs/results.md and prints its tables from the files that `benchmarks/experiments.py` wrote.

python benchmarks/figures.py benchmarks/results docs/figures > docs/measured.md
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt  # (only after the choice of what draws)

NAMES = {"resnet20": "ResNet-20", "mobilenetv2": "MobileNetV2"}
CURVES = {
    "fig5_images": ("Images (the number of images fed is constant)", "Fig. 5"),
    "fig6_cross_entropy": ("Proportion of cross entropy in the loss", "Fig. 6"),
    "fig7_learning_rate": ("Learning rate of weights and biases", "Fig. 7"),
    "efqat_ratio": ("Share of channels that train", "EfQAT"),
}
LINEAR = ("fig6_cross_entropy", "efqat_ratio")
PER_CHANNEL = ("efqat_ratio",)
BARS = ("fig8_fig9_cle_and_training", "fig12_doubly_per_channel")
TITLES = {
    "table1_ours": "Table 1, our rows",
    "table2_heuristics": "Table 2: heuristics without a finetune",
    "fig8_fig9_cle_and_training": "Figures 8 and 9: CLE before, and factors trained",
    "fig12_doubly_per_channel": "Figure 12: granularity of 4-bit weights alone (W4A32), scales trained or frozen",
    "relu6": "ReLU6 exact, or replaced by ReLU",
    "skew": "Channels multiplied by random factors in [1/8, 8]",
    "skew_short": "The same with half of the images fed, and without CLE and trained factors",
    "efqat_modes": "EfQAT: channels of each layer (cwpl), of the network (cwpn), or whole layers (lwpn)",
    **{name: f"{figure}: {label.lower()}" for name, (label, figure) in CURVES.items()},
}


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read all files of a folder by experiment, one for each network."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), reverse=True):
        name = path.stem.rpartition("_")[0]
        found.setdefault(name, []).append(json.loads(path.read_text()))
    return found


def table(name: str, files: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with the points of an experiment."""
    yield f"## {TITLES[name]}"
    for data in files:
        yield ""
        fed, tested = data["images_fed"], data.get("test_images", 10_000)
        where = {"torch": "", "openvino": ", of the file in OpenVINO"}[data["runtime"]]
        yield f"{NAMES[data['net']]}, {fed:,} images fed, {tested:,} test images{where}:"
        yield ""
        yield "| | agreement | drop | images | CPU seconds |"
        yield "|---|---|---|---|---|"
        for p in data["points"]:
            numbers = f"{p['agreement']:.2f} | {p['drop']:.2f} | {p['images']:,} | {p['cpu_seconds']:.0f}"
            yield f"| {p['label']} | {numbers} |"
    yield ""
    yield from (f"`{data['command']}`\n" for data in files)


def curve(name: str, files: list[dict[str, Any]], path: Path) -> None:
    """Draw agreement over a setting."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for data in files:
        points = sorted((float(p["label"]), p["agreement"]) for p in data["points"])
        axes.plot(*zip(*points, strict=True), marker="o", label=NAMES[data["net"]])
    if name not in LINEAR:
        axes.set_xscale("log")
    axes.set_xlabel(CURVES[name][0])
    axes.set_ylabel(f"Agreement, %, weights per {'channel' if name in PER_CHANNEL else 'tensor'}")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def bars(files: list[dict[str, Any]], path: Path) -> None:
    """Draw the agreement of each combination of settings."""
    rows = len(files[0]["points"])
    shape = {"figsize": (5.5 * len(files), 0.6 + 0.32 * rows), "layout": "constrained", "squeeze": False}
    figure, several = plt.subplots(1, len(files), **shape)
    for axes, data in zip(several[0], files, strict=True):
        values = {p["label"]: p["agreement"] for p in reversed(data["points"])}
        axes.barh(list(values), list(values.values()), color="tab:blue")
        axes.set_xlim(min(values.values()) - 1, 100)
        axes.set_title(NAMES[data["net"]])
        axes.set_xlabel("Agreement with the float network, %")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def kernel_errors(files: list[dict[str, Any]], path: Path) -> None:
    """Draw the rounding error of each kernel by granularity (Fig. 3)."""
    figure, several = plt.subplots(1, len(files), figsize=(5 * len(files), 3.2), layout="constrained", squeeze=False)
    for axes, data in zip(several[0], files, strict=True):
        for key, marker in {"per-tensor": "s", "per-channel": "o", "doubly per-channel": "^"}.items():
            axes.plot([p[key] for p in data["points"]], marker=marker, markersize=3, linewidth=0.8, label=key)
        axes.set_xlabel(f"Layer of {NAMES[data['net']]}")
        axes.set_ylabel("Relative error of the 4-bit kernel")
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw and print everything that was measured."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "qft_plugin"  # the same file from the same numbers
    found = load(folder)
    print("# Measured points\n\nMade by `python benchmarks/figures.py benchmarks/results docs/figures`; ", end="")
    print("see [results](results.md) for what they mean. Each command needs `--out FOLDER` too.\n")
    for name in TITLES:
        if name in found:
            print("\n".join(table(name, found[name])))
    for name in CURVES:
        if name in found:
            curve(name, found[name], out / f"{name}.svg")
    for name in BARS:
        if name in found:
            bars(found[name], out / f"{name}.svg")
    if "fig3_granularity" in found:
        kernel_errors(found["fig3_granularity"], out / "fig3_granularity.svg")


if __name__ == "__main__":
    main()
