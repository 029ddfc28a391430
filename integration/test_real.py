"""The main job on a real pretrained network, where a folder of them is at hand (environment variable QFT_REAL)."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nncf

import qft_plugin.nncf as host
from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig

REAL = os.environ.get("QFT_REAL")
TEST_IMAGES = 2000
LEAST_AGREEMENT = 93.5
"""A short finetune reaches 95 to 96 % in both granularities; rounding to nearest reaches 84 to 86 %."""

LEAST_IR_AGREEMENT = 99.5
"""Float32 sums in another order move the class of one or two images in a thousand."""

pytestmark = pytest.mark.skipif(not REAL, reason="QFT_REAL names no folder of real networks")


@pytest.fixture(scope="module")
def real():
    """Return the module that defines the networks, ResNet-20, calibration images and test images."""
    folder = Path(REAL)
    spec = importlib.util.spec_from_file_location("nets_of_real_folder", folder / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)

    def images(kind, count):
        with np.load(next(folder.glob(f"*_{kind}.npz"))) as file:
            return nets.normalise(torch.from_numpy(file["x"][:count])).contiguous()

    return nets.load("resnet20"), images("calibration", 1024), images("test", TEST_IMAGES)


@torch.no_grad()
def classes(model, images):
    return torch.cat([model(part).argmax(1) for part in images.split(500)])


@pytest.mark.parametrize("rescale", ["channelwise", "layerwise"])
def test_resnet20_agrees_with_float(rescale, real, tmp_path):
    """A quarter of the default finetune agrees with the float network, and the saved IR agrees with the result."""
    net, calibration, test = real
    config = QFTConfig(hardware=HardwareSpec(rescale=rescale), finetune=FinetuneConfig(images_fed=3072))
    quantized = nncf.quantize(net, nncf.Dataset(list(calibration.split(128))), algorithm=config)
    with host.without_compiler():
        found = classes(quantized, test)
    assert 100 * float((found == classes(net, test)).double().mean()) > LEAST_AGREEMENT
    report = host.save_openvino(quantized, tmp_path / "model.xml", calibration[:8])
    assert report.int8_convolutions == len(report.convolutions) == 19
    compiled = openvino.Core().compile_model(report.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ir = classes(lambda x: torch.from_numpy(np.asarray(compiled([x.numpy()])[0])), test)
    assert 100 * float((ir == found).double().mean()) > LEAST_IR_AGREEMENT
