"""A wrong example of an export: the error names it, what it should be, and what was found."""

import nets
import pytest
import torch
from conftest import four_bits

from qft_plugin import DataError, QFTError

RESIDUAL = r"like the images that the model was quantized with, float32 \[images, 3, 8, 8\]"

WRONG = {
    "missing": (lambda _: None, r"Found None\."),
    "list": (lambda x: [x, x], r"Found a list of 2 tensors"),
    "list of lists": (lambda x: x[:1].tolist(), r"Found a list of list"),
    "numpy": (lambda x: x.numpy(), r"Found a[n]? ndarray"),
    "two inputs": (lambda x: (x, x), r"Found float32 \[16, 3, 8, 8\], float32.*which its forward does not take"),
    "another name": (lambda x: {"picture": x}, r"Found picture: float32.*which its forward does not take"),
    "no axis of images": (lambda x: x[0], r"Found float32 \[3, 8, 8\]"),
    "channels": (lambda x: x[:, :2], r"Found float32 \[16, 2, 8, 8\], on which the model raises RuntimeError"),
    "double": (lambda x: x.double(), r"Found float64 \[16, 3, 8, 8\]"),
    "bytes": (lambda x: x.byte(), r"Found uint8"),
    "device": (lambda x: x.to("meta"), r"Found float32 \[16, 3, 8, 8\] on meta, while the model is on cpu"),
}


@pytest.fixture(scope="module")
def made():
    """Return what was quantized already, by host."""
    return {}


@pytest.fixture
def quantized(host, made):
    """Return a quantized model and an image batch; each host quantizes once."""
    if type(host) not in made:
        model, items = nets.build("residual"), nets.items("residual")
        made[type(host)] = host.finetuned(model, items, four_bits(finetune=None))[1], items[0]
    return made[type(host)]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_example(kind, host, quantized, tmp_path):
    """It is refused before anything is exported, and no file is left."""
    model, item = quantized
    make, words = WRONG[kind]
    with pytest.raises(DataError, match=rf"^example_input should be {RESIDUAL}\. {words}") as caught:
        host.save(model, tmp_path, make(item))
    assert str(caught.value).endswith("a tensor, a tuple of tensors or a dict of tensors.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [lambda x: x[:1], lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_a_right_example(form, host, quantized, tmp_path):
    """Every form that a dataset may have is one, with any number of images."""
    model, item = quantized
    assert host.save(model, tmp_path, form(item)).bytes > 0


def test_a_model_without_images(tmp_path):
    """Where nothing is known of the images, what the model takes decides."""
    pytest.importorskip("brevitas")
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerTensorFloat
    from torch import nn

    from qft_plugin.brevitas import save_qcdq, save_qonnx

    model = nn.Sequential(qnn.QuantConv2d(3, 4, 3, weight_quant=Int8WeightPerTensorFloat)).eval()
    for save in (save_qcdq, save_qonnx):
        for wrong, words in (
            (torch.randn(1, 4, 8, 8), r"float32 \[1, 4, 8, 8\], on which the model raises"),
            (torch.randn(1, 3, 8, 8).double(), r"float64 \[1, 3, 8, 8\], while the model is in float32"),
            (None, r"None"),
        ):
            with pytest.raises(
                DataError, match=rf"^example_input should be one input, as for the model\. Found {words}"
            ):
                save(model, tmp_path / "net.onnx", wrong)
    assert list(tmp_path.iterdir()) == []
    assert issubclass(DataError, QFTError)
