"""ReLU6 and Hardtanh with bounds for each channel: the same function, its gradient, and scales that pass through it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from graphs import FOLD_TOLERANCE, mapped
from hypothesis import given
from hypothesis import strategies as st
from models import CHANNELS, Apply, Residual, conv, image, shuffle
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.channel_clip import ChannelHardtanh, free_bounds, hardtanh, replace_by_relu
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import DofMap, on_axis
from qft_plugin.training.dof import Dof
from qft_plugin.training.solve import solve

EXACT = 1e-12
"""float64 sums of at most a few hundred terms in another order."""

FUNCTIONS: dict[str, Callable[[], nn.Hardtanh]] = {
    "relu6": nn.ReLU6,
    "relu6 in place": partial(nn.ReLU6, inplace=True),
    "from zero": partial(nn.Hardtanh, 0.0, 0.7),
    "symmetric": nn.Hardtanh,
    "not symmetric": partial(nn.Hardtanh, -0.3, 1.1),
    "above zero": partial(nn.Hardtanh, 0.2, 0.9),
}

LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "image": ((2, 3, 4, 5), -3),
    "channels last": ((2, 3, 4, 5), -3),
    "volume": ((2, 3, 2, 2, 2), -4),
    "1-d image": ((2, 3, 7), -2),
    "tokens": ((2, 7, 3), -1),
    "vector": ((4, 3), -1),
    "windows": ((2, 2, 4, 3), -1),
    "transposed": ((2, 7, 3), -1),
}
"""Shape of an activation with 3 channels, and their axis."""


def activation(layout: str) -> tuple[Tensor, int]:
    """Return a random activation whose values reach beyond all bounds used here, and the axis of its channels."""
    shape, axis = LAYOUTS[layout]
    x = 3 * torch.randn(shape, dtype=torch.float64)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, axis


def bounds(*, from_zero: bool) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds of three channels."""
    low = torch.tensor([-0.3, -1.0, 0.2], dtype=torch.float64)
    return (torch.zeros_like(low) if from_zero else low), torch.tensor([0.5, 1.7, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_starts_as_the_function_that_it_stands_for(name: str, layout: str, gradient: bool) -> None:
    """Value and gradient of the data are those of the module, bit for bit, on every axis, with autograd or without."""
    x, axis = activation(layout)
    function = FUNCTIONS[name]()
    free = ChannelHardtanh(function, 3, axis=axis, like=x)
    found, expected = (x.clone().requires_grad_(gradient) for _ in range(2))
    g = torch.randn_like(x)
    outputs = free(found), function(expected * 1)
    assert torch.equal(*outputs)
    if gradient:
        for y in outputs:
            y.backward(g)
        assert torch.equal(found.grad, expected.grad)
        assert 0 < int((found.grad == 0).sum()) < x.numel()
    assert repr(free).startswith("ChannelHardtanh(")


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_clip(layout: str, from_zero: bool) -> None:
    """The gradients of data and bounds are those of finite differences."""
    x, axis = activation(layout)
    low, high = bounds(from_zero=from_zero)
    x.requires_grad_()
    high.requires_grad_()
    low.requires_grad_(not from_zero)
    assert torch.autograd.gradcheck(lambda *t: hardtanh(*t, axis, from_zero), (x, low, high))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_against_ordinary_operations(layout: str) -> None:
    """A gradient in another layout gives what autograd gives through minimum and maximum."""
    x, axis = activation(layout)
    g = torch.randn(*x.shape, 2, dtype=torch.float64)[..., 0]
    found, expected = ([t.clone().requires_grad_() for t in (x, *bounds(from_zero=False))] for _ in range(2))
    hardtanh(*found, axis, False).backward(g)
    low, high = (t.view(-1, *(1,) * (-axis - 1)) for t in expected[1:])
    torch.minimum(torch.maximum(expected[0], low), high).backward(g)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=EXACT, atol=EXACT)


def test_only_what_needs_a_gradient_gets_one() -> None:
    """With fixed bounds the data has its gradient, with fixed data the bounds have theirs."""
    x, axis = activation("image")
    low, high = bounds(from_zero=False)
    data = x.clone().requires_grad_()
    hardtanh(data, low, high, axis, False).sum().backward()
    top = high.clone().requires_grad_()
    hardtanh(x, low, top, axis, False).sum().backward()
    view = (x.transpose(0, 1).flatten(1), low[:, None], high[:, None])
    assert int(data.grad.sum()) == int(((view[0] > view[1]) & (view[0] < view[2])).sum())
    assert torch.equal(top.grad, (view[0] >= view[2]).sum(1).double())


def test_values_at_the_bounds_belong_to_the_bounds() -> None:
    """Exactly at a bound the data has no gradient, as in torch, and the bound has it."""
    x = torch.tensor([[-1.0, 0.0, 1.0]]).T.requires_grad_()
    low, high = torch.tensor([-1.0]).requires_grad_(), torch.tensor([1.0]).requires_grad_()
    hardtanh(x, low, high, -1, False).sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0]
    assert (low.grad.tolist(), high.grad.tolist()) == ([1], [1])


