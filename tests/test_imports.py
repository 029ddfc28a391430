"""Who may import whom: a folder imports those below it, and no host is loaded before the user asks for one."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qft_plugin

PACKAGE = Path(qft_plugin.__file__).parent
HOSTS = {"nncf", "brevitas", "openvino", "onnx", "qonnx", "onnxruntime"}

FLOORS = [
    {"errors"},
    {"checks", "files", "packages"},
    {"hardware"},
    {"config"},
    {"config_file"},
    {"onnx_import"},
    {"tensors"},
    {"graph"},
    {"training"},
    {"report"},
    {"job", "deploy"},
    {"nncf", "brevitas"},
    {"cli"},
    {"__main__"},
]
"""Folders, and the files beside them; each may import those of earlier floors."""

OUTSIDE = {
    "errors": set(),
    "checks": set(),
    "packages": set(),
    "files": set(),
    "hardware": set(),
    "config": set(),
    "config_file": {"tomli", "tomli_w"},
    "onnx_import": {"torch", "numpy", "onnx", "onnxruntime"},
    "cli": {"torch", "numpy", "typer", "PIL", "nncf"},
    "report": {"torch", "numpy", "rich", "jinja2"},
    "job": {"torch", "numpy", "safetensors"},
    "deploy": {"torch", "numpy", *HOSTS} - {"nncf", "brevitas"},
}
"""What a folder may import beside the standard library; `torch` and `numpy` where nothing is said. Hosts are free."""

FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {
    ".".join(("qft_plugin", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
NAMES = [name for name in FILES if name != "qft_plugin"]


def folder_of(module: str) -> str:
    """Return the folder of a module of the package, or its own name where it stands in none."""
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            modules = {name for a in node.names if (name := f"{node.module}.{a.name}") in FILES}
            found |= modules or {node.module}
    return found


def inside(name: str) -> set[str]:
    """Return the modules of the package that one of them imports; those of the package itself are its public names."""
    return {m for m in imported(FILES[name]) if m in FILES and m not in ("qft_plugin", name)}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_imports_only_those_below_it(name: str) -> None:
    """No file imports a folder of its own floor, or of one above."""
    own = folder_of(name)
    others = {folder_of(m) for m in inside(name)} - {own}
    assert {m for m in others if FLOOR[m] >= FLOOR[own]} == set()


def test_there_are_no_circles() -> None:
    """No file needs itself, over whatever others."""
    edges = {name: {m for m in inside(name) if not name.startswith(f"{m}.")} for name in NAMES}
    assert len(list(TopologicalSorter(edges).static_order())) == len(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if folder_of(n) not in ("nncf", "brevitas")])
def test_no_host_is_imported_below_the_hosts(name: str) -> None:
    """Beside the standard library there are torch and numpy, and runtimes where files are written."""
    outside = {m.split(".")[0] for m in imported(FILES[name])} - {"qft_plugin"} - sys.stdlib_module_names
    assert outside <= OUTSIDE.get(folder_of(name), {"torch", "numpy"})


def test_processes_are_known_where_training_is() -> None:
    """What is below the finetune, and what writes files, does not know of several processes."""
    asks = re.compile(r"torch\.distributed|from torch import .*\bdistributed\b")
    knows = {folder_of(n) for n in NAMES if asks.search(FILES[n].read_text())}
    assert knows == {"training"}


@pytest.mark.parametrize(("host", "other"), [("nncf", "brevitas"), ("brevitas", "nncf")])
def test_hosts_do_not_know_each_other(host: str, other: str) -> None:
    """No file of one host imports the other."""
    for name in NAMES:
        if folder_of(name) == host:
            assert not any(other in m.split(".") for m in imported(FILES[name])), name


@pytest.mark.parametrize("host", ["nncf", "brevitas"])
def test_files_of_a_host_are_private(host: str) -> None:
    """What users may import is what the folder itself gives."""
    stems = {path.stem for path in (PACKAGE / host).glob("*.py")} - {"__init__"}
    assert all(stem.startswith("_") for stem in stems)


def test_importing_the_package_loads_no_host() -> None:
    """A process that imports the package and all that stands below the hosts has loaded no host and no runtime."""
    modules = [n for n in FILES if n == "qft_plugin" or folder_of(n) not in ("nncf", "brevitas")]
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; "
        f"print(sorted({HOSTS!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_the_package_gives_what_it_promises() -> None:
    """Every public name exists, is listed once in order, and has a docstring."""
    assert qft_plugin.__all__ == sorted(set(qft_plugin.__all__))
    assert all(getattr(qft_plugin, name).__doc__ for name in qft_plugin.__all__)
