"""Networks from ONNX files: they compute what ONNX Runtime computes, and what cannot be is refused by name."""

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import four_bits
from torch import nn

from qft_plugin import DataError, HostError, ModelError, ParityError, QFTWarning, from_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed here")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed here")

from onnx_files import exported, model_of, node, small_network, value, whole, written  # noqa: E402

from qft_plugin.onnx_import import layers  # noqa: E402
from qft_plugin.onnx_import.file import relative, run  # noqa: E402

pytestmark = pytest.mark.wide

CLOSE = 1e-5
"""float32 sums in another order; what is read is refused from 1e-4 on."""

CONV = {"w": value(4, 3, 3, 3), "b": value(4)}
NORM = {"s": value(3, low=0.5), "b": value(3), "m": value(3), "v": value(3, low=0.5)}

ONE_NODE = {
    "conv": (node("Conv", "x", "w", "b", pads=[1, 1, 1, 1], strides=[2, 2]), CONV, nn.Conv2d),
    "conv without bias": (node("Conv", "x", "w", dilations=[2, 2]), {"w": CONV["w"]}, nn.Conv2d),
    "conv padded on one side": (node("Conv", "x", "w", "b", pads=[0, 1, 2, 0]), CONV, nn.Conv2d),
    "conv same upper": (node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2, 2]), {"w": CONV["w"]}, nn.Conv2d),
    "conv same lower": (node("Conv", "x", "w", auto_pad="SAME_LOWER", strides=[2, 2]), {"w": CONV["w"]}, nn.Conv2d),
    "depthwise": (node("Conv", "x", "w", group=3), {"w": value(6, 1, 3, 3)}, nn.Conv2d),
    "transposed": (
        node("ConvTranspose", "x", "w", "b", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        {"w": value(3, 4, 3, 3), "b": value(4)},
        nn.ConvTranspose2d,
    ),
    "batch norm": (node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=1e-3), NORM, nn.BatchNorm2d),
    "instance norm": (node("InstanceNormalization", "x", "s", "b"), NORM, nn.InstanceNorm2d),
    "layer norm": (node("LayerNormalization", "x", "s", "b", axis=-1), {"s": value(8), "b": value(8)}, nn.LayerNorm),
    "lrn": (node("LRN", "x", size=3, alpha=0.01), {}, nn.LocalResponseNorm),
    "relu": (node("Relu", "x"), {}, nn.ReLU),
    "relu6": (node("Clip", "x", "l", "h"), {"l": np.float32(0), "h": np.float32(6)}, nn.ReLU6),
    "hardtanh": (node("Clip", "x", "l", "h"), {"l": np.float32(-0.5), "h": np.float32(0.7)}, nn.Hardtanh),
    "lower bound": (node("Clip", "x", "l"), {"l": np.float32(0)}, nn.ReLU),
    "upper bound": (node("Clip", "x", "", "h"), {"h": np.float32(0.3)}, None),
    "leaky": (node("LeakyRelu", "x", alpha=0.2), {}, nn.LeakyReLU),
    "prelu": (node("PRelu", "x", "s"), {"s": value(3, 1, 1)}, nn.PReLU),
    "elu": (node("Elu", "x", alpha=0.7), {}, nn.ELU),
    "sigmoid": (node("Sigmoid", "x"), {}, nn.Sigmoid),
    "tanh": (node("Tanh", "x"), {}, nn.Tanh),
    "softplus": (node("Softplus", "x"), {}, nn.Softplus),
    "hard swish": (node("HardSwish", "x"), {}, nn.Hardswish),
    "hard sigmoid": (node("HardSigmoid", "x", alpha=1 / 6), {}, nn.Hardsigmoid),
    "another hard sigmoid": (node("HardSigmoid", "x", alpha=0.3, beta=0.4), {}, None),
    "softmax": (node("Softmax", "x", axis=1), {}, nn.Softmax),
    "log softmax": (node("LogSoftmax", "x"), {}, nn.LogSoftmax),
    "max pool": (node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), {}, nn.MaxPool2d),
    "max pool, one side": (node("MaxPool", "x", kernel_shape=[2, 2], pads=[0, 0, 1, 1]), {}, nn.MaxPool2d),
    "max pool, ceil": (node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), {}, nn.MaxPool2d),
    "mean pool": (node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), {}, nn.AvgPool2d),
    "mean pool, padding counted": (
        node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 0, 0, 0], count_include_pad=1),
        {},
        nn.AvgPool2d,
    ),
    "global mean": (node("GlobalAveragePool", "x"), {}, nn.AdaptiveAvgPool2d),
    "global max": (node("GlobalMaxPool", "x"), {}, nn.AdaptiveMaxPool2d),
    "mean": (node("ReduceMean", "x", axes=[2, 3]), {}, nn.AdaptiveAvgPool2d),
    "mean without axes": (node("ReduceMean", "x", axes=[-1, 2], keepdims=0), {}, None),
    "sum": (node("ReduceSum", "x", "a", keepdims=0), {"a": whole(1)}, None),
    "largest": (node("ReduceMax", "x", axes=[1]), {}, None),
    "constant added": (node("Add", "x", "c"), {"c": value(3, 1, 1)}, None),
    "one number": (node("Mul", "x", "c"), {"c": np.float32(0.1)}, None),
    "one number before": (node("Sub", "c", "x"), {"c": value(1)}, None),
    "power": (node("Pow", "x", "c"), {"c": np.float32(2)}, None),
    "largest of two": (node("Max", "x", "c"), {"c": value(3, 8, 8)}, None),
    "sum of three": (node("Sum", "x", "x", "c"), {"c": value(8)}, None),
    "mean of two": (node("Mean", "x", "c"), {"c": value(3, 8, 8)}, None),
    "error function": (node("Erf", "x"), {}, None),
    "slice": (
        node("Slice", "x", "s", "e", "a", "t"),
        {"s": whole(1), "e": whole(-1), "a": whole(3), "t": whole(2)},
        None,
    ),
    "slice to the end": (node("Slice", "x", "s", "e", "a"), {"s": whole(-3), "e": whole(2**62), "a": whole(2)}, None),
    "one of an axis": (node("Gather", "x", "i", axis=1), {"i": np.int64(-1)}, None),
    "some of an axis": (node("Gather", "x", "i", axis=1), {"i": whole(2, 0)}, None),
    "transposed axes": (node("Transpose", "x", perm=[0, 2, 3, 1]), {}, None),
    "flattened": (node("Flatten", "x"), {}, None),
    "reshaped": (node("Reshape", "x", "s"), {"s": whole(0, -1, 4)}, None),
    "unsqueezed": (node("Unsqueeze", "x", "a"), {"a": whole(1, -1)}, None),
    "padded": (node("Pad", "x", "p", "c"), {"p": whole(0, 0, 1, 2, 0, 0, 3, 0), "c": np.float32(0.5)}, None),
    "reflected": (node("Pad", "x", "p", mode="reflect"), {"p": whole(0, 0, 1, 2, 0, 0, 3, 0)}, None),
    "nearest": (
        node("Resize", "x", "", "f", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        {"f": np.array([1, 1, 2, 2], np.float32)},
        None,
    ),
    "bilinear": (
        node("Resize", "x", "", "f", mode="linear", coordinate_transformation_mode="half_pixel"),
        {"f": np.array([1, 1, 2, 3], np.float32)},
        None,
    ),
    "shuffled": (node("DepthToSpace", "x", blocksize=1, mode="CRD"), {}, nn.PixelShuffle),
}
OTHER_OPSETS = {
    "clip by attributes": (node("Clip", "x", min=0.0, max=6.0), {}, nn.ReLU6, 7),
    "clip without a lower bound": (node("Clip", "x", max=0.5), {}, None, 7),
    "pad by attributes": (node("Pad", "x", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.5), {}, None, 9),
    "squeeze by attributes": (node("Squeeze", "x", axes=[-1]), {}, None, 11),
    "unsqueeze by attributes": (node("Unsqueeze", "x", axes=[1, 3]), {}, None, 11),
    "slice by attributes": (node("Slice", "x", starts=[1], ends=[3], axes=[2]), {}, None, 9),
    "sum by attributes": (node("ReduceSum", "x", axes=[1], keepdims=1), {}, None, 11),
    "split by attributes": (node("Split", "x", outputs=("y", "z"), axis=1, split=[1, 2]), {}, None, 11),
    "dropout": (node("Dropout", "x", ratio=0.5), {}, None, 10),
    "norm": (node("BatchNormalization", "x", "s", "b", "m", "v"), NORM, nn.BatchNorm2d, 7),
    "upsample": (node("Upsample", "x", "f", mode="nearest"), {"f": np.array([1, 1, 2, 2], np.float32)}, None, 9),
    "softmax over the last axis": (node("Softmax", "x", axis=3), {}, nn.Softmax, 11),
    "gemm": (node("Gemm", "r", "w", "c"), {"w": value(8, 4), "c": value(4)}, nn.Linear, 9),
    "mean": (node("ReduceMean", "x", "a"), {"a": whole(2, 3)}, nn.AdaptiveAvgPool2d, 20),
    "gelu": (node("Gelu", "x", approximate="tanh"), {}, nn.GELU, 20),
    "mish": (node("Mish", "x"), {}, nn.Mish, 18),
    "group norm": (
        node("GroupNormalization", "x", "s", "b", num_groups=3),
        {"s": NORM["s"], "b": NORM["b"]},
        nn.GroupNorm,
        18,
    ),
    "split": (node("Split", "x", outputs=("y", "z", "u"), axis=1, num_outputs=3), {}, None, 18),
}
"""What earlier and later opsets say otherwise, with the opset."""


