"""Who may import whom: data flows one way, and no host is loaded before the user asks for one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qft_plugin

PACKAGE = Path(qft_plugin.__file__).parent
HOSTS = {"nncf", "brevitas", "openvino", "onnx", "qonnx", "onnxruntime"}

LEVELS = [
    {"errors"},
    {"spec", "quantize", "distributed"},
    {"graph", "data", "partial_backward"},
    {"relations"},
    {"placement", "initialize", "compensate", "model", "elements"},
    {"partial", "norms"},
    {"bounded", "dof_map", "offline", "finetune", "record", "blocks"},
    {"channelwise", "deployed"},
    {"report", "student", "bias_correction"},
    {"health"},
    {"problem", "ranges"},
    {"start"},
    {"pipeline"},
    {"cli"},
]
"""A module may import the levels above its own in this list; those that do not exist yet are planned."""

INSIDE = {
    "errors": set(),
    "spec": {"errors"},
    "quantize": set(),
    "distributed": {"errors"},
    "data": {"errors", "distributed"},
    "finetune": {"data", "errors", "spec", "partial", "distributed"},
    "__init__": {"errors", "spec"},
}
"""Modules that may import even less of the package than their level allows."""

OUTSIDE = {
    "problem": {"torch"},
    "start": {"torch"},
    "pipeline": {"torch"},
    "report": {"torch", "matplotlib"},
    "cli": {"torch", "rich"},
}
"""What a module may import beside the standard library; `torch` and `numpy` where nothing is said."""

MODULES = sorted(p.stem for p in PACKAGE.glob("*.py"))
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
            if node.module in ("qft_plugin", "qft_plugin.nncf", "qft_plugin.brevitas", "qft_plugin.deploy"):
                found |= {f"{node.module}.{a.name}" for a in node.names if _is_module(f"{node.module}.{a.name}")}
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def inside(name: str) -> set[str]:
    """Return the modules of the package that one of its modules imports, by their short names."""
    modules = imported(PACKAGE / f"{name}.py")
    return {m.removeprefix("qft_plugin.") for m in modules if m.split(".")[0] == "qft_plugin"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_what_stands_before_them(name: str) -> None:
    """The import table: every module has a level and imports earlier levels only (which also forbids cycles)."""
    if name != "__init__":
        assert name in LEVEL, f"{name}.py should stand in the import table"
        assert all(LEVEL.get(other, 99) < LEVEL[name] for other in inside(name)), inside(name)
    if name in INSIDE:
        assert inside(name) <= INSIDE[name]


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_no_host(name: str) -> None:
    """Beside the standard library there is torch; a host or a runtime belongs into its own folder."""
    outside = {m.split(".")[0] for m in imported(PACKAGE / f"{name}.py")} - {"qft_plugin"} - sys.stdlib_module_names
    assert not outside & HOSTS
    assert outside <= OUTSIDE.get(name, {"torch", "numpy"})
    assert not {m.split(".")[0] for m in inside(name)} & {"nncf", "brevitas", "deploy"} or name in ("pipeline", "cli")


def test_hosts_do_not_know_each_other() -> None:
    """No file below one host's folder imports the other host."""
    for host, other in (("nncf", "brevitas"), ("brevitas", "nncf")):
        for path in (PACKAGE / host).glob("*.py"):
            assert not any(other in m.split(".") for m in imported(path)), path


def test_no_two_modules_need_each_other() -> None:
    """In the whole package, no two files import each other."""
    files = {
        ".".join(("qft_plugin", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }
    edges = {name: imported(path) & set(files) for name, path in files.items()}
    assert len(edges) > 10
    assert not [(a, b) for a in edges for b in edges[a] if a != b and a in edges[b]]


def test_importing_the_package_loads_no_host() -> None:
    """A process that imports the package and all host-free modules has loaded no host and no runtime."""
    modules = [f"qft_plugin.{name}" for name in MODULES if name not in ("__init__", "cli")]
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {['qft_plugin', *modules]!r}]; "
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