@given(power=st.integers(-3, 3), seed=st.integers(0, 99))
def test_bounds_absorb_a_factor(power: int, seed: int) -> None:
    """With bounds scaled as the data the function is homogeneous: exactly, where the factor is a power of two."""
    x = 3 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    low, high = (t.float() for t in bounds(from_zero=False))
    k = 2.0**power
    assert torch.equal(hardtanh(k * x, k * low, k * high, -3, False), k * hardtanh(x, low, high, -3, False))


@pytest.mark.parametrize("original", [nn.ReLU6(), nn.Hardtanh(-2.0, 3.0), nn.Hardtanh(-4.0, 0.0)])
def test_the_factor_is_what_bounds_were_divided_by(original: nn.Hardtanh) -> None:
    """Scaled by the factor of its channel in front, and back after, the original does the same with values beyond."""
    module = ChannelHardtanh(original, 3, axis=-1, like=torch.zeros((), dtype=torch.float64))
    c = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    module.low.div_(c)
    module.high.div_(c)
    assert torch.equal(module.factor(), c)
    x = 100 * torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(original(x * module.factor()) / module.factor(), module(x), rtol=EXACT, atol=0)


def strong(*modules: nn.Module) -> nn.Module:
    """Return a float64 chain whose activations reach beyond the bounds of a ReLU6."""
    model = nn.Sequential(*modules).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)).mul_(2)
    return model


class Shared(nn.Module):
    """One ReLU6 that stands after two layers."""

    def __init__(self, between: int = CHANNELS) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(between), nn.Conv2d(between, CHANNELS, 3, padding=1), conv(4)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def one_act() -> list[nn.Module]:
    """Return a chain that holds one ReLU6 under two names."""
    act = nn.ReLU6()
    return [conv(), act, conv(), act, conv(4)]


