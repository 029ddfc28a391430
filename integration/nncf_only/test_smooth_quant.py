"""NNCF's SmoothQuant: off unless it is asked for, and then told apart from what it multiplies."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
from conftest import few_steps, four_bits, relative_error
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from nncf.torch.function_hook import get_hook_storage

import qft_plugin.nncf as host
from qft_plugin import HardwareSpec
from qft_plugin.job import run
from qft_plugin.job.parts import Parts
from qft_plugin.nncf import _attach
from qft_plugin.nncf._replay import replay
from qft_plugin.nncf._smooth import INSIDE, SQMultiply, quantize_after_multiplying, smoothing

LAYERS = 8
"""Linear layers of the transformer of the collection."""

TYPE = {"model_type": nncf.ModelType.TRANSFORMER}
ALIKE = 3.0
"""The loss at the start with and without SmoothQuant; where other units were compared, it was several hundred fold."""

FOLDED = 1e-4
"""float32: weights with factors that are unfolded by the next layer, over a few layers."""


def alphas(**values):
    """Set the strength of SmoothQuant."""
    smooth = AdvancedSmoothQuantParameters(**{"convolution": -1, **values})
    return {**TYPE, "advanced_parameters": AdvancedQuantizationParameters(smooth_quant_alphas=smooth)}


ASKED = alphas(matmul=0.9)


def quantize(config=None, *, name="transformer", **settings):
    """Quantize a network of the collection, the transformer for example."""
    torch.manual_seed(0)
    model, items = nets.build(name), nets.items(name)
    return model, items, host.quantize(model, nncf.Dataset(items), config or four_bits(), **settings)


def multiplications(model):
    """Count NNCF's multiplications in front of layers."""
    return sum(isinstance(h, SQMultiply) for _, h in get_hook_storage(model).named_hooks(remove_duplicate=False))


class Functions(nn.Module):
    """Two linear layers, called as functions in one module, read one tensor: they share a multiplication."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(12, 12)) for _ in range(2))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = x.exp()
        x = functional.linear(x, self.first).tanh() + functional.linear(x, self.second).sigmoid()
        return self.head(functional.gelu(x))


def test_off_by_default():
    """A model type alone, and default alphas beside it, give what alphas below 0 give: no multiplication."""
    results = [quantize(four_bits(finetune=None), **settings)[2] for settings in (TYPE, alphas(), alphas(matmul=-1))]
    states = [job.model.state_dict() for job in results]
    assert [multiplications(job.model) for job in results] == [0, 0, 0]
    for state in states[:-1]:
        assert state.keys() == states[-1].keys()
        assert all(torch.equal(tensor, states[-1][name]) for name, tensor in state.items())


def test_only_the_default_is_changed():
    """The user's own parameters stay what they were."""
    advanced = AdvancedQuantizationParameters()
    quantize(four_bits(finetune=None), **TYPE, advanced_parameters=advanced)
    assert advanced == AdvancedQuantizationParameters()


@pytest.mark.parametrize("place", [None, "up", ["down", "head"]])
def test_the_loss_compares_real_units(place, outputs):
    """With SmoothQuant in front of what is compared, the loss is about what it is without, and training lowers it."""
    config = four_bits(finetune=few_steps(loss_at=place, images_fed=512))
    (model, items, without), (_, _, asked) = quantize(config, **TYPE), quantize(config, **ASKED)
    assert multiplications(asked.model) == LAYERS
    assert asked.result.start_loss < ALIKE * without.result.start_loss
    assert asked.result.final_loss < asked.result.start_loss
    errors = [relative_error(outputs(job.model, items[0]), outputs(model, items[0])) for job in (without, asked)]
    assert errors[1] < ALIKE * errors[0]


