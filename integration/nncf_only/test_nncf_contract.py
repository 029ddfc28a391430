"""What a user of `nncf.quantize(..., algorithm=...)` may rely on."""

import copy
import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
from conftest import few_steps, four_bits, relative_error

import qft_plugin.nncf as host
from qft_plugin import ConfigError, QFTConfig
from qft_plugin.nncf._register import MARK, PLACES
from qft_plugin.nncf._write import without_compiler


@pytest.fixture
def float_model():
    """Make a network with the states that a user may have set: modes, gradients, hooks."""
    model = nets.build("residual")
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.register_forward_hook(lambda *call: call[-1])
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model


def snapshot(model):
    """Describe everything in a model that a quantization could change by mistake."""
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "identity": [id(t) for t in model.state_dict(keep_vars=True).values()],
        "modes": [m.training for m in model.modules()],
        "modules": [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()],
        "gradients": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


def assert_unchanged(model, before):
    """Compare a model with its description from before."""
    after = snapshot(model)
    state = before.pop("state")
    assert all(torch.equal(t, state[n]) for n, t in after.pop("state").items())
    gradients = zip(before.pop("gradients"), after.pop("gradients"), strict=True)
    for (asked, value), (asked_now, value_now) in gradients:
        assert asked == asked_now
        assert (value is None and value_now is None) or torch.equal(value, value_now)
    assert after == before
    assert not hasattr(model, "__nncf_hooks")


@pytest.mark.core
def test_the_model_is_never_changed(float_model):
    """Weights, buffers, modes, gradients, hooks and modules of the user's model stay as they were."""
    before = snapshot(float_model)
    nncf.quantize(float_model, nncf.Dataset(nets.items("residual")), algorithm=four_bits())
    assert_unchanged(float_model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_model_survives_an_interruption(float_model, error):
    """An interruption in the middle of the finetune comes through and leaves the user's model as it was."""
    before = snapshot(float_model)
    seen = []

    def stop(step):
        seen.append(step.number)
        if step.number == 3:
            raise error

    with pytest.raises(error):
        nncf.quantize(float_model, nncf.Dataset(nets.items("residual")), algorithm=four_bits(), callback=stop)
    assert seen == [1, 2, 3]
    assert_unchanged(float_model, before)


def test_the_mode_of_the_model_does_not_matter():
    """A model in train mode, with dropout, gives the result that it gives in eval mode."""

    class Dropped(nets.Residual):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = Dropped()
    dataset = nncf.Dataset(nets.items("residual"))
    results = [nncf.quantize(m, dataset, algorithm=four_bits()).state_dict() for m in (model.eval(), model.train())]
    assert all(torch.equal(t, results[1][n]) for n, t in results[0].items())
    assert model.training


def test_the_result_is_reproducible():
    """Two runs give the same bits whatever the global random state is; another seed gives others."""
    model, dataset = nets.build("residual"), nncf.Dataset(nets.items("residual"))

    def run(seed, number):
        torch.manual_seed(number)
        config = four_bits(finetune=few_steps(seed=seed, images_fed=1600), compensate=False)
        return nncf.quantize(model, dataset, algorithm=config).state_dict()

    first, second, other = run(0, 1), run(0, 2), run(1, 1)
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert any(not torch.equal(t, other[n]) for n, t in first.items())


@pytest.mark.core
def test_registering_again_changes_nothing():
    """A second registration leaves the wrapped function in place."""
    before = [place.quantize for place in PLACES]
    host.register()
    assert [place.quantize for place in PLACES] == before
    assert not any(hasattr(getattr(wrapped, MARK), MARK) for wrapped in before)


@pytest.mark.core
def test_unregistering_gives_nncf_its_function_back():
    """After `unregister` the argument is unknown to NNCF, after `register` it is known again."""
    host.unregister()
    try:
        assert "algorithm" not in inspect.signature(nncf.quantize).parameters
        assert all(not hasattr(place.quantize, MARK) for place in PLACES)
        with pytest.raises(TypeError, match="algorithm"):
            nncf.quantize(nets.build("linear_only"), nncf.Dataset(nets.items("linear_only")), algorithm="qft")
        host.unregister()
    finally:
        host.register()
    assert all("algorithm" in inspect.signature(place.quantize).parameters for place in PLACES)


@pytest.mark.core
def test_signature_and_documentation_are_extended():
    """The wrapped function keeps NNCF's name, arguments and words, and adds its own four arguments."""
    wrapped, original = nncf.quantize, getattr(nncf.quantize, MARK)
    before, after = inspect.signature(original).parameters, inspect.signature(wrapped).parameters
    own = {"algorithm": None, "callback": None, "verbose": True, "checkpoint": None}
    assert list(after) == [*before, *own]
    assert all(after[name] == parameter for name, parameter in before.items())
    assert {name: after[name].default for name in own} == own
    assert wrapped.__name__ == original.__name__
    assert all(line in wrapped.__doc__ for line in original.__doc__.splitlines())
    order = [wrapped.__doc__.index(word) for word in (":param calibration_dataset:", ":param algorithm:", ":return:")]
    assert order == sorted(order)


@pytest.mark.core
def test_without_algorithm_the_result_is_nncfs_own():
    """Without `algorithm` the wrapped function gives the bits that NNCF alone gives."""
    model, dataset = nets.build("residual"), nncf.Dataset(nets.items("residual"))
    with without_compiler():
        own = getattr(nncf.quantize, MARK)(model, dataset, subset_size=2).state_dict()
        found = nncf.quantize(model, dataset, subset_size=2).state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(t, own[n]) for n, t in found.items())


