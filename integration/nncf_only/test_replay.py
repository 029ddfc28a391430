"""The student of NNCF without NNCF: the same hooks at the same calls, ReLUs computed by the quantizers after them."""

import nets
import pytest
import torch
from conftest import few_steps, four_bits
from torch import nn

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nncf
from nncf.torch.function_hook import get_hook_storage, wrap_model

import qft_plugin.nncf as host
from qft_plugin.nncf import _attach
from qft_plugin.nncf._replay import Replay, replay

SAME = 1e-3
"""Relative, on the losses of a training: sums in another order, and what eight steps make of them."""

RELUS = {"residual": 4, "in_place": 4, "inverted": 3}
"""How many ReLUs and bounded ReLUs of a network stand right in front of a quantizer that reads nothing else."""


class Scaled(nn.Module):
    """A hook that multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Joined(nn.Module):
    """Reads its input twice, takes a tensor off itself, and concatenates."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        z = torch.sub(y, y)
        first, second = torch.chunk(torch.cat([z, x], 1), 2, dim=1)
        return first - second


def losses(model, items, config, monkeypatch, *, found):
    """Return the losses of a training: replayed, with what was found in `found`, or under NNCF where that is `None`."""

    def spied(*args):
        result = None if found is None else replay(*args)
        if found is not None:
            found.append(result)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(_attach, "replay", spied)
        return torch.tensor(host.quantize(model, nncf.Dataset(items), config).result.losses)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_training_is_the_same_without_nncf(name, monkeypatch):
    """Every network of the collection is replayed, and each step's loss is what it is under NNCF's own hooks."""
    model, items, found = nets.build(name), nets.items(name), []
    fast = losses(model, items, four_bits(), monkeypatch, found=found)
    assert len(found) == 1
    assert found[0] is not None
    slow = losses(model, items, four_bits(), monkeypatch, found=None)
    torch.testing.assert_close(fast, slow, rtol=SAME, atol=1e-6)
    rectified = sum(hooks.quantizer() is not None for hooks in found[0]._calls.values())
    assert rectified == RELUS.get(name, rectified)


@pytest.mark.parametrize("name", list(RELUS))
def test_training_in_lower_precision_is_replayed_too(name, monkeypatch):
    """What autocast rounds does not hide that both ways are the same."""
    config, found = four_bits(finetune=few_steps(precision="bfloat16")), []
    losses(nets.build(name), nets.items(name), config, monkeypatch, found=found)
    assert found[0] is not None
    assert sum(hooks.quantizer() is not None for hooks in found[0]._calls.values()) == RELUS[name]


def hooked(model, *hooks):
    """Wrap a model and register hooks: kind, operation, port, factor."""
    wrapped = wrap_model(model)
    storage = get_hook_storage(wrapped)
    for kind, op, port, factor in hooks:
        register = storage.register_pre_function_hook if kind == "pre" else storage.register_post_function_hook
        register(op, port, Scaled(factor))
    return wrapped


@pytest.mark.core
@pytest.mark.parametrize(
    "hooks",
    [
        [("post", "x", 0, 3.0)],
        [("post", "/relu/0", 0, 3.0)],
        [("pre", "/sub/0", 0, 3.0)],
        [("pre", "/sub/0", 1, 3.0)],
        [("pre", "/sub/0", 0, 3.0), ("pre", "/sub/0", 1, 5.0), ("pre", "/sub/0", 1, 7.0)],
        [("pre", "/cat/0", 1, 3.0)],
        [("post", "/chunk/0", 1, 3.0), ("post", "/chunk/0", 0, 5.0)],
        [("pre", "/relu/0", 0, 3.0), ("post", "/relu/0", 0, 5.0), ("post", "x", 0, 7.0)],
    ],
    ids=["input", "result", "first", "second", "both", "in a list", "several results", "all around"],
)
def test_hooks_run_where_nncf_runs_them(hooks):
    """Hooks on inputs, arguments, lists and results give the same output, or NNCF's own are kept."""
    model, x = hooked(Joined(), *hooks), torch.randn(2, 3)
    expected, before = model(x), dict(model.__dict__)
    found = replay(model, lambda: [model(x)])
    # One tensor is both arguments: a hook on the second alone looks like one on the first.
    assert (found is None) == (hooks == [("pre", "/sub/0", 1, 3.0)])
    if found is not None:
        with found.active():
            assert torch.equal(model(x), expected)
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(model(x), expected)


def test_what_cannot_be_found_again_is_left_to_nncf(caplog):
    """A hook inside a function that NNCF looks into, and one on the output, keep NNCF's own hooks, with a log line."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 3, 4)
    inside = hooked(Attending().eval(), ("post", "attention/softmax/0", 0, 3.0), ("pre", "output", 0, 2.0))
    with caplog.at_level("INFO", logger="qft_plugin"):
        assert replay(inside, lambda: [inside(x)]) is None
    assert "Fast hooks are off" in caplog.text


class Changed(nn.Module):
    """Changes in place, after a ReLU, what the ReLU has read."""

    def __init__(self, change) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(torch.relu(x))
        x = self.change(x)
        return self.last(x + y).mean((2, 3))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.sigmoid_(), lambda x: x.clamp_(-1, 1), lambda x: x.view(-1).neg_().view(x.shape)],
    ids=["sigmoid", "clamp", "through a view"],
)
def test_what_a_relu_has_read_may_change_later(change, monkeypatch):
    """Such a ReLU is not left to its quantizer, which would keep what it has read for the backward pass."""
    items = list(torch.randn(4, 16, 4, 6, 6))
    found = []
    fast = losses(Changed(change), items, four_bits(), monkeypatch, found=found)
    assert len(fast) == 8
    if found[0] is not None:
        assert not any(hooks.quantizer() for hooks in found[0]._calls.values())


def test_an_error_leaves_the_model_as_it_was():
    """When the run fails, the hooks are in their places again and NNCF runs the model."""
    model = hooked(Joined(), ("post", "/relu/0", 0, 3.0))

    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Replay(model, fail)
    assert [type(m) for _, m in get_hook_storage(model).named_hooks()] == [Scaled]
    found = Replay(model, lambda: model(torch.ones(1, 2)))
    with pytest.raises(ValueError, match="broken"), found.active():
        fail()
    assert type(model.forward).__name__ == "ForwardWithHooks"
