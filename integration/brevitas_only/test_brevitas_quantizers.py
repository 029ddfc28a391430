"""Each quantizer of this plugin alone, in Brevitas' own layers, before anything is linked."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.nn as qnn
import torch
from brevitas_models import activation_scalings, conv, integers, weight_scalings
from torch import nn

from qft_plugin import ConfigError, ModelError, QFTConfig
from qft_plugin.brevitas import (
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    QFTInt8ActPerTensorFloat,
    QFTShiftedUint8ActPerTensorFloat,
    QFTUint8ActPerTensorFloat,
    fold,
    initialize,
    link,
    save_qonnx,
)

pytestmark = pytest.mark.core

ON_GRID = 1e-3
"""Largest distance of value / scale from an integer: float32 rounding of numbers up to 255."""

GRADIENT = 1e-5
"""Relative difference of a gradient that was summed in another order."""

WEIGHTS = {
    "tensor": QFTInt4WeightPerTensorFloat,
    "channel": QFTInt4WeightPerChannelFloat,
    "doubly": QFTInt4WeightDoublyPerChannelFloat,
}
ACTIVATIONS = {
    "unsigned": (QFTUint8ActPerTensorFloat, 0, 255),
    "signed": (QFTInt8ActPerTensorFloat, -128, 127),
    "shifted": (QFTShiftedUint8ActPerTensorFloat, 0, 255),
}
LAYERS = {
    "conv1d": (qnn.QuantConv1d, (6, 8, 3), {}, (2, 6, 9), 0, 1),
    "conv2d": (qnn.QuantConv2d, (6, 8, 3), {}, (2, 6, 9, 9), 0, 1),
    "conv3d": (qnn.QuantConv3d, (6, 8, 3), {}, (2, 6, 5, 5, 5), 0, 1),
    "grouped": (qnn.QuantConv2d, (6, 8, 3), {"groups": 2}, (2, 6, 9, 9), 0, None),
    "depthwise": (qnn.QuantConv2d, (6, 6, 3), {"groups": 6}, (2, 6, 9, 9), 0, None),
    "conv_transpose1d": (qnn.QuantConvTranspose1d, (6, 8, 3), {}, (2, 6, 9), 1, 0),
    "conv_transpose2d": (qnn.QuantConvTranspose2d, (6, 8, 3), {}, (2, 6, 9, 9), 1, 0),
    "conv_transpose3d": (qnn.QuantConvTranspose3d, (6, 8, 3), {}, (2, 6, 4, 4, 4), 1, 0),
    "linear": (qnn.QuantLinear, (6, 8), {}, (2, 6), 0, 1),
}
"""Class, arguments, settings, shape of an input, axis of the outputs and of the inputs in the weight."""

every_weight = pytest.mark.parametrize("kind", WEIGHTS)
every_activation = pytest.mark.parametrize("kind", ACTIVATIONS)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def make(layer, **settings):
    """Make a layer of the table, and an input for it."""
    kind, args, own, shape, *_ = LAYERS[layer]
    return kind(*args, **own, **settings), torch.randn(shape)


@every_layer
@every_weight
def test_weight_alone(layer, kind):
    """Alone, a weight quantizer scales itself at the first forward and has its granularity on the weight's axes."""
    module, x = make(layer, weight_quant=WEIGHTS[kind])
    (scaling,) = weight_scalings(module).values()
    assert not scaling.ready
    y = module(x)
    assert scaling.ready
    assert torch.isfinite(y).all()
    out_axis, in_axis = LAYERS[layer][4:]
    scale = module.weight_quant.scale()
    expected = {0: [], 1: [1] * module.weight.dim(), 2: [1] * module.weight.dim()}[list(WEIGHTS).index(kind)]
    if kind != "tensor":
        expected[out_axis] = module.weight.shape[out_axis]
    if kind == "doubly":
        expected[1 - out_axis if in_axis is None else in_axis] = module.weight.shape[1 - out_axis]
    assert list(scale.shape) == expected
    whole = integers(module)
    assert whole.min() >= -7
    assert whole.max() <= 7
    assert whole.abs().max() == 7
    assert len(whole.unique()) > 8


@every_layer
@every_weight
def test_error_of_a_fresh_scale(layer, kind):
    """The first scale of a weight is no worse, in squared error, than the one that clips nothing."""
    module, x = make(layer, weight_quant=WEIGHTS[kind])
    module(x)
    W = module.weight.detach()
    step = W.abs().max() / 7
    naive = ((W / step).round() * step - W).square().sum()
    assert (module.weight_quant(W).value - W).square().sum() < naive


