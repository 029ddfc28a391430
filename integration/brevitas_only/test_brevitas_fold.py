"""Folding: an ordinary Brevitas model with the integers of the linked one."""

import copy
import functools
import re

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.nn as qnn
import torch
from brevitas.inject import ExtendedInjector
from brevitas_models import (
    MODELS,
    Normed,
    Residual,
    activation_scalings,
    assert_same_state,
    build,
    conv,
    every_model,
    identity,
    images,
    integers,
    relative,
    relu,
    run,
    scramble,
    state_of,
    weight_scalings,
)
from torch import nn

from qft_plugin import ConfigError, DeployabilityError, HardwareSpec, ModelError, QFTConfig
from qft_plugin.brevitas import (
    QFTInt4Weight,
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    QFTInt8Act,
    QFTShiftedUint8Act,
    fold,
    initialize,
    link,
)
from qft_plugin.brevitas._quantizers import KEPT
from qft_plugin.graph.channel_clip import ChannelHardtanh

FLIPS = 2e-2
"""Outputs where a few activations round the other way: each changes by one step of its 8 bits."""

SAME = 1e-4
"""Outputs where none does: float32 rounding of scales that were multiplied in another order."""

BIAS = 0.1
"""Half a step of a 4-bit weight's accumulator, by which a bias moves, is a part of these networks' small outputs."""

WEIGHTS = {"channel": QFTInt4Weight, "tensor": QFTInt4WeightPerTensorFloat}
DOUBLY = QFTInt4WeightDoublyPerChannelFloat

every_weight = pytest.mark.parametrize("kind", WEIGHTS)


