"""What is asked of a torch model before any host looks at it, and how its outputs are compared."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Apply
from torch import Tensor, nn

from qft_plugin.errors import DataError, ModelError
from qft_plugin.graph.torch_model import (
    Functional,
    accepts,
    check_finite,
    check_model,
    first_outputs,
    largest_change,
    tensors_in,
)

FLOAT32 = 1e-6
"""One difference and one quotient of float32 numbers."""


def with_parameter(value: Tensor) -> nn.Module:
    """Return a linear layer that also holds a parameter of another kind."""
    model = nn.Linear(2, 2)
    model.register_parameter("other", nn.Parameter(value, requires_grad=False))
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Linear(2, 2).double(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        with_parameter(torch.arange(3)),
    ],
    ids=["float32", "float64", "integer buffers", "integer parameters"],
)
def test_plain_models_pass(model: nn.Module) -> None:
    """A module whose floating parameters are all float32, or all float64, is accepted and left as it is."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    check_model(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: torch.relu, "converted from"),
    "a state dict": (lambda: nn.Linear(2, 2).state_dict(), "converted from"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), r"Pass its \.module"),
    "compiled": (lambda: torch.compile(nn.Linear(2, 2), backend="eager"), r"Pass its \._orig_mod"),
    "on meta": (lambda: nn.Linear(2, 2, device="meta"), "Load its weights"),
    "lazy": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "call a lazy module once"),
    "nothing to train": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "Found none in"),
    "only integers": (lambda: nn.ParameterList([nn.Parameter(torch.arange(3), requires_grad=False)]), "set()"),
    "two dtypes": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), r"model\.to\("),
    "half": (lambda: nn.Linear(2, 2).half(), r"model\.float\(\)"),
    "bfloat16": (lambda: nn.Linear(2, 2).bfloat16(), r"model\.float\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_advice(name: str) -> None:
    """What cannot be trained is refused with what was expected, what was found, and what to do about it."""
    make, advice = REFUSED[name]
    with pytest.raises(ModelError, match=r"should.*Found.*") as error:
        check_model(make())
    assert error.match(advice)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # scripting is on its way out of torch
def test_a_scripted_model_is_refused() -> None:
    """TorchScript is a `Module` too, but its forward cannot be followed."""
    with pytest.raises(ModelError, match="before scripting"):
        check_model(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_named(value: float) -> None:
    """One bad number is enough, and the message says in which parameter."""
    tensors = {"good": torch.ones(3), "bad.weight": torch.ones(2, 2), "counts": torch.arange(3)}
    check_finite(tensors)
    tensors["bad.weight"][1, 0] = value
    with pytest.raises(ModelError, match=r"Parameter bad\.weight: should be finite"):
        check_finite(tensors)


def test_accepts_follows_the_signature_of_forward() -> None:
    """Positional and keyword arguments are accepted where `forward` takes them, and it is not called."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor) -> Tensor:
            raise AssertionError(x, y, mask)

    test, t = accepts(Masked()), torch.ones(1)
    assert test(t, mask=t)
    assert test(t, t, mask=t)
    assert test(x=t, mask=t)
    assert not test(t)
    assert not test(t, t, t, mask=t)
    assert not test(t, mask=t, label=t)
    assert not test(mask=t)


class Pair(NamedTuple):
    left: Tensor
    right: Any


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


def test_tensors_of_an_output_are_found_in_order() -> None:
    """Tuples, lists, mappings, named tuples and dataclasses are opened, however deep; the rest is passed over."""
    t = [torch.tensor(i) for i in range(7)]
    value = (
        t[0],
        [t[1], None, "text", 3.0],
        OrderedDict(a=t[2], b={"c": [t[3]]}),
        Pair(t[4], Output(t[5], (t[6],))),
        {1, 2},
    )
    assert [int(x) for x in tensors_in(value)] == list(range(7))
    assert list(tensors_in(None)) == []
    assert [int(x) for x in tensors_in(t[3])] == [3]


@dataclass(slots=True)
class SlottedOutput:
    logits: Tensor
    aux: list[Tensor]


def test_tensors_of_a_dataclass_with_slots_are_found() -> None:
    """A dataclass is opened whether or not its instances have a `__dict__`."""
    found = list(tensors_in(SlottedOutput(torch.tensor(1), [torch.tensor(2)])))
    assert [int(x) for x in found] == [1, 2]


class Scaled(NamedTuple):
    """A tensor of a host, with its scale."""

    value: torch.Tensor
    scale: torch.Tensor


def test_what_a_host_wraps_around_a_tensor_is_left_out() -> None:
    """Of a wrapper that is named the value counts, wherever it stands; of any other tuple everything does."""
    wrapped = Scaled(torch.tensor(1), torch.tensor(2))
    value = {"a": [wrapped, torch.tensor(3)], "b": wrapped}
    assert [int(x) for x in tensors_in(value, Scaled)] == [1, 3, 1]
    assert [int(x) for x in tensors_in(value)] == [1, 2, 3, 1, 2]


def test_first_outputs_are_those_of_the_model() -> None:
    """All tensors of the output come back, with arguments given by position and by keyword."""

    class TwoInputs(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y, "label": x.argmax(1)}

    x, y = torch.randn(2, 2, 3)
    total, label = first_outputs(TwoInputs(), ((x,), {"y": y}))
    assert torch.equal(total, x + y)
    assert torch.equal(label, x.argmax(1))


def test_a_model_that_cannot_run_on_the_data() -> None:
    """The dataset is to blame: the message has the model's own error and the dtype and shape of the images."""
    with pytest.raises(DataError, match=r"RuntimeError.*torch\.float32 \[2, 5\]") as error:
        first_outputs(nn.Linear(3, 4), ((torch.randn(2, 5),), {}))
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_float_model_that_computes_no_numbers(value: float) -> None:
    """NaN or infinity in any floating output of the float model is refused before training."""
    model = Apply(lambda x: {"good": x, "bad": [x, x * value]})
    with pytest.raises(ModelError, match="Found NaN or infinity"):
        first_outputs(model, ((torch.ones(2, 3),), {}))


def test_a_model_without_tensors_in_its_output() -> None:
    """There must be something to compare with the teacher."""
    with pytest.raises(ModelError, match="should return tensors"):
        first_outputs(Apply(lambda x: [str(x), None]), ((torch.ones(2, 3),), {}))


def test_a_model_that_changes_its_images_is_refused() -> None:
    """Images are used again, so a model that works on them in place is refused with advice."""
    with pytest.raises(ModelError, match="in place"):
        first_outputs(Apply(lambda x: x.sub_(0.5).mul(2)), ((torch.ones(2, 3),), {}))


def test_largest_change_by_hand() -> None:
    """The worst output decides: max |e - f| / max |e| is 1/4 in the first and 1/2 in the second."""
    expected = [torch.tensor([4.0, -1.0]), torch.tensor([[0.5], [-2.0]])]
    found = [torch.tensor([4.0, -2.0]), torch.tensor([[1.5], [-2.0]])]
    assert largest_change(expected, found) == pytest.approx(0.5, rel=FLOAT32)
    assert largest_change(expected[:1], found[:1]) == pytest.approx(0.25, rel=FLOAT32)
    assert largest_change(expected, expected) == 0
    assert largest_change([], []) == 0


@given(power=st.integers(-10, 10), seed=st.integers(0, 1000))
def test_largest_change_has_no_unit(power: int, seed: int) -> None:
    """Both networks in other units change as much, exactly for powers of two; so they do with their signs swapped."""
    e, f = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed))
    k = 2.0**power
    assert largest_change([e], [f]) > 0
    assert largest_change([k * e], [k * f]) == largest_change([e], [f]) == largest_change([-e], [-f])


