"""Every Python snippet of the README and of docs/ runs, one after the other on each page, as it is printed."""

import importlib.util
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest

sybil = pytest.importorskip("sybil", reason="sybil is not installed")
from sybil.parsers import markdown  # noqa: E402  (only after the check that it is there)

ROOT = Path(__file__).parents[2]
NEEDED = ("nncf", "brevitas", "onnx", "onnxruntime")
"""Packages that some environments lack."""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = {"docs/settings.md": ["two GPUs at least"], "docs/progress.md": ["tensorboard", "mlflow"]}
"""What snippets would need that are marked as not to be run, by page; all others run."""

EVERY_VERSION = ("docs/tutorials/brevitas_class.md", "docs/tutorials/brevitas_float.md")
"""Pages that run on every version of their host; the others on the newest."""

OVERFLOWS = "docs/tutorials/transformer.md"
"""The page whose save may warn, as it says, of products of two activations: on CPUs without VNNI."""

LEAST_AGREEMENT = 0.95
"""Of what a page calls `agreement`; digits after a tenth of the default finetune, or more of it. A network that was not
finetuned agrees on 0.8 to 0.95."""

SECONDS = 300
"""Much longer than two processes take, which is about 15."""


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def snippets_of(page):
    """Parse a page; what runs first on it may be in a comment that readers do not see."""
    document = sybil.Sybil([markdown.PythonCodeBlockParser(), markdown.SkipParser()]).parse(page)
    document.namespace["__name__"] = "snippets"
    return list(document.examples())


def needed_by(snippets):
    """Name the packages of which modules, or this project's modules for them, are imported."""
    text = "\n".join(str(snippet.parsed) for snippet in snippets)
    return [name for name in NEEDED if re.search(rf"(?:import|from) (?:qft_plugin\.)?{name}\b", text)]


def parameters():
    """Give each page that has snippets the marks of what it needs."""
    found = []
    for page in PAGES:
        snippets = snippets_of(page)
        marks = [] if name_of(page) in EVERY_VERSION else [pytest.mark.wide]
        if needed_by(snippets) == ["nncf"]:
            marks.append(pytest.mark.nncf_only)
        if name_of(page) == OVERFLOWS:
            marks.append(pytest.mark.filterwarnings("ignore:OpenVINO should round where the model rounds"))
        if snippets:
            found.append(pytest.param(page, id=name_of(page), marks=marks))
    return found


def run(snippet):
    """Run one, or return what it would need."""
    try:
        snippet.evaluate()
    except unittest.SkipTest as reason:
        return str(reason)
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_snippet_is_overlooked(page):
    """Every fence of Python is one that the parser sees, so none carries more than the language."""
    seen = re.findall(r"^ *```+python|^ *<!--- (?:invisible-code-block|skip):", page.read_text(encoding="utf-8"), re.M)
    assert len(snippets_of(page)) == len(seen)


@pytest.mark.parametrize("page", parameters())
def test_the_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    """Each runs after those before it, and none is left out but those that are listed here."""
    snippets = snippets_of(page)
    for name in needed_by(snippets):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed here")
    monkeypatch.chdir(tmp_path)
    left_out = [what for snippet in snippets if (what := run(snippet)) is not None]
    assert left_out == NOT_RUN.get(name_of(page), [])
    assert snippets[0].namespace.get("agreement", 1) > LEAST_AGREEMENT


@pytest.mark.wide
@pytest.mark.nncf_only
def test_the_script_for_processes_runs_in_two(tmp_path):
    """The one script of its page gives one file under torchrun, and the same figures in both processes."""
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("nncf is not installed here")
    page = (ROOT / "docs" / "tutorials" / "processes.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(# quantize\.py\n.*?)^```", page, re.M | re.S)
    (tmp_path / "quantize.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "quantize.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"\d+ bytes, agreement [\d.]+ %", done.stdout)
    assert len(said) == 2
    assert said[0] == said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.bin", "digits.xml", "quantize.py"]
