"""What holds for every network of the collection, on the real NNCF."""

import io

import pytest
import torch

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
import nncf.torch
from conftest import few_steps, four_bits, relative_error, weight_quantizers
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import nn
from torch.nn import functional

import qft_plugin.nncf as host
from qft_plugin import FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.torch_model import accepts, tensors_in
from qft_plugin.nncf._read import read
from qft_plugin.training.data import read_inputs
from qft_plugin.training.loss import Loss, Prediction, distillation_loss

EXACT_64 = 1e-9
"""Largest relative difference in float64 of two orders of the same arithmetic."""

EIGHT_BITS = 0.03
"""Relative L2 error of 8-bit weights and activations in these networks; a wrong fold or scale shows as 0.2 and more."""

FOUR_BITS = 0.2
"""Likewise of 4-bit weights after a few steps."""

ROUNDING = 1e-5
"""Relative difference of a float32 value that was divided and multiplied by its step."""

LOSS_AGAIN = 0.01
"""Relative difference of a loss computed by NNCF's quantizers: a few activations round the other way."""

every_net = pytest.mark.parametrize("name", nets.NETS)


@every_net
def test_random_factors_do_not_change_the_float_network(name):
    """Folding the BatchNorms and random cross-layer factors leaves the outputs of the float network as they are."""
    model = nets.build(name).double()
    items = nets.items(name, batches=1, size=4)
    double = [
        {k: v.double() for k, v in x.items()} if isinstance(x, dict) else
        tuple(v.double() for v in x) if isinstance(x, tuple) else x.double()
        for x in items
    ]  # fmt: skip
    like = next(model.parameters())
    inputs = read_inputs(double, accepts=accepts(model), like=like, settings=FinetuneConfig(max_images=4))
    source = read(model, inputs)
    dof_map = map_dof(source.graph)
    assert (dof_map.size > 0) == nets.NETS[name].rescales
    tensors = {n: source.tensors[n] for n in names_of(dof_map.layers)}
    factors = torch.randn(dof_map.size, dtype=torch.float64)
    folded = fold_network(dof_map, factors, tensors)
    changed = sum(not torch.equal(folded[n], tensors[n]) for n in tensors)
    assert (changed > 0) == nets.NETS[name].rescales
    args, kwargs = inputs.batch(slice(None))
    with torch.no_grad():
        expected = list(tensors_in(model(*args, **kwargs)))
        found = list(tensors_in(torch.func.functional_call(source.model, folded, args, kwargs)))
    assert relative_error(found, expected) < EXACT_64


@every_net
def test_read_then_write_with_nothing_trained(name, outputs):
    """Without a finetune and with 8 bits the written network computes what the float network computes."""
    model, items = nets.build(name), nets.items(name)
    config = QFTConfig(weight_bits=8, small_layer_bits=8, finetune=None)
    result = nncf.quantize(model, nncf.Dataset(items), algorithm=config)
    found, expected = outputs(result, items[0]), outputs(model, items[0])
    assert 0 < relative_error(found, expected) < EIGHT_BITS


@every_net
def test_four_bits_stay_close(name, quantized, outputs):
    """With 4-bit weights the outputs stay near those of the float network."""
    q = quantized(name)
    assert 0 < relative_error(outputs(q.job.model, q.items[0]), outputs(q.model, q.items[0])) < FOUR_BITS


@every_net
def test_the_loss_does_not_grow(name, quantized):
    """The state that is kept is never worse than the one before the first step."""
    result = quantized(name).job.result
    assert result.steps == len(result.losses) == 8
    assert 0 < result.final_loss <= result.start_loss


@every_net
def test_result_keeps_the_parameter_names(name, quantized):
    """The state dict has every name and shape of the user's model, and beside them only NNCF's hooks."""
    q = quantized(name)
    before, after = q.model.state_dict(), q.job.model.state_dict()
    assert {n: t.shape for n, t in before.items()} == {n: after[n].shape for n in before}
    assert all(n.startswith("__nncf_hooks.") for n in after.keys() - before.keys())
    assert not q.job.model.training


@every_net
def test_weights_lie_on_the_grid_of_their_quantizers(name, quantized):
    """Every quantized weight is a whole number from -7 to 7 times the scale of a standard 4-bit quantizer."""
    q = quantized(name)
    parameters = dict(q.job.model.named_parameters())
    layer_norms = {layer.weight for layer in q.job.dof_map.layers if layer.kind == "layer_norm"}
    checked = 0
    for weight, quantizer in weight_quantizers(q.job):
        if weight in layer_norms:
            continue
        assert type(quantizer) is SymmetricQuantizer
        assert quantizer.num_bits == 4
        integers = parameters[weight] / (quantizer.scale / 7)
        assert (integers - integers.round()).abs().max() < 7 * ROUNDING
        assert integers.round().abs().max() <= 7
        checked += 1
    layers = [m for m in q.model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))]
    assert checked >= len(layers) - nets.NETS[name].not_quantized


def test_a_layer_norm_is_not_cut_to_four_bits(quantized):
    """NNCF puts a per-tensor quantizer on the weight of a LayerNorm, which no kernel runs in 4 bits: it keeps 8."""
    job = quantized("transformer").job
    layer_norms = {layer.weight for layer in job.dof_map.layers if layer.kind == "layer_norm"}
    assert layer_norms == {"norm1.weight", "norm2.weight"}
    assert all(quantizer.num_bits == 8 for weight, quantizer in weight_quantizers(job) if weight in layer_norms)


