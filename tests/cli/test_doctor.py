"""The doctor: what it finds, what it says to do, and when it ends with 1."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from commands import qft

from qft_plugin import HostError
from qft_plugin.cli import doctor
from qft_plugin.cli.doctor import Finding, State


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let the packages be those of a dict; hosts among them can be imported."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(doctor, "version", versions.get)
    for host in doctor.HOSTS:
        monkeypatch.setitem(sys.modules, f"qft_plugin.{host}", ModuleType(host))
    return versions


def states(findings: list[Finding]) -> dict[str, str]:
    """Return the state of each finding by its name."""
    return {f.name: f.state.value for f in findings}


def test_a_host_and_what_it_saves_with_are_good(installed: dict[str, str]) -> None:
    """The other host is a note with the line that installs it."""
    installed.update(nncf="3.4.0", openvino="2026.4.1")
    found = doctor.hosts_found()
    assert states(found) == {"nncf": "good", "openvino": "good", "brevitas": "note"}
    assert found[-1].mend == "for it: pip install 'qft_plugin[brevitas]'"


def test_what_a_host_needs_beside_it_is_bad_where_it_is_missing(installed: dict[str, str]) -> None:
    """With the line that installs it."""
    installed.update(brevitas="0.13.4", onnx="1.17.0")
    missing = next(f for f in doctor.hosts_found() if f.name == "onnxruntime")
    assert missing.state is State.bad
    assert missing.mend == "pip install 'qft_plugin[export]'"


def test_a_host_that_cannot_be_imported_is_bad(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the import says is what to do."""

    def failing(name: str) -> ModuleType:
        raise HostError("NNCF should be at least 2.17. Found 2.16.")

    installed["nncf"] = "2.16.0"
    monkeypatch.setattr("importlib.import_module", failing)
    bad = doctor.hosts_found()[0]
    assert (bad.state, bad.found) == (State.bad, "2.16.0")
    assert bad.mend == "HostError: NNCF should be at least 2.17. Found 2.16."


def test_no_host_at_all_ends_with_one(installed: dict[str, str]) -> None:
    """The table says what to install."""
    done = qft("doctor")
    assert done.exit_code == 1
    assert "-> pip install 'qft_plugin[nncf]' or pip install 'qft_plugin[brevitas]'" in done.output


def test_all_is_well(installed: dict[str, str]) -> None:
    """Then it ends with 0; as JSON it is read by programs."""
    installed.update(brevitas="0.13.4", onnx="1.17.0", onnxruntime="1.32.0")
    done = qft("doctor", "--json")
    assert done.exit_code == 0, done.output
    found = {f["name"]: f for f in json.loads(done.output)}
    assert found["brevitas"] == {"name": "brevitas", "state": "good", "found": "0.13.4", "mend": ""}
    assert {"python", "torch", "devices", "threads", "memory"} <= set(found)


def test_a_compiler_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none NNCF is slower; that is no failure."""
    found = doctor.compiler({"CXX": str(tmp_path / "no-compiler")})
    assert found.state is State.note
    assert "NNCF cannot compile its quantizers" in found.found
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert doctor.compiler({"CXX": str(compiler)}).state is State.good


def test_a_lock_that_was_left_is_found(tmp_path: Path) -> None:
    """A fresh one belongs to a build that runs; an old one is named with the line that removes it."""
    assert doctor.lock(tmp_path / "nowhere", 0).state is State.good
    assert doctor.lock(tmp_path, 0).found == "none"
    left = tmp_path / "py311_cpu" / "quantized_functions" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (1000, 1000))
    assert doctor.lock(tmp_path, 1010).found == "a build runs now"
    stale = doctor.lock(tmp_path, 1000 + doctor.LOCK_SECONDS + 1)
    assert stale.state is State.bad
    assert stale.mend == f"rm '{left}'"
    assert doctor.extensions_folder({"TORCH_EXTENSIONS_DIR": "/some/where"}) == Path("/some/where")


def test_more_threads_than_cores_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable that limits them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert (doctor.threads().state, doctor.threads().mend) == (State.note, "OMP_NUM_THREADS=2")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert doctor.threads().state is State.good


@pytest.mark.parametrize(
    ("version", "state"), [("2.7.0", "good"), ("2.13.0+cpu", "good"), ("2.6.1", "bad"), ("3.0.0", "bad")]
)
def test_versions_of_torch(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    """Those that pyproject.toml allows are good."""
    monkeypatch.setattr("torch.__version__", version)
    found = doctor.torch_version()
    assert found.state.value == state
    assert bool(found.mend) == (state == "bad")


def test_the_doctor_says_what_the_project_says() -> None:
    """The oldest versions are those of pyproject.toml."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, doctor.OLDEST_PYTHON))}"' in text
    assert f'"torch>={".".join(map(str, doctor.OLDEST_TORCH))},<3"' in text


def test_little_disk_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may still fit."""
    monkeypatch.setattr(doctor, "DISK", 2**60)
    assert doctor.disk().state is State.note
    assert "TMPDIR" in doctor.disk().mend