@functools.cache
def trained(name, weight=QFTInt4Weight):
    """Make a linked network whose degrees of freedom are all away from their start; it must not be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = build(name, weight), images(name)
        run(model, x)
        link(model, x)
        scramble(model)
    return model, x


@every_weight
@every_model
def test_the_function_and_the_integers_stay(name, kind):
    """Every integer weight is that of the linked model, and the outputs differ by float32 rounding alone."""
    model, x = trained(name, WEIGHTS[kind])
    expected = run(model, x)
    folded = fold(model)
    for layer in weight_scalings(model):
        assert torch.equal(integers(folded.get_submodule(layer)), integers(model.get_submodule(layer)))
    assert relative(run(folded, x), expected) < FLIPS


def test_most_outputs_are_the_same_in_float32():
    """Flipped activations are the exception: at most a few networks of the collection have any."""
    errors = []
    for name in MODELS:
        model, x = trained(name)
        expected = run(model, x)
        errors.append(relative(run(fold(model), x), expected))
    assert sorted(errors)[len(errors) // 2] < SAME


@every_weight
@every_model
def test_the_granularity_of_the_scales(name, kind):
    """Folded scales are one number per tensor, or one per output channel of a weight, and nothing trains them."""
    model, _ = trained(name, WEIGHTS[kind])
    folded = fold(model)
    for layer in weight_scalings(model):
        module = folded.get_submodule(layer)
        scale = module.weight_quant.scale()
        axis = int(isinstance(module, nn.ConvTranspose2d))
        expected = [1] * module.weight.dim()
        expected[axis] = module.weight.shape[axis]
        # A grouped transposed convolution counts its output channels inside each group.
        if axis and module.groups > 1:
            expected[0] = module.weight.shape[0]
        assert list(scale.shape) == ([] if kind == "tensor" else expected)
        assert torch.allclose(integers(module) * scale.double(), module.weight.double(), rtol=1e-6)
    for name_of_proxy in activation_scalings(model):
        assert folded.get_submodule(name_of_proxy).scale().numel() == 1
        assert folded.get_submodule(name_of_proxy).scale().dim() == 0
    assert not any(p.requires_grad for n, p in folded.named_parameters() if "_quant" in n and "stock" not in n)


@every_model
def test_nothing_of_this_plugin_is_left(name):
    """No module of a folded model is of a class of this plugin, and no state of it hangs on a proxy."""
    model, _ = trained(name)
    folded = fold(model)
    ours = {type(m) for m in folded.modules() if type(m).__module__.startswith("qft_plugin")}
    assert ours == ({ChannelHardtanh} if name == "depthwise" else set())  # torch has no ReLU6 with channels
    for module in folded.modules():
        assert KEPT not in module.__dict__
        assert "init_tensor_quant" not in module.__dict__
        for value in vars(module).values():
            owner = type(value).__module__
            assert not owner.startswith("qft_plugin") or (
                isinstance(value, type) and issubclass(value, ExtendedInjector)
            )
    assert not any("log_" in n for n in folded.state_dict())


@every_model
def test_the_linked_model_stays(name):
    """Folding changes neither a bit of the linked model nor its outputs, and shares no tensor with it."""
    model, x = trained(name)
    model = copy.deepcopy(model).train()
    modes = [m.training for m in model.modules()]
    before = state_of(model)
    folded = fold(model, bias_bits=None)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.mul_(3)
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == modes
    assert not any(m.training for m in folded.modules())
    link(model, x)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", ["residual", "transposed", "one_d", "linear_only", "depthwise"])
def test_doubly_per_channel(name):
    """A doubly per-channel weight keeps a scale for each pair of channels, its integers and its function."""
    model, x = trained(name, DOUBLY)
    expected = run(model, x)
    folded = fold(model)
    for layer in weight_scalings(model):
        module = folded.get_submodule(layer)
        shape = list(module.weight.shape[:2]) + [1] * (module.weight.dim() - 2)
        assert list(module.weight_quant.scale().shape) == shape
        assert torch.equal(integers(module), integers(model.get_submodule(layer)))
    assert relative(run(folded, x), expected) < FLIPS


@every_model
@every_weight
def test_integer_biases(name, kind):
    """With `bias_bits` every bias is an integer times the scale of its layer's accumulator, s_in * S_w."""
    model, x = trained(name, WEIGHTS[kind])
    without_scale = [
        n
        for n, s in weight_scalings(model).items()
        if s.neighbours.before is None and model.get_submodule(n).bias is not None
    ]
    if without_scale:
        with pytest.raises(DeployabilityError, match=f"Layer {without_scale[0]}: its bias.*its input is not quantized"):
            fold(model, bias_bits=32)
        return
    plain, folded = fold(model), fold(model, bias_bits=32)
    for layer, scaling in weight_scalings(model).items():
        module, before = folded.get_submodule(layer), scaling.neighbours.before
        if module.bias is None:
            continue
        with torch.no_grad():
            quantized = module.bias_quant(module.bias)
        accumulator = before.log_s.exp() * scaling.folded_step()
        assert torch.allclose(quantized.scale.flatten(), accumulator.expand_as(quantized.scale.flatten()), rtol=1e-5)
        whole = quantized.value / quantized.scale
        assert torch.allclose(whole, whole.round(), atol=max(1e-3, whole.abs().max().item() * 1e-6))
        assert whole.abs().max().item() > 3
        assert int(quantized.bit_width) == 32
        assert (quantized.value - plain.get_submodule(layer).bias).abs().max() <= 0.51 * quantized.scale.max()
    assert relative(run(folded, x), run(plain, x)) < BIAS


def test_few_bits_clip_a_bias():
    """The bits of the biases are those that were asked for."""
    model, _ = trained("linear_only")
    folded = fold(model, bias_bits=8)
    quantized = folded.fc1.bias_quant(folded.fc1.bias)
    whole = (quantized.value / quantized.scale).round()
    assert whole.min() >= -128
    assert whole.max() <= 127


def test_a_bias_without_an_accumulator_scale():
    """A bias whose layer reads floats, or has a scale per input channel, is refused by the layer's name."""
    model, x = Residual().eval(), images("residual")
    model.inp = nn.Identity()
    link(model, x)
    with pytest.raises(DeployabilityError, match=r"Layer c1: its bias.*its input is not quantized"):
        fold(model, bias_bits=32)
    assert fold(model).c1.bias is not None
    model, _ = trained("residual", DOUBLY)
    with pytest.raises(DeployabilityError, match=r"Layer c1: its bias.*differs by input channel"):
        fold(model, bias_bits=32)


