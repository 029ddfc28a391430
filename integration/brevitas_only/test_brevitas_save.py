"""What the exported files hold, where they run, and what is refused."""

import copy

import nets
import pytest
import torch
from conftest import four_bits

pytest.importorskip("brevitas", reason="these tests are about Brevitas")

import brevitas.nn as qnn
import onnx
import openvino
from brevitas.export import export_onnx_qcdq
from onnx import numpy_helper
from qonnx.transformation.extract_conv_bias import ExtractBiasFromConv
from torch import nn

from qft_plugin import DeployabilityError, HardwareSpec, ParityError
from qft_plugin.brevitas import (
    QFTInt4WeightDoublyPerChannelFloat,
    QFTUint8Act,
    fold,
    link,
    quantize,
    save_qcdq,
    save_qonnx,
)
from qft_plugin.brevitas._save import watched, weight_integers
from qft_plugin.deploy import qcdq, qonnx
from qft_plugin.deploy.layers import precisions, runtime_ops
from qft_plugin.deploy.onnx_run import in_onnx_runtime, in_openvino
from qft_plugin.deploy.openvino import INT8

EXACT = 1e-5
"""Relative L2: float32 sums in another order; one activation that rounds the other way is at 1e-4 and more."""

ROUNDED = 5e-3
"""A few activations that round the other way in OpenVINO's kernels, each by one step of 8 bits."""

NETS = ["residual", "in_place", "inverted", "branches", "grouped", "transposed", "twice", "one_d", "linear_only"]


@pytest.fixture(scope="module")
def folded():
    """Return a function that quantizes and folds a network of the collection once."""
    made = {}

    def make(name):
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, items = nets.build(name), nets.items(name)
            linked = quantize(model, items, config=four_bits())
            made[name] = linked, fold(linked), items[0]
        return made[name]

    return make


@pytest.mark.core
@pytest.mark.parametrize("name", NETS)
def test_qonnx_computes_what_torch_computes(name, folded, tmp_path):
    """Folded and unfolded models equal their QONNX files in every integer and to 1e-5 in their outputs."""
    linked, model, item = folded(name)
    for number, exported in enumerate((linked, model)):
        report = save_qonnx(exported, tmp_path / f"{number}.onnx", item)
        assert report.relative_error < EXACT
        assert report.weights == len(weight_integers(exported)) > 0
        assert report.quantizers[4] >= report.weights
        assert report.bytes == report.path.stat().st_size


# The repeated layer of "twice" reads two quantizers, so that its bias has no one accumulator scale: `fold` refuses it.
@pytest.mark.core
@pytest.mark.parametrize(("name", "bias_bits"), [*((n, None) for n in NETS), *((n, 32) for n in NETS if n != "twice")])
def test_qcdq_runs_in_int8(name, bias_bits, folded, tmp_path):
    """Every convolution of a folded model runs in int8 in OpenVINO, and ONNX Runtime computes what torch computes."""
    linked, _, item = folded(name)
    report = save_qcdq(fold(linked, bias_bits=bias_bits), tmp_path / "model.onnx", item)
    assert report.relative_error < EXACT
    assert report.openvino_error < ROUNDED
    net = nets.NETS[name]
    assert len(report.convolutions) == net.convolutions
    assert report.int8_convolutions == net.convolutions - net.not_int8
    if name != "transposed":  # has no linear layer
        assert set(report.linear.values()) <= INT8


def test_the_clips_keep_openvino_from_int8(folded, tmp_path):
    """As Brevitas exports it, the model runs in floating point; without the clips of its weights in int8."""
    _, model, item = folded("residual")
    path = tmp_path / "model.onnx"
    # Around a module of another kind: torch takes the graph of an fx module for one of its own.
    export_onnx_qcdq(
        nn.Sequential(copy.deepcopy(model)), args=item, export_path=str(path), dynamo=False, opset_version=13
    )
    file = onnx.load(path)
    before = ran_in_openvino(path, item)
    clips = sum(node.op_type == "Clip" for node in file.graph.node)
    assert qcdq.strip_weight_clips(file) == 5 <= clips
    assert qcdq.strip_weight_clips(file) == 0
    onnx.save(file, path)
    after = ran_in_openvino(path, item)
    assert not before[0] & INT8
    assert after[0] <= INT8
    assert float((before[1] - after[1]).norm() / before[1].norm()) < ROUNDED


def ran_in_openvino(path, item):
    """Return the precisions that the convolutions of a file run in, and what it computes."""
    convolutions, _ = precisions(runtime_ops(openvino.Core().read_model(path)), {})
    return set(convolutions.values()), in_openvino(path)([item], [])[0]


