"""Runs the integration tests against versions of the hosts, one tox environment per recipe.

    python integration/run.py                  # all recipes; prints a table of the results
    python integration/run.py nncf217 nncf340  # these two
    python integration/run.py --table          # runs nothing; prints the table of what the recipes combine

A recipe is a file of requirements, `recipes/<tox environment>.txt`, from which tox installs the host and torch. Its
comments are printed as notes. Needs tox.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = {"NNCF": "nncf", "Brevitas": "brevitas[export]"}


@dataclass(frozen=True)
class Recipe:
    """The versions that an environment combines."""

    host: str
    version: str
    torch: str
    notes: str


def read(file: Path) -> Recipe:
    """Read a recipe, whose environment has the name of the host and digits.

    Raises:
        ValueError: it does not name one version of the host and one of torch.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    notes = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    pins = {name: version for line in lines if not line.startswith("#") for name, _, version in [line.partition("==")]}
    host = next(host for host in PACKAGES if host.lower() == file.stem.rstrip("0123456789"))
    if not (pins.get("torch") and pins.get(PACKAGES[host])):
        raise ValueError(f"{file.name}: should pin torch and {PACKAGES[host]} by ==. Found {pins}.")
    return Recipe(host, pins[PACKAGES[host]], pins["torch"], notes)


def recipes() -> dict[str, Recipe]:
    """Read all recipes, by the name of their tox environment."""
    return {file.stem: read(file) for file in sorted((HERE / "recipes").glob("*.txt"))}


def table(chosen: Mapping[str, Recipe], results: Mapping[str, str] | None = None) -> str:
    """Print recipes as a Markdown table, with a column of results where there are any."""
    rows = [["host", "version", "torch", *(["result"] if results is not None else []), "notes"]]
    rows.append(["---"] * len(rows[0]))
    for name, recipe in chosen.items():
        result = [] if results is None else [results.get(name, "not run")]
        rows.append([recipe.host, recipe.version, recipe.torch, *result, recipe.notes])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(name: str) -> str:
    """Run the tests of one environment and say how they ended."""
    ended = subprocess.run([sys.executable, "-m", "tox", "run", "-e", name], cwd=HERE.parent, check=False)
    return "passes" if ended.returncode == 0 else f"fails (exit {ended.returncode})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns 1 where something failed."""
    known = recipes()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "environments", nargs="*", metavar="ENV", help=f"of {', '.join(known)}; all where none is given"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the recipes")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.environments) - set(known))
    if unknown:
        parser.error(f"unknown environments: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in asked.environments or known}
    results = None if asked.table else {name: run(name) for name in chosen}
    print(table(chosen, results))
    return int(results is not None and any(result != "passes" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
