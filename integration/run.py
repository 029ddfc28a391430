"""Runs the tests under versions of the hosts, of torch and of Python, and keeps the table of what was run.

    python integration/run.py                  # all environments, one after the other; then the table
    python integration/run.py nncf217 nncf340  # these two; the rows of the others stay
    python integration/run.py --collect        # runs nothing; takes what `tox run -m matrix` has left in .tox
    python integration/run.py --table          # runs nothing; prints the table

An environment of tox leaves a record of its run (`record.py`). The records are kept in `matrix.json`, the last of each
environment, and the table in `docs/hosts.md` is made from them alone. A recipe is a file of requirements,
`recipes/<tox environment>.txt`, from which tox installs the host and torch; its comments are the notes of its row.
Needs tox.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT = HERE / "matrix.json"
PAGE = ROOT / "docs" / "hosts.md"
RECORD = "record.json"

PACKAGES = {"NNCF": "nncf", "Brevitas": "brevitas[export]"}

HEAD = ["environment", "host", "Python", "torch", "OpenVINO", "tests", "result", "date", "notes"]

CHOSEN = {
    "core": "core",
    "core and not nncf_only": "core",
    "not table": "all",
    "not table and not nncf_only": "all",
    "": "unit",
}
"""What the expressions of markers in tox.ini mean in the table."""


@dataclass(frozen=True)
class Recipe:
    """The versions that an environment combines."""

    host: str
    version: str
    pins: Mapping[str, str]
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
    return Recipe(host, pins[PACKAGES[host]], {name.partition("[")[0]: pin for name, pin in pins.items()}, notes)


def recipes() -> dict[str, Recipe]:
    """Read all recipes, by the name of their tox environment."""
    return {file.stem: read(file) for file in sorted((HERE / "recipes").glob("*.txt"))}


def kept() -> dict[str, dict[str, Any]]:
    """Read the last record of each environment; one that was never run has its reason, `not_run`, in its place."""
    found: dict[str, dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8"))
    return found


def result_of(record: Mapping[str, Any]) -> str:
    """Say in one line how a run ended, or why there was none."""
    if "not_run" in record:
        return f"not run: {record['not_run']}"
    failed = record["failed"] + record["error"]
    counts = [f"{record['passed']} passed", f"{failed} failed" if failed else "", f"{record['skipped']} skipped"]
    return ", ".join(count for count in counts if count and not count.startswith("0 "))


def row(name: str, record: Mapping[str, Any], recipe: Recipe | None) -> list[str]:
    """Describe an environment by what was installed in it; by its recipe where it was not run."""
    found: Mapping[str, str] = record.get("packages", recipe.pins if recipe else {})
    hosts = [f"{host} {found[host.lower()]}" for host in PACKAGES if host.lower() in found]
    tests = CHOSEN.get(record["tests"], record["tests"]) if "tests" in record else ""
    versions = [record.get("python", ""), found.get("torch", ""), found.get("openvino", "")]
    notes = record.get("notes") or (recipe.notes if recipe else "")
    return [name, ", ".join(hosts), *versions, tests, result_of(record), record.get("date", ""), notes]


def table(records: Mapping[str, Mapping[str, Any]], known: Mapping[str, Recipe]) -> str:
    """Print records as a Markdown table."""
    rows = [HEAD, ["---"] * len(HEAD), *(row(name, records[name], known.get(name)) for name in sorted(records))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def collect(names: Sequence[str]) -> None:
    """Take the records that environments have left, and write `matrix.json` and the table in the docs."""
    records = kept()
    for name in names:
        left = ROOT / ".tox" / name / RECORD
        if left.exists():
            notes = {key: records[name][key] for key in ("notes",) if key in records.get(name, {})}
            records[name] = {**json.loads(left.read_text(encoding="utf-8")), **notes}
    KEPT.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    places = [place for place, line in enumerate(lines) if line.startswith("| environment |")]
    end = next(place for place in range(places[0], len(lines)) if not lines[place].startswith("|"))
    lines[places[0] : end] = table(records, recipes()).splitlines()
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(name: str) -> bool:
    """Run the tests of one environment and say whether they passed."""
    (ROOT / ".tox" / name / RECORD).unlink(missing_ok=True)
    return subprocess.run([sys.executable, "-m", "tox", "run", "-e", name], cwd=ROOT, check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns 1 where something failed."""
    known = list(kept())
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "environments", nargs="*", metavar="ENV", help=f"of {', '.join(known)}; all that can run where none is given"
    )
    parser.add_argument("--collect", action="store_true", help="run nothing, take the records that tox has left")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.environments) - set(known))
    if unknown:
        parser.error(f"unknown environments: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = asked.environments or [name for name in known if asked.collect or "not_run" not in kept()[name]]
    passed = True
    if not asked.table:
        passed = asked.collect or [run(name) for name in chosen].count(False) == 0
        collect(chosen)
    print(table(kept(), recipes()))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