def test_errors_of_layers(monkeypatch):
    """With SmoothQuant, nothing quantized is the user's network, and each layer is measured with what it reads."""
    found, measure = [], run.measure

    def noted(*args):
        found.append(Parts(*args))
        return measure(*args)

    monkeypatch.setattr(run, "measure", noted)
    model, _, job = quantize(four_bits(analyse=True), **ASKED)
    (parts,) = found
    assert all(len(parts.reads[layer.weight]) == 1 for layer in parts.layers if layer.kind == "linear")
    for call, _ in parts.batches(16):
        with torch.no_grad():
            torch.testing.assert_close(parts.run(parts.none(), call).logits, model(*call[0]), rtol=FOLDED, atol=FOLDED)
    linear = [layer for layer in job.report.layers if layer.kind == "linear"]
    assert [layer.activation_bits for layer in linear] == [8] * LAYERS
    assert all(layer.errors.weight < 0.5 for layer in linear)


@pytest.mark.parametrize(("name", "count"), [("inverted", 5), ("one_d", 3)])
def test_in_front_of_convolutions(name, count, monkeypatch):
    """Factors in front of plain and depthwise convolutions are undone too, where the user asks for them."""
    found, measure = [], run.measure
    monkeypatch.setattr(run, "measure", lambda *args: found.append(Parts(*args)) or measure(*args))
    config = four_bits(analyse=True)
    model, _, job = quantize(config, name=name, **alphas(convolution=0.5, matmul=0.5))
    _, _, without = quantize(config, name=name, **TYPE)
    (call, _), *_ = found[0].batches(16)
    with torch.no_grad():
        expected = model(*call[0])
    torch.testing.assert_close(found[0].run(found[0].none(), call).logits, expected, rtol=FOLDED, atol=FOLDED)
    assert len(smoothing(job.model)) >= count
    assert job.result.start_loss < ALIKE * without.result.start_loss


def test_integers_that_a_layer_reads():
    """Hardware with accumulators of integers finds the quantizers behind multiplications; else it would warn."""
    hardware = HardwareSpec(bias_bits=32, rescale_factor="power_of_two")
    _, _, job = quantize(four_bits(hardware=hardware), **ASKED)
    assert multiplications(job.model) == LAYERS


def test_training_runs_without_nncf(monkeypatch):
    """The hooks of a student with SmoothQuant can be replayed: no quantizer is inside a hook."""
    found = []

    def spied(*args):
        found.append(replay(*args))
        return found[-1]

    monkeypatch.setattr(_attach, "replay", spied)
    quantize(**ASKED)
    assert len(found) == 1
    assert found[0] is not None


@pytest.mark.parametrize("build", [lambda: nets.build("transformer"), lambda: Functions().eval()])
def test_quantizers_leave_the_hooks(build, outputs):
    """What NNCF has quantized computes the same, bit by bit, with its quantizers behind the multiplications."""
    model = build()
    items = nets.items("transformer") if hasattr(model, "embed") else [torch.randn(16, 12) for _ in range(4)]
    advanced = AdvancedQuantizationParameters(disable_bias_correction=True)  # which would compile NNCF's extension
    moved = nncf.quantize(model, nncf.Dataset(items), **TYPE, advanced_parameters=advanced)
    before = copy.deepcopy(moved)
    names = [name for name, _ in get_hook_storage(before).named_hooks(remove_duplicate=False)]
    quantize_after_multiplying(moved)
    after = [name for name, _ in get_hook_storage(moved).named_hooks(remove_duplicate=False)]
    assert sum(INSIDE in name for name in names) == len(smoothing(moved)) > 1
    assert not any(INSIDE in name for name in after)
    assert len(after) == len(names)
    for item in items:
        assert torch.equal(*(found for run in (before, moved) for found in outputs(run, item)))


def test_saved_and_restored(outputs, tmp_path):
    """A result with multiplications is proved in its file, and comes back from its config and state dict."""
    model, items, job = quantize(**ASKED)
    host.save_openvino(job.model, tmp_path / "m.xml", items[0])
    config, state = nncf.torch.get_config(job.model), job.model.state_dict()
    restored = nncf.torch.load_from_config(copy.deepcopy(model), config)
    restored.load_state_dict(state)
    assert torch.equal(*(found for net in (job.model, restored.eval()) for found in outputs(net, items[0])))
