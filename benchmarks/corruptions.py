"""Prints the tables of docs/proof.md: which corruptions of files the proof notices, and whether it names the place.

python benchmarks/corruptions.py --results corruptions.jsonl

Every outcome is added to the file of results at once; a run that was stopped goes on where it was.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

STYLES: Final = {"ir": "IR", "qcdq": "QCDQ", "qonnx": "QONNX"}


def measured(styles: Sequence[str], networks: Sequence[str], examples: Sequence[str], results: Path) -> None:
    """Prove right and corrupted files, and add a line for each to a file.

    Args:
        styles: formats of files.
        networks: names in `integration/corruptions.py`.
        examples: likewise.
        results: what is there is not done again.
    """
    import corruptions

    done = {tuple(line[key] for key in ("style", "network", "example", "kind")) for line in read(results)}
    for style in styles:
        for network in networks:
            for example in examples:
                right = corruptions.right(network, style, example)
                where = {"style": style, "network": network, "example": example}
                if (style, network, example, "none") not in done:
                    add(results, {**where, "kind": "none", **of_right(right, example)})
                for c in right.corruptions:
                    if (style, network, example, c.kind) in done:
                        continue
                    found = corruptions.try_out(right, c, example)
                    outcome = {"noticed": found.noticed, "named": found.named, "message": found.message}
                    add(results, {**where, "kind": c.kind, "place": c.place, **outcome})


def of_right(right: Any, example: str) -> dict[str, Any]:
    """Prove a right file and return what was measured."""
    from qft_plugin.errors import ParityError

    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            proof = right.prove(right.file(), example)
    except ParityError as error:
        return {"noticed": True, "message": str(error)}
    return {
        "noticed": False,
        "warned": [str(w.message) for w in warned],
        "stretch_error": proof.stretch_error,
        "ties": proof.ties,
        "from_torch": proof.from_torch.relative,
        "itself": proof.torch_from_itself.relative,
    }


def read(results: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of results."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def add(results: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of results."""
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def tables(lines: Iterable[dict[str, Any]]) -> str:
    """Write the tables in markdown."""
    lines = list(lines)
    right = [line for line in lines if line["kind"] == "none"]
    wrong = [line for line in lines if line["kind"] != "none"]
    networks = list(dict.fromkeys(line["network"] for line in wrong))
    places = {(line["style"], line["network"], line["kind"]) for line in wrong}
    text = (
        f"{len(places)} corruptions of {len({(la['style'], la['network']) for la in right})} right files, proved "
        f"{len(wrong)} times with the five kinds of examples: {sum(la['noticed'] for la in wrong)} noticed, "
        f"{sum(la['named'] for la in wrong)} of them by the name of a layer next to the place. "
        f"Right files proved {len(right)} times: {sum(la['noticed'] for la in right)} refused.\n\n"
    )
    text += _table("corruption", "kind", wrong, networks)
    text += "\n" + _table("example", "example", wrong, networks)
    text += "\n| format | right files proved | refused | largest `stretch_error` | largest `ties` |\n"
    text += "|---|---|---|---|---|\n"
    for style, name in STYLES.items():
        of_style = [line for line in right if line["style"] == style]
        if of_style:
            worst = [max(line.get(key, 0.0) for line in of_style) for key in ("stretch_error", "ties")]
            refused = sum(line["noticed"] for line in of_style)
            text += f"| {name} | {len(of_style)} | {refused} | {worst[0]:.1e} | {worst[1]:.1e} |\n"
    for line in wrong:
        if not (line["noticed"] and line["named"]):
            what = "not noticed" if not line["noticed"] else "not named"
            text += f"\n- {what}: {line['kind']}, {line['network']}, {STYLES[line['style']]}, {line['example']}."
    return text


def _table(head: str, key: str, wrong: Sequence[dict[str, Any]], networks: Sequence[str]) -> str:
    text = f"| {head} | {' | '.join(networks)} |\n|---|{'---|' * len(networks)}\n"
    for value in dict.fromkeys(line[key] for line in wrong):
        cells = []
        for network in networks:
            found = [line for line in wrong if line[key] == value and line["network"] == network]
            good = sum(line["noticed"] and line["named"] for line in found)
            cells.append(f"{good} of {len(found)}" if found else "")
        text += f"| {value} | {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))
    import corruptions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--styles", nargs="*", default=list(STYLES))
    parser.add_argument("--networks", nargs="*", default=list(corruptions.NETWORKS))
    parser.add_argument("--examples", nargs="*", default=list(corruptions.EXAMPLES))
    asked = parser.parse_args()
    measured(asked.styles, asked.networks, asked.examples, asked.results)
    sys.stdout.write(tables(read(asked.results)))
