"""What a measurement of latency refuses before any runtime is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qft_plugin import DataError, DeployabilityError
from qft_plugin.deploy.latency import measure_latency


@pytest.mark.parametrize("name", ["missing.xml", "net.bin"])
def test_another_file(tmp_path: Path, name: str) -> None:
    """A file that is not there, or of another kind, is named."""
    (tmp_path / "net.bin").touch()
    with pytest.raises(DeployabilityError, match=rf"should be an \.xml or \.onnx file\. Found .*{name}"):
        measure_latency(tmp_path / name, torch.zeros(1))


@pytest.mark.parametrize("settings", [{"threads": 0}, {"repeats": 0}])
def test_no_threads_or_runs(tmp_path: Path, settings: dict[str, int]) -> None:
    """At least one is needed of both."""
    (tmp_path / "net.xml").touch()
    with pytest.raises(DeployabilityError, match="threads and repeats should be at least 1"):
        measure_latency(tmp_path / "net.xml", torch.zeros(1), **settings)


@pytest.mark.parametrize("example", [None, (), {}, [1], torch.tensor(1.0)])
def test_another_example(tmp_path: Path, example: Any) -> None:
    """Tensors with an axis of images are needed."""
    (tmp_path / "net.xml").touch()
    with pytest.raises(DataError, match="example should be a tensor, a tuple of tensors or a dict of tensors"):
        measure_latency(tmp_path / "net.xml", example)