@pytest.mark.core
@pytest.mark.parametrize("own", [{"callback": print}, {"checkpoint": "folder"}], ids=lambda own: next(iter(own)))
def test_what_is_our_own_needs_an_algorithm(own):
    """A callback without an algorithm would never be called, a folder never filled, so they are refused."""
    with pytest.raises(ConfigError, match=rf'{next(iter(own))} should come with algorithm="qft"'):
        nncf.quantize(nets.build("linear_only"), nncf.Dataset(nets.items("linear_only")), **own)


@pytest.mark.core
def test_the_callback_sees_every_step():
    """The callback is told number, total, loss and learning rate of every step, as the result lists them."""
    steps = []
    settings = few_steps(images_fed=96, batch_size=16, restarts=2)
    model, dataset = nets.build("residual"), nncf.Dataset(nets.items("residual"))
    job = host.quantize(model, dataset, four_bits(finetune=settings), callback=steps.append)
    assert [(s.number, s.total) for s in steps] == [(i, 6) for i in range(1, 7)]
    assert tuple(s.loss for s in steps) == job.result.losses
    assert steps[0].learning_rate == settings.learning_rate
    assert steps[3].learning_rate == pytest.approx(settings.learning_rate / 2)


def test_qft_is_the_config_with_its_defaults():
    """The word "qft" means a `QFTConfig()`: the first step is the same."""

    class StopError(Exception):
        pass

    losses = []

    def stop(step):
        losses.append(step.loss)
        raise StopError

    model, dataset = nets.build("linear_only"), nncf.Dataset(nets.items("linear_only"))
    for algorithm in ("qft", QFTConfig()):
        with pytest.raises(StopError):
            nncf.quantize(model, dataset, algorithm=algorithm, callback=stop)
    assert losses[0] == losses[1]


@pytest.mark.core
def test_the_result_can_be_copied_and_trained_on(outputs):
    """The result is an ordinary torch model: a copy computes the same, and every weight asks for a gradient."""
    model, items = nets.build("residual"), nets.items("residual")
    result = nncf.quantize(model, nncf.Dataset(items), algorithm=four_bits())
    again = copy.deepcopy(result)
    assert torch.equal(outputs(again, items[0])[0], outputs(result, items[0])[0])
    assert all(p.requires_grad for n, p in result.named_parameters() if "__nncf_hooks" not in n)


def test_more_steps_help():
    """From rounding to nearest, a hundred steps take a tenth of the loss away at least: what should train does."""
    model, dataset = nets.build("residual"), nncf.Dataset(nets.items("residual"))
    job = host.quantize(model, dataset, four_bits(finetune=few_steps(images_fed=1600), compensate=False))
    assert job.result.final_loss < 0.9 * job.result.start_loss


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off(context, outputs):
    """Inside `torch.no_grad()`, where calibration code often stands, the finetune gives what it gives outside."""
    model, items = nets.build("residual"), nets.items("residual")
    expected = nncf.quantize(model, nncf.Dataset(items), algorithm=four_bits())
    with context():
        result = nncf.quantize(model, nncf.Dataset([x.clone() for x in items]), algorithm=four_bits())
    assert torch.equal(outputs(result, items[0])[0], outputs(expected, items[0])[0])


@pytest.mark.parametrize("kind", ["generator", "mixed", "single", "loader"])
def test_datasets_of_any_kind(kind, outputs):
    """Generators without length, batches of mixed sizes, single images and loaders give the same images."""
    model = nets.build("residual")
    images = torch.cat(nets.items("residual"))
    sources = {
        "generator": lambda: (images[i : i + 16] for i in range(0, 64, 16)),
        "mixed": lambda: list(images.split([5, 16, 1, 30, 12])),
        "single": lambda: list(images.split(1)),
        "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, images), batch_size=16),
    }
    pick = (lambda batch: batch[0]) if kind == "loader" else None
    dataset = nncf.Dataset(sources[kind](), pick) if pick else nncf.Dataset(sources[kind]())
    # Only NNCF's own statistics depend on the batches, so the ranges are chosen without them.
    config = four_bits(activation_range="max")
    result = nncf.quantize(model, dataset, algorithm=config)
    expected = nncf.quantize(model, nncf.Dataset(list(images.split(16))), algorithm=config)
    assert relative_error(outputs(result, images), outputs(expected, images)) < 1e-6


@pytest.mark.core
def test_only_as_many_images_as_asked_are_read():
    """`max_images` stops the reading of an endless dataset."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.randn(16, 3, 8, 8)

    config = four_bits(finetune=few_steps(max_images=40))
    nncf.quantize(nets.build("residual"), nncf.Dataset(endless()), algorithm=config)
    assert len(read) == 3
