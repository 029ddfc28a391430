"""Looking at single calls of a recorded network while it runs."""

from collections.abc import Callable

import pytest
import torch
from graphs import hooks_and_modes, record
from models import BLOCKS, Small, chained, image
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.layer_graph import Ref
from qft_plugin.graph.record import Tap


class Branches(nn.Module):
    """Calls of one function in several places, among them one on a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(8, 2)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu(), self.b(x + x.shape[0]).relu()
        self.seen["cat"] = left
        both = torch.cat([left, right], dim=1)
        pooled = both.mean((2, 3))
        self.seen |= {"mean": both, "linear": pooled, "b": x + x.shape[0]}
        return self.head(pooled)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_tap_shows_what_the_calls_read(batch: int) -> None:
    """Each watcher sees the first activation that its call reads, once, whatever the size of the batch; of a list of
    tensors it is the first one.
    """
    model = Branches()
    graph = record(model, torch.randn(2, 3, 4, 4))
    names = {"b": "b/conv2d/1", "cat": "cat/0", "mean": "mean/0", "linear": "head/linear/0"}
    shown: dict[str, list[Tensor]] = {key: [] for key in names}
    x = torch.randn(batch, 3, 4, 4)
    with Tap({names[key]: shown[key].append for key in names}, graph):
        out = model(x)
    for key, values in shown.items():
        assert len(values) == 1
        assert torch.equal(values[0], model.seen[key])
    model(x)
    assert all(len(values) == 1 for values in shown.values())
    assert torch.equal(out, model(x))


@pytest.mark.parametrize("block", BLOCKS)
def test_tap_finds_every_call_of_every_block(block: str) -> None:
    """Watched one by one, each operation that reads an activation shows a tensor of the recorded shape, but for the
    size of the batch.
    """
    model, x = chained(block, "conv"), image()
    graph = record(model, x)
    watched = [op for op in graph.ops if op.inputs and (op.args[:1] == (Ref(0),) or isinstance(op.args[0], list))]
    assert len(watched) >= 4
    shown: dict[str, list[Tensor]] = {op.name: [] for op in watched}
    one = x[:1]
    with Tap({name: values.append for name, values in shown.items()}, graph):
        model(one)
    for op in watched:
        (value,) = shown[op.name]
        assert tuple(value.shape[1:]) == graph.shapes[op.inputs[0]][1:]


def test_tap_sees_through_a_functional_call() -> None:
    """With other weights as an argument of the call, the same calls have the same numbers."""
    model, x = Branches(), torch.randn(2, 3, 4, 4)
    graph = record(model, x)
    weights = {name: 2 * p.detach() for name, p in model.named_parameters()}
    shown: list[Tensor] = []
    with Tap({"head/linear/0": shown.append}, graph):
        torch.func.functional_call(model, weights, (x,))
    assert len(shown) == 1
    assert torch.equal(shown[0], model.seen["linear"])


def test_tap_passes_gradients() -> None:
    """What a watcher sees is the tensor itself, on the way from the weights to the output."""
    model = Branches()
    graph = record(model, torch.randn(2, 3, 4, 4))
    shown: list[Tensor] = []
    with Tap({"mean/0": shown.append}, graph):
        model(torch.randn(3, 3, 4, 4)).sum().backward()
    assert shown[0].requires_grad
    assert float(model.a.weight.grad.abs().sum()) > 0


def test_tap_ends_with_an_exception() -> None:
    """After a watcher or the model raised, nothing is watched any more."""
    model = Branches()
    graph = record(model, torch.randn(2, 3, 4, 4))

    def refuse(_: Tensor) -> None:
        raise ValueError("enough")

    before = hooks_and_modes()
    with pytest.raises(ValueError, match="enough"), Tap({"mean/0": refuse}, graph):
        model(torch.randn(2, 3, 4, 4))
    assert hooks_and_modes() == before
    model(torch.randn(2, 3, 4, 4))


def test_tap_finds_an_activation_after_constants() -> None:
    """The first activation may stand after numbers and parameters."""
    model = Small(lambda m, x: torch.stack([m.mean.expand(2, 4, 5, 5), torch.mul(m.mean, m.a(x))]))
    x = torch.randn(2, 3, 5, 5)
    graph = record(model, x)
    seen: list[Tensor] = []
    stacked: list[Tensor] = []
    with Tap({"mul/0": seen.append, "stack/0": stacked.append}, graph):
        model(x)
    assert torch.equal(seen[0], model.a(x))
    assert torch.equal(stacked[0], model.mean.expand(2, 4, 5, 5))


KERNEL = torch.rand(2, 4, 1, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda h: torch.mean(input=h, dim=(2, 3)),
        lambda h: functional.conv2d(weight=KERNEL, input=h),
        lambda h: torch.cat(tensors=[h, h], dim=1),
    ],
    ids=["mean", "conv2d", "cat"],
)
def test_tap_finds_an_activation_by_keyword(call: Callable[[Tensor], Tensor]) -> None:
    """The first activation may be passed by keyword."""
    model = Small(lambda m, x: call(m.a(x)))
    x = torch.randn(2, 3, 5, 5)
    graph = record(model, x)
    seen: list[Tensor] = []
    with Tap({graph.ops[-1].name: seen.append}, graph):
        model(x)
    assert torch.equal(seen[0], model.a(x))


def test_tap_refuses_an_operation_that_was_not_recorded() -> None:
    """A watcher of an unknown call would wait for ever."""
    graph = record(Branches(), torch.randn(2, 3, 4, 4))
    with pytest.raises(KeyError, match="mean/7"):
        Tap({"mean/7": lambda _: None}, graph)