def test_a_constant_outside_its_clip_is_refused(folded, tmp_path):
    """A clip that would change an integer is not removed without a word: the error names the constant."""
    _, model, item = folded("residual")
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(
        nn.Sequential(copy.deepcopy(model)), args=item, export_path=str(path), dynamo=False, opset_version=13
    )
    file = onnx.load(path)
    clip = next(n for n in file.graph.node if n.op_type == "Clip" and "conv1" in n.name)
    for node in file.graph.node:
        if clip.input[0] in node.output:
            values = numpy_helper.to_array(node.attribute[0].t).copy()
            values.flat[0] = 100
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(values))
    for tensor in file.graph.initializer:
        if tensor.name == clip.input[0]:
            values = numpy_helper.to_array(tensor).copy()
            values.flat[0] = 100
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ParityError, match=r"conv1.*Found 1 of 576"):
        qcdq.strip_weight_clips(file)


def test_the_batch_of_a_qcdq_file_is_free(folded, tmp_path):
    """A file that was exported with 16 images computes 3."""
    _, model, item = folded("residual")
    save_qcdq(model, tmp_path / "model.onnx", item)
    with torch.no_grad():
        expected = model(item[:3])
    (found,) = in_onnx_runtime(onnx.load(tmp_path / "model.onnx"))([item[:3]], [])
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["features", "two_inputs", "keywords"])
def test_several_inputs_and_outputs(name, folded, tmp_path):
    """Inputs by position or by keyword and a dictionary of outputs come through both exports."""
    _, model, item = folded(name)
    assert save_qonnx(model, tmp_path / "qonnx.onnx", item).relative_error < EXACT
    assert save_qcdq(model, tmp_path / "qcdq.onnx", item).relative_error < EXACT


class Doubly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = qnn.QuantConv2d(3, 8, 3, weight_quant=QFTInt4WeightDoublyPerChannelFloat)
        self.act = qnn.QuantReLU(act_quant=QFTUint8Act)
        self.second = qnn.QuantConv2d(8, 4, 3, weight_quant=QFTInt4WeightDoublyPerChannelFloat)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@pytest.mark.core
def test_doubly_per_channel_is_for_qonnx(tmp_path):
    """Its scales are in the QONNX file as they are, and QCDQ refuses them by the names of the layers."""
    model, x = Doubly().eval(), torch.randn(4, 3, 8, 8)
    link(model, x)
    report = save_qonnx(fold(model), tmp_path / "model.onnx", x)
    assert report.relative_error < EXACT
    file = qonnx.load(report.path)
    shapes = [tuple(file.get_initializer(n.input[1]).shape) for n in file.graph.node if n.op_type == "Quant"]
    assert (8, 3, 1, 1) in shapes
    assert (4, 8, 1, 1) in shapes
    with pytest.raises(DeployabilityError, match=r"first, second"):
        save_qcdq(fold(model), tmp_path / "qcdq.onnx", x)
    assert not (tmp_path / "qcdq.onnx").exists()


@pytest.mark.core
def test_qcdq_refuses_what_is_not_folded(folded, tmp_path):
    """A linked model has scales by input channel; the error names the layers and says to fold."""
    linked, _, item = folded("residual")
    with pytest.raises(DeployabilityError, match=r"conv1.*fold"):
        save_qcdq(linked, tmp_path / "model.onnx", item)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.core
@pytest.mark.parametrize("save", [save_qonnx, save_qcdq])
@pytest.mark.parametrize("path", ["missing/model.onnx", "model.xml"])
def test_where_a_file_cannot_go(save, path, folded, tmp_path):
    """A folder that does not exist and another suffix are refused."""
    _, model, item = folded("residual")
    with pytest.raises(DeployabilityError, match=r"\.onnx file in an existing folder"):
        save(model, tmp_path / path, item)


@pytest.mark.core
@pytest.mark.parametrize("save", [save_qonnx, save_qcdq])
def test_a_wrong_file_is_not_written(save, folded, tmp_path, monkeypatch):
    """Where the proof fails, the file that was there stays and nothing else is left; the model is as before."""
    _, model, item = folded("residual")
    model.train()
    target = tmp_path / "model.onnx"
    target.write_text("what was there")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("conv1.weight").neg_()
    monkeypatch.setattr("qft_plugin.brevitas._save.watched", lambda _: watched(other))
    with pytest.raises(ParityError, match=r"conv1\.weight"):
        save(model, target, item)
    monkeypatch.undo()
    assert target.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [target]
    assert all(module.training for module in model.modules())
    model.eval()
    assert save(model, target, item).relative_error < EXACT