class TwoSteps(nn.Module):
    """A layer that is called twice, on activations of two quantizers."""

    def __init__(self):
        super().__init__()
        self.inp, self.between, self.conv = identity(), relu(), conv(8, 8)

    def forward(self, x):
        return self.conv(self.between(self.conv(self.inp(x))))


def test_a_bias_with_two_accumulator_scales():
    """A layer that reads two different steps has no one accumulator scale: its bias is refused by its name."""
    model, x = TwoSteps().eval(), torch.randn(8, 8, 6, 6)
    link(model, x)
    assert relative(run(fold(model), x), run(model, x)) < FLIPS
    with pytest.raises(DeployabilityError, match="Layer conv: its bias"):
        fold(model, bias_bits=32)


class Parts(nn.Module):
    """A layer that reads a concatenation, whose parts have quantizers of their own."""

    def __init__(self):
        super().__init__()
        self.inp, self.left, self.right = identity(), conv(8, 8), conv(8, 8)
        self.r1, self.r2, self.conv = relu(), relu(), conv(16, 4)

    def forward(self, x):
        x = self.inp(x)
        return self.conv(torch.cat([self.r1(self.left(x)), self.r2(20 * self.right(x))], 1))


@pytest.mark.parametrize("network", [TwoSteps, Parts])
@pytest.mark.parametrize("bits", [None, 16])
def test_one_scale_for_all_that_a_layer_reads(network, bits):
    """Where biases are integers, all activations of a layer get one scale; else each keeps its own, and both work."""
    model, x = network().eval(), torch.randn(64, 8, 6, 6)
    with torch.no_grad():
        model.conv.bias.copy_(torch.linspace(-3, 3, len(model.conv.bias)))
    float_model = copy.deepcopy(model)
    for module in float_model.modules():
        if isinstance(module, (qnn.QuantConv2d, qnn.QuantReLU, qnn.QuantIdentity)):
            for name in ("weight_quant", "act_quant"):
                if hasattr(module, name):
                    getattr(module, name).disable_quant = True
    initialize(model, [x], QFTConfig(hardware=HardwareSpec(bias_bits=bits)))
    inputs = weight_scalings(model)["conv"].neighbours.inputs
    assert len(inputs) == 2
    assert len({float(s.log_s.detach()) for s in inputs}) == (2 if bits is None else 1)
    folded = fold(model)
    assert relative(run(folded, x), run(model, x)) < (FLIPS if bits is None else BIAS)
    assert folded.conv.bias_quant.is_quant_enabled == (bits is not None)
    assert relative(run(folded, x), run(float_model, x)) < 0.3


def test_not_linked():
    """What is not linked is refused with what to call first."""
    with pytest.raises(ModelError, match=r"should be linked.*Found a Residual.*link\(model, example_input\)"):
        fold(build("residual"))


@every_model
def test_a_folded_state_goes_into_another_folded_model(name):
    """The state dict of one folded model, scales and zero points included, makes another compute the same."""
    first, x = trained(name)
    second = copy.deepcopy(first)
    scramble(second)
    one, other = fold(first), fold(second)
    expected = run(one, x)
    assert not torch.equal(run(other, x), expected)
    other.load_state_dict(one.state_dict())
    assert torch.equal(run(other, x), expected)
    copied = copy.deepcopy(other)
    copied.load_state_dict(one.state_dict())
    assert torch.equal(run(copied, x), expected)


@pytest.mark.parametrize(("quantizer", "bits"), [(QFTInt8Act, 8), (QFTInt8Act, 6), (QFTShiftedUint8Act, 8),
                                                 (QFTShiftedUint8Act, 5)])  # fmt: skip
