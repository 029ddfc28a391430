"""Brevitas on a real pretrained network, where a folder of them is at hand (environment variable QFT_REAL)."""

import pytest
import real_folder

pytest.importorskip("brevitas", reason="these tests are about Brevitas")

from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.brevitas import fold, quantize, save_qcdq, save_qonnx
from qft_plugin.deploy import qonnx

pytestmark = pytest.mark.skipif(not real_folder.REAL, reason=real_folder.REASON)


@pytest.mark.parametrize("rescale", ["channelwise", "layerwise"])
def test_resnet20_agrees_with_float(rescale, tmp_path):
    """A quarter of the default finetune agrees with the float network, and both exports agree with the result."""
    net, calibration, test = real_folder.load()
    finetune = FinetuneConfig(images_fed=real_folder.SHORT)
    config = QFTConfig(hardware=HardwareSpec(rescale=rescale), finetune=finetune)
    folded = fold(quantize(net, list(calibration.split(128)), config=config))
    found = real_folder.classes(folded, test)
    assert real_folder.percent(found == real_folder.classes(net, test)) > real_folder.LEAST_AGREEMENT
    report = save_qcdq(folded, tmp_path / "qcdq.onnx", calibration[:8])
    assert report.int8_convolutions == len(report.convolutions) == 19
    images = test[: real_folder.COMPARED]
    ir = real_folder.on_openvino(report.path)(images)
    assert real_folder.distance(ir, folded, images) < real_folder.AS_FAR
    save_qonnx(folded, tmp_path / "qonnx.onnx", images)
    (executed,) = qonnx.in_executor(qonnx.load(tmp_path / "qonnx.onnx"))([images], [])
    assert real_folder.distance(executed, folded, images) < real_folder.AS_FAR
