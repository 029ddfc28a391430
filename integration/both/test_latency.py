"""How long a file takes, of IR and ONNX files."""

import pytest
import torch
from torch import nn

from qft_plugin import DataError, DeployabilityError
from qft_plugin.deploy.latency import measure_latency

openvino = pytest.importorskip("openvino", reason="latency is measured in OpenVINO")


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.deep = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(3)))

    def forward(self, image, offset):
        """Add an offset to an image."""
        return self.deep(self.conv(image + offset)).mean((2, 3))


EXAMPLE = (torch.rand(4, 3, 32, 32), torch.rand(4, 3, 1, 1))


def saved(folder, *, width=8, batch=-1):
    """Write a network as IR."""
    shapes = [[batch, *t.shape[1:]] for t in EXAMPLE]
    model = openvino.convert_model(Two(width).eval(), example_input=EXAMPLE, input=shapes)
    path = folder / f"net{width}_{batch}.xml"
    openvino.save_model(model, path)
    return path


@pytest.mark.parametrize("batch", [-1, 1, 4])
def test_one_image_is_timed(tmp_path, batch):
    """Whatever number of images the file is for, and the example has."""
    found = measure_latency(saved(tmp_path, batch=batch), EXAMPLE, repeats=5)
    assert 0 < found["fastest_ms"] <= found["median_ms"] <= found["slowest_ms"]
    assert (found["runs"], found["threads"]) == (5, 1)


def test_more_work_takes_longer(tmp_path):
    """A network of 64 times the products of another is slower."""
    small, large = (measure_latency(saved(tmp_path, width=w), EXAMPLE, repeats=9)["fastest_ms"] for w in (16, 128))
    assert large > 2 * small


def test_inputs_by_name(tmp_path):
    """A dict names the inputs of the file."""
    found = measure_latency(saved(tmp_path), {"image": EXAMPLE[0], "offset": EXAMPLE[1]}, repeats=3)
    assert found["median_ms"] > 0


def test_an_onnx_file(tmp_path):
    """OpenVINO reads it as it is."""
    onnx = pytest.importorskip("onnx", reason="the file is made with onnx")
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["images", 3, 8, 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "net.onnx")
    assert measure_latency(tmp_path / "net.onnx", torch.rand(2, 3, 8, 8), repeats=3)["median_ms"] > 0


def test_what_the_file_does_not_take(tmp_path):
    """Another number of inputs, other shapes and a file that is none are refused, each with what to do."""
    path = saved(tmp_path)
    with pytest.raises(DataError, match=r"should have the 2 inputs of net8_-1\.xml\. Found 1"):
        measure_latency(path, EXAMPLE[0])
    with pytest.raises(DeployabilityError, match="OpenVINO should load and run the file"):
        measure_latency(path, (torch.rand(1, 5, 32, 32), EXAMPLE[1]))
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(DeployabilityError, match="OpenVINO should load and run the file"):
        measure_latency(tmp_path / "broken.onnx", EXAMPLE[0])