@every_net
def test_config_and_state_dict_bring_the_result_back(name, quantized, outputs):
    """NNCF's own config and a state dict, written and read, make the identical network from a fresh instance."""
    q = quantized(name)
    file = io.BytesIO()
    torch.save({"config": nncf.torch.get_config(q.job.model), "state": q.job.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)  # NNCF's config holds an enumeration of its own
    again = nncf.torch.load_from_config(nets.NETS[name].build().eval(), saved["config"])
    again.load_state_dict(saved["state"])
    for found, expected in zip(outputs(again, q.items[0]), outputs(q.job.model, q.items[0]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_written_network_is_the_student(rescale, outputs):
    """Where the outputs themselves are compared, NNCF's quantizers give the loss that the finetune reported."""
    model, items = nets.build("transposed"), nets.items("transposed")
    config = four_bits(equalize=rescale, train_cross_layer=rescale)
    job = host.quantize(model, nncf.Dataset(items), config)
    images = torch.cat(items)
    wanted, got = (Prediction(tuple(outputs(m, images)), None) for m in (model, job.model))
    loss = float(distillation_loss(got, wanted, Loss((1.0,) * len(wanted.features), 0.0)))
    assert loss == pytest.approx(job.result.final_loss, rel=LOSS_AGAIN)


@pytest.mark.parametrize("name", ["residual", "inverted", "transposed", "linear_only"])
def test_layerwise_rescale_gives_one_scale_per_weight(name, outputs):
    """With a scalar factor between accumulator and output, all channels of a weight have one scale."""
    model, items = nets.build(name), nets.items(name)
    config = four_bits(hardware=HardwareSpec(rescale="layerwise"), finetune=few_steps(images_fed=32))
    job = host.quantize(model, nncf.Dataset(items), config)
    quantizers = [quantizer for _, quantizer in weight_quantizers(job)]
    assert quantizers
    assert all(quantizer.scale.unique().numel() == 1 for quantizer in quantizers)
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < 2 * FOUR_BITS


@pytest.mark.parametrize("name", ["residual", "grouped", "linear_only"])
def test_channelwise_rescale_gives_each_channel_its_scale(name, quantized):
    """By default the channels of a weight have scales of their own."""
    q = quantized(name)
    assert all(quantizer.scale.unique().numel() > 1 for _, quantizer in weight_quantizers(q.job))


class LinearAttention(nn.Module):
    """Linear attention: queries and keys after a ReLU, values with a column of ones, divided by their sum."""

    def __init__(self):
        super().__init__()
        self.qkv, self.project = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        y = q.relu() @ (k.relu().transpose(-1, -2) @ functional.pad(v, (0, 1), value=1.0))
        y = y[..., :-1] / (y[..., -1:] + 1e-15)
        return self.project(y.transpose(1, 2).unsqueeze(-1)).mean((2, 3))


def test_small_divisors_are_not_rounded_to_zero(outputs):
    """NNCF's own quantizer of a divisor makes NaN of a sum below half a step; here no quantizer is only divided by."""
    model = LinearAttention().eval()
    with torch.no_grad():
        model.qkv.weight.mul_(torch.linspace(0.01, 3, 24).view(-1, 1, 1, 1))
        model.qkv.bias[:16].sub_(0.7)
    items = [torch.randn(16, 3, 6, 6) * torch.logspace(-2, 0.5, 16).view(-1, 1, 1, 1) for _ in range(2)]
    own = nncf.quantize(
        model,
        nncf.Dataset(items),
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    assert not torch.isfinite(outputs(own, items[0])[0]).all()
    job = host.quantize(model, nncf.Dataset(items), four_bits(weight_bits=8, finetune=None))
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < FOUR_BITS


class Around(nn.Module):
    """A convolution and a BatchNorm of which something else uses a part."""

    def __init__(self, use):
        super().__init__()
        self.use, self.conv, self.norm, self.fc = use, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        between = self.conv(x)
        y = self.norm(between)
        if self.use == "reader":
            y = y + between
        elif self.use == "weight":
            y = self.conv(y.relu())
        elif self.use == "norm":
            y = self.norm(y.relu())
        y = self.fc(y.relu().mean((2, 3)))
        return (y, between) if self.use == "output" else y


@pytest.mark.parametrize("use", ["nothing", "reader", "output", "weight", "norm"])
def test_a_norm_folds_where_nothing_else_uses_a_part_of_the_pair(use):
    """Not where the activation between has other readers or is an output, nor where weight or norm are used again."""
    model, items = nets.settled(Around(use)), [torch.randn(4, 3, 8, 8)]
    like = next(model.parameters())
    inputs = read_inputs(items, accepts=accepts(model), like=like, settings=FinetuneConfig(max_images=4))
    assert len(read(model, inputs).norms) == (use == "nothing")


def test_bounds_that_are_reached(outputs):
    """Where activations saturate at the bounds of ReLU6 in channels of other scales, they do so in the result."""
    model, items = nets.build("inverted"), [20 * item for item in nets.items("inverted")]
    job = host.quantize(model, nncf.Dataset(items), four_bits(weight_bits=8, finetune=None))
    reached = []
    hooks = [m.register_forward_hook(lambda _, __, y: reached.append(bool((y == 6).any())))
             for m in model.modules() if isinstance(m, nn.ReLU6)]  # fmt: skip
    expected = outputs(model, items[0])
    for hook in hooks:
        hook.remove()
    assert reached == [True] * 3
    assert relative_error(outputs(job.model, items[0]), expected) < EIGHT_BITS
