"""What the finetune makes small, under each host: several named tensors, class probabilities, blocks."""

from dataclasses import replace

import nets
import pytest
import torch
from conftest import few_steps, four_bits

from qft_plugin import ConfigError
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job import run
from qft_plugin.training.finetune import finetune

pytestmark = pytest.mark.wide

SUMS = 1e-4
"""Relative: losses of batches of 16 images, summed in float32 in another order."""

WRITTEN = 1e-2
"""Relative: a written network's scales differ in the last bit, so that single activations round to the other side."""


def start_loss(host, name, **settings):
    """Return the loss before the first step, of a student whose channels are rescaled."""
    torch.manual_seed(0)
    model, items = nets.build(name), nets.items(name)
    result, _ = host.finetuned(model, items, four_bits(activation_range="max", finetune=few_steps(**settings)))
    assert result.final_loss <= result.start_loss
    return result.start_loss


@pytest.mark.parametrize("name", ["residual", "linear_only", "one_d"])
def test_two_named_tensors_with_weights(name, host):
    """The loss is the weighted mean of the losses at the two places alone, each in the teacher's units."""
    one, other = {"residual": ("conv2", "fc"), "linear_only": ("fc2", "fc3"), "one_d": ("conv2", "fc")}[name]
    a, b = (start_loss(host, name, loss_at=at) for at in (one, other))
    assert a != b
    assert start_loss(host, name, loss_at=[one, other]) == pytest.approx((a + b) / 2, rel=SUMS)
    assert start_loss(host, name, loss_at={one: 3, other: 0.5}) == pytest.approx((3 * a + 0.5 * b) / 3.5, rel=SUMS)


@pytest.mark.parametrize("at", [None, ["conv2", "fc"]])
def test_cross_entropy_mixes_by_a_proportion(at, host):
    """The loss is the weighted mean of the features' loss and of the divergence, which is all of it at 1."""
    features, half, alone = (start_loss(host, "residual", loss_at=at, cross_entropy=p) for p in (0, 0.5, 1))
    assert features != alone
    assert half == pytest.approx((features + alone) / 2, rel=SUMS)


def test_the_divergence_is_that_of_the_class_probabilities(host):
    """With p = 1 the loss of the result is the mean divergence of its class probabilities from the teacher's."""
    model, items = nets.build("linear_only"), nets.items("linear_only")
    # Plain rounding leaves something to gain: compensated, these few layers are at 5e-5 from the start.
    settings = four_bits(finetune=few_steps(cross_entropy=1, images_fed=512), compensate=False)
    result, quantized = host.finetuned(model, items, settings)
    images = torch.cat(items)
    (student,), (teacher,) = host.outputs(quantized, images), list(tensors_in(model(images)))
    t, s = teacher.detach().log_softmax(1), student.log_softmax(1)
    assert result.final_loss == pytest.approx(float((t.exp() * (t - s)).sum(1).mean()), rel=WRITTEN)
    assert result.final_loss < result.start_loss


def test_a_proportion_above_one(host):
    """A proportion that is none is refused."""
    with pytest.raises(ConfigError, match=r"cross_entropy should be at most 1\. Found 1\.5"):
        host.finetuned(nets.build("residual"), nets.items("residual"), four_bits(finetune=few_steps(cross_entropy=1.5)))


def test_class_probabilities_of_a_network_without_classes(host):
    """A model that returns no tensor of classes has none to compare, at any proportion."""
    model, items = nets.build("transposed"), nets.items("transposed")
    for p in (0.5, 1):
        with pytest.raises(ConfigError, match=r"cross_entropy.*\[images, classes\]"):
            host.finetuned(model, items, four_bits(finetune=few_steps(cross_entropy=p)))


def test_a_tensor_that_is_changed_in_place_is_compared_as_it_was(host):
    """The input of an activation in place is compared before the activation, as in the network that is not in place."""
    plain, in_place = Stack(inplace=False).eval(), Stack(inplace=True).eval()
    in_place.load_state_dict(plain.state_dict())
    items = nets.items("residual")
    losses = [host.finetuned(m, items, four_bits(finetune=few_steps(loss_at="clip")))[0] for m in (plain, in_place)]
    assert losses[0].start_loss == pytest.approx(losses[1].start_loss, rel=SUMS)


class Stack(torch.nn.Module):
    """Two convolutions; between them, a clip in place reads what is compared."""

    def __init__(self, *, inplace):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.clip = torch.nn.Hardtanh(0, 0.2, inplace=inplace)
        self.conv2 = torch.nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.conv2(self.clip(self.conv1(x))).mean((2, 3))


