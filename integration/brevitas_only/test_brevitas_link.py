"""Linking: what layers share, and that it survives what Brevitas does to a model."""

import copy

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.nn as qnn
import torch
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import preprocess_for_quantize, quantize
from brevitas.quant import Int8Bias, Int8BiasPerTensorFloatInternalScaling, Int32Bias
from brevitas_models import (
    MODELS,
    LinearOnly,
    Residual,
    activation_scalings,
    assert_same_state,
    batches,
    build,
    conv,
    every_model,
    identity,
    images,
    integers,
    linked,
    relative,
    relu,
    run,
    scramble,
    shared_log_c,
    state_of,
    weight_scalings,
)
from torch import nn

from qft_plugin import DataError, ModelError
from qft_plugin.brevitas import (
    QFTInt4Weight,
    QFTInt4WeightPerTensorFloat,
    QFTInt8Act,
    QFTUint8Act,
    dof_map_of,
    initialize,
    link,
)
from qft_plugin.brevitas._twin import make_twin

pytestmark = pytest.mark.core

SAME = 1e-5
"""Relative L2 difference of outputs whose scales were computed another way in float32."""


@every_model
def test_the_function_stays(name):
    """Linking alone changes no scale, so the outputs stay; BatchNorms are folded on the way."""
    model, x = build(name), images(name)
    before = run(model, x)
    dof_map = link(model, x[:2])
    assert (dof_map.size > 0) == MODELS[name].rescales
    assert relative(run(model, x), before) < SAME


@every_model
def test_the_map_is_printable(name):
    """Printed, the map has a line for each edge, and a reason for each that is not wholly free."""
    dof_map = link(*linked(name))
    lines = str(dof_map).splitlines()
    assert lines[0].split()[:2] == ["edge", "made"]
    assert len(lines) == len(dof_map.edges) + 1
    for edge, line in zip(dof_map.edges, lines[1:], strict=True):
        assert edge.name in line
        assert bool(edge.reason) == (edge.free < edge.channels)
        assert edge.reason in line
    reasons = {edge.reason for edge in dof_map.edges}
    assert "input of the network" in reasons
    assert "output of the network" in reasons


def test_the_reason_of_a_barrier():
    """What cannot be rescaled through is named."""
    model, x = linked("foreign")
    assert "foreign_quantizer is not homogeneous" in str(link(model, x))


@every_model
def test_each_degree_of_freedom_once(name):
    """A state dict holds each trained tensor once, and the cross-layer factors of all layers in one."""
    model, _ = linked(name)
    state = model.state_dict()
    names = [n for n in state if "log_" in n]
    assert len({state[n].data_ptr() for n in names if state[n].numel()}) == len([n for n in names if state[n].numel()])
    assert sum(n.endswith("log_c") for n in names) == 1
    assert sum(n.endswith("log_F") for n in names) == len(weight_scalings(model))
    assert sum(n.endswith("log_s") for n in names) == len(activation_scalings(model))
    assert {n for n in state if "log_" in n} == {n for n, _ in model.named_parameters() if "log_" in n}
    assert shared_log_c(model).numel() == dof_map_of(model).size


@every_model
def test_a_second_link_changes_nothing(name):
    """Linking again, with factors that have been trained, keeps every bit and every parameter object."""
    model, x = linked(name)
    scramble(model)
    before, objects = state_of(model), [id(p) for p in model.parameters()]
    expected = run(model, x)
    link(model, images(name))
    assert_same_state(model, before)
    assert [id(p) for p in model.parameters()] == objects
    assert torch.equal(run(model, x), expected)


@every_model
def test_the_modes_stay(name):
    """Linking a model in train mode leaves the mode of every module."""
    model = build(name)
    model.train()
    next(model.children()).eval()
    before = {n: m.training for n, m in model.named_modules()}
    link(model, images(name))
    assert {n: m.training for n, m in model.named_modules() if n in before} == before


@pytest.mark.parametrize("name", [n for n, net in MODELS.items() if net.rescales])
def test_scales_follow_the_factors(name):
    """A shared factor moves the scale of an activation and, the other way, those of the weights around it."""
    model, x = linked(name)
    dof_map = dof_map_of(model)
    layers = [layer for layer in dof_map.layers if bool((layer.out_index > 0).any())]
    layer = model.get_submodule(layers[0].weight.removesuffix(".weight"))
    before = layer.weight_quant.scale().clone()
    with torch.no_grad():
        shared_log_c(model).fill_(0.5)
    ratio = (layer.weight_quant.scale() / before).flatten(1)[:, 0]
    moved = torch.where(layers[0].out_index > 0, 0.5, 0.0).exp()
    if not bool((layers[0].in_index > 0).any()) and layers[0].kind in ("conv1d", "conv2d", "linear"):
        assert torch.allclose(ratio, moved, rtol=1e-5)
    assert any(s.channel_factors() is not None and s.channel_factors().max() > 1.5
               for s in activation_scalings(model).values())  # fmt: skip
    assert torch.isfinite(run(model, x)).all()


