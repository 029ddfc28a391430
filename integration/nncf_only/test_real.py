"""The main job on a real pretrained network, where a folder of them is at hand (environment variable QFT_REAL)."""

import pytest
import real_folder

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nncf

import qft_plugin.nncf as host
from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig

pytestmark = pytest.mark.skipif(not real_folder.REAL, reason=real_folder.REASON)


@pytest.mark.parametrize("rescale", ["channelwise", "layerwise"])
def test_resnet20_agrees_with_float(rescale, tmp_path):
    """A quarter of the default finetune agrees with the float network, and the saved IR agrees with the result."""
    net, calibration, test = real_folder.load()
    finetune = FinetuneConfig(images_fed=real_folder.SHORT)
    config = QFTConfig(hardware=HardwareSpec(rescale=rescale), finetune=finetune)
    quantized = nncf.quantize(net, nncf.Dataset(list(calibration.split(128))), algorithm=config)
    with host.without_compiler():
        found = real_folder.classes(quantized, test)
    assert real_folder.percent(found == real_folder.classes(net, test)) > real_folder.LEAST_AGREEMENT
    report = host.save_openvino(quantized, tmp_path / "model.xml", calibration[:8])
    assert report.int8_convolutions == len(report.convolutions) == 19
    images = test[: real_folder.COMPARED]
    ir = real_folder.on_openvino(report.path)(images)
    with host.without_compiler():
        assert real_folder.distance(ir, quantized, images) < real_folder.AS_FAR