BLOCKS = {"linear_only": ["fc2"], "residual": ["conv1", "conv3"], "branches": ["join"]}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_by_block(name, host):
    """The result of block-by-block training from the nearest integers is closer to the teacher than they are."""
    model, items = nets.build(name), nets.items(name)
    settings = few_steps(blocks=BLOCKS[name], images_fed=3200)
    result, quantized = host.finetuned(model, items, four_bits(compensate=False, finetune=settings))
    assert result.steps == 200
    assert result.final_loss < 0.95 * result.start_loss
    assert all(bool(torch.isfinite(t).all()) for t in host.outputs(quantized, items[0]))


def test_each_phase_has_the_loss_of_its_place(host):
    """With nothing trained, one step on all images in each phase: the losses at each end, then the ordinary one."""
    still = {"batch_size": 64, "images_fed": 192, "learning_rate": 0, "scale_learning_rate": 0}
    expected = [start_loss(host, "residual", loss_at=at) for at in ("conv2", "conv3", "fc")]
    torch.manual_seed(0)
    model, items = nets.build("residual"), nets.items("residual")
    settings = few_steps(blocks=["conv2", "conv3"], loss_at="fc", **still)
    result, _ = host.finetuned(model, items, four_bits(activation_range="max", finetune=settings))
    assert result.losses == pytest.approx(expected, rel=SUMS)
    assert result.start_loss == result.final_loss == pytest.approx(expected[-1], rel=SUMS)


def test_a_block_trains_what_belongs_to_it(host, monkeypatch):
    """In each phase the tensors of its own layers move, those of all others keep every bit."""
    seen = []

    def watched(student, state, phases, *, options, **settings):
        seen.append((state, {n: t.clone() for n, t in state.state_dict().items()}))
        report = lambda _: seen.append((state, {n: t.clone() for n, t in state.state_dict().items()}))  # noqa: E731
        return finetune(student, state, phases, options=replace(options, callback=report), **settings)

    monkeypatch.setattr(run, "finetune", watched)
    settings = few_steps(blocks=["conv1", "conv3"], cross_entropy=0.5, images_fed=48)  # one step for each phase
    host.finetuned(nets.build("residual"), nets.items("residual"), four_bits(finetune=settings))
    assert len(seen) == 4
    names = [layer.weight for layer in seen[0][0].map.layers]
    expected = [{"stem"}, {"conv1", "conv2"}, {"conv3", "fc"}]
    for (_, before), (_, after), layers in zip(seen, seen[1:], expected, strict=False):
        moved = [n for n in after if not torch.equal(after[n], before[n])]
        owners = {names[int(n.split(".")[1])].split(".")[0] for n in moved if n.startswith("layers.")}
        assert owners == layers
        assert any(n.startswith("activations.log_s.") for n in moved)


@pytest.mark.parametrize("ends", [["conv3", "conv1"], ["stem"], ["conv1", "relu"], ["fc"]])
def test_blocks_that_are_none(ends, host):
    """Ends in the wrong order, at the input, without a name, or after the loss are refused before any step."""
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.blocks should name"):
        host.finetuned(nets.build("residual"), nets.items("residual"), four_bits(finetune=few_steps(blocks=ends)))


@pytest.mark.parametrize(("at", "comparable"), [("reshape/0", False), ("view/0", True), ("fc", True)])
def test_a_tensor_whose_channels_cannot_be_told(at, comparable, host):
    """Where the positions of one channel have different scales, naming it is an error that says so."""
    model, items = Heads().eval(), [torch.randn(16, 6) for _ in range(4)]
    config = four_bits(finetune=few_steps(loss_at=at))
    if comparable:
        assert host.finetuned(model, items, config)[0].steps == 8
    else:
        with pytest.raises(ConfigError, match=r"loss_at.*one scale in each channel.*'reshape/0'.*several"):
            host.finetuned(model, items, config)


class Heads(torch.nn.Module):
    """Features that are cut into heads for a while, without anything that mixes them."""

    def __init__(self):
        super().__init__()
        self.up, self.fc = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.up(x).relu().view(-1, 2, 4).reshape(-1, 8))


@pytest.mark.parametrize("at", ["body", {"conv2": 1, "body": 2}, ["conv2", "body"]])
def test_a_name_that_matches_nothing(at, host):
    """One wrong name is enough for an error that shows it and the operations there are, before any step."""
    model, items = nets.build("residual"), nets.items("residual")
    with pytest.raises(ConfigError, match=r"loss_at.*'body'.*conv1/conv2d"):
        host.finetuned(model, items, four_bits(finetune=few_steps(loss_at=at)))