def images(count=5, *shape, seed=7):
    """Make random images."""
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((count, *(shape or (3, 8, 8)))).astype(np.float32)
    )


def same(model, proto, x):
    """Compare a module and a file on images; returns the relative difference."""
    with torch.no_grad():
        found = model(x)
    return relative(found.numpy(), run(proto, {model.input_names[0]: x.numpy()})[0])


@pytest.mark.parametrize("name", ONE_NODE)
def test_an_operation_computes_the_same(tmp_path, name):
    """For another number of images than any that was tried; what torch has as a module is one."""
    one, constants, kind = ONE_NODE[name]
    proto = model_of([one], constants=constants)
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE
    kinds = [type(m) for m in model.modules()][1:]
    assert kinds == ([] if kind is None else [kind])


@pytest.mark.parametrize("name", OTHER_OPSETS)
def test_an_operation_of_another_opset_computes_the_same(tmp_path, name):
    """Likewise of earlier and later versions of the operators."""
    one, constants, kind, opset = OTHER_OPSETS[name]
    inputs = {"squeeze by attributes": {"x": ("n", 3, 8, 1)}, "gemm": {"r": ("n", 8)}}.get(name)
    proto = model_of([one], inputs=inputs, constants=constants, opset=opset)
    model = from_onnx(written(tmp_path, proto))
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    assert same(model, proto, images(5, *shape)) < CLOSE
    assert [type(m) for m in model.modules()][1:] == ([] if kind is None else [kind])