def in_two_parents() -> list[nn.Module]:
    """Return two chains that share a ReLU6."""
    act = nn.ReLU6()
    return [nn.Sequential(conv(), act), nn.Sequential(conv(), act), conv(4)]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: strong(conv(), nn.ReLU6(), conv(4)),
    "hardtanh": lambda: strong(conv(), nn.Hardtanh(-0.7, 1.3), conv(4)),
    "depthwise": lambda: strong(conv(), nn.ReLU6(), conv(groups=CHANNELS), nn.ReLU6(), conv(4, 1)),
    "grouped": lambda: strong(conv(), nn.ReLU6(), Apply(shuffle), conv(groups=4), nn.Hardtanh(), conv(4)),
    "residual": lambda: strong(conv(), Residual(nn.Sequential(conv(), nn.ReLU6(), conv())), nn.ReLU6(), conv(4)),
    "called twice": lambda: strong(Shared()),
    "pool after": lambda: strong(conv(), nn.ReLU6(), nn.MaxPool2d(2), conv(4)),
    "linear": lambda: strong(conv(), nn.Flatten(), nn.Linear(288, 12), nn.ReLU6(), nn.Linear(12, 3)),
    "tokens": lambda: strong(
        Apply(lambda x: x.flatten(2).transpose(1, 2)), nn.Linear(CHANNELS, 6), nn.ReLU6(), nn.Linear(6, 3)
    ),
    "1-d": lambda: strong(Apply(lambda x: x.flatten(2)), nn.Conv1d(CHANNELS, 6, 3), nn.ReLU6(), nn.Conv1d(6, 3, 3)),
    "batch norm": lambda: strong(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU6(), conv(4)),
    "nothing bounded": lambda: strong(conv(), nn.ReLU(), conv(4)),
    "two names": lambda: strong(*one_act()),
    "two parents": lambda: strong(*in_two_parents()),
    "in place": lambda: strong(conv(), nn.ReLU6(inplace=True), conv(4)),
    "two sizes": lambda: strong(Shared(between=4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_free_bounds_change_no_function(name: str) -> None:
    """Outputs and the gradients of all parameters are what they were, bit for bit."""
    model, x = NETWORKS[name](), image()
    results = []
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        free_bounds(model, ((x,), {}))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def free(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """Put bounds for each channel into a network; return the names of the modules that have them."""
    free_bounds(model, ((image() if x is None else x,), {}))
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if isinstance(module, ChannelHardtanh)]


def test_one_module_in_two_chains_is_replaced_in_both() -> None:
    """A ReLU6 that two chains share, or that one forward calls twice, is freed wherever it stands."""
    assert free(NETWORKS["two parents"]()) == ["0.1", "1.1"]
    assert free(NETWORKS["called twice"]()) == ["0.act"]


def test_what_was_replaced_is_remembered_but_no_part_of_the_network() -> None:
    """The original module is at hand, and neither a child nor in the state dict; hyperparameters are its own."""
    model = strong(conv(), nn.Hardtanh(-0.5, 2), conv(4))
    original = model[1]
    assert free(model) == ["1"]
    assert model[1].original is original
    assert not list(model[1].children())
    assert set(model[1].state_dict()) == {"low", "high"}
    assert model[1].low.tolist() == [-0.5] * CHANNELS
    assert model[1].high.tolist() == [2.0] * CHANNELS
    assert model[1].low.dtype == torch.float64


class Own(nn.ReLU6):
    """A subclass may compute anything."""


class Idle(nn.Module):
    """A ReLU6 that is there but not called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.spare = conv(), nn.ReLU6(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))


def test_what_cannot_be_replaced_stays() -> None:
    """Different numbers of channels, a subclass, a module that is never called: all stay, others do not."""
    assert free(NETWORKS["two sizes"]()) == []
    assert free(strong(conv(), Own(), conv(), nn.ReLU6(), conv(4))) == ["3"]
    assert free(strong(Idle())) == ["0.act"]
    assert free(strong(conv(), nn.ReLU(), conv(4))) == []


def test_only_the_named_modules_are_replaced() -> None:
    """With `only`, all others keep their one bound."""
    model = strong(conv(), nn.ReLU6(), conv(), nn.ReLU6(), conv(4))
    free_bounds(model, ((image(),), {}), only={"3"})
    assert [type(m) for m in (model[1], model[3])] == [nn.ReLU6, ChannelHardtanh]
    free_bounds(model, ((image(),), {}), only=())
    assert type(model[1]) is nn.ReLU6


@pytest.mark.parametrize(
    ("name", "at", "axis", "channels"),
    [("chain", "1", -3, 8), ("linear", "3", -1, 12), ("tokens", "2", -1, 6), ("1-d", "2", -2, 6)],
)
def test_channels_are_found_on_their_axis(name: str, at: str, axis: int, channels: int) -> None:
    """Axis 1 in images, and in sequences where a network has 1-d convolutions; the last one in all others."""
    model = NETWORKS[name]()
    free(model)
    module = model.get_submodule(at)
    assert (module.axis, module.high.numel()) == (axis, channels)
    assert on_axis(module.high, module.axis).dim() == -axis


def test_arguments_by_keyword() -> None:
    """A network is run as its user calls it."""

    class Named(ByKeyword):
        def forward(self, *, x: Tensor) -> Tensor:
            return self.act(self.a(x))

    model = Named().double()
    free_bounds(model, ((), {"x": image()}))
    assert isinstance(model.act, ChannelHardtanh)
    assert not model.a._forward_pre_hooks


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the detached parameters and buffers of a network by name."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def folding_error(model: nn.Module, x: Tensor) -> tuple[DofMap, float]:
    """Fold random factors between 1/8 and 8 into a freed network; return its map and the largest relative change."""
    free(model, x)
    dof = mapped(model, x)
    log_c = (torch.rand(dof.size, dtype=torch.float64) * 2 - 1) * torch.tensor(8.0).double().log()
    folded = fold_network(dof, log_c, tensors_of(model))
    with torch.no_grad():
        before, after = model(x), torch.func.functional_call(model, folded, (x,))
    return dof, float((before - after).abs().max() / before.abs().max())


FREE = [
    "chain",
    "hardtanh",
    "depthwise",
    "grouped",
    "residual",
    "called twice",
    "pool after",
    "linear",
    "tokens",
    "1-d",
]
FREE += ["two parents", "in place"]


@pytest.mark.parametrize("name", FREE)
def test_random_factors_fold_through_bounds(name: str) -> None:
    """Scales pass every function with bounds, no channel between two layers is pinned, and bounds do clip."""
    model, x = NETWORKS[name](), image()
    dof, error = folding_error(model, x)
    assert error < FOLD_TOLERANCE
    kernels = [layer for layer in dof.layers if layer.is_kernel]
    functions = [layer for layer in dof.layers if layer.kind == "hardtanh"]
    assert len(functions) == sum(isinstance(m, ChannelHardtanh) for m in model.modules()) > 0
    assert all((layer.out_index > 0).all() for layer in (*kernels[:-1], *functions))
    with torch.no_grad():
        before = model(x)
        for module in model.modules():
            if isinstance(module, ChannelHardtanh):
                module.high.mul_(0.5)
        assert float((model(x) - before).abs().max()) > 0.01


def test_a_function_that_is_called_twice_ties_its_edges() -> None:
    """One bound for each channel means one factor for each channel, on both edges."""
    model = NETWORKS["called twice"]()
    free(model)
    dof = mapped(model, image())
    assert dof.size == CHANNELS
    bounded = next(layer for layer in dof.layers if layer.kind == "hardtanh")
    assert len(bounded.calls) == 2
    assert torch.equal(dof.layer("0.a.weight").out_index, dof.layer("0.b.weight").out_index)


def test_a_bound_on_one_side_only_would_be_seen() -> None:
    """The comparison above is not blind: folding everything but the bounds changes the output."""
    model, x = NETWORKS["chain"](), image()
    free(model)
    dof = mapped(model, x)
    folded = fold_network(dof, torch.ones(dof.size, dtype=torch.float64), tensors_of(model))
    assert {"1.high", "1.low"} <= set(names_of(dof.layers))
    with torch.no_grad():
        changed = torch.func.functional_call(model, folded | {"1.high": model[1].high}, (x,))
        assert float((changed - model(x)).abs().max()) > 0.01


def test_bounds_train_with_the_factors_alone() -> None:
    """In the offline subgraph bounds are high / c, with a gradient for the factors and for nothing of their own."""
    model, x = NETWORKS["hardtanh"](), image()
    free(model)
    dof = Dof(mapped(model, x), tensors_of(model), {}, {})
    with torch.no_grad():
        dof.log_c.uniform_(-2, 2)
    tensors = solve(dof).tensors
    c = dof.factors()[dof.map.layer("1.high").out_index]
    torch.testing.assert_close(tensors["1.high"], 1.3 / c, rtol=EXACT, atol=0)
    torch.testing.assert_close(tensors["1.low"], -0.7 / c, rtol=EXACT, atol=0)
    loss = torch.func.functional_call(model, tensors, (x,)).square().sum()
    loss.backward()
    assert dof.log_c.grad is not None
    # Folding changes no output, so no loss of the float network depends on a factor.
    assert float(dof.log_c.grad.abs().max()) < FOLD_TOLERANCE * loss.item()
    bounded = next(module for module in dof.layers if module.layer.kind == "hardtanh")
    assert not bounded.W.requires_grad
    assert not bounded.bias.requires_grad


@pytest.mark.parametrize(
    "function",
    [functional.relu6, partial(functional.hardtanh, min_val=-1.0, max_val=1.0), partial(torch.clamp, min=0, max=6)],
    ids=["relu6", "hardtanh", "clamp"],
)
def test_a_functional_call_stays_a_barrier(function: Callable[[Tensor], Tensor]) -> None:
    """What a forward calls as a function has one bound: its channels are pinned, and the map says why."""
    model = strong(conv(), Apply(function), conv(4))
    dof, error = folding_error(model, image())
    assert (dof.size, error) == (0, 0)
    assert "has one bound for all channels" in str(dof)


def test_one_bound_stays_a_barrier() -> None:
    """A module that was not freed is a barrier too, and the map says why."""
    dof = mapped(strong(conv(), nn.ReLU6(), conv(4)), image())
    assert dof.size == 0
    assert "hardtanh has one bound for all channels" in str(dof)


def test_replace_by_relu() -> None:
    """Every module with a lower bound of 0 becomes a ReLU; other bounds and subclasses stay."""
    model = strong(
        conv(), nn.ReLU6(), nn.Sequential(conv(), nn.Hardtanh(0, 3)), conv(), nn.Hardtanh(), conv(), Own(), conv(4)
    )
    replace_by_relu(model)
    assert [type(m) for m in (model[1], model[2][1], model[4], model[6])] == [nn.ReLU, nn.ReLU, nn.Hardtanh, Own]


@pytest.mark.parametrize("name", ["two parents", "called twice", "two sizes"])
def test_replace_by_relu_reaches_shared_modules(name: str) -> None:
    """Under whatever names a ReLU6 stands, and for whatever channels, none is left."""
    model = NETWORKS[name]()
    replace_by_relu(model)
    assert not any(isinstance(m, nn.Hardtanh) for m in model.modules())
    dof = mapped(model, image())
    assert dof.size > 0


class ReadLater(nn.Module):
    """An in-place ReLU6 whose input is read after it: what is added is what it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.act(x)
        return x[:, :4] + self.b(y)


def test_a_change_in_place_that_is_read_later_stays() -> None:
    """A ReLU6 that changes what something else reads keeps its place, because nothing else would compute the same."""
    model, x = strong(ReadLater()), image()
    with torch.no_grad():
        before = model(x)
        assert free(model) == []
        assert torch.equal(model(x), before)


class ByKeyword(nn.Module):
    """A ReLU6 that gets its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = conv(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.a(x))


def test_an_input_by_keyword() -> None:
    """A function may be called as torch names its argument, before and after it is replaced."""
    model, x = strong(ByKeyword()), image()
    before = model(x)
    assert free(model) == ["0.act"]
    assert torch.equal(model(x), before)


def test_gradient_without_a_batch() -> None:
    """A vector over the channels alone has nothing to sum."""
    x, (low, high) = 3 * torch.randn(3, dtype=torch.float64), bounds(from_zero=False)
    inputs = [t.requires_grad_() for t in (x, low, high)]
    assert torch.autograd.gradcheck(lambda *t: hardtanh(*t, -1, False), inputs)


def test_one_module_under_two_names_is_replaced_under_both() -> None:
    """A ReLU6 that a chain holds twice is freed at both places, or dropped at both."""
    assert free(NETWORKS["two names"]()) == ["1", "3"]
    model = NETWORKS["two names"]()
    replace_by_relu(model)
    assert [type(model[1]), type(model[3])] == [nn.ReLU, nn.ReLU]


def test_replacing_by_relu_keeps_the_change_in_place() -> None:
    """What works in place goes on to do so: something may read it."""
    model = NETWORKS["in place"]()
    replace_by_relu(model)
    assert model[1].inplace
