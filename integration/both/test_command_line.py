"""The command line with real hosts: from a function and a folder of images, or from ONNX, to a file that is proved."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import EACH_HOST, host_of

pytest.importorskip("typer", reason="typer is not installed here")
pytest.importorskip("onnx", reason="onnx is not installed here")

from onnx_files import exported, small_network
from PIL import Image
from typer.testing import CliRunner

from qft_plugin.cli.app import app

pytestmark = pytest.mark.wide

SUFFIX = {"nncf": ".xml", "brevitas": ".onnx"}
FEW = ("--images-fed", "64", "--batch", "16", "--size", "16")


def make():
    """Make the network of the tests, as a user's function would."""
    return small_network()[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with images."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            tmp_path / f"images/{number:02}.png"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    return tmp_path


@pytest.mark.parametrize("name", EACH_HOST)
def test_a_function_and_a_folder_become_a_file(folder, name):
    """All convolutions in int8, said at the end; nothing else is left in the folder."""
    host_of(name)
    out = f"net{SUFFIX[name]}"
    done = CliRunner().invoke(app, ["quantize", "test_command_line:make", "--data", "images", "--out", out, *FEW])
    assert done.exit_code == 0, done.output
    assert "5 of 5 convolutions run in int8 in OpenVINO" in done.output
    assert "6 quantized weights, each proved" in done.output
    written = {p.name for p in folder.iterdir()} - {"images"}
    assert written == ({out, "net.bin"} if name == "nncf" else {out})


@pytest.mark.parametrize("name", EACH_HOST)
def test_onnx_becomes_a_file(folder, name):
    """Likewise; with --quiet nothing is said."""
    host_of(name)
    net, images = small_network()
    source = exported(folder, net, images[:1])
    out = f"net{SUFFIX[name]}"
    common = ["quantize", str(source), "--data", "images", "--out", out, *FEW]
    done = CliRunner().invoke(app, common)
    assert done.exit_code == 0, done.output
    assert "5 of 5 convolutions run in int8 in OpenVINO" in done.output
    (folder / out).unlink()
    again = CliRunner().invoke(app, [*common, "--quiet"])
    assert (again.exit_code, again.output) == (0, "")
    assert (folder / out).is_file()


def test_a_format_is_chosen(folder):
    """QONNX has a Quant for each quantizer, QCDQ has none."""
    host_of("brevitas")
    import onnx

    common = ["quantize", "test_command_line:make", "--data", "images", "--out", "net.onnx", *FEW]
    for form, count in (("qonnx", True), ("qcdq", False)):
        done = CliRunner().invoke(app, [*common, "--format", form])
        assert done.exit_code == 0, done.output
        kinds = {node.op_type for node in onnx.load(folder / "net.onnx").graph.node}
        assert ("Quant" in kinds) == count


@pytest.mark.parametrize("name", EACH_HOST)
def test_images_of_another_size_than_the_file_is_for(folder, name):
    """The size that it is for is said."""
    host_of(name)
    net, images = small_network()
    source = exported(folder, net, torch.zeros(1, *images.shape[1:]))
    out = f"net{SUFFIX[name]}"
    done = CliRunner().invoke(app, ["quantize", str(source), "--data", "images", "--out", out])
    assert done.exit_code == 1
    assert "images [?, 3, 16, 16]. Found [32, 3, 20, 24]" in done.output
    assert CliRunner().invoke(app, ["quantize", "no.onnx", "--data", "images", "--out", out]).exit_code == 1