def test_products_become_linear_layers(tmp_path):
    """Gemm and MatMul with the constant that is added after it, in both orders, are linear layers with a bias."""
    proto = model_of(
        [
            node("MatMul", "x", "a", outputs=("p",)),
            node("Add", "c", "p", outputs=("q",)),
            node("Gemm", "q", "b", "d", alpha=0.5, beta=2.0, transB=1),
        ],
        inputs={"x": ("n", 6)},
        constants={"a": value(6, 5), "c": value(5), "b": value(4, 5), "d": value(1, 4)},
    )
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images(5, 6)) < CLOSE
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is None) for m in linear] == [(6, 5, False), (5, 4, False)]
    assert model.source.count("\n") == 4


@pytest.mark.parametrize(("gate", "kind"), [({}, nn.SiLU), ({"alpha": 1 / 6}, nn.Hardswish), ({"alpha": 0.3}, None)])
def test_gates_become_one_module(tmp_path, gate, kind):
    """A product of x and sigmoid(x) is one activation function for the hosts, where it is one for torch."""
    first = node("HardSigmoid" if gate else "Sigmoid", "x", outputs=("g",), **gate)
    proto = model_of([first, node("Mul", "x", "g")])
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE
    assert [type(m) for m in model.modules()][1:] == ([] if kind is None else [kind])