class Auxiliary(Doubly):
    def __init__(self):
        super().__init__()
        self.unused = qnn.QuantConv2d(8, 4, 3, weight_quant=QFTInt4WeightDoublyPerChannelFloat)


def test_a_layer_that_is_not_called(caplog, tmp_path):
    """A head for training alone is named by link, and not looked for in the file."""
    model, x = Auxiliary().eval(), torch.randn(4, 3, 8, 8)
    with caplog.at_level("WARNING", logger="qft_plugin"):
        link(model, x)
    assert "unused.weight" in caplog.text
    assert save_qonnx(fold(model), tmp_path / "model.onnx", x).weights == 2


@pytest.mark.core
@pytest.mark.parametrize("rescale", ["channelwise", "layerwise"])
def test_qonnx_moves_integer_biases(rescale, tmp_path):
    """QONNX' own transformation moves quantized biases out of the convolutions, and the file computes the same."""
    model, items = nets.build("inverted"), nets.items("inverted")
    config = four_bits(hardware=HardwareSpec(bias_bits=24, rescale=rescale), finetune=None)
    folded = fold(quantize(model, items, config=config))
    save_qonnx(folded, tmp_path / "model.onnx", items[0])
    file = qonnx.load(tmp_path / "model.onnx")
    moved = file.transform(ExtractBiasFromConv())
    convolutions = [node for node in moved.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == nets.NETS["inverted"].convolutions
    assert all(len(node.input) == 2 for node in convolutions)
    found, expected = (qonnx.in_executor(model)([items[0]], []) for model in (moved, file))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


class SharedConvolution(nn.Module):
    """A convolution that an operation with a slice and a concatenation read, as in edgenext's split attention."""

    def __init__(self, joins, bias):
        super().__init__()
        self.joins = joins
        self.stem = nn.Conv2d(3, 16, 1)
        self.shortcut = nn.Conv2d(16, 16, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.next = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        left, right = (x + self.shortcut(x)).chunk(2, 1)
        left = self.shared(left)
        return self.last(torch.cat([left, self.next(self.joins(left, right))], 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joins", [torch.add, torch.sub, torch.mul])
def test_openvino_keeps_a_convolution_that_several_operations_read(joins, bias, tmp_path):
    """OpenVINO computes what torch computes where a convolution, with a bias or without, has several readers."""
    model = SharedConvolution(joins, bias).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    data = [torch.randn(16, 3, 8, 8)]
    folded = fold(quantize(model, data, config=four_bits(finetune=None)))
    report = save_qcdq(folded, tmp_path / "model.onnx", data[0])
    assert report.openvino_error < ROUNDED
    assert report.int8_convolutions == 5


class Bag(nn.Module):
    """Averages embeddings by a module that is exported as a loop."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(16, 8, mode="mean"), nn.Linear(8, 4)

    def forward(self, words):
        return self.head(self.bag(words))


@pytest.fixture(scope="module")
def bag():
    """Return a quantized network whose file has a loop, and an input."""
    words = torch.arange(64).view(16, 4) % 16
    return fold(quantize(Bag().eval(), [words], config=four_bits(finetune=None))), words


def test_what_a_loop_reads_stays(bag, tmp_path):
    model, words = bag
    report = save_qcdq(model, tmp_path / "bag.onnx", words)
    assert report.relative_error < EXACT
    assert report.openvino_error < EXACT


def test_what_the_executor_of_qonnx_cannot_run_is_refused(bag, tmp_path):
    """Its clean-up loses what a loop reads; the operation is named, and nothing is written."""
    model, words = bag
    with pytest.raises(DeployabilityError, match=r"QONNX' executor should load and run.*Loop"):
        save_qonnx(model, tmp_path / "bag.onnx", words)
    assert list(tmp_path.iterdir()) == []


class Spectrum(nn.Module):
    """Calls a function that no ONNX operation of this version stands for."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x) + torch.special.bessel_j0(x.mean())


@pytest.mark.core
@pytest.mark.parametrize("save", [save_qcdq, save_qonnx])
def test_what_torch_cannot_export_is_refused(save, tmp_path):
    """The operation is named, and nothing is written."""
    x = torch.randn(16, 8)
    folded = fold(quantize(Spectrum().eval(), [x], config=four_bits(finetune=None)))
    with pytest.raises(DeployabilityError, match=r"torch\.onnx should export.*bessel_j0"):
        save(folded, tmp_path / "spectrum.onnx", x)
    assert list(tmp_path.iterdir()) == []