def test_largest_change_of_a_zero_output() -> None:
    """Where the first network gives 0 only, the change is still a number."""
    assert largest_change([torch.zeros(3)], [torch.zeros(3)]) == 0
    assert 1 < largest_change([torch.zeros(3)], [torch.ones(3)]) < math.inf


@pytest.mark.parametrize("place", [0, 1, 2])
def test_largest_change_keeps_nan(place: int) -> None:
    """NaN in any output is NaN in the result, whatever stands before and after it, so that no comparison passes."""
    expected = [torch.ones(2) for _ in range(3)]
    found = [torch.ones(2) * (1 + i) for i in range(3)]
    found[place] = torch.tensor([1.0, math.nan])
    assert math.isnan(largest_change(expected, found))


def test_largest_change_passes_over_labels_and_nothing() -> None:
    """Integer and empty outputs have no change; a different number of outputs is an error."""
    assert largest_change([torch.tensor([1]), torch.ones(0)], [torch.tensor([5]), torch.ones(0)]) == 0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        largest_change([torch.ones(1), torch.ones(1)], [torch.ones(1)])


def test_a_module_as_a_function_of_its_tensors() -> None:
    """Tensors stand in for parameters and buffers under all of their names, for one call and with their gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.second.weight = self.first.weight
            self.again = self.second

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return scale * self.again(self.second(self.first(self.norm(x))))

    model = Tied().eval()
    function, x = Functional(model), torch.randn(2, 3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for name in ("first.weight", "second.weight", "again.weight"):
        W = torch.randn(3, 3, requires_grad=True)
        mean = torch.randn(3)
        found = function({name: W, "norm.running_mean": mean}, (x,), {"scale": 2.0})
        expected = copy.deepcopy(model)
        with torch.no_grad():
            expected.first.weight.copy_(W)
            expected.norm.running_mean.copy_(mean)
        torch.testing.assert_close(found, expected(x, scale=2.0))
        found.sum().backward()
        assert W.grad is not None
        assert bool(W.grad.any())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.second.weight is model.first.weight
