"""What holds for every test: one seed, and few, repeatable Hypothesis examples."""

import os
import random
import secrets
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from qft_plugin.tensors import fake_quantize

settings.register_profile("unit", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("unit")

os.environ.setdefault("QFT_SEED", str(secrets.randbits(32)))  # here, so that all processes of one run have the same


def pytest_report_header() -> str | None:
    """Say what draws the same networks again."""
    asked = os.environ.get("QFT_EXAMPLES")
    return f"QFT_EXAMPLES={asked} QFT_SEED={os.environ['QFT_SEED']}" if asked else None


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (users' code draws from it)
    torch.manual_seed(0)


@pytest.fixture(params=[fake_quantize.IN_CACHE, 7], ids=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on an activation in one part or in several."""
    monkeypatch.setattr(fake_quantize, "IN_CACHE", request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let temporary files be made in an empty folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path