def test_calculations_with_shapes_are_done_once(tmp_path):
    """What older exporters write for x.view(x.size(0), -1), and a token that is added to each image."""
    proto = model_of(
        [
            node("Shape", "x", outputs=("s",)),
            node("Gather", "s", "zero", outputs=("n",)),
            node("Unsqueeze", "n", "axis", outputs=("n1",)),
            node("Concat", "n1", "rest", outputs=("shape",), axis=0),
            node("Reshape", "x", "shape", outputs=("r",)),
            node("Concat", "n1", "token", outputs=("wide",), axis=0),
            node("Expand", "row", "wide", outputs=("rows",)),
            node("Concat", "rows", "r", axis=1),
        ],
        constants={"zero": np.int64(0), "axis": whole(0), "rest": whole(-1), "token": whole(4), "row": value(1, 4)},
    )
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE
    assert "Shape" not in model.source
    assert model.source.count("\n") == 4


def test_an_exported_network_keeps_its_names(tmp_path):
    """Layers stand where they stood, each activation function by itself, and the inputs have the file's names."""
    net, x = small_network()
    model = from_onnx(exported(tmp_path, net, x[:1]), x)
    with torch.no_grad():
        assert relative(model(x).numpy(), net(x).numpy()) < CLOSE
    kinds = (nn.Conv2d, nn.Linear)
    layers_of = [[n for n, m in each.named_modules() if isinstance(m, kinds)] for each in (net, model)]
    assert layers_of[0] == layers_of[1]
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == 3
    assert (model.input_names, model.output_names) == (("images",), ("logits",))


def test_batch_norms_that_the_file_has_are_modules(tmp_path):
    """Hosts fold them as those of torch."""
    net, x = small_network()
    model = from_onnx(exported(tmp_path, net, x[:1], training=True))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 4
    with torch.no_grad():
        assert relative(model(x).numpy(), net(x).numpy()) < CLOSE


