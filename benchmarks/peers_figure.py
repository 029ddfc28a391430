"""Draws the bars of the README, the tools on ResNet-20, from the first table of docs/comparison.md.

python benchmarks/peers_figure.py docs/comparison.md docs/figures/peers_resnet20.svg
"""

import argparse
import re
import textwrap
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt  # (only after the choice of what draws)

OURS, OTHERS, EIGHT_BITS = "#3949ab", "#9e9e9e", "#cfcfcf"
LINE = 44
"""Letters on a line of a label."""


def rows(page: str) -> dict[str, float]:
    """Read the agreement per channel of each tool, in %."""
    table = next(part for part in page.split("\n\n") if part.startswith("| tool"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {label(name): float(found.removesuffix(" %")) for name, found, *_ in cells}


def label(tool: str) -> str:
    """Write the name of a tool without marks and brackets."""
    return textwrap.fill(re.sub(r"[`*]| \(.*?\)", "", tool), LINE)


def draw(found: dict[str, float], path: Path) -> None:
    """Draw one bar for each tool, ours in colour: the images whose class changes, so that bars begin at 0."""
    figure, axes = plt.subplots(figsize=(8.5, 0.8 + 0.42 * len(found)), layout="constrained")
    for name, agreement in reversed(found.items()):
        colour = OURS if name.startswith("QFT") else EIGHT_BITS if name.startswith("8-bit") else OTHERS
        axes.barh(name, 100 - agreement, color=colour, height=0.68)
        axes.text(100.1 - agreement, name, f"{100 - agreement:.2f}", va="center")
    axes.set_title("ResNet-20, 4-bit weights per channel", loc="left")
    axes.set_xlabel("test images that get another class than in float, % (less is better)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "qft_plugin"  # the same file from the same numbers
    draw(rows(args.page.read_text(encoding="utf-8")), args.figure)


if __name__ == "__main__":
    main()
