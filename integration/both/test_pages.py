"""What the pages say about files, commands, settings and figures is so."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import qft_plugin
from qft_plugin import EfQAT, FinetuneConfig, HardwareSpec, QFTConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SCRIPTS = [path for name in ("examples", "benchmarks", "integration") for path in sorted((ROOT / name).glob("*.py"))]
SETTINGS = (QFTConfig, HardwareSpec, FinetuneConfig, EfQAT)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
each_text = pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix())


def read(path):
    return path.read_text(encoding="utf-8")


def options_of(script):
    """Return every option that a script gives to argparse, without importing what it imports."""
    calls = [node for node in ast.walk(ast.parse(read(script))) if isinstance(node, ast.Call)]
    adds = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {arg.value for call in adds for arg in call.args if isinstance(arg, ast.Constant)} | {"--help"}


@each_text
def test_commands_name_scripts_and_options_that_there_are(page):
    """Every `python FOLDER/SCRIPT.py --OPTION` can be started."""
    for script, rest in re.findall(r"python ((?:benchmarks|integration|examples)/\S+?\.py)([^`\n|>]*)", read(page)):
        assert (ROOT / script).exists(), script
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= options_of(ROOT / script), f"{script}{rest}"


def environments():
    """Return the names of the environments of tox, and of its labels."""
    text = read(ROOT / "tox.ini")
    names = set()
    for start, versions, whole in re.findall(r"^\[testenv:(?:(\w+)\{([\d,]+)\}|(\w+))\]", text, re.M):
        names |= {start + version for version in versions.split(",")} if start else {whole}
    return names, set(re.findall(r"^    (\w+) = nncf", text, re.M))


@each_page
def test_commands_name_environments_and_extras_that_there_are(page):
    """Every `tox run -e ENV`, `tox run -m LABEL` and `.[EXTRA]` can be started."""
    names, labels = environments()
    assert {"lint", "nncf340", "docs"} <= names
    assert labels == {"matrix"}
    for asked in re.findall(r"tox (?:run|exec) (?:-q )?-e ([\w,]+)", read(page)):
        assert set(asked.split(",")) <= names
    assert set(re.findall(r"tox run -m (\w+)", read(page))) <= labels
    extras = set(re.findall(r"^(\w+) = \[", read(ROOT / "pyproject.toml").partition("optional-dependencies]")[2], re.M))
    for asked in re.findall(r"'\.\[([\w,]+)\]'", read(page)):
        assert set(asked.split(",")) <= extras


@each_page
def test_files_that_are_named_are_there(page):
    """A path of this project that a page names exists."""
    folders = "qft_plugin|tests|integration|benchmarks|examples|docs"
    for path in re.findall(rf"(?<![\w/.<])((?:{folders})/[\w/]+\.(?:py|md|ini|txt|svg))\b", read(page)):
        assert (ROOT / path).exists(), path


@each_page
def test_nothing_is_fetched_to_show_a_page(page):
    """No page embeds an image, a script or a frame from the network."""
    assert not re.search(r"!\[[^\]]*\]\(\w+:|<(?:script|img|link|iframe)\b", read(page))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    """Links to files, and to headings of the page itself; those inside docs/ are checked when the site is built."""
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", read(page), re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", read(page))
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / link.partition("#")[0]).exists(), link


def test_the_page_of_operations_is_what_the_script_prints():
    """docs/operations.md is up to date."""
    spec = importlib.util.spec_from_file_location("operations_page", ROOT / "benchmarks" / "operations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(DOCS / "operations.md") == module.page()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_every_setting_has_a_row(settings):
    """docs/settings.md has a row for each field, under the name of its class."""
    tables = read(DOCS / "settings.md").split("| field of `")
    (table,) = (part for part in tables if part.startswith(f"{settings.__name__}`"))
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in dataclasses.fields(settings)} <= named


@pytest.mark.parametrize("module", ["qft_plugin", "qft_plugin.nncf", "qft_plugin.brevitas"])
def test_every_public_name_is_in_the_reference(module):
    """docs/api.md shows each module, and the short names for which the source has no docstring of their own."""
    page = read(DOCS / "api.md")
    assert f"::: {module}\n" in page
    if module != "qft_plugin" and importlib.util.find_spec(module.rpartition(".")[2]) is None:
        pytest.skip(f"{module} needs its host")
    found = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        assert getattr(value, "__name__", None) == name or f"`{name}`" in page, name


def test_the_picture_of_the_tools_is_of_the_present_table():
    """The bars of the README are those of the first table of docs/comparison.md."""
    first = read(DOCS / "comparison.md").partition("\n## With")[0]
    rows = re.findall(r"^\| (?!tool)[^|]+\| ([\d.]+) % \|", first, re.M)
    assert len(rows) >= 8
    picture = read(DOCS / "figures" / "peers_resnet20.svg")
    assert all(f"{100 - float(agreement):.2f}" in picture for agreement in rows)


def test_the_first_table_is_the_one_of_the_results():
    """README and docs/results.md state the same figures of the present defaults."""
    figures = r"\| (\w+) \| (per \w+) \| ([\d.]+ %) \| ([-\d.]+) \|"
    first = re.findall(rf"^\|[^|]*{figures}", read(ROOT / "README.md"), re.M)
    second = re.findall(rf"^{figures}", read(DOCS / "results.md"), re.M)
    assert len(first) == 6
    assert set(second) <= set(first)
    assert len(second) == 4


def test_the_version_is_one_that_the_changelog_names():
    """CHANGELOG.md has a heading for this version."""
    assert re.search(rf"^## {re.escape(qft_plugin.__version__)}\b", read(ROOT / "CHANGELOG.md"), re.M)
