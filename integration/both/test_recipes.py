"""The recipes are the one place for versions of hosts; tox and the table of what was run follow."""

import configparser
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import record
import run

ROOT = Path(__file__).parents[2]

RAN = {
    "date": "2026-11-27",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "nncf": "3.4.0", "openvino": "2026.4.1"},
    "tests": "core",
    "passed": 12,
    "failed": 0,
    "error": 0,
    "skipped": 3,
    "failures": [],
}


def tox():
    """Read tox.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def environments():
    """Read from tox.ini the names of the environments of both hosts."""
    sections = [re.fullmatch(r"testenv:(nncf|brevitas)\{(.*)\}", name) for name in tox().sections()]
    return {f"{found[1]}{number}" for found in sections if found for number in found[2].split(",")}


def spelled_out(names):
    """Write every name of a list of tox out: `a{1,2}` is a1 and a2."""
    brace = re.search(r"\{([^{}]*)\}", names)
    if not brace:
        return [names]
    return [
        each
        for part in brace[1].split(",")
        for each in spelled_out(names[: brace.start()] + part + names[brace.end() :])
    ]


def test_every_environment_has_its_recipe():
    """Each tox environment of a host has one recipe, and none is left over."""
    assert environments() == set(run.recipes())


def test_versions_of_hosts_stand_in_recipes_only():
    """What tox.ini installs of a host has its version from a recipe, in the demo and the benchmarks too."""
    assert re.findall(r"(?:nncf|brevitas(?:\[export\])?)==.*", (ROOT / "tox.ini").read_text()) == []


def test_the_matrix_is_the_table():
    """Each environment of the label has a row, run or with the reason why not, and no other has one."""
    label = next(line for line in tox()["tox"]["labels"].splitlines() if line.startswith("matrix ="))
    parts = re.split(r",\s*(?![^{]*\})", label.partition("=")[2].strip())
    assert {name for part in parts for name in spelled_out(part)} == set(run.kept())


def test_the_docs_have_the_table(capsys):
    """`--table` runs nothing and prints one row for each environment, and the docs have what it prints."""
    assert run.main(["--table"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "| environment | host | Python | torch | OpenVINO | tests | result | date | notes |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == sorted(run.kept())
    assert printed in (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(run.recipes()))
def test_what_was_run_is_what_the_recipe_says(name):
    """A recipe whose versions change is run again before its row stands."""
    found = run.kept()[name]
    assert "not_run" in found or all(found["packages"][each] == pin for each, pin in run.recipes()[name].pins.items())


def test_nothing_that_failed_is_supported():
    """No row of the table has a test that fails, and each that was run has tests that passed."""
    for name, found in run.kept().items():
        assert "not_run" in found or (found["passed"] > 0 and found["failures"] == []), name


def test_a_recipe_without_a_version(tmp_path):
    """A recipe that leaves the version of its host open is refused by its name."""
    file = tmp_path / "nncf999.txt"
    file.write_text("torch==2.13.0\nnncf\n")
    with pytest.raises(ValueError, match=r"nncf999\.txt: should pin torch and nncf"):
        run.read(file)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make a project of three environments: one that was run, one that failed, one that cannot be run."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "KEPT", tmp_path / "matrix.json")
    monkeypatch.setattr(run, "PAGE", tmp_path / "hosts.md")
    failed = {**RAN, "failed": 2, "error": 1, "failures": ["a", "b", "c"]}
    run.KEPT.write_text(json.dumps({"nncf340": RAN, "nncf217": failed, "torch27": {"not_run": "no wheel"}}))
    run.PAGE.write_text("# Hosts\n\n| environment |\n| --- |\n| old |\n\nAfter it.\n")
    return tmp_path


def leave(project, name, **changes):
    """Write what an environment of tox leaves."""
    folder = project / ".tox" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run.RECORD).write_text(json.dumps({**RAN, **changes}))


def test_records_are_collected(project, capsys):
    """What ran replaces its row and the reason why it had not run; all other rows and the page around stay."""
    leave(project, "nncf217", passed=7)
    leave(project, "torch27", tests="", packages={"torch": "2.7.1"})
    assert run.main(["--collect"]) == 0
    page = run.PAGE.read_text().splitlines()
    assert page[:2] + page[-2:] == ["# Hosts", "", "", "After it."]
    rows = {line.split(" | ")[0]: line.split(" | ")[1:8] for line in page[4:-2]}
    assert rows == {
        "| nncf217": ["NNCF 3.4.0", "3.11.7", "2.13.0", "2026.4.1", "core", "7 passed, 3 skipped", "2026-11-27"],
        "| nncf340": ["NNCF 3.4.0", "3.11.7", "2.13.0", "2026.4.1", "core", "12 passed, 3 skipped", "2026-11-27"],
        "| torch27": ["", "3.11.7", "2.7.1", "", "unit", "12 passed, 3 skipped", "2026-11-27"],
    }
    before = run.PAGE.read_text(), run.KEPT.read_text()
    assert run.main(["--collect"]) == 0
    assert (run.PAGE.read_text(), run.KEPT.read_text()) == before
    assert "\n".join(page[2:-2]) in capsys.readouterr().out


@pytest.mark.usefixtures("project")
def test_a_failure_stands_in_the_table():
    """Failed tests and errors are counted together, and what cannot be run says why."""
    rows = run.table(run.kept(), {}).splitlines()
    assert "| 12 passed, 3 failed, 3 skipped |" in rows[2]
    assert "| not run: no wheel |" in rows[4]


def test_environments_are_run(project, monkeypatch):
    """All that can be run where none is named; a failing one gives the exit code, and takes no old record."""
    ran = []

    def tox_run(command, **_):
        ran.append(command[-1])
        return SimpleNamespace(returncode=int(command[-1] == "nncf217"))

    monkeypatch.setattr(run.subprocess, "run", tox_run)
    leave(project, "nncf340", passed=99)
    assert run.main(["nncf340"]) == 0
    assert run.kept()["nncf340"]["passed"] == RAN["passed"]
    assert run.main([]) == 1
    assert ran == ["nncf340", "nncf217", "nncf340"] or ran == ["nncf340", "nncf340", "nncf217"]


def test_an_unknown_environment(capsys):
    """A name without a row is refused with the names that there are."""
    with pytest.raises(SystemExit):
        run.main(["nncf216"])
    assert "nncf217" in capsys.readouterr().err


def ended(file, *, keyword="", paths=("integration/both",), markers="core"):
    """Call the plugin at the end of a run of 2 tests."""
    config = SimpleNamespace(
        getoption={"record": file}.get, args=list(paths), option=SimpleNamespace(keyword=keyword, markexpr=markers)
    )
    record.pytest_configure(config)
    stats = {"passed": [object()], "failed": [SimpleNamespace(nodeid="test_b")]}
    record.pytest_terminal_summary(SimpleNamespace(stats=stats), 1, config)


def test_a_run_is_written_down(tmp_path):
    """The record has what ran, the versions without the name of a build, and what failed."""
    file = tmp_path / "record.json"
    ended(file)
    found = json.loads(file.read_text())
    assert set(found) - set(RAN) == {"xfailed"}
    assert (found["tests"], found["passed"], found["failed"], found["failures"]) == ("core", 1, 1, ["test_b"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["packages"]["torch"])


@pytest.mark.parametrize("part", [{"keyword": "a_test"}, {"paths": ["integration/both/test_a.py::test_b"]}])
def test_a_part_of_a_run_is_not_written_down(part, tmp_path):
    """A run of chosen tests says nothing of a version, and leaves no record of an earlier run either."""
    file = tmp_path / "record.json"
    file.write_text("{}")
    ended(file, **part)
    assert not file.exists()
