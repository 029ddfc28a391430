"""Prints docs/operations.md: what scales do at each torch function, from the table that the package itself uses.

python benchmarks/operations.py > docs/operations.md
"""

from typing import Final

from qft_plugin.graph.operations import ROWS, Operation

TOP: Final = """# Supported operations

Every torch function runs: what is not in this table stays in floating point and is a *barrier*, around which scales are
pinned. The table says what a scale for each channel does at each function, which decides how much of a network is free
([networks](networks.md) counts it). It is made from the rows of `qft_plugin/graph/operations.py` by
`python benchmarks/operations.py`; the tests run every function and check every row. Methods and operators of tensors,
forms in place, and torch's modules that call a function are the same operation.

**Quantized weights** have the layers, and the products of matrices whose second factor is a parameter. All other
functions compute in floating point or, in a runtime, in integers where it can."""

GROUPS: Final = {
    "Layers": (
        ("layer", "matrix product"),
        "The weight is quantized, and absorbs a factor of every channel that it reads and of every one that it makes. "
        "A product of two activations has no weight; it ties or pins their scales.",
    ),
    "Scales pass": (
        ("same", "spatial", "moved", "joined", "reduced", "padded", "attention"),
        "Each channel keeps its factor. Of attention only the values pass; queries and keys are pinned.",
    ),
    "Scales are tied": (
        ("added", "multiplied", "divided"),
        "The factors of both inputs are the same in each channel, or that of the result follows from theirs.",
    ),
    "Scales end or begin": (
        ("normalised", "affine", "bounded"),
        "Weights, biases or bounds absorb the factors: normalisations those of what they make, bounds both.",
    ),
    "Barriers": (
        ("one bound", None),
        "No factor passes, and the scales around are pinned. `HardwareSpec(activation_scale='explicit')` frees those "
        "after the elementwise curves, by a multiplication.",
    ),
}
"""A heading, the rules of `Operation.rule` below it, and what they mean for a scale."""

NOTES: Final = {
    "batch_norm": "folded into the layer before it; elsewhere an affine function, which absorbs factors",
    "addmm": "its weight is quantized where the host does",
}


def names(row: Operation) -> str:
    """Write a function with its other spellings, without those that only Python's operators have."""
    return ", ".join(f"`{name}`" for name in (row.name, *(n for n in row.spellings if not n.startswith("__"))))


def line(row: Operation) -> str:
    """Write the row of a function."""
    modules = ", ".join(f"`{module.__name__}`" for module in row.modules)
    kind = NOTES.get(row.name) or ("elementwise curve" if row.curve else row.rule or "")
    return f"| {names(row)} | {modules} | {kind} | {'yes' if row.keeps_grid else ''} |"


def page() -> str:
    """Write the whole page."""
    parts = [TOP]
    for title, (rules, meaning) in GROUPS.items():
        rows = [row for row in ROWS if row.rule in rules and not row.reads and row.memory != "argument"]
        table = ["| function | modules | how | integers stay integers |", "|---|---|---|---|", *map(line, rows)]
        parts.append(f"## {title}\n\n{meaning}\n\n" + "\n".join(table))
    reads = ", ".join(f"`{row.name}`" for row in ROWS if row.reads == "values")
    parts.append(
        "## What a file cannot hold\n\nA file is a trace of one path. A forward that branches on values "
        f"({reads}) is refused at the save, or told."
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
