"""The DoF map: repeated calls, tensors with several users, outputs, and the map as an object."""

from collections.abc import Callable

import pytest
import torch
from graphs import FOLD_TOLERANCE, chain, checked, conv_op, folding_error, mapped, unary_op
from models import chained, image
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.dof_map import map_dof
from qft_plugin.errors import ModelError
from qft_plugin.graph import PINNED


def test_a_module_called_twice_has_one_pair_of_scales() -> None:
    """Where a block is repeated with the same weight, the edges of both calls are tied."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(self.body(self.first(x)).relu()))

    dof = checked(Twice().double(), image())
    body = dof.layer("body.weight")
    assert len(body.calls) == len(body.inputs) == len(body.outputs) == 2
    assert dof.size == 4
    assert torch.equal(body.in_index, body.out_index)


class Shared(nn.Module):
    """Three convolutions, the third parameterised by `run`, which may use the first two's tensors in other ways."""

    def __init__(self, run: Callable[["Shared", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


SHARINGS: dict[str, Callable[[Shared, Tensor], Tensor]] = {
    "weight multiplies": lambda m, x: m.c(m.b(m.a(x).relu()) * m.b.weight.view(1, 4, 4, 1)[:, :, :1]),
    "bias multiplies": lambda m, x: m.c(m.b(m.a(x).relu()) * m.b.bias.view(1, 4, 1, 1)),
    "bias of two layers": lambda m, x: m.c(functional.conv2d(m.b(m.a(x)), m.b.weight, m.a.bias)),
    "another bias": lambda m, x: m.c(m.b(functional.conv2d(m.b(m.a(x)), m.b.weight))),
    "another layer's bias": lambda m, x: m.c(functional.conv2d(m.b(m.a(x)).relu(), m.b.weight, m.a.bias).relu()),
    "a far layer's bias": lambda m, x: (
        m.c(m.a(x).relu()) + functional.conv2d(m.b(x[:, :4]), m.b.weight, m.a.bias)[:, :2]
    ),
    "weight with a computed bias": lambda m, x: m.c(
        functional.conv2d(m.b(m.a(x).relu()), m.b.weight, x.mean((0, 2, 3))[:4])
    ),
    "weight in a list": lambda m, x: m.c(functional.conv2d(m.b(m.a(x)), torch.cat([m.b.weight, m.b.weight])[:4])),
    "weight transposed": lambda m, x: m.c(functional.conv2d(m.b(m.a(x)), m.b.weight.transpose(0, 1))),
}


@pytest.mark.parametrize("name", SHARINGS)
def test_tensors_with_other_users_are_left_alone(name: str) -> None:
    """A weight or bias that something else reads as well is never rescaled, so that the reader sees what it saw."""
    dof, error = folding_error(Shared(SHARINGS[name]).double(), image())
    assert error < FOLD_TOLERANCE
    assert dof.layer("b.weight").out_index.tolist() == [PINNED] * 4


def test_tied_autoencoder() -> None:
    """A kernel used forwards and transposed is left alone, with a reason, and what is around it stays free."""

    def run(m: Shared, x: Tensor) -> Tensor:
        wide = functional.conv_transpose2d(m.a(x).relu(), m.a.weight)
        return m.c(m.b(wide[:, :4]).relu())

    dof = checked(Shared(run).double(), image())
    assert dof.layer("a.weight").out_index.tolist() == [PINNED] * 4
    assert dof.layer("b.weight").out_index.tolist() == dof.layer("c.weight").in_index.tolist()


def test_arguments_by_keyword_are_understood() -> None:
    """Layers whose input is passed by keyword are either followed or a barrier, never a crash."""

    def run(m: Shared, x: Tensor) -> Tensor:
        inner = functional.conv2d(input=m.a(x).relu(), weight=m.b.weight, bias=m.b.bias)
        return m.c(functional.interpolate(input=inner, scale_factor=2))

    _, error = folding_error(Shared(run).double(), image())
    assert error < FOLD_TOLERANCE


@pytest.mark.parametrize("outputs", [("c",), ("c", "act")])
def test_outputs_of_the_network_are_pinned(outputs: tuple[str, ...]) -> None:
    """A tensor that leaves the network cannot be rescaled, also where something inside reads it too."""
    graph = chain(
        conv_op("a", "x", shape=(4, 3), bias="a.bias"),
        unary_op("act", "relu", "a"),
        conv_op("c", "act", shape=(2, 4)),
        shapes={"x": (1, 3, 2, 2), "a": (1, 4, 2, 2), "act": (1, 4, 2, 2), "c": (1, 2, 2, 2)},
        outputs=outputs,
    )
    dof = map_dof(graph)
    assert dof.size == (4 if outputs == ("c",) else 0)
    assert dof.layer("a.weight").bias == "a.bias"


def test_a_network_without_layers_is_refused() -> None:
    """There must be a weight to quantize; a normalisation alone is none."""
    with pytest.raises(ModelError, match="at least one convolution or linear layer"):
        mapped(nn.Sequential(nn.LayerNorm(8), nn.ReLU()).double(), torch.randn(2, 8, dtype=torch.float64))


def test_the_map_with_everything_pinned() -> None:
    """`all_pinned` keeps layers and edges, allows no factor, and prints its reason in every row."""
    dof = mapped(chained("relu", "conv"), image()).all_pinned("because")
    assert dof.size == 0
    assert all(int(la.in_index.max()) == int(la.out_index.max()) == PINNED for la in dof.layers)
    assert str(dof).count("because") == len(dof.edges)


def test_layers_are_found_by_weight() -> None:
    """`DofMap.layer` knows every weight and no other name."""
    dof = mapped(chained("relu", "conv"), image())
    assert dof.layer("2.weight").kind == "conv2d"
    with pytest.raises(KeyError):
        dof.layer("3.weight")
