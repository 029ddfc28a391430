"""Runs the integration tests against versions of the hosts, one tox environment per recipe.

    python integration/run.py                  # all recipes; prints a table of the results
    python integration/run.py nncf217 nncf340  # these two
    python integration/run.py --table          # runs nothing; prints the table of what the recipes combine

A recipe is `recipes/<tox environment>.toml` with the fields host, version, torch and notes. Needs Python 3.11 and tox.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
FIELDS = ("host", "version", "torch", "notes")

Recipe = Mapping[str, str]


def recipes() -> dict[str, Recipe]:
    """Read all recipes, by the name of their tox environment.

    Raises:
        ValueError: a recipe lacks a field or has another one.
    """
    found = {}
    for file in sorted((HERE / "recipes").glob("*.toml")):
        recipe = tomllib.loads(file.read_text(encoding="utf-8"))
        if tuple(recipe) != FIELDS:
            raise ValueError(f"{file.name}: should have the fields {FIELDS}. Found {tuple(recipe)}.")
        found[file.stem] = recipe
    return found


def table(chosen: Mapping[str, Recipe], results: Mapping[str, str] | None = None) -> str:
    """Print recipes as a Markdown table, with a column of results where there are any."""
    rows = [["host", "version", "torch", *(["result"] if results is not None else []), "notes"]]
    rows.append(["---"] * len(rows[0]))
    for name, recipe in chosen.items():
        result = [] if results is None else [results.get(name, "not run")]
        rows.append([recipe["host"], recipe["version"], recipe["torch"], *result, recipe["notes"]])
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