def test_copies_and_pickles_compute_the_same(tmp_path):
    """As those of any module, with parameters of their own."""
    net, x = small_network()
    model = from_onnx(exported(tmp_path, net, x[:1]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.fc.weight is not model.fc.weight


def test_the_parts_of_a_split_are_told_apart(tmp_path):
    """Each goes where the file says; and rows of images are joined with tokens and taken apart again."""
    proto = model_of(
        [
            node("Split", "x", outputs=("a", "b"), axis=3),
            node("Sub", "b", "a", outputs=("d",)),
            node("Transpose", "d", outputs=("t",), perm=[2, 0, 1, 3]),
            node("Shape", "t", outputs=("s",)),
            node("Reshape", "t", "rows", outputs=("r",)),
            node("Gemm", "r", "w", outputs=("g",)),
            node("Reshape", "g", "s", outputs=("u",)),
            node("Transpose", "u", perm=[1, 2, 3, 0]),
        ],
        constants={"rows": whole(-1, 12), "w": value(12, 12)},
    )
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE


def test_names_that_a_module_has_itself_are_given_way_to(tmp_path):
    """Of layers and of inputs; a second output that nobody reads is left out."""
    proto = model_of(
        [
            node("Conv", "self", "forward.weight", outputs=("a",)),
            node("Conv", "a", "source.weight", outputs=("b",)),
            node("Conv", "b", "training", outputs=("c",)),
            node("Dropout", "c", outputs=("y", "mask")),
        ],
        inputs={"self": ("n", 3, 8, 8)},
        constants={name: value(3, 3, 1, 1, seed=len(name)) for name in ("forward.weight", "source.weight", "training")},
    )
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE
    assert len(list(model.parameters())) == 3


def test_a_second_output_that_is_read_is_refused(tmp_path):
    """With the node that makes it."""
    nodes = [node("MaxPool", "x", outputs=("p", "i"), kernel_shape=[2, 2]), node("Cast", "i", to=1)]
    with pytest.raises(ModelError, match=r"MaxPool .MaxPool_p: more than its first output is read"):
        from_onnx(written(tmp_path, model_of(nodes)))


def test_one_weight_stays_one(tmp_path):
    """A layer that is called twice is one module."""
    constants = {"w": value(3, 3, 1, 1)}
    proto = model_of([node("Conv", "x", "w", outputs=("h",)), node("Conv", "h", "w")], constants=constants)
    model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images()) < CLOSE
    assert len(list(model.parameters())) == 1


def test_several_inputs_and_outputs(tmp_path):
    """Both have the names and the order of the file."""
    shape = ("n", 3, 8, 8)
    proto = model_of(
        [node("Add", "left", "right", outputs=("sum",)), node("Sub", "left", "right", outputs=("difference",))],
        inputs={"left": shape, "right": shape},
        outputs=("difference", "sum"),
    )
    model = from_onnx(written(tmp_path, proto), {"right": images(), "left": images(seed=8)})
    a, b = images(2), images(2, seed=9)
    difference, total = model(left=a, right=b)
    assert torch.equal(difference, a - b)
    assert torch.equal(total, a + b)
    assert model.output_names == ("difference", "sum")


@pytest.mark.parametrize("rest", [(-1,), (192,)])
def test_a_fixed_number_of_images_is_made_free(tmp_path, rest):
    """Where every image is computed by itself, though the number stands in the file."""
    proto = model_of(
        [node("Reshape", "x", "s", outputs=("r",)), node("Gemm", "r", "w")],
        inputs={"x": (1, 3, 8, 8)},
        constants={"s": whole(1, *rest), "w": value(192, 4)},
    )
    model = from_onnx(written(tmp_path, proto))
    x = images(4)
    expected = np.concatenate([run(proto, {"x": row.unsqueeze(0).numpy()})[0] for row in x])
    assert relative(model(x).detach().numpy(), expected) < CLOSE


def test_a_number_that_cannot_be_free_is_told(tmp_path):
    """Where other images would change the result, the model takes what the file takes."""
    proto = model_of([node("ReduceSum", "x", "a")], inputs={"x": (1, 3, 8, 8)}, constants={"a": whole(0)})
    with pytest.warns(QFTWarning, match="Found one for 1 at a time"):
        model = from_onnx(written(tmp_path, proto))
    assert same(model, proto, images(1)) < CLOSE


def test_an_open_size_is_that_of_the_example(tmp_path):
    """Without an example it is asked for."""
    path = written(tmp_path, model_of([node("Relu", "x")], inputs={"x": ("n", 3, "h", "w")}))
    with pytest.raises(ModelError, match=r"input x with the shape \[\?, 3, \?, \?\]. Pass an example_input"):
        from_onnx(path)
    assert from_onnx(path, images(2, 3, 5, 6))(images(3, 3, 5, 6)).shape == (3, 3, 5, 6)


def test_all_operations_without_a_counterpart_are_named(tmp_path):
    """Those that are unknown, and those that torch cannot do so, with their nodes and the reason."""
    nodes = [
        node("Shrink", "x", outputs=("a",)),
        node("Slice", "a", "s", "e", "d", "t", outputs=("b",)),
        node("Shrink", "b", outputs=("c",)),
        node("Relu", "c"),
    ]
    constants = {"s": whole(-1), "e": whole(0), "d": whole(3), "t": whole(-1)}
    with pytest.raises(ModelError, match=r"Found 2 without: Shrink .Shrink_a: .*, Shrink_c: .*Slice .Slice_b: it runs"):
        from_onnx(written(tmp_path, model_of(nodes, constants=constants)))


def test_operations_of_other_makers_are_named(tmp_path):
    """ONNX Runtime would refuse the first of them alone."""
    nodes = [
        node("Odd", "x", outputs=("a",), domain="some.where"),
        node("Shrink", "a", outputs=("b",)),
        node("Even", "b", domain="some.where"),
    ]
    with pytest.raises(ModelError, match=r"Found 3 without: Shrink .*some\.where\.Even .*some\.where\.Odd .Odd_a"):
        from_onnx(written(tmp_path, model_of(nodes, extra=["some.where"])))


def test_a_quantized_file_is_refused(tmp_path):
    """By the operations that say so."""
    constants = {"s": np.float32(0.1), "z": np.uint8(0)}
    nodes = [node("QuantizeLinear", "x", "s", "z", outputs=("q",)), node("DequantizeLinear", "q", "s", "z")]
    with pytest.raises(ModelError, match="quantized already, with DequantizeLinear, QuantizeLinear"):
        from_onnx(written(tmp_path, model_of(nodes, constants=constants)))


def test_files_that_cannot_be_read(tmp_path):
    """Each is refused with what to do."""
    with pytest.raises(ModelError, match=r"should be an ONNX file\. Found none"):
        from_onnx(tmp_path / "no.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    with pytest.raises(ModelError, match=r"should be an ONNX file with all of its weights\. Found"):
        from_onnx(broken)
    half = model_of([node("Identity", "x")], constants={"unused": value(3).astype(np.float16)})
    with pytest.raises(ModelError, match=r"should be in float32\. Found weights in float16"):
        from_onnx(written(tmp_path, half))


@pytest.mark.parametrize(
    "example", [torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 8), (torch.zeros(1), torch.zeros(1)), {"y": 1}]
)
def test_an_example_that_does_not_fit_is_refused(tmp_path, example):
    """With what the file takes."""
    with pytest.raises(DataError, match=r"example_input should .* the inputs of the file: x \[\?, 3, 8, 8\]"):
        from_onnx(written(tmp_path, model_of([node("Relu", "x")])), example)


def test_another_result_is_refused_where_it_begins(tmp_path, monkeypatch):
    """The proof names the first operation that differs, not what follows it."""
    nodes = [node("Tanh", "x", outputs=("a",)), node("Relu", "a", outputs=("b",)), node("Sigmoid", "b")]
    path = written(tmp_path, model_of(nodes))
    monkeypatch.setitem(layers.LAYERS, "Relu", lambda _: layers.Made("{m}({0})", nn.LeakyReLU(0.5)))
    with pytest.raises(ParityError, match=r"differs in y by .*; the first operation that does is Relu .Relu_b"):
        from_onnx(path)


def test_a_module_that_does_not_run_is_refused(tmp_path, monkeypatch):
    """Likewise."""
    path = written(tmp_path, model_of([node("Relu", "x")]))
    monkeypatch.setitem(layers.LAYERS, "Relu", lambda _: layers.Made("{m}({0})", nn.Linear(5, 5)))
    with pytest.raises(ParityError, match="should run where ONNX Runtime runs"):
        from_onnx(path)


def test_a_missing_package_names_the_line_that_installs_it(tmp_path, monkeypatch):
    """Of both packages."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(HostError, match=r"onnxruntime should be installed.*'\.\[onnx\]'"):
        from_onnx(written(tmp_path, model_of([node("Relu", "x")])))


@pytest.mark.parametrize("norms", [False, True], ids=["folded by the exporter", "with BatchNorms"])
def test_a_network_from_a_file_is_quantized_as_that_of_torch(tmp_path, host, norms):
    """As many convolutions in int8 as from torch, all of them, and as close to the float network."""
    net, x = small_network()
    model = from_onnx(exported(tmp_path, net, x[:1], training=norms))
    config = four_bits()
    found = {}
    for name, float_model in (("torch", net), ("file", model)):
        result, quantized = host.finetuned(float_model, [x], config)
        report = host.save(quantized, tmp_path, x[:4])
        found[name] = (report.int8_convolutions, len(report.convolutions), report.weights)
        assert math.isfinite(result.final_loss)
    assert found["file"] == found["torch"] == (5, 5, 6)