@every_weight
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_weight_bit_width(kind, bits):
    """`weight_bit_width` on the layer wins over the 4 bits of the quantizer, and gives the whole narrow range."""
    module = conv(6, 8, weight=WEIGHTS[kind], weight_bit_width=bits)
    module(torch.randn(2, 6, 5, 5))
    assert integers(module).abs().max() == 2 ** (bits - 1) - 1
    assert int(module.weight_quant.bit_width()) == bits
    (scaling,) = weight_scalings(module).values()
    assert scaling.bits == bits


@every_weight
@pytest.mark.parametrize("layer", ["conv2d", "conv_transpose2d", "linear", "conv1d"])
def test_quant_tensor_of_a_weight(layer, kind):
    """What Brevitas sees of a weight is a valid integer tensor."""
    module, x = make(layer, weight_quant=WEIGHTS[kind])
    module(x)
    quantized = module.quant_weight()
    assert quantized.is_valid
    assert quantized.signed_t
    assert torch.equal(quantized.int().double(), integers(module))


@every_activation
@pytest.mark.parametrize("bits", [3, 8])
def test_activation_alone(kind, bits):
    """An activation quantizer takes the range of its first batch, and puts all later ones on its integers."""
    quantizer, low, high = ACTIVATIONS[kind]
    low, high = (low, high) if bits == 8 else (-4, 3) if kind == "signed" else (0, 7)
    module = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=True, bit_width=bits)
    x = torch.rand(4, 3, 6, 6) if kind == "unsigned" else torch.randn(4, 3, 6, 6) + 0.5
    first = module(x)
    (scaling,) = activation_scalings(module).values()
    assert scaling.ready
    assert first.is_valid
    assert first.scale.dim() == 0
    assert (first.value - x).abs().max() <= first.scale * (0.5 + ON_GRID) * (2 if kind == "shifted" else 1)
    scale = first.scale.detach().clone()
    second = module(3 * x)
    assert torch.equal(second.scale, scale)
    whole = second.int()
    assert int(whole.min()) >= low
    assert int(whole.max()) == high
    assert bool(second.signed_t) == (kind == "signed")
    assert (float(second.zero_point) > 0) == (kind == "shifted")


@every_activation
@pytest.mark.parametrize("function", ["QuantReLU", "QuantIdentity", "QuantSigmoid", "QuantTanh"])
def test_activation_functions(kind, function):
    """Each of Brevitas' activations quantizes what its own function gives."""
    quantizer, low, high = ACTIVATIONS[kind]
    module = getattr(qnn, function)(act_quant=quantizer, return_quant_tensor=True)
    exact = {"QuantReLU": torch.relu, "QuantSigmoid": torch.sigmoid, "QuantTanh": torch.tanh}.get(function, torch.clone)
    x = torch.randn(4, 5, 6)
    y = module(x)
    assert y.is_valid
    assert low <= int(y.int().min()) <= int(y.int().max()) <= high
    expected = exact(x).clamp(min=0) if kind == "unsigned" else exact(x)
    # One more half step where the zero point was rounded to an integer: an end of the range may be clipped.
    assert (y.value - expected).abs().max() <= y.scale * (1 + ON_GRID)
    assert len(y.value.unique()) > 20


@every_activation
def test_a_bound_that_the_quantizer_would_have_to_keep(kind):
    """Brevitas leaves out the clip of QuantHardTanh, because its own quantizers' range is the bound: it is refused."""
    with pytest.raises(ConfigError, match="QuantHardTanh"):
        qnn.QuantHardTanh(act_quant=ACTIVATIONS[kind][0], min_val=-1.0, max_val=1.0)


@every_activation
@every_layer
def test_activations_on_layers(layer, kind):
    """A layer takes each activation quantizer as its input and as its output quantizer, with bit widths of its own."""
    quantizer, *_ = ACTIVATIONS[kind]
    module, x = make(
        layer, weight_quant=QFTInt4WeightPerChannelFloat, input_quant=quantizer, output_quant=quantizer,
        input_bit_width=6, output_bit_width=5, return_quant_tensor=True,
    )  # fmt: skip
    y = module(x)
    assert y.is_valid
    assert len(y.int().unique()) <= 32
    found = activation_scalings(module)
    assert {name: s.high - s.low for name, s in found.items()} == {"input_quant": 63, "output_quant": 31}
    assert all(s.ready for s in found.values())
    entered = module.input_quant(x)
    assert len(entered.int().unique()) <= 64


