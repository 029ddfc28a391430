"""The scripts of examples/ run as a user starts them, on images that are made here."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from snippet_setup import digit_net, digits

EXAMPLES = Path(__file__).parents[2] / "examples"
INTEGRATION = Path(__file__).parents[1]
SECONDS = 300
"""Much longer than any takes, which is about 20."""

FED = ["--images-fed", "640"]


def run(script, *arguments):
    """Run a script with the networks of the tests in reach, and return what it says."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments), *FED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(INTEGRATION), *sys.path])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "QFTWarning" not in done.stderr
    return done.stdout


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed here")


@pytest.mark.wide
@pytest.mark.nncf_only
def test_a_folder_of_images_becomes_ir(tmp_path):
    """PNG files, a network and its weights give an IR whose convolutions run in int8."""
    needs("nncf")
    from PIL import Image

    images, _ = digits()
    (tmp_path / "images").mkdir()
    for number, image in enumerate((255 * images[:160, 0]).byte().numpy()):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    torch.save(digit_net().state_dict(), tmp_path / "weights.pt")
    arguments = ["--model", "snippet_setup:DigitNet", "--weights", tmp_path / "weights.pt", "--size", 8]
    said = run(
        "images_to_openvino.py",
        tmp_path / "images",
        tmp_path / "net.xml",
        *arguments,
        *("--mean", 0, "--std", 1),
    )
    assert "3 of 3 convolutions in int8" in said
    assert (tmp_path / "net.xml").exists()
    assert (tmp_path / "net.bin").exists()


@pytest.mark.wide
def test_a_network_of_brevitas_becomes_qonnx_and_qcdq(tmp_path):
    """The two files are there, and the convolutions of one run in int8."""
    needs("brevitas")
    said = run("brevitas_to_onnx.py", tmp_path / "out")
    assert "2 of 2 convolutions in int8" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["net_qcdq.onnx", "net_qonnx.onnx"]


@pytest.mark.wide
def test_an_onnx_file_becomes_ir(tmp_path):
    """A float ONNX file and an array of images give an IR whose convolutions run in int8."""
    needs("nncf", "onnx", "onnxruntime")
    images, _ = digits()
    numpy.save(tmp_path / "images.npy", images[:160].numpy())
    free = {"images": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this exporter goes
        torch.onnx.export(
            digit_net(), (images[:2],), tmp_path / "net.onnx", input_names=["images"], dynamic_axes=free, dynamo=False
        )
    said = run("onnx_to_openvino.py", tmp_path / "net.onnx", tmp_path / "images.npy", tmp_path / "net.xml")
    assert "3 of 3 convolutions in int8" in said
    assert (tmp_path / "net.bin").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_script_is_short(script):
    """A script can be read in one go."""
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) <= 80
