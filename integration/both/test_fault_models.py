"""Models with faults: a right result or a clear error, and the user's model is afterwards what it was before."""

import threading
import warnings

import nets
import numpy as np
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from untouched import untouched

from qft_plugin import DeployabilityError, ModelError, QFTWarning

CLOSE = 0.1
"""Relative L2 error of the outputs in 4 bits after a few steps; of another network it is 0.3 and more."""


class Chain(nn.Module):
    """Three convolutions, two with a BatchNorm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def features(self, x):
        return self.bn1(self.conv1(x)).relu()

    def forward(self, x):
        return self.head(self.features(x))

    def head(self, x):
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


def chain():
    return nets.settled(Chain())


def images():
    return [torch.randn(16, 3, 8, 8) for _ in range(4)]


def changed(change):
    """Return a function that makes a network to which something was done."""

    def make():
        model = chain()
        with torch.no_grad():
            change(model)
        return model.eval()

    return make


def old(norm):
    """Return a function that puts one of torch's older hooks on a layer."""

    def change(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch announces that they will go
            norm(model.conv2)

    return change


def nothing(*_):
    """Do nothing, as a hook."""


def hooked(model):
    """Hook what torch knows of."""
    model.conv1.register_forward_hook(nothing)
    model.conv2.register_forward_pre_hook(nothing)
    model.bn1.register_full_backward_hook(nothing)
    model.conv2.register_full_backward_hook(nothing)
    model.register_full_backward_pre_hook(nothing)
    model.conv3.weight.register_hook(lambda grad: grad)
    model.register_state_dict_pre_hook(nothing)


def with_kept_activation(model):
    """Keep an activation with its history, as a hook of a user who looks at features does."""
    model.conv1.register_forward_hook(lambda module, _, output: setattr(module, "last", [output]))
    with torch.enable_grad():
        model(torch.randn(2, 3, 8, 8))


def partly_trained(model):
    """Freeze some layers, leave gradients in others, and leave one norm alone in eval mode."""
    model.conv1.requires_grad_(False)
    model.conv2.weight.requires_grad_(False)
    with torch.enable_grad():
        model(torch.randn(2, 3, 8, 8)).sum().backward()


def dead(model):
    """Let channels never be anything but 0: behind a ReLU, by a gamma, and by a weight."""
    model.bn1.bias[2] = -1e3
    model.bn2.weight[3] = model.bn2.bias[3] = 0
    model.conv3.weight[1] = model.conv3.bias[1] = 0


def zero(model):
    nn.init.zeros_(model.conv2.weight)
    nn.init.zeros_(model.conv2.bias)


def spectral(model):
    parametrizations.spectral_norm(model.conv2)
    parametrizations.spectral_norm(model.fc)


class OneWeight(Chain):
    """A weight that two modules share, with a BatchNorm after each."""

    def __init__(self):
        super().__init__()
        self.first, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv2.weight = self.first.weight

    def features(self, x):
        return self.bn3(self.first(super().features(x))).relu()


class Optional(Chain):
    """Arguments that are left out, and a branch for each."""

    def forward(self, x, scale=None, *, both=False):
        x = self.features(x)
        if scale is not None:
            x = x * scale
        return (self.head(x), x) if both else self.head(x)


MODELS = {
    "hooks": changed(hooked),
    "kept_activation": changed(with_kept_activation),
    "spectral_norm": changed(spectral),
    "weight_norm": changed(lambda model: parametrizations.weight_norm(model.conv2)),
    "orthogonal": changed(lambda model: parametrizations.orthogonal(model.fc)),
    "old_weight_norm": changed(old(nn.utils.weight_norm)),
    "old_spectral_norm": changed(old(nn.utils.spectral_norm)),
    "pruned": changed(lambda model: prune.l1_unstructured(model.conv2, "weight", 0.5)),
    "partly_trained": changed(partly_trained),
    "frozen": changed(lambda model: model.requires_grad_(False)),
    "dead_channels": changed(dead),
    "layer_of_zeros": changed(zero),
    "last_layer_of_zeros": changed(lambda model: (nn.init.zeros_(model.fc.weight), nn.init.ones_(model.fc.bias))),
    "variance_0": changed(lambda model: (model.bn1.running_var[:3].zero_(), model.bn2.running_var.zero_())),
    "gamma_below_0": changed(lambda model: (model.bn1.weight[:4].neg_(), model.bn2.weight.neg_())),
    "gamma_0": changed(lambda model: (model.bn1.weight[1].zero_(), model.bn2.weight[2:6].zero_())),
    "one_weight": lambda: nets.settled(OneWeight()),
    "optional": lambda: nets.settled(Optional()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_quantized_and_not_touched(name, host):
    """Each layer of it gets integers, the result is near the float network, and the model is bit for bit as before."""
    model, items = MODELS[name](), images()
    with torch.no_grad():
        expected = [model(items[0])]
    if name == "partly_trained":
        model.train()
        model.bn1.eval()
    with untouched(model):
        quantized = host.quantize(model, items, four_bits(finetune=few_steps(images_fed=64)))
    assert 0 < relative_error(host.outputs(quantized, items[0]), expected) < CLOSE or name == "last_layer_of_zeros"
    integers = host.integers(quantized, items[0])
    weights = {"conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"}
    if name == "one_weight" and type(host).__name__ == "UnderBrevitas":  # it leaves a weight of two in floating point
        weights.remove("conv2.weight")
    assert set(integers) == weights
    model(items[0])  # what hooks and parametrizations compute is still there


def test_what_torch_has_pruned_stays_0(host):
    """The other weights train, and are hardly ever 0."""
    model, items = MODELS["pruned"](), images()
    found = host.integers(host.quantize(model, items, four_bits(finetune=few_steps())), items[0])["conv2.weight"]
    kept = model.conv2.weight_mask != 0
    assert not found[~kept].any()
    assert (found[kept] != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["hooks", "spectral_norm"])
def test_a_file_of_it(name, host, tmp_path):
    """Torch refuses to trace backward hooks, and OpenVINO knows no operation of a power iteration."""
    model, items = MODELS[name](), images()
    _, quantized = host.finetuned(model, items, four_bits(finetune=few_steps(images_fed=32)))
    assert host.save(quantized, tmp_path, items[0][:2]).proof.weights == 4


def test_a_hook_that_changes_what_a_layer_computes(host):
    """NNCF's model runs it; Brevitas' has another module in the place of the layer, and says so."""
    model, items = chain(), images()
    model.conv1.register_forward_hook(lambda *called: 2 * called[2])
    with untouched(model):
        if type(host).__name__ == "UnderBrevitas":
            with pytest.raises(ModelError, match="a forward hook that changes what a layer computes"):
                host.quantize(model, items, four_bits(finetune=None))
            return
        quantized = host.quantize(model, items, four_bits(finetune=None))
    with torch.no_grad():
        assert relative_error(host.outputs(quantized, items[0]), [model(items[0])]) < CLOSE


class Counting(Chain):
    """Counts its calls in a buffer and in a number, and takes one image at a time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.number = 0

    def forward(self, x):
        self.calls += 1
        self.number += 1
        return self.fc(self.bn2(self.conv2(self.features(x))).relu().mean((2, 3)).reshape(1, 8))


def test_a_model_that_counts_its_calls(host):
    """Only a copy of it is called."""
    model, items = nets.settled(Counting()), [torch.randn(1, 3, 8, 8) for _ in range(8)]
    with untouched(model):
        host.quantize(model, items, four_bits(finetune=None))


class Drops(Chain):
    """Calls a dropout in eval mode too."""

    def features(self, x):
        return functional.dropout(super().features(x), 0.1)


class Noisy(Chain):
    """Draws from torch's generator in eval mode."""

    def features(self, x):
        return super().features(x + 0.3 * torch.randn_like(x))


class Lowered(Chain):
    """Computes a part in 16 bits."""

    def features(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().features(x).float()


def test_an_autocast_in_the_forward_is_refused(host):
    """Before anything long: no file of it could run in int8."""
    model, items = nets.settled(Lowered()), images()
    with untouched(model), pytest.raises(ModelError, match=r"float32\. Found conv2d in torch\.bfloat16"):
        host.run(model, items, four_bits(), callback=pytest.fail)


class Doubles(Chain):
    """Draws from numpy's generator, and often nothing comes of it."""

    def features(self, x):
        # The state that users' code shares.
        return (2 if np.random.rand() < 0.5 else 1) * super().features(x)  # noqa: NPY002


@pytest.mark.parametrize("make", [Drops, Noisy, Doubles])
def test_a_model_that_is_random_is_told_before_it_trains(make, host):
    """And nobody's random numbers go on by it."""
    model, items, told = nets.settled(make()), images(), []

    def look(step):
        told.append(step.number)
        assert any("something random is still active" in str(w.message) for w in seen)

    with warnings.catch_warnings(record=True) as seen, untouched(model):
        warnings.simplefilter("always")
        host.run(model, items, four_bits(finetune=few_steps(images_fed=32)), callback=look)
    assert told == [1, 2]


def test_no_file_of_a_model_that_is_random(host, tmp_path):
    """A file computes one thing; that is said before it is made."""
    model, items = nets.settled(Noisy()), images()
    with pytest.warns(QFTWarning, match="something random"):
        _, quantized = host.finetuned(model, items, four_bits(finetune=few_steps(images_fed=32)))
    with pytest.raises(DeployabilityError, match="its forward draws random numbers"):
        host.save(quantized, tmp_path, items[0][:2])
    assert list(tmp_path.iterdir()) == []


class OwnGenerator(Chain):
    """Draws from a generator of its own, which nobody can set back."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def features(self, x):
        return super().features(x + 0.3 * torch.randn(x.shape, generator=self.generator))


class Locked(Chain):
    """Has something that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(("make", "words"), [
    (lambda: nets.settled(OwnGenerator()), "compute the same in eval mode.*a generator of its own"),
    (lambda: nets.settled(Locked()), r"copy\.deepcopy can copy.*lock"),
    (changed(lambda model: [p.zero_() for p in model.parameters()]), "Found 0 for each of the 64 images"),
    (changed(lambda model: model.bn1.running_var.fill_(-1)), "NaN or infinity for the first images"),
], ids=["own_generator", "lock", "zeros", "negative_variance"])  # fmt: skip
def test_a_model_that_is_refused_before_it_trains(make, words, host):
    """With what was found, and what to do."""
    model, items, steps = make(), images(), []
    with untouched(model), pytest.raises(ModelError, match=words):
        host.run(model, items, four_bits(), callback=steps.append)
    assert steps == []