@pytest.mark.parametrize("quantizer", [QFTUint8ActPerTensorFloat, QFTShiftedUint8ActPerTensorFloat])
def test_a_batch_of_zeros(quantizer):
    """A first batch that is 0 everywhere, as after a dead ReLU, stays 0, and the next batch is quantized well."""
    module = qnn.QuantReLU(act_quant=quantizer)
    assert torch.equal(module(-torch.ones(2, 3)), torch.zeros(2, 3))
    x = torch.rand(20, 3)
    assert torch.allclose(module(x), x, atol=1 / 255)


def native(x, log_s, low, high):
    """Write Eq. 1 with plain autograd: the rounding alone passes gradients on."""
    s = log_s.exp()
    ratio = x / s
    rounded = ratio + (ratio.round() - ratio).detach()
    return torch.clamp(rounded, low, high) * s


@pytest.mark.parametrize("kind", ["unsigned", "signed"])
def test_gradient_of_an_activation(kind):
    """Scale and input get the native gradient of Eq. 1, values that are clipped included."""
    quantizer, low, high = ACTIVATIONS[kind]
    module = qnn.QuantIdentity(act_quant=quantizer)
    module(torch.rand(50))
    (scaling,) = activation_scalings(module).values()
    x = (2 * torch.randn(500)).requires_grad_()
    g = torch.randn(500)
    (module(x) * g).sum().backward()
    log_s, copied = scaling.log_s.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = native(copied, log_s, low, high)
    assert (expected.abs() == expected.abs().max()).sum() > 50  # many are clipped
    (expected * g).sum().backward()
    assert torch.allclose(scaling.log_s.grad, log_s.grad, rtol=GRADIENT)
    assert torch.allclose(x.grad, copied.grad, rtol=GRADIENT, atol=1e-6)


def test_gradient_of_a_shifted_activation():
    """With a zero point the gradient is that of the shifted clamp."""
    module = qnn.QuantIdentity(act_quant=QFTShiftedUint8ActPerTensorFloat)
    module(torch.rand(50) - 0.3)
    (scaling,) = activation_scalings(module).values()
    zero = int(scaling.zero_point)
    assert 0 < zero < 255
    x, g = torch.randn(500).requires_grad_(), torch.randn(500)
    (module(x) * g).sum().backward()
    log_s, copied = scaling.log_s.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    (native(copied, log_s, -zero, 255 - zero) * g).sum().backward()
    assert torch.allclose(scaling.log_s.grad, log_s.grad, rtol=1e-4)
    assert torch.allclose(x.grad, copied.grad, rtol=GRADIENT, atol=1e-6)


@every_weight
@pytest.mark.parametrize("layer", ["conv2d", "grouped", "conv_transpose2d", "linear"])
def test_gradient_of_a_weight(layer, kind):
    """Weight and logarithms of its scales get the native gradient of Eq. 1, clipped weights included."""
    module, x = make(layer, weight_quant=WEIGHTS[kind])
    module(x)
    (scaling,) = weight_scalings(module).values()
    with torch.no_grad():
        scaling.log_F.sub_(0.5)  # a smaller step clips more
    assert (integers(module).abs() == 7).double().mean() > 0.1
    g = torch.randn(module.weight.shape)
    (module.weight_quant(module.weight).value * g).sum().backward()
    W = module.weight.detach().clone().requires_grad_()
    log_step = module.weight_quant.scale().detach().log().requires_grad_()
    (native(W, log_step, -7, 7) * g).sum().backward()
    assert torch.allclose(module.weight.grad, W.grad, rtol=GRADIENT, atol=1e-6)
    # The sum over what shares one scale; a grouped layer's left scales are summed inside their group.
    per_step = log_step.grad
    out_axis = LAYERS[layer][4]
    expected = per_step if kind == "tensor" else per_step.movedim(out_axis, 0).flatten(1).sum(1)
    assert torch.allclose(scaling.log_F.grad, expected, rtol=1e-4, atol=1e-5)
    if kind == "doubly" and layer == "grouped":
        assert torch.allclose(scaling.log_L.grad, per_step.view(2, 4, 3).sum(1).flatten(), rtol=1e-4, atol=1e-5)
    elif kind == "doubly":
        expected = per_step.movedim(1 - out_axis, 0).flatten(1).sum(1)
        assert torch.allclose(scaling.log_L.grad, expected, rtol=1e-4, atol=1e-5)


@every_weight
def test_a_wide_range_is_refused(kind):
    """The grid of a weight is symmetric; the switch of Brevitas that makes it wider is refused by its name."""
    with pytest.raises(ConfigError, match=r"weight_narrow_range should be True.*Found False"):
        conv(3, 4, weight=WEIGHTS[kind], weight_narrow_range=False)


