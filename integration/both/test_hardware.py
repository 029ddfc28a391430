"""Constraints of hardware, read back from the objects of the hosts themselves, and what can be saved of them."""

import functools
import importlib.util
import math
import warnings
from dataclasses import replace

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from hardware import HOSTS, PLACES, UnderBrevitas, UnderNNCF, hook
from hosts import EACH_HOST
from torch import nn

from qft_plugin import HardwareSpec, QFTWarning
from qft_plugin.graph.channel_affine import Rescaled
from qft_plugin.graph.channel_clip import ChannelHardtanh
from qft_plugin.graph.torch_model import tensors_in

pytestmark = pytest.mark.wide

LOG2 = 1e-5
"""float32 keeps 24 bits: a quotient of products of scales is off by a few of their last bits."""

INTEGER = 1e-3
"""How far from an integer float32 may leave a bias of a few thousand steps."""

CLOSE = {4: 0.5, 6: 0.3, 8: 0.25, None: 0.25}
"""Relative L2 error by bits of activations after a few steps; a network with a wrong scale is at 1 and more."""

LAST_BIT = 1e-6
"""A scale that is read, stored as its logarithm and written may change in its last bit."""


WEIGHT_ONLY = HardwareSpec(activation_bits=None)

SPECS = {
    "finn": HardwareSpec.finn(),
    "integer only": HardwareSpec.integer_only(),
    "integer only, layerwise": replace(HardwareSpec.integer_only(), rescale="layerwise"),
    "openvino cpu": HardwareSpec.openvino_cpu(),
    "weights only": WEIGHT_ONLY,
    "weights only, doubly": replace(WEIGHT_ONLY, doubly_per_channel=True),
    "6 bits": HardwareSpec(activation_bits=6),
    "4 bits": HardwareSpec(activation_bits=4),
    "factors of 4 bits": HardwareSpec(rescale_factor=4),
    "addends per channel": HardwareSpec(elementwise_rescale="channel"),
    "integer addends per channel": HardwareSpec(elementwise_rescale="channel", rescale_factor=8),
}


