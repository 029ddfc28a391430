"""How products and quantizers of a file are found where little tells them apart."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qft_plugin.deploy.channels import channel_fit
from qft_plugin.deploy.file_view import File, FileProduct, FileQuantizer, Ran, Stretches
from qft_plugin.deploy.findings import Findings
from qft_plugin.deploy.products import compare_product
from qft_plugin.deploy.quantizers import find_quantizer, in_torch
from qft_plugin.deploy.stretches import _values
from qft_plugin.deploy.watched import Grid, Product, Quantizer, Seen, Watched

GRID = Grid(torch.tensor(0.1), torch.tensor(128.0), 0, 255)


class InMemory:
    """A file of products and quantizers that none runs."""

    runtime, free_batch = "nothing", True

    def __init__(self, products: Sequence[FileProduct] = (), quantizers: Sequence[FileQuantizer] = ()) -> None:
        self.products, self.quantizers = products, quantizers
        self.constants: Sequence[np.ndarray] = ()

    def stretches(self, inputs: Sequence[Tensor], quantized: Sequence[Tensor]) -> Stretches:
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], *, hidden: frozenset[int] = frozenset()) -> Ran:
        raise NotImplementedError


def file_quantizer(name: str) -> FileQuantizer:
    low, high = (end.numpy().reshape(1) for end in GRID.ends)
    return FileQuantizer(name, f"before {name}", low, high, low, high, 256)


class Quantized(nn.Module):
    """A layer whose weight is quantized to steps of 0.1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.steps = layer, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.steps(self.layer.weight).clone()
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        function = (
            nn.functional.conv_transpose2d if isinstance(self.layer, nn.ConvTranspose2d) else nn.functional.conv2d
        )
        return function(x, weight, self.layer.bias, 2, 1, groups=2)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
}


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-11])
@pytest.mark.parametrize("name", LAYERS)
def test_a_product_is_told_from_its_bias_at_any_size(name: str, size: float) -> None:
    """What a dead part of a network multiplies is far below the last digit of its bias."""
    made, shape = LAYERS[name]
    model, x = Quantized(made()), size * torch.randn(shape)
    grid = Grid(torch.tensor(0.1), torch.tensor(0.0), -7, 7)
    model.steps.register_forward_hook(lambda _, args, __: grid.scale * (args[0] / grid.scale).round())
    watched = Watched(model, [Quantizer(model.steps, "steps", lambda args: (args[0], grid))])
    found: list[Product] = []
    watched.run(((x,), {}), product=found.append)
    assert len(found) == 1
    nn.init.zeros_(model.layer.bias)
    expected = model(x).detach()
    assert bool(expected.any())
    torch.testing.assert_close(found[0].result, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-25])
def test_a_factor_is_fitted_at_any_size(size: float) -> None:
    """Squares below 1e-38 are 0 in float32, and would fit nothing."""
    x, factors = torch.randn(3, 4, 5), torch.tensor([1.0, 2, 3, 4]).reshape(4, 1)
    ratio, left = channel_fit(size * x * factors, size * x, 1)
    torch.testing.assert_close(ratio, factors.flatten())
    assert float(left.max()) < 1e-5


def product(integers: Tensor, x: Tensor) -> tuple[Product, FileProduct]:
    values = 0.1 * integers
    theirs = FileProduct("fc", integers.flatten().to(torch.int64).numpy(), values.flatten().double().numpy())
    return Product(0, "fc.weight", x @ values.T, 1, integers, values, 0, None), theirs


@pytest.mark.parametrize("what", ["the weight", "what it reads"])
def test_a_product_of_zeros_has_its_integers(what: str) -> None:
    """Nothing tells where it is, but the file has such a constant, and zeros come out of it."""
    integers = torch.zeros(3, 4) if what == "the weight" else torch.arange(12.0).reshape(3, 4) - 6
    mine, theirs = product(integers, torch.zeros(2, 4) if what == "what it reads" else torch.randn(2, 4))
    findings = Findings()
    compare_product(InMemory([theirs]), Stretches([], [torch.zeros(2, 3)], []), mine, findings)
    assert (findings.weights, findings.products, findings.silent) == ({"fc.weight"}, {0: "fc.weight"}, set())


@pytest.mark.parametrize("what", ["other integers", "numbers come out"])
def test_a_product_of_zeros_is_no_other_product(what: str) -> None:
    mine, theirs = product(torch.arange(12.0).reshape(3, 4), torch.zeros(2, 4))
    if what == "other integers":
        theirs.integers[3] += 1
    computed = torch.zeros(2, 3) if what == "other integers" else torch.randn(2, 3)
    findings = Findings()
    compare_product(InMemory([theirs]), Stretches([], [computed], []), mine, findings)
    assert (findings.weights, findings.silent) == (set(), {"fc.weight"})


def seen(x: Tensor, number: int = 0) -> Seen:
    return Seen(number, "act", None, x, x, GRID)


def test_a_transposition_between_equal_axes_is_seen() -> None:
    """A quantizer in front of a transposition reads the same numbers in another order, in the same shape."""
    x, file, findings = torch.randn(2, 4, 4, 4), InMemory(quantizers=[file_quantizer("a")]), Findings()
    read = x.permute(0, 2, 3, 1).contiguous()
    place = find_quantizer(file, Stretches([read], [], []), seen(x), findings)
    assert place == (0, (0, 2, 3, 1))
    assert torch.equal(in_torch(file, place, read, seen(x)), x)
    assert (findings.quantizers, findings.unmatched) == ({0}, {})


@pytest.mark.parametrize("zeros", [True, False])
def test_a_quantizer_that_reads_zeros_is_the_one_that_it_was(zeros: bool) -> None:
    """The order of zeros does not show; where other numbers show that it is another one, it is that."""
    x = torch.zeros(2, 4, 4, 4) if zeros else torch.randn(2, 4, 4, 4)
    file, findings = InMemory(quantizers=[file_quantizer("a"), file_quantizer("b")]), Findings()
    known = (1, (0, 2, 3, 1))
    place = find_quantizer(file, Stretches([x, x], [], []), seen(x), findings, known=known)
    assert place == (known if zeros else (0, None))
    assert findings.quantizers == {place[0]}


def test_quantizers_of_equal_zeros_are_each_their_own() -> None:
    """Two dead parts of a network read the same: each of the file's is one of torch's."""
    file: File = InMemory(quantizers=[file_quantizer("a"), file_quantizer("b")])
    x, findings = torch.zeros(2, 4), Findings()
    computed = Stretches([x, x], [], [])
    places = [find_quantizer(file, computed, seen(x, number), findings) for number in range(3)]
    assert places == [(0, None), (1, None), (0, None)]
    assert findings.quantizers == {0, 1}


def test_quantizers_of_equal_zeros_get_equal_values() -> None:
    """So it does not matter which is which; those that made other numbers get other ones."""
    file = InMemory(quantizers=[file_quantizer(name) for name in "abc"])
    zeros = torch.zeros(2, 4)
    first, second, third = _values(file, [zeros, zeros, torch.ones(2, 4)], "dense")
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
