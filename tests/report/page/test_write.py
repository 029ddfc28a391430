"""The page: structure, contents, what is missing, and how it is written."""

import dataclasses
import itertools
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from mobile_report import LATENCY, mobile_report, saved_file

from qft_plugin import ConfigError, HostError
from qft_plugin.report.data import Layer, Node, Report
from qft_plugin.report.page.numbers import DASH, TIMES
from qft_plugin.report.page.write import page

VOID = {"meta", "link", "input", "br", "hr", "img"}
EVIL = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """Reads a page; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words).replace("\N{NO-BREAK SPACE}", " "))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


FULL = mobile_report()
TEXT = page(FULL, file=saved_file(), latency=LATENCY)
PAGE = Page(TEXT)

EMPTY = Report(
    host="nncf",
    versions={},
    model="Net",
    images=0,
    held_out=0,
    compared_at=(),
    start_loss=None,
    final_loss=None,
    losses=(),
    agreement=None,
    start_agreement=None,
    layers=(),
)


def test_the_page_is_well_formed() -> None:
    """Each id is there once, each link goes to one, headings skip no level, controls have labels."""
    ids = [a["id"] for _, a in PAGE.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in PAGE.all("a")} <= {f"#{name}" for name in ids}
    named = {a["aria-labelledby"] for _, a in PAGE.elements if "aria-labelledby" in a}
    assert named <= set(ids)
    levels = [int(tag[1]) for tag, _ in PAGE.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert levels.count(1) == 1


def test_the_page_asks_for_nothing_outside() -> None:
    """No attribute and no style names another file, and a policy forbids what a script might ask for."""
    outside = [
        (tag, key, value)
        for tag, attributes in PAGE.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset") and not str(value).startswith("#")
    ]
    assert outside == [("link", "href", "data:,")]
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", TEXT)
    assert set(re.findall(r"url\((.*?)\)", TEXT)) == {"#stripes", "#dots", "#cross"}
    assert "@import" not in TEXT
    policy = next(a["content"] for a in PAGE.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_is_small() -> None:
    """A MobileNetV2 of 53 layers with everything stays below 300 KB."""
    assert len(FULL.layers) == 53
    assert len(TEXT.encode()) < 300_000


def test_pictures_have_alternatives() -> None:
    """Each picture is an image with a label, or hidden from who cannot see it."""
    pictures = PAGE.all("svg")
    assert len(pictures) > 3 * 53
    assert all(a.get("aria-hidden") == "true" or (a.get("role") == "img" and a.get("aria-label")) for a in pictures)


def test_all_layers_are_there() -> None:
    """Each has its row, with all columns, and its fold-out; the costliest are marked."""
    rows = [a for a in PAGE.all("tr") if "data-bits" in a]
    assert [a["data-bits"] for a in rows] == [str(layer.bits) for layer in FULL.layers]
    assert sum(a.get("class") == "worst" for a in rows) == 5
    assert [a["id"] for a in PAGE.all("details")] == [f"layer-{n}" for n in range(1, 54)]
    assert all(layer.name in PAGE.text and layer.weight in PAGE.text for layer in FULL.layers)
    sortable = [a for a in PAGE.all("th") if "aria-sort" in a]
    assert len(sortable) == 3 + 4 + 9


@pytest.mark.parametrize(
    "words",
    [
        "MobileNetV2",
        "quantized under Brevitas · qft_plugin 0.1.0 · brevitas 0.13.4",
        "90.6 % from 81.2 % at the start",
        "0.0162 from 0.0713 at the start",
        f"layers: 51 {TIMES} 4 bits, 2 {TIMES} 8 bits",
        "10 min 36 s",
        "4.10 GB",
        "3.74 MB on disk, 27.0 % of what the float weights alone take",
        "Convolutions: 52 run in u8.",
        "Linear layers: 1 runs in u8.",
        "ONNX Runtime",
        "3.04 ms",
        f"{TIMES}2.51",
        "1 warning",
        "Measured on 64 images.",
        "Note: one of the smallest layers",
    ],
)
def test_what_the_page_says(words: str) -> None:
    """Head, tiles, file, times and warnings are there in words."""
    assert words in PAGE.text


def test_warnings_and_decisions_are_there_in_full() -> None:
    """However many and long they are."""
    said = tuple(f"{n}: " + "long words " * 60 + "end" for n in range(5))
    text = Page(page(dataclasses.replace(FULL, warnings=said, decisions=said[:2]))).text
    assert all(text.count(words) == (2 if n < 2 else 1) for n, words in enumerate(said))
    assert "5 warnings" in text
    assert "Decisions on the way to the target" in text


def test_everything_is_escaped() -> None:
    """Names that look like HTML are shown as they are, wherever they come from."""
    layer = dataclasses.replace(FULL.layers[5], name=EVIL, weight=EVIL, kind=EVIL, reason=EVIL)
    evil = dataclasses.replace(
        FULL,
        model=EVIL,
        host=EVIL,
        versions={EVIL: EVIL},
        compared_at=(EVIL,),
        layers=(layer,),
        nodes=(Node(name=EVIL, function=EVIL, inputs=(EVIL + "1",), layer=EVIL, bits=8),),
        warnings=(EVIL,),
        decisions=(EVIL,),
        seconds={EVIL: 1.0},
    )
    file = saved_file()
    file.path, file.convolutions = Path(EVIL), {EVIL: EVIL}
    text = page(evil, file=file, latency={EVIL: 1.0})
    read = Page(text)
    assert len(read.all("script")) == 1
    assert "<script>alert" not in text
    assert read.text.count("<script>alert('&\"')</script>") >= 12


def test_a_report_without_errors_says_how_to_get_them() -> None:
    """Their columns and pictures are left out, everything else stays."""
    read = Page(page(mobile_report(analysed=False)))
    assert "QFTConfig(analyse=True)" in read.text
    assert len([a for a in read.all("th") if "aria-sort" in a]) == 3 + 4
    assert "costly" not in read.text
    assert len(read.all("details")) == 53
    assert "QFTConfig(analyse=True)" not in PAGE.text


def test_a_report_of_nothing() -> None:
    """Whatever may be missing may be missing, and nothing of it is shown."""
    read = Page(page(EMPTY))
    assert "has not been compared with the float network" in read.text
    assert "Finetune" not in read.text
    assert "Deployed file" not in read.text
    assert "None" not in read.text
    assert "nan" not in read.text.lower()


def test_what_is_not_known_is_a_dash() -> None:
    """None and NaN are shown alike, and sorted behind everything."""
    first = FULL.layers[0]
    assert first.errors is not None
    odd = dataclasses.replace(
        first.errors,
        loss_without=math.inf,
        weight=math.nan,
        loss_only=math.nan,
        agreement_only=None,
        agreement_without=math.nan,
        clipped=None,
    )
    layers = (dataclasses.replace(first, errors=odd), *FULL.layers[1:])
    text = page(dataclasses.replace(FULL, layers=layers, agreement=None, start_agreement=math.nan, final_loss=math.nan))
    assert text.count(f'data-v="">{DASH}</td>') == 5
    assert text.count('data-v="Infinity">∞</td>') == 1
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL).lower()


def test_floats_and_odd_shapes() -> None:
    """A layer in floating point says why; a weight may be one number or have no scale."""
    layers = (
        Layer(name="a", weight="a.w", kind="linear", shape=(), bits=None, activation_bits=None, scales=0, reason="odd"),
    )
    read = Page(page(dataclasses.replace(EMPTY, layers=layers)))
    assert "a.w, one number. Note: odd." in read.text
    assert [a["data-bits"] for a in read.all("tr") if "data-bits" in a] == ["float"]


def test_five_hundred_layers() -> None:
    """A large network stays below 3 MB."""
    layers = tuple(dataclasses.replace(FULL.layers[n % 53], name=f"blocks.{n}") for n in range(500))
    nodes = tuple(
        Node(name=str(n), function="linear", inputs=(str(n - 1),), layer=f"blocks.{n}", bits=8) for n in range(500)
    )
    assert len(page(dataclasses.replace(FULL, layers=layers, nodes=nodes)).encode()) < 3_000_000


def test_several_files() -> None:
    """Each has its part; one that was not proved says so; a format without runtime precisions has none."""
    bare = saved_file()
    bare.path, bare.openvino = Path("bare.xml"), None
    unknown = SimpleNamespace(relative=math.nan, same_class=math.nan, images=0)
    bare.proof = SimpleNamespace(**{**vars(bare.proof), "weights": 0, "from_torch": unknown})
    qonnx = SimpleNamespace(path=Path("net.qonnx.onnx"), bytes=10, proof=saved_file().proof)
    text = Page(page(FULL, file=[saved_file(), bare, qonnx])).text
    assert text.count("without a proof") == 1
    assert text.count("Convolutions: 52") == 2
    assert "net.qonnx.onnx" in text


def test_the_file_is_the_page(tmp_path: Path) -> None:
    """What is written is what was made, and can be read by others as other files can."""
    path = FULL.save_html(tmp_path / "report.html", file=saved_file(), latency=LATENCY)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == TEXT
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    assert str(FULL.save_html(os.fspath(path))) == str(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last step fails, the old file is as it was and nothing is left beside it."""
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        FULL.save_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["report.txt", "report", "missing/report.html"])
def test_a_path_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    """Another suffix and a missing folder are refused by what they are."""
    with pytest.raises(ConfigError, match=r"should be a \.html file in an existing folder\. Found .*" + name):
        FULL.save_html(tmp_path / name)


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf, "1", True, {"median_ms": 1}])
def test_a_latency_that_is_no_time(ms: object) -> None:
    """It is refused by its name."""
    with pytest.raises(ConfigError, match=r"latency\['ours'\] should be milliseconds"):
        page(FULL, latency={"ours": ms})  # type: ignore[dict-item]


@pytest.mark.parametrize("file", ["net.xml", Path("net.xml"), [1]])
def test_a_file_that_is_no_report(file: object) -> None:
    """A path in the place of a report is refused."""
    with pytest.raises(ConfigError, match="file should be what save_openvino"):
        page(FULL, file=file)  # type: ignore[arg-type]


def test_without_jinja2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the line that installs it; nothing is written."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(HostError, match=r"jinja2 should be installed.*pip install 'qft_plugin\[report\]'"):
        FULL.save_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
