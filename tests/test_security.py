"""What the package reads, writes and runs: no pickle, program or network; files of the user, and private ones."""

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qft_plugin
from qft_plugin.files import draft_of
from qft_plugin.training.rows import Rows

PACKAGE = Path(qft_plugin.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

NEVER_IMPORTED = {
    *("pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "yaml"),  # they run what they read
    *("subprocess", "multiprocessing", "pty", "ctypes"),
    *("socket", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "webbrowser", "requests", "httpx", "aiohttp"),
}

RUNS = {"eval", "exec", "compile", "__import__", "system", "popen", "import_module", "run_path", "run_module"}
UNPICKLES = {"torch.load", "torch.hub.load", "torch.package", "numpy.load", "np.load", "torch.jit.load"}
WRITES = {
    *(
        "write_text",
        "write_bytes",
        "mkdir",
        "makedirs",
        "touch",
        "symlink_to",
        "chmod",
        "tofile",
        "copyfile",
        "copytree",
    ),
    *("rmtree", "unlink", "rmdir", "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile"),
    *("mkstemp", "mkdtemp", "mktemp", "save_model", "serialize"),
}

ALLOWED = {
    "brevitas/_save.py": {"onnx.save"},  # to a draft
    "cli/doctor.py": {"importlib.import_module"},  # a host, by its name here
    "cli/hosts.py": {"importlib.import_module"},  # likewise
    "cli/sources.py": {"importlib.import_module"},  # the function that the user names on the command line
    "deploy/openvino.py": {"openvino.save_model"},  # to a draft
    "deploy/files.py": {"tempfile.TemporaryFile"},  # where the user's file goes, to see whether that can be written to
    "files.py": {"tempfile.mkdtemp", "open('rb+')", "draft.write_text", "shutil.copyfile", "shutil.rmtree",
                 "mark.unlink"},  # drafts beside what the user names
    "job/checkpoint.py": {"path.mkdir", "self._folder.mkdir"},  # the folder that the user names
    "onnx_import/file.py": {"__import__"},  # onnx and onnxruntime
    "onnx_import/module.py": {"compile", "exec"},  # a text of our own: the test of `from_onnx` puts code into names
    "training/rows.py": {"tempfile.TemporaryFile"},  # without a name
}  # fmt: skip
"""Calls that run, read or write something, by file; a new one needs a reason here."""


def calls_of(tree: ast.AST) -> set[str]:
    """List the calls of a file that this test is about; of `open` those that may write."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        built_in = last in ("eval", "compile") and name != last  # model.eval(), re.compile(), torch.compile()
        if name in UNPICKLES or (last in RUNS and not built_in) or last in WRITES or name == "onnx.save":
            found.add(name)
        if last == "open":
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            found |= {f"open({mode!r})" for mode in modes if isinstance(mode, str) and set(mode) & set("wax+")}
    return found


def imported(tree: ast.AST) -> set[str]:
    """List the top-level packages that a file imports."""
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_run_unpickled_or_written_but_what_is_listed(name: str) -> None:
    """A file makes exactly the calls that are listed for it, and imports nothing that unpickles, connects or starts."""
    tree = ast.parse(SOURCES[name].read_text())
    assert calls_of(tree) == ALLOWED.get(name, set())
    assert imported(tree) & NEVER_IMPORTED == set()


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "torch.load(p)", "np.load(p, allow_pickle=True)", "os.system(x)", "p.write_bytes(x)", "open(p, 'a')"],
)
def test_such_calls_would_be_seen(text: str) -> None:
    """The scan above is not blind."""
    assert calls_of(ast.parse(text))


@pytest.fixture
def open_umask() -> object:
    """Let new files be readable by all, unless they are made otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_temporary_files_are_private(tmp_path: Path, folder: Path) -> None:
    """Nobody else can read a draft, or images and activations on the disk, which have no name besides."""
    with draft_of(tmp_path / "net.xml") as draft:
        assert stat.S_IMODE(draft.parent.stat().st_mode) == 0o700
    rows = Rows(memory_limit=0)
    rows.append(torch.zeros(4, 3))
    about = os.fstat(rows._file.fileno())
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert about.st_nlink == 0
    assert list(folder.iterdir()) == []
    rows.discard()


def audited(notes: Path, home: Path, *arguments: str) -> dict[str, list[str]]:
    """Run `audited.py` in a process whose home and folder for temporary files are empty ones."""
    (home / "tmp").mkdir(parents=True)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    program = Path(__file__).parent / "audited.py"
    subprocess.run([sys.executable, program, notes, *arguments], env=environment, cwd=home, check=True)
    found: dict[str, list[str]] = json.loads(notes.read_text())
    return found


def test_a_job_writes_what_the_user_names_and_nothing_else(tmp_path: Path) -> None:
    """Import and job connect to, start and unpickle nothing; only the files that were asked for are left."""
    target, home = tmp_path / "target", tmp_path / "home"
    target.mkdir()
    found = audited(tmp_path / "notes.json", home, "audited:small", str(target))
    assert not [key for key in found if key.endswith(("network", "programs")) or key == "job pickle.find_class"]
    assert {path for path in found["job writes"] if not path.startswith((str(target), str(home / "tmp")))} == set()
    assert any(path.startswith(str(home / "tmp")) for path in found["job writes"])  # its images did not fit
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "report.html"]
    assert [path for path in home.rglob("*") if path.is_file()] == []