@pytest.fixture(params=EACH_HOST)
def host(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed here")
    return HOSTS[request.param]


@functools.cache
def quantized(host, net, spec):
    """Quantize a network once for all tests that only look at the result."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, items = nets.build(net), nets.items(net)
        finetune = few_steps(scale_learning_rate=0.005)
        result = host().quantize(model, items, four_bits(hardware=SPECS[spec], finetune=finetune))
    return result, model, items


EACH = pytest.mark.parametrize("spec", SPECS)
NETS = pytest.mark.parametrize("net", ["residual", "inverted"])


def factors(result, net):
    """List log2 of the rescale factors between two quantizers, s_in * s_w / s_out, by name of the weight."""
    activations, kernels, places = result.activations(), result.kernels(), PLACES[result.name, net]
    found = {}
    for name, (before, after) in places.around.items():
        if before in activations and after in activations:
            found[name] = (activations[before].scale * kernels[name].step / activations[after].scale).log2()
    return found


def bias_steps(result, net):
    """List the biases in steps of their accumulators, s_in * s_w, by name of the weight."""
    activations, kernels, places = result.activations(), result.kernels(), PLACES[result.name, net]
    return {
        name: kernels[name].bias / (activations[before].scale * kernels[name].step)
        for name, (before, _) in places.around.items()
        if before in activations
    }


@NETS
@EACH
def test_the_network_still_works(spec, net, host):
    """After a few steps under any constraint the outputs are near those of the float network."""
    result, model, items = quantized(host, net, spec)
    expected = [t.detach() for t in tensors_in(nets.call(model, items[0]))]
    assert relative_error(result.outputs(items[0]), expected) < CLOSE[SPECS[spec].activation_bits]


@NETS
@EACH
def test_quantizers_have_their_bits(spec, net, host):
    """Every activation that a layer reads is quantized to the given bits, or none is; every weight to 4 bits."""
    result, _, _ = quantized(host, net, spec)
    activations, places = result.activations(), PLACES[host.name, net]
    wanted = SPECS[spec].activation_bits
    if wanted is None:
        assert activations == {}
    else:
        assert {a.bits for a in activations.values()} == {wanted}
        assert {before for before, _ in places.around.values()} <= set(activations)
    kernels = result.kernels()
    assert kernels.keys() == places.around.keys()
    assert {kernel.bits for kernel in kernels.values()} == {4}
    for kernel in kernels.values():
        assert (len(kernel.step.unique()) == 1) == (SPECS[spec].rescale == "layerwise")


@NETS
@EACH
def test_factors_are_what_the_hardware_multiplies_by(spec, net, host):
    """s_in * s_w / s_out is a power of two, or has so many bits, where the hardware asks for it; else it is free."""
    if SPECS[spec].activation_bits is None:
        pytest.skip("there are no factors without quantized activations")
    result, _, _ = quantized(host, net, spec)
    found = factors(result, net)
    assert len(found) >= 1
    check_factors(torch.cat(list(found.values())), SPECS[spec].rescale_factor)


def check_factors(logarithms, kind):
    """Assert that log2 of rescale factors is what the hardware can multiply by."""
    if kind == "power_of_two":
        assert (logarithms - logarithms.round()).abs().max() < LOG2
    elif kind != "float":
        multipliers = torch.exp2(logarithms - logarithms.floor()) * 2 ** (kind - 1)
        assert (multipliers.log2() - multipliers.round().log2()).abs().max() < LOG2
    else:
        assert (logarithms - logarithms.round()).abs().max() > 0.05


@NETS
@EACH
def test_biases_are_integers(spec, net, host):
    """Every bias is a whole number of s_in * s_w within its bits where the hardware asks for it; else it is free."""
    if SPECS[spec].activation_bits is None:
        pytest.skip("there is no accumulator without quantized activations")
    result, _, _ = quantized(host, net, spec)
    bits = SPECS[spec].bias_bits
    for name, steps in bias_steps(result, net).items():
        away = (steps - steps.round()).abs().max()
        if bits is None:
            assert away > 0.02, name
        else:
            assert away < INTEGER * max(1, float(steps.abs().max()) / 2**12), name
            assert steps.round().abs().max() < 2 ** (bits - 1), name
            assert steps.round().abs().max() > 0, name


@pytest.mark.parametrize("spec", ["finn", "integer only", "factors of 4 bits"])
def test_layers_around_a_concatenation_are_constrained_too(spec, host):
    """Bits, integer biases and factors hold for the layers before and after a concatenation, and none is warned of."""
    model, items = nets.build("branches"), nets.items("branches")
    config = four_bits(hardware=SPECS[spec], layer_activation_bits={"join.weight": 6})
    result = host().quantize(model, items, config)
    places = PLACES[host.name, "branches"].around
    assert result.activations()[places["join.weight"][0]].bits == 6
    for steps in bias_steps(result, "branches").values():
        away = (steps - steps.round()).abs().max()
        assert (away < INTEGER * max(1, float(steps.abs().max()) / 2**12)) == (SPECS[spec].bias_bits is not None)
    found = factors(result, "branches")
    assert set(found) == {"left.weight", "right.weight", "join.weight"}
    check_factors(torch.cat(list(found.values())), SPECS[spec].rescale_factor)


@NETS
@EACH
def test_addends_have_the_scales_that_the_hardware_can_add(spec, net, host):
    """Both inputs of the addition have one scale, or two that differ by a shift, or what they like."""
    result, _, _ = quantized(host, net, spec)
    activations, names = result.activations(), PLACES[host.name, net].addends
    if not SPECS[spec].quantizes_addends:
        # OpenVINO's CPU plugin adds in float, and NNCF's quantizer of what is only added is gone.
        assert names[1] not in activations
        return
    ratio = math.log2(activations[names[0]].scale / activations[names[1]].scale)
    if SPECS[spec].elementwise_rescale == "none":
        assert abs(ratio) < LOG2
    elif SPECS[spec].elementwise_rescale == "power_of_two":
        assert abs(ratio - round(ratio)) < LOG2
    else:
        assert abs(ratio - round(ratio)) > LOG2


@NETS
@EACH
def test_it_can_be_saved(spec, net, host, tmp_path):
    """Each format takes the network, and the proof that is built into saving holds."""
    result, _, items = quantized(host, net, spec)
    with warnings.catch_warnings():
        # OpenVINO leaves out the rounding of some addends, which test_proof.py is about.
        warnings.filterwarnings("ignore", "OpenVINO should round where the model rounds", QFTWarning)
        reports = result.save(tmp_path, items[0])
    for report in reports:
        assert report.weights == 5
        assert report.path.is_file()


@NETS
@pytest.mark.parametrize("spec", ["finn", "integer only", "factors of 4 bits"])
def test_read_then_write_changes_nothing(spec, net, host):
    """A finetune whose learning rates are 0 gives the outputs and scales of no finetune at all."""
    results = []
    for finetune in (None, few_steps(images_fed=32, learning_rate=0, scale_learning_rate=0)):
        torch.manual_seed(0)
        model, items = nets.build(net), nets.items(net)
        results.append(host().quantize(model, items, four_bits(hardware=SPECS[spec], finetune=finetune)))
    start, end = results
    for name, kernel in start.kernels().items():
        other = end.kernels()[name]
        torch.testing.assert_close(other.step, kernel.step, rtol=LAST_BIT, atol=0)
        torch.testing.assert_close(other.weight, kernel.weight, rtol=LAST_BIT, atol=LAST_BIT)
    assert relative_error(end.outputs(items[0]), start.outputs(items[0])) < LAST_BIT


def test_bits_of_single_activations(host, tmp_path):
    """Patterns choose the bits of what a layer reads, the others have those of the hardware; it can be saved."""
    model, items = nets.build("residual"), nets.items("residual")
    wanted = {"conv1.weight": 4, "conv3*": 5, "fc.weight": 8}
    config = four_bits(layer_activation_bits=wanted, hardware=HardwareSpec(activation_bits=6))
    result = host().quantize(model, items, config)
    found = {
        name: result.activations()[before].bits for name, (before, _) in PLACES[host.name, "residual"].around.items()
    }
    assert found == {"stem.weight": 6, "conv1.weight": 4, "conv2.weight": 6, "conv3.weight": 5, "fc.weight": 8}
    assert all(report.weights == 5 for report in result.save(tmp_path, items[0]))


def test_the_widest_reader_wins(host):
    """Where two layers read one activation it has the bits of the wider one."""
    model, items = nets.build("branches"), nets.items("branches")
    config = four_bits(layer_activation_bits={"left.weight": 4, "right.weight": 6}, finetune=None)
    activations = host().quantize(model, items, config).activations()
    image = activations[hook("x") if host.name == "nncf" else "quantizer_0"]
    assert image.bits == 6
    assert sorted(a.bits for a in activations.values())[0] == 6


def test_a_layer_that_could_overflow_is_named(host):
    """With 8-bit accumulators every layer is named in one warning, with the bits that it needs."""
    model, items = nets.build("residual"), nets.items("residual")
    config = four_bits(hardware=HardwareSpec(accumulator_bits=8), finetune=None)
    with pytest.warns(QFTWarning, match=r"accumulator of 8 bits.*conv1\.weight needs 1\d") as caught:
        host().quantize(model, items, config)
    (message,) = [str(w.message) for w in caught if issubclass(w.category, QFTWarning)]
    assert all(f"{name} needs" in message for name in PLACES[host.name, "residual"].around)


@pytest.mark.parametrize("spec", ["finn", "openvino cpu", "integer only"])
def test_bounded_activations_have_a_factor_for_each_channel(spec, host):
    """Scales pass every ReLU6 where activations are quantized."""
    result, _, _ = quantized(host, "inverted", spec)
    bounds = [layer for layer in result.dof_map.layers if layer.kind == "hardtanh"]
    assert len(bounds) == 3
    assert all((layer.out_index > 0).all() for layer in bounds)
    kinds = [type(m) for m in result.model.modules()]
    assert kinds.count(nn.ReLU6 if host.name == "nncf" else ChannelHardtanh) == 3


@pytest.mark.nncf_only
def test_without_quantized_activations_a_bound_is_a_barrier_under_nncf():
    """OpenVINO would move the factors around a ReLU6 into the weights before their integers are made."""
    pytest.importorskip("nncf")
    result, _, _ = quantized(UnderNNCF, "inverted", "weights only")
    assert not any(layer.kind == "hardtanh" for layer in result.dof_map.layers)
    assert str(result.dof_map).count("hardtanh has one bound for all channels") >= 3
    assert [type(m) for m in result.model.modules()].count(nn.ReLU6) == 3


@pytest.mark.parametrize("spec", ["openvino cpu", "weights only"])
def test_bounds_may_be_dropped(spec, host, tmp_path):
    """With `bounded="relu"` no ReLU6 is left, no channel in front of one is pinned, and the result can be saved."""
    model, items = nets.build("inverted"), nets.items("inverted")
    result = host().quantize(model, items, four_bits(bounded="relu", hardware=SPECS[spec]))
    assert not any(isinstance(m, (nn.Hardtanh, ChannelHardtanh)) for m in result.model.modules())
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == 3
    assert not any(layer.kind == "hardtanh" for layer in result.dof_map.layers)
    assert (result.dof_map.layer("expand.0.weight").out_index > 0).all()
    assert all(report.weights == 5 for report in result.save(tmp_path, items[0]))
    # Its function is another one, so it is compared with the float network without bounds.
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    expected = [t.detach() for t in tensors_in(nets.call(model, items[0]))]
    assert relative_error(result.outputs(items[0]), expected) < CLOSE[8]


def shifted_under_nncf(finetune):
    """Quantize with NNCF's asymmetric activations; return quantizers by name, outputs, and the object."""
    import nncf

    torch.manual_seed(0)
    model, items = nets.build("residual"), [x**3 for x in nets.items("residual")]
    config = four_bits(finetune=finetune, compensate=False)  # there is something to gain from where it stands
    return UnderNNCF().quantize(
        model, items, config, preset=nncf.QuantizationPreset.MIXED, target_device=nncf.TargetDevice.NPU
    ), items


def shifted_under_brevitas(finetune):
    """Train a model of Brevitas' layers whose signed activations have zero points."""
    import brevitas.nn as qnn

    from qft_plugin import QFTConfig
    from qft_plugin import brevitas as host
    from qft_plugin.brevitas._scalings import ActivationScaling

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.2))
    weight, act = {"weight_quant": host.QFTInt4Weight}, {"act_quant": host.QFTShiftedUint8Act}
    model = nn.Sequential(
        qnn.QuantIdentity(**act), qnn.QuantConv2d(3, 8, 3, **weight), nn.LeakyReLU(0.2), qnn.QuantIdentity(**act),
        qnn.QuantConv2d(8, 8, 3, **weight), nn.LeakyReLU(0.2), qnn.QuantIdentity(**act),
    )  # fmt: skip
    for mine, theirs in (("1", "0"), ("4", "2")):
        layer, other = model.get_submodule(mine), teacher.get_submodule(theirs)
        layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in (other.weight, other.bias))
    items = [torch.randn(16, 3, 8, 8) + 0.3 for _ in range(4)]
    host.initialize(model, items, QFTConfig(compensate=False))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ActivationScaling):
                module.log_s.sub_(0.7)  # half the range: there is something to gain from where it stands
    if finetune is not None:
        host.finetune(model, teacher, items, QFTConfig(finetune=finetune))
    result = UnderBrevitas()
    result.linked, result.model = model.eval(), host.fold(model)
    return result, items


