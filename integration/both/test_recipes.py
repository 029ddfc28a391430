"""The recipes, the tox environments and the table that documents them say the same."""

import configparser
import re
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML; the other versions check this")

import run

TOX = Path(run.HERE).parent / "tox.ini"


PACKAGES = {"NNCF": "nncf", "Brevitas": "brevitas[export]"}


def pinned():
    """Read from tox.ini which versions of host and torch each environment of a host installs."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(TOX)
    found = {}
    for host, package in PACKAGES.items():
        short = host.lower()
        section = next(name for name in tox.sections() if name.startswith(f"testenv:{short}{{"))
        deps = tox[section]["deps"]
        torch = re.search(r"torch==(\S+)", deps)[1]
        for number in re.search(r"\{(.*)\}", section)[1].split(","):
            name = f"{short}{number}"
            version = re.search(rf"^{name}: {re.escape(package)}==(\S+)", deps, re.M)[1]
            found[name] = (host, version, torch)
    return found


def test_every_environment_has_its_recipe():
    """Each tox environment of a host has one recipe with the versions that it installs, and none is left over."""
    recipes = {name: (r["host"], r["version"], r["torch"]) for name, r in run.recipes().items()}
    assert recipes == pinned()


def test_the_table_lists_every_recipe(capsys):
    """`--table` runs nothing and prints one row per recipe."""
    assert run.main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| host | version | torch | notes |", "| --- | --- | --- | --- |"]
    assert [line.split(" | ")[1] for line in lines[2:]] == [recipe["version"] for recipe in run.recipes().values()]


def test_results_stand_in_the_table(capsys, monkeypatch):
    """A failing environment is shown in its row and in the exit code, and only the chosen ones are run."""
    monkeypatch.setattr(run, "run", lambda name: "passes" if name == "nncf340" else "fails (exit 1)")
    assert run.main(["nncf340"]) == 0
    assert run.main(["nncf217", "nncf340"]) == 1
    rows = [line.split(" | ")[1:4] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [["2.17.0", "2.13.0", "fails (exit 1)"], ["3.4.0", "2.13.0", "passes"]]


def test_an_unknown_environment(capsys):
    """A name without a recipe is refused with the names that there are."""
    with pytest.raises(SystemExit):
        run.main(["nncf216"])
    assert "nncf217" in capsys.readouterr().err
