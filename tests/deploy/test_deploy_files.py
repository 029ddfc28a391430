"""Where a file is written to, and what is said of a disk without room."""

import errno
import sys
from pathlib import Path

import pytest
from torch import nn

from qft_plugin.deploy.files import check_module, checked_path, refused, written_to
from qft_plugin.errors import DeployabilityError


@pytest.mark.parametrize("path", [3, None, b"net.xml", "net.xml", "missing/net.onnx"])
def test_what_is_no_path_of_a_file(path: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but a name with the suffix in a folder that is there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeployabilityError, match=r"a \.onnx file in an existing folder\. Found"):
        checked_path(path, ".onnx")  # type: ignore[arg-type]
    assert checked_path("net.onnx", ".onnx") == Path("net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["net.xml", "net.bin"])
def test_a_folder_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    """It is not replaced."""
    (tmp_path / name).mkdir()
    with pytest.raises(DeployabilityError, match="Found a folder at "):
        checked_path(tmp_path / "net.xml", ".xml")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such folder")
def test_a_folder_that_no_file_can_be_made_in() -> None:
    """Whatever the operating system says of it."""
    with pytest.raises(DeployabilityError, match=r"FileNotFoundError.* MiB free in /proc"):
        checked_path("/proc/net.xml", ".xml")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_is_no_fault_of_the_model(number: int, tmp_path: Path) -> None:
    """An exporter that cannot write is not asked for other operations."""
    with (
        pytest.raises(DeployabilityError, match=r"net\.xml should be written.*MiB free.*Make room"),
        written_to(tmp_path / "net.xml"),
        refused("The exporter should export.", "Replace the operation."),
    ):
        raise OSError(number, "what the system says")


def test_other_errors_are_those_of_the_exporter(tmp_path: Path) -> None:
    """Also a file that it has not found."""
    with (
        pytest.raises(DeployabilityError, match=r"should export\. Found FileNotFoundError.*Replace the operation\."),
        written_to(tmp_path / "net.xml"),
        refused("The exporter should export.", "Replace the operation."),
    ):
        raise FileNotFoundError(errno.ENOENT, "no such library")


def test_what_is_no_model() -> None:
    """A module is one."""
    check_module(nn.Linear(1, 1))
    with pytest.raises(DeployabilityError, match="Found dict"):
        check_module({})
