"""Small networks that were drawn at random and went wrong once: each has one construct that is seldom seen."""

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from conftest import four_bits, relative_error
from hosts import host_of
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.errors import ParityError
from qft_plugin.graph.torch_model import tensors_in

SEVEN_BITS = 0.015
"""Relative L2 error of the outputs with 7 bits, with which no CPU overflows; quantizers in a wrong place show as 0.02
and more."""


class Unusual(nn.Module):
    """Two convolutions with BatchNorms and a third one, used as `run` says."""

    def __init__(self, run: Callable[["Unusual", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, x).relu())


def both(m: Unusual, x: Tensor) -> Tensor:
    """Run the two convolutions with their norms."""
    return m.norm2(m.conv2(m.norm1(m.conv1(x)).relu()))


def norm_by_function(m: Unusual, x: Tensor) -> Tensor:
    n = m.norm1
    x = functional.batch_norm(m.conv1(x), n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
    return m.norm2(m.conv2(x.relu()))


def norm_held_in_a_list() -> nn.Module:
    model = Unusual(lambda m, x: m.held[3](m.held[2](m.held[1](m.held[0](x)).relu())))
    model.held = [model.conv1, model.norm1, model.conv2, model.norm2]
    return model


def called_in_vain(m: Unusual, x: Tensor) -> Tensor:
    x = m.conv1(x)
    y = m.conv2(x.relu())
    m.conv2(x.tanh())
    return y


def multiplied_by_zeros() -> nn.Module:
    model = Unusual(lambda m, x: m.conv2(m.conv1(x) * m.factor).relu())
    model.factor = nn.Parameter(torch.tensor([0.0, 1, 2, 0.5, 0, 1, 0.7, 3]).reshape(8, 1, 1))
    return model


def depthwise_transposed() -> nn.Module:
    model = Unusual(both)
    model.conv2 = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8)
    return model


def group_norm_first() -> nn.Module:
    model = Unusual(lambda m, x: both(m, m.first(x)))
    model.first = nn.GroupNorm(1, 3)
    return model


def norm_over_channels() -> nn.Module:
    model = Unusual(lambda m, x: both(m, m.first(x.movedim(1, -1)).movedim(-1, 1)))
    model.first = nn.LayerNorm(3)
    return model


def norm_between_equal_axes() -> nn.Module:
    """There are as many channels as rows and columns: a transposition does not show in the shape."""
    model = Unusual(lambda m, x: m.conv2(m.first(m.conv1(x).movedim(1, -1)).movedim(-1, 1)))
    model.first = nn.LayerNorm(8)
    return model


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def dead_gates() -> nn.Module:
    """No image wakes the ReLUs of two gates: what their last convolutions add to their biases is 0."""
    model = Unusual(lambda m, x: m.second(m.conv2(m.first(m.conv1(x)))))
    model.first, model.second = Gate(), Gate()
    for gate in (model.first, model.second):
        nn.init.constant_(gate.down.bias, -100)
    return model


def second_half_only() -> nn.Module:
    model = Unusual(lambda m, x: m.norm2(m.conv2(m.wide(x).chunk(2, 1)[1])))
    model.wide = nn.Conv2d(3, 16, 3)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "norm by function": lambda: Unusual(norm_by_function),
    "norm held in a list": norm_held_in_a_list,
    "called in vain": lambda: Unusual(called_in_vain),
    "multiplied by zeros": multiplied_by_zeros,
    "depthwise transposed": depthwise_transposed,
    "group norm first": group_norm_first,
    "norm over channels": norm_over_channels,
    "norm between equal axes": norm_between_equal_axes,
    "dead gates": dead_gates,
    "second half only": second_half_only,
    "square": lambda: Unusual(lambda m, x: m.norm2(m.conv2(m.conv1(x).square() * 0.1 + x.mean(1, keepdim=True)))),
}


def quantized(host: Any, name: str) -> tuple[Any, Any, list[Tensor]]:
    """Return the result of a job, its model, and the images."""
    model, images = nets.settled(NETWORKS[name]()), list(torch.randn(2, 16, 3, 8, 8))
    result, student = host.finetuned(model, images, four_bits(weight_bits=7))
    with torch.no_grad():
        expected = list(tensors_in(model(images[0])))
    assert relative_error(host.outputs(student, images[0]), expected) < SEVEN_BITS
    return result, student, images


@pytest.mark.parametrize("name", NETWORKS)
def test_unusual_networks(name, host, tmp_path):
    """They keep what they compute, train, and every weight of their files is proved; nothing is warned of."""
    result, student, images = quantized(host, name)
    assert result.final_loss <= result.start_loss
    integers = host.integers(student, images[0][:2])
    assert host.save(student, tmp_path, images[0][:2]).weights == len(integers)


def test_wrong_integers_in_a_dead_part_are_found(tmp_path):
    """What a layer adds to its bias is too little to change a sum, but its integers are compared."""
    host, images = host_of("brevitas"), torch.randn(16, 3, 8, 8)
    import onnx
    from onnx import numpy_helper

    from qft_plugin.brevitas import fold, save_qcdq
    from qft_plugin.brevitas._save import watched
    from qft_plugin.deploy.onnx_run import in_onnx_runtime
    from qft_plugin.deploy.onnx_view import ONNXFile
    from qft_plugin.deploy.proof import prove

    student = fold(host.finetuned(nets.settled(dead_gates()), [images], four_bits(finetune=None))[1])
    save_qcdq(student, tmp_path / "net.onnx", images[:2], check=False)
    file = onnx.load(tmp_path / "net.onnx")
    wrong = next(t for t in file.graph.initializer if list(t.dims) == [8, 2, 1, 1])
    changed = numpy_helper.to_array(wrong).copy()
    changed.flat[0] += 1 if changed.flat[0] <= 0 else -1
    wrong.CopyFrom(numpy_helper.from_array(changed, wrong.name))
    read = ONNXFile(file, runtime="ONNX Runtime", free_batch=True, run=in_onnx_runtime(file))
    with pytest.raises(ParityError, match=r"Weight first\.up\.weight: its integers .* Found 1 of 16"):
        prove(watched(student), read, ((images[:2],), {}))


def test_a_tensor_times_itself_in_qonnx(tmp_path):
    """A node that reads one tensor twice is read back by QONNX, which renames the first place only."""
    host = host_of("brevitas")
    from qft_plugin.brevitas import fold, save_qonnx

    model = nets.settled(Unusual(lambda m, x: m.conv2((y := m.conv1(x).relu()) * y)))
    images = [torch.randn(16, 3, 8, 8)]
    _, student = host.finetuned(model, images, four_bits(finetune=None))
    assert save_qonnx(fold(student), tmp_path / "net.onnx", images[0][:2]).weights == 3


def test_layers_that_are_not_called_by_their_names_are_refused():
    """Where torch.fx cannot follow a forward, no quantized layer takes the place of one in a list."""
    from qft_plugin import ModelError

    model = norm_held_in_a_list().eval()
    run = model.run
    model.run = lambda m, x: x if float(x.sum()) > 1e9 else run(m, x)
    with pytest.raises(ModelError, match="calls conv1, conv2 by a name of its own"):
        host_of("brevitas").quantize(model, [torch.randn(16, 3, 8, 8)], four_bits(finetune=None))