SHIFTED = {"nncf": shifted_under_nncf, "brevitas": shifted_under_brevitas}


def test_zero_points_train(host, tmp_path):
    """Zero points move with the training, are whole numbers of the grid in the host's own words, and can be saved."""
    make = SHIFTED[host.name]
    (start, _), (end, items) = (make(f) for f in (None, few_steps(scale_learning_rate=0.02, images_fed=1024)))
    before, after = ({name: a.zero_point for name, a in r.activations().items()} for r in (start, end))
    assert before.keys() == after.keys()
    assert any(0 < z < 255 and z != before[name] for name, z in after.items())
    assert all(0 <= z <= 255 and z == round(z) for name, z in after.items() if not end.activations()[name].signed)
    expected = end.outputs(items[0])
    for report in end.save(tmp_path, items[0]):
        assert report.weights >= 2
    assert relative_error(end.outputs(items[0]), expected) == 0


@pytest.mark.parametrize("bits", [6, 8])
def test_biases_that_do_not_fit_are_clipped_to_the_ends(bits, host, tmp_path):
    """A bias beyond its bits is trained as the end of their range, on either side, and that is what is deployed."""
    model, items = nets.build("residual"), nets.items("residual")
    clipped = pytest.warns(QFTWarning, match=rf"A bias of {bits} bits .* clipped: .*bias needs \d+")
    with clipped, pytest.warns(QFTWarning, match=r"loss should end below 0\.3\. Found 0\.5"):
        result = host().quantize(model, items, four_bits(hardware=HardwareSpec(bias_bits=bits)))
    steps = torch.cat(list(bias_steps(result, "residual").values())).round()
    assert (steps.min(), steps.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert all(report.weights == 5 for report in result.save(tmp_path, items[0]))


def factors_of_addends(result):
    """List the factors in front of additions, as the host holds them, `[channels]` each."""
    if result.name == "brevitas":
        return [m.weight for m in result.model.modules() if isinstance(m, Rescaled)]
    from nncf.torch.function_hook import get_hook_storage

    from qft_plugin.nncf._write import SQMultiply

    hooks = get_hook_storage(result.model).named_hooks()
    return [h.scale.flatten() for name, h in hooks if isinstance(h, SQMultiply) and "add" in name]


@NETS
def test_every_channel_of_an_addend_has_a_factor_of_its_own(net, host, tmp_path):
    """What is added is no longer tied to the sum: both sides are free, and trained, and saved."""
    # Plain rounding of these weights to 3 bits leaves a fifth and more of the loss to gain, so the training is kept.
    torch.manual_seed(1)
    model, items = nets.build(net), nets.items(net)
    settings = {"finetune": few_steps(images_fed=4096), "compensate": False, "weight_bits": 3}
    result = host().quantize(model, items, four_bits(hardware=SPECS["addends per channel"], **settings))
    tied, _, _ = quantized(host, net, "openvino cpu")
    channels = len(result.dof_map.layer({"residual": "conv2.weight", "inverted": "project.0.weight"}[net]).out_index)
    # Three edges in the place of one: the two addends and their sum.
    assert result.dof_map.size == tied.dof_map.size + 2 * channels
    found = factors_of_addends(result)
    assert [len(f) for f in found] == [channels] * 2
    for factor in found:
        assert len(factor.unique()) > channels / 2
    if host is UnderBrevitas:
        with torch.no_grad():
            linked = list(tensors_in(nets.call(result.linked, items[0])))
        assert relative_error(result.outputs(items[0]), linked) < 1e-2
    assert all(report.weights == 5 for report in result.save(tmp_path, items[0]))


@NETS
def test_addends_start_with_one_scale(net, host):
    """Before the training all factors are 1: the hosts calibrate the network as it is."""
    model, items = nets.build(net), nets.items(net)
    settings = {"finetune": None, "hardware": HardwareSpec(elementwise_rescale="channel")}
    for factor in factors_of_addends(host().quantize(model, items, four_bits(**settings))):
        assert torch.equal(factor, torch.ones_like(factor))


def test_what_else_is_added_stays_as_it_is(host):
    """Integers, numbers, what is broadcast and what is added to itself get no factor."""
    torch.manual_seed(0)
    model = Sums()
    items = [torch.randn(8, 3, 6, 6) for _ in range(4)]
    result = host().quantize(model, items, four_bits(hardware=SPECS["addends per channel"]))
    assert factors_of_addends(result) == []
    assert relative_error(result.outputs(items[0]), [model(items[0]).detach()]) < CLOSE[8]


class Rows(nn.Module):
    """A convolution over a sequence, tokens of any number, an addition in place, and a module called `addend_0`."""

    def __init__(self):
        super().__init__()
        self.conv, self.addend_0, self.b = nn.Conv1d(3, 8, 3), nn.Linear(8, 9), nn.Linear(9, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).transpose(1, 2)
        y = torch.relu(self.b(torch.relu(self.addend_0(x))) + x)
        y += x
        return self.head(y)


def test_sequences_of_another_length(host):
    """Factors stand on the channels, not on the tokens."""
    torch.manual_seed(0)
    model, items = Rows(), [torch.randn(8, 3, 7) for _ in range(4)]
    result = host().quantize(model, items, four_bits(hardware=SPECS["addends per channel"]))
    assert [len(f) for f in factors_of_addends(result)] == [8] * 4
    other = torch.randn(2, 3, 16)
    assert relative_error(result.outputs(other), [model(other).detach()]) < CLOSE[8]


class NotBound(nn.Module):
    """An addition in place whose result has no name of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        y = self.b(x)
        y.add_(x)
        return self.head(torch.relu(y))


def test_an_addition_whose_result_has_no_name_keeps_its_scales(host):
    """Nothing can be put in front of it; the network is what it was."""
    torch.manual_seed(0)
    model, items = NotBound(), [torch.randn(8, 3, 6, 6) for _ in range(4)]
    result = host().quantize(model, items, four_bits(hardware=SPECS["addends per channel"]))
    assert factors_of_addends(result) == []
    assert result.dof_map.size > 0
    assert relative_error(result.outputs(items[0]), [model(items[0]).detach()]) < CLOSE[8]


class Sums(nn.Module):
    """Additions of all kinds."""

    def __init__(self):
        super().__init__()
        self.conv, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        x = torch.relu(self.conv(x) + self.shift) + 1
        x = self.second(x + x.mean((2, 3), keepdim=True))
        x = torch.relu(x + x)
        index = torch.tensor([0, 1]) + torch.tensor([1, 1])
        return self.head(x[:, :, index])