def test_activation_grids(quantizer, bits):
    """Bit width, sign and zero point of every activation are those of the linked model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = qnn.QuantIdentity(act_quant=quantizer, bit_width=bits, return_quant_tensor=False)
            self.fc1, self.act = qnn.QuantLinear(6, 6, weight_quant=QFTInt4Weight), nn.LeakyReLU(0.1)
            self.mid = qnn.QuantIdentity(act_quant=quantizer, bit_width=bits)
            self.fc2 = qnn.QuantLinear(6, 3, weight_quant=QFTInt4Weight)

        def forward(self, x):
            return self.fc2(self.mid(self.act(self.fc1(self.inp(x)))))

    model, x = Net().eval(), torch.randn(64, 6) + 0.3
    link(model, x)
    scramble(model)
    folded = fold(model)
    assert relative(run(folded, 2 * x), run(model, 2 * x)) < FLIPS
    for name in ("inp", "mid"):
        old, new = model.get_submodule(name).act_quant, folded.get_submodule(name).act_quant
        entered = torch.linspace(-9, 9, 5001)[:, None].expand(-1, 6)
        found = new(entered)
        assert int(found.bit_width) == bits
        assert bool(found.signed_t) == (quantizer is QFTInt8Act)
        ours = old.__dict__[KEPT]
        assert torch.allclose(found.scale, ours.log_s.exp(), rtol=1e-6)
        assert torch.allclose(found.zero_point, ours.zero_point - ours.low if ours.asymmetric else torch.zeros(()))
        assert len(found.value.unique()) == 2**bits
        if name == "inp":
            assert torch.allclose(found.value, old(entered).value, atol=1e-5)


def test_kept_functions():
    """What an activation module computes before it quantizes stays in the folded model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = identity()
            self.fc1, self.act = (
                qnn.QuantLinear(6, 6, weight_quant=QFTInt4Weight),
                qnn.QuantSigmoid(act_quant=QFTInt8Act),
            )
            self.fc2, self.tanh = qnn.QuantLinear(6, 6, weight_quant=QFTInt4Weight), qnn.QuantTanh(act_quant=QFTInt8Act)
            self.fc3, self.last = qnn.QuantLinear(6, 6, weight_quant=QFTInt4Weight), qnn.QuantReLU(act_quant=QFTInt8Act)

        def forward(self, x):
            x = self.tanh(self.fc2(self.act(self.fc1(self.inp(x)))))
            return self.last(self.fc3(x))

    model, x = Net().eval(), 3 * torch.randn(64, 6)
    link(model, x)
    expected = run(model, x)
    assert (expected == 0).any()
    assert relative(run(fold(model), x), expected) < FLIPS


def test_batch_norms_stay_folded():
    """A BatchNorm that linking has folded does not come back, and one that stayed works on."""
    model = Normed().eval()
    x = images("normed")
    link(model, x)
    folded = fold(model)
    assert isinstance(folded.bn1, nn.Identity)
    assert isinstance(folded.last, nn.BatchNorm1d)


def test_folding_twice():
    """A folded model is an ordinary one: it is not linked and folds no further."""
    model, _ = trained("residual")
    with pytest.raises(ModelError, match="should be linked"):
        fold(fold(model))


@pytest.mark.parametrize("bits", [1, 33, 8.0, True, "8"])
def test_no_width_of_a_bias(bits):
    """What is no bit width is refused before anything is done."""
    with pytest.raises(ConfigError, match="bias_bits"):
        fold(build("residual"), bias_bits=bits)


def test_a_bias_that_does_not_fit():
    """A bias is never clipped: the error says how many bits it needs."""
    model, x = build("residual"), images("residual", 8)
    link(model, x)
    with pytest.raises(DeployabilityError, match=r"Pass bias_bits=\d+") as caught:
        fold(model, bias_bits=2)
    assert 2 < int(re.findall(r"bias_bits=(\d+)", str(caught.value))[-1]) < 32


def test_every_call_of_a_quantizer_is_calibrated():
    """A quantizer that is called several times gets a range that covers all it reads, not only its last input."""
    model, data = build("shared_activation"), [images("shared_activation") for _ in range(4)]
    peaks = []
    shared = next(m for n, m in model.named_modules() if isinstance(m, qnn.QuantReLU))
    handle = shared.register_forward_pre_hook(lambda _, args: peaks.append(float(args[0].max())))
    run(model, data[0])
    handle.remove()
    assert len(peaks) > 1
    initialize(model, data)
    scaling = next(s for s in activation_scalings(model).values() if s.low == 0)
    assert float(scaling.log_s.detach().exp()) * 255 > 0.5 * max(peaks)