@every_weight
def test_an_unlinked_layer_trains(kind):
    """Without being linked a layer is trainable by any optimizer: training its scale brings the output closer."""
    module = conv(3, 8, weight=WEIGHTS[kind])
    x = torch.randn(8, 3, 6, 6)
    target = nn.functional.conv2d(x, module.weight.detach(), module.bias.detach(), padding=1)
    optimizer = torch.optim.Adam([p for n, p in module.named_parameters() if "log_" in n], lr=3e-3)
    with torch.no_grad():
        module(x)
        for scaling in weight_scalings(module).values():
            scaling.log_F.add_(0.3)  # away from the best scale
    losses = []
    for _ in range(60):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@every_weight
@pytest.mark.parametrize("layer", ["conv2d", "conv_transpose2d", "linear", "grouped"])
def test_layers_that_read_a_quant_tensor(layer, kind):
    """A layer with a bias computes on a QuantTensor what it computes on the same plain values."""
    module, x = make(layer, weight_quant=WEIGHTS[kind])
    entered = qnn.QuantIdentity(act_quant=QFTInt8ActPerTensorFloat, return_quant_tensor=True)(x)
    assert torch.allclose(module(entered), module(entered.value), atol=1e-5)


def test_assigned_weights_keep_the_trained_scale():
    """Assigning a weight rebuilds Brevitas' quantizer; the scale and its parameter stay."""
    module = conv(3, 4)
    module(torch.randn(2, 3, 5, 5))
    (before,) = weight_scalings(module).values()
    scale = module.weight_quant.scale().clone()
    module.weight = nn.Parameter(module.weight.detach() * 1.1)
    (after,) = weight_scalings(module).values()
    assert after is before
    assert torch.equal(module.weight_quant.scale(), scale)


@pytest.mark.parametrize("value", ["1", "true"])
def test_torchscript_mode_is_refused(value):
    """Brevitas' TorchScript mode is refused at import, by the name of its variable."""
    code = (
        "import importlib, qft_plugin\n"
        "try:\n    importlib.import_module('qft_plugin.brevitas')\n"
        "except qft_plugin.HostError as error:\n    print('refused:', error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BREVITAS_JIT": value}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "refused:" in found.stdout
    assert "BREVITAS_JIT" in found.stdout


class Weight2(QFTInt4WeightPerChannelFloat):
    """A quantizer of a user's."""

    bit_width = 2


class Act4(QFTUint8ActPerTensorFloat):
    """Likewise."""

    bit_width = 4


BITS = {
    "class": (Weight2, Act4, {}, {}),
    "let": (QFTInt4WeightPerChannelFloat.let(bit_width=2), QFTUint8ActPerTensorFloat.let(bit_width=4), {}, {}),
    "keyword": (QFTInt4WeightPerChannelFloat, QFTUint8ActPerTensorFloat, {"weight_bit_width": 2}, {"bit_width": 4}),
}


@pytest.mark.parametrize("how", BITS)
def test_bit_widths_of_a_user(how, tmp_path):
    """Bit widths of a user's class, and of a keyword given with a quantizer only, hold from the layer to the file."""
    weight, act, weight_settings, act_settings = BITS[how]
    model = nn.Sequential(
        qnn.QuantIdentity(act_quant=QFTInt8ActPerTensorFloat),
        qnn.QuantConv2d(3, 8, 3, weight_quant=weight, **(weight_settings if weight else {})),
        qnn.QuantReLU(act_quant=act, **(act_settings if act else {})),
        qnn.QuantConv2d(8, 8, 3, weight_quant=weight, **(weight_settings if weight else {})),
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    link(model, x)
    initialize(model, [x], QFTConfig(finetune=None))
    folded = fold(model)
    for found in (model, folded):
        assert [int(found[i].weight_quant.bit_width()) for i in (1, 3)] == [2, 2]
        assert int(found[2].act_quant.bit_width()) == 4
        assert set(integers(found[3]).flatten().tolist()) <= {-1.0, 0.0, 1.0}
    assert save_qonnx(folded, tmp_path / "model.onnx", x).quantizers == {8: 1, 2: 2, 4: 1}


@pytest.mark.parametrize(
    "layer", [(qnn.QuantEmbedding, 10, 8), (qnn.QuantLSTM, 8, 8), (qnn.QuantRNN, 8, 8), (qnn.QuantScaleBias, 8, True)]
)
def test_a_layer_whose_weight_has_no_such_scale(layer):
    """A weight quantizer in an embedding, a recurrent layer or a factor per channel is refused by the layer's class."""
    kind, *sizes = layer
    with pytest.raises(ModelError, match=r"convolution or linear layer.*Found one in a"):
        kind(*sizes, weight_quant=QFTInt4WeightPerChannelFloat)
