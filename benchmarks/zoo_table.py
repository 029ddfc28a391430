"""Writes the section of docs/networks.md on how architectures of other libraries fare, from lines of `zoo.py`."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

TITLES: Final = {"nncf": "NNCF", "brevitas": "Brevitas"}
COLUMNS: Final = "error | own 8 bits | from torch | int8 | free | s"
OUTCOMES: Final = ("ok", "refused", "crashed")
HEAD: Final = """
## How architectures of other libraries fare

Random weights, statistics of BatchNorms from some batches, 16 items of calibration, a finetune of a few steps: enough
to see whether a network can be quantized, saved and proven, and too little for the accuracy that a trained one reaches.
Made by `python -m tox run -e zoo -- --out FILE` and `python benchmarks/zoo.py --table FILE`.

- **ok**: quantized with 4-bit weights, saved, proven, and the file runs on batches of another size. **refused**: by an
  error of this library that says why. **crashed**: by any other error, or by taking more than the time limit.
- **error**: relative L2 difference of the file's outputs from the float network's, on inputs that nothing else has
  seen. **own 8 bits**: that of the host's own quantization with 8-bit weights, where it succeeds and can be converted.
  **from torch**: difference of the file's outputs from those of the quantized model in torch.
- **int8**: convolutions and linear layers of the file that OpenVINO's CPU plugin runs in int8. **free**: layer inputs
  whose scales are free in every channel, without those that read the input of the network.
- **s**: seconds of quantizing and saving, on one thread.
"""


def page(lines: list[dict[str, Any]]) -> str:
    """Write the section: counts for each family, and a table of all networks."""
    by_name: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault((line["family"], line["name"]), {})[line["host"]] = line
    head = "| network |" + "".join(f" {title} | {COLUMNS} |" for title in TITLES.values())
    body = (
        f"| {name} |" + "".join(_cells(of_host.get(h)) for h in TITLES)
        for (_, name), of_host in sorted(by_name.items())
    )
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([HEAD, *_counts(lines), "", head, rule, *body, ""])


def _counts(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "| host | family | networks | ok | refused | crashed | the host's own 8 bits | of these, not ours |"
    yield "|---|---|---|---|---|---|---|---|"
    for host in TITLES:
        of_host = [line for line in lines if line["host"] == host]
        families = {line["family"]: None for line in of_host}
        for family in [*sorted(families), "all"] if of_host else []:
            group = [line for line in of_host if family in (line["family"], "all")]
            found = Counter(line["outcome"] for line in group)
            own = [line for line in group if line.get("host_outcome") == "ok"]
            not_ours = sum(line["outcome"] != "ok" for line in own)
            counts = " | ".join(str(found[outcome]) for outcome in OUTCOMES)
            yield f"| {TITLES[host]} | {family} | {len(group)} | {counts} | {len(own)} | {not_ours} |"


def _cells(line: dict[str, Any] | None) -> str:
    if line is None:
        return " |" * 7
    own = line.get("host_to_float") if line.get("host_outcome") == "ok" else None
    found = line.get("file_to_float"), own, line.get("file_to_torch")
    errors = " | ".join("" if e is None else f"{e:.3f}" for e in found)
    int8 = _of(line, ("int8_convolutions", "int8_linear"), ("convolutions", "linear"))
    free = _of(line, ("free_inputs",), ("layer_inputs",))
    seconds = line.get("quantize_seconds", 0) + line.get("save_seconds", 0)
    return f" {line['outcome']} | {errors} | {int8} | {free} | {seconds:.0f} |"


def _of(line: dict[str, Any], some: tuple[str, ...], all_of_them: tuple[str, ...]) -> str:
    if not all(name in line for name in some):
        return ""
    return f"{sum(line[name] for name in some)} of {sum(line[name] for name in all_of_them)}"


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file that need not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