def test_batch_norms_are_folded():
    """A BatchNorm after a layer goes into it and leaves an Identity; one after a pool stays, and is a barrier."""
    model, x = build("normed"), images("normed")
    exact = nn.functional.conv2d(x, model.c1.weight, padding=1)
    exact = model.bn1(exact).detach()
    dof_map = link(model, x)
    assert isinstance(model.bn1, nn.Identity)
    assert isinstance(model.bn2, nn.Identity)
    assert isinstance(model.last, nn.BatchNorm1d)
    folded = nn.functional.conv2d(x, model.c1.weight, model.c1.bias, padding=1)
    assert torch.allclose(folded, exact, atol=1e-5)
    assert not {"batch_norm"} & {e.function for e in dof_map.edges if e.name.startswith(("bn1", "bn2"))}
    assert integers(model.c1).abs().max() == 7


def test_a_foreign_quantizer_is_a_barrier():
    """Brevitas' own quantizers are left as they are: no factor passes, nothing of theirs changes."""
    model, _ = linked("foreign")
    dof_map = dof_map_of(model)
    free = {layer.weight: (bool((layer.in_index > 0).any()), bool((layer.out_index > 0).any()))
            for layer in dof_map.layers}  # fmt: skip
    assert "stock.weight" not in free
    assert free["c1.weight"] == (False, True)
    assert free["c2.weight"] == (True, False)
    assert free["c3.weight"] == (False, True)
    before = model.stock.quant_weight().scale.clone(), model.stock_act(torch.ones(1))
    with torch.no_grad():
        shared_log_c(model).normal_()
    after = model.stock.quant_weight().scale, model.stock_act(torch.ones(1))
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_a_shared_activation_ties_its_channels():
    """What passes one quantizer has one scale per channel: the layers around it have the same variables."""
    model, _ = linked("shared_activation")
    layers = {layer.weight: layer for layer in dof_map_of(model).layers}
    index = layers["c1.weight"].out_index
    assert sorted(index.tolist()) == list(range(1, 9))
    for name in ("c2.weight", "c3.weight"):
        assert torch.equal(layers[name].in_index, index)
        assert torch.equal(layers[name].out_index, index)
    assert torch.equal(layers["fc.weight"].in_index, index)


def test_the_inputs_of_an_addition_are_tied():
    """Brevitas' addition quantizes both addends with one scale, so that their channels share their factors."""
    model, _ = linked("added")
    layers = {layer.weight: layer for layer in dof_map_of(model).layers}
    assert bool((layers["left.weight"].out_index > 0).all())
    assert torch.equal(layers["left.weight"].out_index, layers["right.weight"].out_index)


def test_a_quantized_bias_is_refused():
    """A bias quantizer is refused by the name of its layer."""
    model = build("residual")
    model.c2 = conv(8, 8, bias_quant=Int32Bias, input_quant=QFTUint8Act)
    with pytest.raises(ModelError, match=r"Layer c2: its bias should not be quantized"):
        link(model, images("residual"))


@pytest.mark.parametrize(("quantizer", "bits"), [
    (Int8Bias, 8),
    (Int32Bias, 32),
    (Int8BiasPerTensorFloatInternalScaling, 8),
])  # fmt: skip
def test_what_to_use_instead_of_a_quantized_bias(quantizer, bits):
    """The message names all layers, the quantizer, and the setting that gives integer biases of the same width."""
    model = build("residual")
    model.c2, model.c3 = (conv(8, 8, bias_quant=quantizer, input_quant=QFTUint8Act) for _ in range(2))
    words = rf"Layers c2, c3: their biases.*bias_quant={quantizer.__name__}\..*HardwareSpec\(bias_bits={bits}\)"
    for call in (lambda: link(model, images("residual")), lambda: initialize(model, [images("residual")])):
        with pytest.raises(ModelError, match=words):
            call()


def test_no_quantizer_of_ours():
    """A model without a quantizer of this plugin is refused with what to do."""
    with pytest.raises(ModelError, match="weight_quant=QFTInt4Weight"):
        link(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))


class OneWeight(nn.Module):
    """Two layers with one weight, or with one weight quantizer."""

    def __init__(self, what):
        super().__init__()
        self.inp, self.c1, self.r1, self.r2 = identity(), conv(8, 8), relu(), relu()
        self.c2 = conv(8, 8, weight=self.c1.weight_quant if what == "quantizer" else QFTInt4Weight)
        if what == "weight":
            self.c2.weight = self.c1.weight

    def forward(self, x):
        return self.r2(self.c2(self.r1(self.c1(self.inp(x)))))


@pytest.mark.parametrize("what", ["weight", "quantizer"])
def test_two_layers_with_one_weight(what):
    """One weight, or one weight quantizer, in two layers has two scales to be: it is refused by their names."""
    with pytest.raises(ModelError, match=r"c1.*c2"):
        link(OneWeight(what).eval(), torch.randn(2, 8, 6, 6))


