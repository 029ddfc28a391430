"""A dry run as a table, as JSON and as a page."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qft_plugin import ConfigError
from qft_plugin.report.inspection import (
    Cost,
    Inspection,
    Memory,
    PlannedActivation,
    PlannedLayer,
    duration,
    size,
    tables,
)

INT8 = PlannedLayer(
    name="conv",
    weight="conv.weight",
    kind="conv2d",
    shape=(8, 3, 3, 3),
    bits=4,
    activation_bits=8,
    scales=8,
    granularity="per channel",
    reason="",
    not_int8="",
)
FLOAT = dataclasses.replace(
    INT8,
    name="gate<b>",
    weight="",
    shape=(),
    bits=None,
    activation_bits=None,
    scales=0,
    granularity="",
    reason="<i>why</i>",
    not_int8="<i>why</i>",
)
COST = Cost(
    images=512,
    images_known=True,
    images_seen=64,
    steps=32,
    teacher_batch_images=64,
    teacher_batch_seconds=0.1,
    step_seconds=0.2,
    start_seconds=3.0,
    compensation_seconds=10.0,
    teacher_seconds=0.8,
    finetune_seconds=7.0,
)
MEMORY = Memory(
    images=6_000_000,
    teacher=4_000_000,
    step=50_000_000,
    compensation=90_000_000,
    images_on_disk=False,
    teacher_on_disk=True,
)
FOUND = Inspection(
    host="nncf",
    model="Net",
    compared_at=("avg_pool2d/0",),
    layers=(INT8, FLOAT),
    activations=(
        PlannedActivation(
            name="x", made_by="input", bits=8, channels=3, free=0, pinned_by="input", layers=("conv.weight",)
        ),
    ),
    degrees={"weights": 216, "cross-layer factors": 8},
    float_bytes=1_000,
    file_bytes=2_500,
    cost=COST,
    memory=MEMORY,
    warnings=("Look at <script>alert(1)</script>.",),
    refusals=("save_qcdq refuses it.",),
)


def test_the_table_says_everything() -> None:
    """Every layer, activation, count, time, size, warning and refusal is in the plain text, and rows have no tails."""
    text = str(FOUND)
    for words in (
        "Net under nncf: 1 of 2 layers expected in int8, 1 KB of floats to a file of about 2.5 KB, in about 21 seconds",
        "conv     conv2d  8x3x3x3  4       8      per channel  expected",
        "gate<b>  conv2d           float   float               no        <i>why</i>",
        "x           input    8     3         0     input      conv.weight",
        "cross-layer factors  8",
        "teacher            0.8      100 ms for a batch of 64",
        "finetune           7        32 steps of 200 ms",
        "teacher's outputs  4 MB   in a file on disk",
        "at the peak        96 MB  in memory",
        "- Look at <script>alert(1)</script>.",
        "- save_qcdq refuses it.",
    ):
        assert words in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_job_without_a_finetune_or_a_length() -> None:
    """Nothing is said of a teacher, of steps, or of compensation that is off; images are the most there may be."""
    cost = dataclasses.replace(COST, steps=0, teacher_seconds=0, finetune_seconds=0, compensation_seconds=0)
    text = str(dataclasses.replace(FOUND, cost=dataclasses.replace(cost, images_known=False)))
    times = text[text.index("Time, about") : text.index("Memory, about")]
    assert "at most 512 images" in times
    assert not re.search("teacher|finetune|compensation", times)


def test_one_line() -> None:
    """The short form names model and host, and has one line."""
    assert "\n" not in repr(FOUND)
    assert repr(FOUND).startswith("<Inspection of Net under nncf: 1 of 2 layers expected in int8, ")


def test_json_has_every_field() -> None:
    """It is read back as the same values."""
    read = json.loads(FOUND.to_json())
    assert read == json.loads(json.dumps(dataclasses.asdict(FOUND)))
    assert read["layers"][0]["shape"] == [8, 3, 3, 3]
    assert read["cost"]["steps"] == 32


class Page(HTMLParser):
    """Notes which tags and attributes a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """One file: no script, no address, nothing of a model's names is markup; light, dark and narrow screens."""
    path = tmp_path / "dry.html"
    FOUND.save_html(path)
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not {"script", "img", "iframe", "i", "b"} & set(page.tags)
    assert not {"src", "onclick"} & page.attributes.keys()
    assert (page.tags.count("link"), page.attributes["href"]) == (1, "data:,")  # no icon is asked for
    assert "://" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'content="width=device-width, initial-scale=1"' in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.tags.count("tr") == sum(len(rows) for _, rows in tables(FOUND))
    assert [p.name for p in tmp_path.iterdir()] == ["dry.html"]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """Where the place is a folder, no draft stays beside it."""
    (tmp_path / "dry.html").mkdir()
    with pytest.raises(IsADirectoryError):
        FOUND.save_html(tmp_path / "dry.html")
    assert [p.name for p in tmp_path.iterdir()] == ["dry.html"]
    for path in (tmp_path / "dry.txt", tmp_path / "none" / "dry.html"):
        with pytest.raises(ConfigError, match=r"path should be a \.html file in an existing folder"):
            FOUND.save_html(path)


@pytest.mark.parametrize(
    ("count", "words"), [(999, "999 bytes"), (1_500, "1.5 KB"), (2_340_000, "2.34 MB"), (4 * 10**9, "4 GB")]
)
def test_sizes(count: int, words: str) -> None:
    """Bytes have a unit in powers of a thousand."""
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.5, "0.5 seconds"), (89, "89 seconds"), (120, "2 minutes"), (7200, "2 hours")]
)
def test_durations(seconds: float, words: str) -> None:
    """Times have a unit that fits."""
    assert duration(seconds) == words
