"""The cheaper backward pass of kernels of which a part trains: gradients of the ordinary one, fewer products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from qft_plugin.tensors import partial_gradients
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.partial_gradients import Convolution, PartialBackward, PartialWeight

EXACT = 1e-10
"""float64 sums of up to a thousand terms in another order."""

BFLOAT16 = 0.03
"""Relative L2 error of gradients from products of numbers with eight bits."""


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and some of its output channels."""

    layer: Callable[..., nn.Module]
    args: tuple[Any, ...]
    settings: dict[str, Any]
    shape: tuple[int, ...]
    some: tuple[int, ...]


IMAGE = (2, 6, 7, 5)
CASES = {
    "linear": Case(nn.Linear, (6, 20), {}, (3, 6), (1, 7, 19)),
    "linear on tokens": Case(nn.Linear, (6, 20), {}, (2, 5, 6), (0, 4)),
    "linear on windows": Case(nn.Linear, (6, 5), {}, (2, 3, 2, 6), (2,)),
    "conv1d": Case(nn.Conv1d, (6, 20, 3), {"padding": 1}, (2, 6, 9), (3, 4)),
    "conv2d": Case(nn.Conv2d, (6, 20, 3), {"padding": 1}, IMAGE, (0, 9, 11)),
    "few channels": Case(nn.Conv2d, (6, 8, 3), {}, IMAGE, (2, 7)),
    "many rows": Case(nn.Conv2d, (6, 20, 3), {}, IMAGE, tuple(range(0, 20, 1))[3:18]),
    "all rows": Case(nn.Conv2d, (6, 20, 1), {}, IMAGE, tuple(range(20))),
    "strided": Case(nn.Conv2d, (6, 20, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": 2}, IMAGE, (5,)),
    "same": Case(nn.Conv2d, (6, 20, (3, 5)), {"padding": "same", "dilation": (2, 1)}, IMAGE, (1, 2)),
    "valid": Case(nn.Conv2d, (6, 20, 3), {"padding": "valid"}, IMAGE, (1, 2)),
    "circular": Case(nn.Conv2d, (6, 20, 3), {"padding": 1, "padding_mode": "circular"}, IMAGE, (1, 2)),
    "grouped": Case(nn.Conv2d, (6, 24, 3), {"groups": 3}, IMAGE, (9, 12, 15)),
    "grouped, spread": Case(nn.Conv2d, (6, 24, 3), {"groups": 3}, IMAGE, (1, 12, 23)),
    "depthwise": Case(nn.Conv2d, (6, 6, 3), {"groups": 6, "padding": 1}, IMAGE, (1, 4)),
    "wide depthwise": Case(nn.Conv2d, (20, 20, 3), {"groups": 20}, (2, 20, 5, 5), (1, 4, 17)),
    "depthwise, doubled": Case(nn.Conv2d, (20, 40, 3), {"groups": 20}, (2, 20, 5, 5), (3, 8, 9, 39)),
    "conv3d": Case(nn.Conv3d, (3, 20, 2), {}, (2, 3, 4, 3, 3), (6,)),
    "transposed": Case(nn.ConvTranspose2d, (6, 20, 3), {"stride": 2, "output_padding": 1}, IMAGE, (4, 13)),
    "transposed 1d": Case(nn.ConvTranspose1d, (6, 20, 3), {"dilation": 2}, (2, 6, 9), (4, 13)),
    "transposed 3d": Case(nn.ConvTranspose3d, (3, 20, 2), {}, (2, 3, 4, 3, 3), (4, 13)),
    "grouped transposed": Case(nn.ConvTranspose2d, (6, 24, 3), {"groups": 3}, IMAGE, (9, 12)),
    "depthwise transposed": Case(nn.ConvTranspose2d, (20, 20, 3), {"groups": 20}, (2, 20, 5, 5), (0, 7)),
}

FOUR_AXES = [
    name for name, case in CASES.items() if len(case.shape) == 4 and "linear" not in name and name != "circular"
]
"""Convolutions of images; torch's circular padding itself loses the memory format."""

NOT_UNDERSTOOD = {
    "same, uneven": Case(nn.Conv2d, (6, 20, 4), {"padding": "same"}, IMAGE, (1, 2)),
    "one image": Case(nn.Conv2d, (6, 20, 3), {}, IMAGE[1:], (1, 2)),
    "vector": Case(nn.Linear, (6, 20), {}, (6,), (1, 2)),
}


def kind_of(layer: nn.Module) -> str:
    name = type(layer).__name__.lower()
    return name.replace("convtranspose", "conv_transpose")


class Part:
    """A layer whose kernel has fixed integers in all channels but some, in float64."""

    def __init__(self, case: Case, *, count: int | None = None, per_channel: bool = True, bias: bool = True) -> None:
        self.layer = case.layer(*case.args, bias=bias, **case.settings).double()
        self.axes = Axes(kind_of(self.layer), getattr(self.layer, "groups", 1))
        shape = self.axes.by_output(self.layer.weight).shape
        self.index = torch.tensor(case.some[:count], dtype=torch.long)
        self.integers = torch.randint(-7, 8, shape).double()
        self.log_step = (torch.randn((shape[0],) if per_channel else ()).double() / 4).requires_grad_()
        self.rows = torch.randn(len(self.index), *shape[1:], dtype=torch.float64, requires_grad=True)
        self.bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True) if bias else None
        self.x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
        self.groups_of_rows = torch.unique(self.index // (shape[0] // self.axes.groups))

    def weight(self) -> PartialWeight:
        step = self.log_step.exp()
        on_rows = step.view(-1, *(1,) * (self.integers.dim() - 1)) if step.dim() else step
        W = (self.integers * on_rows).index_copy(0, self.index, self.rows)
        used = self.axes.from_output(W)
        return PartialWeight(used, self.rows, self.index, self.groups_of_rows, step / step.detach())

    def gradients(
        self, *, cheaper: bool, after: Callable[[Tensor], Tensor] = torch.sin, memory_format: Any = None
    ) -> tuple[dict[str, Tensor | None], bool]:
        """Return the gradients of everything, and whether one of the whole kernel was computed."""
        weight = self.weight()
        weight.used.retain_grad()
        tensors = {"weight": weight.used, "bias": self.bias} if self.bias is not None else {"weight": weight.used}
        x = self.x if memory_format is None else self.x.contiguous(memory_format=memory_format)
        with PartialBackward([weight] if cheaper else []):
            y = torch.func.functional_call(self.layer, tensors, x)
        after(y).sum().backward()
        leaves = {"x": self.x, "rows": self.rows, "bias": self.bias, "step": self.log_step}
        found = {name: None if t is None or t.grad is None else t.grad.clone() for name, t in leaves.items()}
        for t in leaves.values():
            if t is not None:
                t.grad = None
        return found, weight.used.grad is not None

    def check(self, *, avoids_the_whole: bool = True, **settings: Any) -> None:
        """Compare with the ordinary backward pass, which computes the gradient of the whole kernel."""
        expected, whole = self.gradients(cheaper=False, **settings)
        assert whole
        found, whole = self.gradients(cheaper=True, **settings)
        assert whole != avoids_the_whole
        for name, gradient in expected.items():
            if gradient is not None and gradient.numel():
                assert found[name] is not None, name
                torch.testing.assert_close(found[name], gradient, rtol=EXACT, atol=EXACT, msg=name)


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slice kernels that are too small to gain from it."""
    monkeypatch.setattr(partial_gradients, "NARROW", 0)
    monkeypatch.setattr(partial_gradients, "FEW", 0)


@pytest.mark.usefixtures("sliced")
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("count", [0, 1, None], ids=["no row", "one row", "rows"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_ordinary_backward_pass(name: str, per_channel: bool, count: int | None) -> None:
    """Input, rows, bias and step get the gradients of the whole kernel's backward pass, without computing it."""
    for bias in (True, False):
        Part(CASES[name], count=count, per_channel=per_channel, bias=bias).check()


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("name", FOUR_AXES)
def test_memory_formats_are_kept(name: str) -> None:
    """With channels last the gradients are the same, and the output has its channels last."""
    part = Part(CASES[name])
    part.check(memory_format=torch.channels_last)
    weight = part.weight()
    x = part.x.detach().contiguous(memory_format=torch.channels_last)
    with PartialBackward([weight]):
        y = torch.func.functional_call(part.layer, {"weight": weight.used, "bias": part.bias}, x)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_unusual_calls_have_the_ordinary_backward_pass(name: str) -> None:
    """Where the arguments are unusual the whole kernel gets a gradient: right, only slower."""
    Part(NOT_UNDERSTOOD[name]).check(avoids_the_whole=False)


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: torch.relu_(y).square(),
    "relu in place": lambda y: functional.relu(y, inplace=True).square(),
    "relu6 in place": lambda y: functional.relu6(y, True).square(),
    "+=": lambda y: y.__iadd__(1.5).square(),
    "method": lambda y: y.mul_(3).square(),
    "twice": lambda y: y.mul_(3).add_(1).square(),
    "through a view": lambda y: y.view(-1).mul_(3).square(),
    "rows of it": lambda y: y[:1].mul_(3).sum() + y.square(),
    "not its first argument": lambda y: torch.mul(y.detach(), 3, out=y.detach()).sum() + y.cos(),
}


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", ["conv2d", "linear", "grouped transposed"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_an_output_that_is_changed_in_place(name: str, after: str, per_channel: bool) -> None:
    """What stands after a layer may change its output, seen or unseen; the gradients stay right."""
    Part(CASES[name], per_channel=per_channel).check(after=AFTER[after])


def flops(part: Part, *, after: Callable[[Tensor], Tensor], cheaper: bool = True) -> float:
    """Return the products of a backward pass over those of a forward one."""
    weight = part.weight()
    tensors = {"weight": weight.used, "bias": part.bias}
    with PartialBackward([weight] if cheaper else []), FlopCounterMode(display=False) as forward:
        y = after(torch.func.functional_call(part.layer, tensors, part.x)).sum()
    with FlopCounterMode(display=False) as backward:
        y.backward()
    return backward.get_total_flops() / forward.get_total_flops()


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("name", ["conv2d", "linear", "linear on tokens", "conv1d", "transposed"])
@pytest.mark.parametrize("count", [0, 2], ids=["no row", "two rows"])
def test_only_what_is_needed_is_multiplied(name: str, count: int) -> None:
    """Of 20 rows the weight gradients of those that train are computed; in an ordinary pass all are."""
    part = Part(CASES[name], count=count)
    assert flops(part, after=torch.sin, cheaper=False) == pytest.approx(2)
    assert flops(part, after=torch.sin) == pytest.approx(1 + count / 20)


@pytest.mark.parametrize("after", ["relu_", "relu in place", "relu6 in place", "+=", "method", "twice"])
def test_changes_in_place_cost_no_product(after: str) -> None:
    """Where an operation is seen to change the output, a copy of it saves the gradient of the whole kernel."""
    assert flops(Part(CASES["conv2d"], count=0), after=AFTER[after]) == pytest.approx(1)


@pytest.mark.usefixtures("sliced")
def test_groups_without_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grouped kernel the products of one group of three are computed, of a depthwise one those of three channels.

    (torch counts the products of grouped backward passes wrongly, so the shapes are looked at.)
    """
    shapes = []
    run = Convolution._backward

    def spied(self: Convolution, g: Tensor, x: Tensor, W: Tensor, groups: int, *, of_input: bool) -> Tensor:
        if not of_input:
            shapes.append((g.shape[1], x.shape[1], tuple(W.shape[:2]), groups))
        return run(self, g, x, W, groups, of_input=of_input)

    monkeypatch.setattr(Convolution, "_backward", spied)
    for name in ("grouped", "wide depthwise", "grouped, spread"):
        Part(CASES[name]).gradients(cheaper=True)
    assert shapes == [(8, 2, (8, 2), 1), (3, 3, (3, 1), 3), (24, 6, (24, 2), 3)]


@pytest.mark.parametrize("name", ["conv2d", "few channels", "wide depthwise", "grouped", "transposed"])
def test_small_kernels_are_not_sliced(name: str) -> None:
    """On CPUs the gradient of a small kernel is computed whole, and the steps' is taken from it; it is the same."""
    Part(CASES[name]).check()
    assert flops(Part(CASES["conv2d"]), after=torch.sin) == pytest.approx(2)


def test_large_kernels_are_sliced() -> None:
    """A kernel of 32 channels that each add 144 products is large enough."""
    part = Part(Case(nn.Conv2d, (16, 32, 3), {}, (2, 16, 5, 5), (0, 9)))
    part.check()
    assert flops(part, after=torch.sin) == pytest.approx(1 + 2 / 32)


def test_a_kernel_that_is_used_twice() -> None:
    """Each call of a layer, and any other use of its kernel, adds its gradient."""
    part = Part(CASES["conv2d"])
    found = []
    for cheaper in (True, False):
        weight = part.weight()
        with PartialBackward([weight] if cheaper else []):
            y = functional.conv2d(part.x, weight.used, part.bias) + functional.conv2d(
                part.x.flip(0), bias=None, weight=weight.used
            )
            loss = y.sin().sum() + weight.used.cos().sum()
        found.append(torch.autograd.grad(loss, [part.x, part.rows, part.log_step, part.bias]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


def test_steps_that_do_not_train_cost_nothing() -> None:
    """Without a gradient for the step no output is kept, and the others stay right."""
    part = Part(CASES["conv2d"])
    part.log_step.requires_grad_(False)
    part.check()
    weight = part.weight()
    with PartialBackward([weight]):
        y = functional.conv2d(part.x, weight.used)
    assert y.grad_fn.out is None


def test_nothing_changes_without_gradients() -> None:
    """While nothing trains, layers run as they are, with the same output."""
    part = Part(CASES["conv2d"])
    weight = part.weight()
    expected = functional.conv2d(part.x, weight.used)
    with PartialBackward([weight]):
        assert torch.equal(functional.conv2d(part.x, weight.used), expected)
        with torch.no_grad():
            y = functional.conv2d(part.x, weight.used)
    assert torch.equal(y, expected)
    assert y.grad_fn is None


def test_half_precision() -> None:
    """Under autocast a layer computes in bfloat16, and gradients have the type of what they belong to."""
    torch.manual_seed(1)
    part = Part(CASES["conv2d"])
    for name in ("layer", "integers", "bias", "x", "rows", "log_step"):
        value = getattr(part, name)
        leaf = isinstance(value, Tensor) and value.requires_grad
        setattr(part, name, value.float().detach().requires_grad_(leaf) if isinstance(value, Tensor) else value.float())
    outputs, found = [], []
    for cheaper in (True, False):
        weight = part.weight()
        with torch.autocast("cpu", torch.bfloat16), PartialBackward([weight] if cheaper else []):
            y = functional.conv2d(part.x, weight.used, part.bias)
        outputs.append(y)
        found.append(torch.autograd.grad(y.float().sin().sum(), [part.x, part.rows, part.log_step, part.bias]))
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm() / expected.norm()) < BFLOAT16