def test_a_dead_activation():
    """An activation that is 0 on the example, as after a dead ReLU, does not keep a model from being linked."""
    model, x = build("residual"), images("residual")
    nn.init.constant_(model.c2.bias, -100.0)
    link(model, x)
    assert torch.isfinite(run(model, x)).all()


def test_an_unused_layer():
    """A layer that the forward never calls keeps its quantizers, outside the links."""

    class Unused(LinearOnly):
        def __init__(self):
            super().__init__()
            self.extra = qnn.QuantLinear(3, 3, weight_quant=QFTInt4Weight, input_quant=QFTInt8Act)

    model, x = Unused().eval(), images("linear_only")
    link(model, x)
    before = state_of(model)
    link(model, x)
    assert_same_state(model, before)
    assert not weight_scalings(model)["extra"].linked
    assert torch.isfinite(run(model.extra, torch.randn(2, 3))).all()


def test_an_example_that_does_not_fit():
    """An example that the model cannot be run on leaves the modes of the model as they were."""
    model = build("residual").train()
    with pytest.raises(DataError, match="should run on"):
        link(model, torch.randn(1, 5, 8, 8))
    assert all(m.training for m in model.modules())


class Plain(nn.Module):
    """A float network for Brevitas' own passes."""

    def __init__(self, adds):
        super().__init__()
        self.adds = adds
        self.c1, self.bn, self.c2 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.relu1, self.relu2, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu1(self.bn(self.c1(x)))
        y = self.relu2(self.c2(x))
        return self.fc((x + y if self.adds else y).mean((2, 3)))


@pytest.mark.parametrize("adds", [False, True], ids=["chain", "residual"])
def test_a_model_that_brevitas_rebuilds(adds):
    """Brevitas' own pass, which builds layers on the meta device, takes these quantizers, and the result links.

    The quantizers that it aligns before an addition share one scale, and so one factor per channel.
    """
    model, x = Plain(adds).eval(), torch.randn(16, 3, 8, 8)
    exact = run(model, x)
    eight_bits = {"weight_quant": QFTInt4Weight, "weight_bit_width": 8}
    rebuilt = quantize(
        preprocess_for_quantize(model),
        compute_layer_map={nn.Conv2d: (qnn.QuantConv2d, eight_bits), nn.Linear: (qnn.QuantLinear, eight_bits)},
        quant_act_map={nn.ReLU: (qnn.QuantReLU, {"act_quant": QFTUint8Act})},
        quant_identity_map={
            "signed": (qnn.QuantIdentity, {"act_quant": QFTInt8Act}),
            "unsigned": (qnn.QuantIdentity, {"act_quant": QFTUint8Act}),
        },
    )
    found = weight_scalings(rebuilt)
    assert len(found) == 3
    assert not any(s.is_meta for s in (*found.values(), *activation_scalings(rebuilt).values()))
    before = run(rebuilt, x)
    assert relative(before, exact) < 0.1
    dof_map = link(rebuilt, x[:2])
    assert relative(run(rebuilt, x), before) < SAME
    scramble(rebuilt)
    copied = copy.deepcopy(rebuilt)
    # Brevitas leaves a module behind that its graph does not call, and fx copies only what the graph calls.
    called = copied.state_dict()
    copied.load_state_dict({name: t for name, t in rebuilt.state_dict().items() if name in called})
    assert torch.equal(run(copied, x), run(rebuilt, x))
    scramble(copied)
    assert not torch.equal(run(copied, x), run(rebuilt, x))
    assert dof_map.size == (8 if adds else 16)


@pytest.mark.parametrize("convert", [torch.Tensor.byte, torch.Tensor.double])
def test_an_example_of_another_dtype(convert):
    """It is refused with how to convert it, before the model runs."""
    with pytest.raises(DataError, match=r"example_input should be of the model's dtype torch\.float32\. Found"):
        link(build("residual"), convert(images("residual")))


def test_links_of_another_example():
    """Linking with an image of another size finds the same links."""
    model = Residual().eval()
    link(model, torch.randn(1, 3, 8, 8))
    before = state_of(model)
    link(model, torch.randn(3, 3, 12, 12))
    assert_same_state(model, before)


# Linked layers have hooks that hand them plain tensors, which GPTQ reads just as well.
@pytest.mark.filterwarnings("ignore:Hooks detected during setup for GPxQ")
@pytest.mark.parametrize("name", ["residual", "depthwise", "one_d"])
def test_brevitas_gptq_on_a_linked_model(name):
    """Brevitas' own GPTQ, which quantizes one column of a weight after the other, brings a linked model nearer to the
    float one.
    """
    model, data = build(name, QFTInt4WeightPerTensorFloat), batches(name)
    run(model, torch.cat(data))
    link(model, data[0])
    scramble(model, spread=0.1)
    twin = make_twin(model)
    before = relative(run(model, data[0]), run(twin, data[0]))
    with torch.no_grad(), gptq_mode(model) as gptq:
        for _ in range(gptq.num_layers):
            for batch in data:
                gptq.model(batch)
            gptq.update()
    assert relative(run(model, data[0]), run(twin, data[0])) < before
