"""The tutorials run as they are printed, and reach what they promise."""

import re
from pathlib import Path

import pytest

pytest.importorskip("brevitas", reason="the tutorials are about Brevitas")

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
LEAST_AGREEMENT = 0.95
"""A tenth of the default finetune on digits; a network that was not finetuned agrees on 0.8 to 0.95."""


@pytest.mark.parametrize("name", sorted(path.name for path in TUTORIALS.glob("*.md")))
def test_tutorial(name, tmp_path, monkeypatch):
    """Every block of Python runs after the ones before it, and the last one finds a high agreement."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (TUTORIALS / name).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 4
    names = {"__name__": "tutorial"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    assert names["agreement"] > LEAST_AGREEMENT
