"""The recipes are the one place for versions of hosts; tox and the table that documents them follow."""

import configparser
import re
from pathlib import Path

import pytest
import run

ROOT = Path(__file__).parents[2]


def environments():
    """Read from tox.ini the names of the environments of both hosts."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    sections = [re.fullmatch(r"testenv:(nncf|brevitas)\{(.*)\}", name) for name in tox.sections()]
    return {f"{found[1]}{number}" for found in sections if found for number in found[2].split(",")}


def test_every_environment_has_its_recipe():
    """Each tox environment of a host has one recipe, and none is left over."""
    assert environments() == set(run.recipes())


def test_versions_of_hosts_stand_in_recipes_only():
    """What tox.ini installs of a host has its version from a recipe, in the demo and the benchmarks too."""
    assert re.findall(r"(?:nncf|brevitas(?:\[export\])?)==.*", (ROOT / "tox.ini").read_text()) == []


def test_the_table_lists_every_recipe(capsys):
    """`--table` runs nothing and prints one row per recipe, and the docs have what it prints."""
    assert run.main(["--table"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[:2] == ["| host | version | torch | notes |", "| --- | --- | --- | --- |"]
    assert [line.split(" | ")[1] for line in lines[2:]] == [recipe.version for recipe in run.recipes().values()]
    assert printed in (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")


def test_a_recipe_without_a_version(tmp_path):
    """A recipe that leaves the version of its host open is refused by its name."""
    file = tmp_path / "nncf999.txt"
    file.write_text("torch==2.13.0\nnncf\n")
    with pytest.raises(ValueError, match=r"nncf999\.txt: should pin torch and nncf"):
        run.read(file)


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
