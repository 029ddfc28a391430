"""The DoF map: repeated calls, tensors with several users, outputs, and the map as an object."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from graphs import FOLD_TOLERANCE, chain, checked, conv_op, folding_error, mapped, parameters_of, record, unary_op
from models import chained, image
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.errors import ModelError
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.layer_graph import PINNED, DofMap


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


@pytest.mark.parametrize(
    "scalar",
    [lambda x: torch.tensor(2.0, dtype=x.dtype), lambda x: x.norm(), lambda x: x.abs().max()],
    ids=["made of a number", "norm", "maximum"],
)
def test_tensors_without_axes(scalar: Callable[[Tensor], Tensor]) -> None:
    """A single number is an activation like any other: here it divides, and everything around it stays free."""
    checked(Shared(lambda m, x: m.c(m.b(m.a(x).relu()) / scalar(x))).double(), image())


class Steps(nn.Module):
    """Layers in a row that are called one after the other; `vectors` are tied, and folding must stay exact."""

    def __init__(self, run: Callable[["Steps", Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def __getitem__(self, i: int) -> nn.Module:
        return self.layers[i]


def tied(model: nn.Module, x: Tensor, *groups: tuple[str, ...]) -> DofMap:
    """Return the map with a quantizer on each group of tensors, after proving by folding that it is right."""
    model = model.double()
    dof = map_dof(replace(record(model, x), vectors=groups))
    folded = fold_network(dof, torch.randn(dof.size, dtype=torch.float64), parameters_of(model))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(model, folded, (x,)), model(x), rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE
        )
    assert set(dof.vectors) == {group[0] for group in groups}
    return dof


def conv_of(name: int, number: int | None = None) -> str:
    """Name the output of a layer of `Steps`."""
    return f"layers/{name}/conv2d/{name if number is None else number}"


@pytest.mark.parametrize("same_size", [True, False], ids=["same size", "other size"])
def test_one_vector_for_several_calls_ties_their_channels(same_size: bool) -> None:
    """A quantizer with a scale per channel that reads two activations gives channel c of both one variable; the
    positions in the image have no part in it.
    """
    size = 1 if same_size else 2

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[2](m[0](x)).sum((2, 3)) + m[3](m[1](x)).sum((2, 3))

    layers = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, size), nn.Conv2d(5, 3, 1), nn.Conv2d(5, 3, 1)
    model, names = Steps(run, *layers), (conv_of(0, 0), conv_of(1, 2))
    separate, together = tied(model, image()), tied(model, image(), names)
    assert separate.size == together.size + 5
    left, right = (together.layer(f"layers.{i}.weight").out_index for i in (0, 1))
    assert torch.equal(left, right)
    assert sorted(left.tolist()) == sorted(set(left.tolist()) - {PINNED})
    vector = together.vectors[names[0]]
    assert vector.axis == 1
    assert torch.equal(vector.index, left)


def test_vectors_of_different_quantizers_stay_apart() -> None:
    """A quantizer of its own for each activation ties nothing between them."""

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[2](m[1](m[0](x)).relu())

    layers = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 3, 1)
    model = Steps(run, *layers)
    dof = tied(model, image(), (conv_of(0),), (conv_of(1),))
    assert dof.size == 10
    assert not set(dof.vectors[conv_of(0)].index.tolist()) & set(dof.vectors[conv_of(1)].index.tolist())


@pytest.mark.parametrize("other", ["channels", "axes"])
def test_one_vector_cannot_fit_different_shapes(other: str) -> None:
    """Where the tensors of one quantizer have other numbers of channels or of axes, none of them is rescaled, and the
    map says why.
    """

    def run(m: Steps, x: Tensor) -> Tensor:
        left, right = m[0](x), m[1](x.flatten(2).transpose(1, 2) if other == "axes" else x)
        right = m[3](right) if other == "axes" else m[3](right).flatten(2).transpose(1, 2)
        return m[2](left).flatten(2).transpose(1, 2) + right

    last = nn.Linear(5, 3) if other == "axes" else nn.Conv2d(4, 3, 1)
    layers = nn.Conv2d(8, 5, 1), nn.Linear(8, 5) if other == "axes" else nn.Conv2d(8, 4, 1), nn.Conv2d(5, 3, 1), last
    second = "layers/1/linear/0" if other == "axes" else conv_of(1)
    dof = tied(Steps(run, *layers), image(), (conv_of(0), second))
    reasons = {edge.name: (edge.free, edge.reason) for edge in dof.edges}
    for name in (conv_of(0), second):
        assert reasons[name] == (0, "one quantizer reads activations of different shapes")
    assert set(dof.vectors[conv_of(0)].index.tolist()) == {PINNED}
    assert dof.size == 0


@pytest.mark.parametrize("length", [7, 5], ids=["another length", "as long as wide"])
def test_the_channels_of_a_conv1d_are_axis_1(length: int) -> None:
    """In `[N, C, L]` after a convolution the vector is over C, also where L is as large."""

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[1](m[0](x).relu())

    x = torch.randn(2, 3, length, dtype=torch.float64)
    name = "relu/0"
    dof = tied(Steps(run, nn.Conv1d(3, 5, 1), nn.Conv1d(5, 2, 1)), x, (name,))
    assert dof.vectors[name].axis == 1
    assert torch.equal(dof.vectors[name].index, dof.layer("layers.1.weight").in_index)
    assert dof.size == 5


SEQUENCES = {"[N, C]": (2, 3), "[N, L, C]": (2, 7, 3), "L as large as C": (2, 5, 3), "[N, H, W, C]": (2, 4, 4, 3)}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_channels_of_a_linear_layer_are_the_last_axis(name: str) -> None:
    """After a linear layer the vector is over the last axis, however many axes stand before it."""

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[1](m[0](x).relu())

    x = torch.randn(SEQUENCES[name], dtype=torch.float64)
    dof = tied(Steps(run, nn.Linear(3, 5), nn.Linear(5, 2)), x, ("relu/0",))
    vector = dof.vectors["relu/0"]
    assert vector.axis % x.dim() == x.dim() - 1
    assert torch.equal(vector.index, dof.layer("layers.1.weight").in_index)
    assert dof.size == 5


def test_an_activation_that_is_pinned_follows_the_others_of_its_vector() -> None:
    """The input of the network could have its channels on any axis; the other tensor of the quantizer decides."""

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[1](m[0](x.clone()))

    x = torch.randn(2, 7, 5, dtype=torch.float64)
    for group in (("clone/0", "layers/0/linear/0"), ("layers/0/linear/0", "clone/0")):
        dof = tied(Steps(run, nn.Linear(5, 5), nn.Linear(5, 2)), x, group)
        assert dof.vectors[group[0]].axis == -1
        assert dof.vectors[group[0]].index.tolist() == [PINNED] * 5
        assert dof.layer("layers.0.weight").out_index.tolist() == [PINNED] * 5


def test_a_vector_ties_positions_that_were_apart() -> None:
    """Two images side by side have variables of their own; one vector over the channels makes them one."""

    def run(m: Steps, x: Tensor) -> Tensor:
        # Cropped apart again, so that no layer reads both.
        both = torch.cat([m[0](x), m[1](x)], dim=3)
        return m[2](both[..., :6]) + m[3](both[..., 6:])

    layers = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 3, 1), nn.Conv2d(5, 3, 1)
    model = Steps(run, *layers)
    separate, together = tied(model, image()), tied(model, image(), ("cat/0",))
    assert (separate.size, together.size) == (10, 5)
    assert torch.equal(together.layer("layers.0.weight").out_index, together.layer("layers.1.weight").out_index)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m[2](functional.pad(m[0](x), (0, 0, 0, 2))),
        lambda m, x: m[2](torch.cat([m[0](x), m[1](x)], dim=1)),
        lambda m, x: m[2](functional.pad(m[0](x.unflatten(1, (1, 7))), (0, 0, 0, 1, 0, 1))),
    ],
    ids=["padded sequence", "two sequences", "padded image, channels last"],
)
def test_the_channels_of_a_sequence_in_parts_are_the_last_axis(run: Callable[[Steps, Tensor], Tensor]) -> None:
    """Zeros or other tokens after a sequence do not change which axis is that of the channels."""
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    model = Steps(run, nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    name = record(model, x).ops[-2].outputs[0]
    dof = tied(model, x, (name,))
    assert dof.size == 5
    assert dof.vectors[name].axis == -1


def test_the_map_with_everything_pinned_has_vectors_of_ones() -> None:
    """`all_pinned` keeps the axis of each vector and pins its channels."""
    model = Steps(lambda m, x: m[1](m[0](x)), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 3, 1))
    pinned = tied(model, image(), (conv_of(0),)).all_pinned("because").vectors[conv_of(0)]
    assert pinned.axis == 1
    assert pinned.index.tolist() == [PINNED] * 5


def test_channels_of_one_axis_are_counted_as_channels() -> None:
    """The table counts the channels of 1-d images, padded zeros are no channels of their own, whole ones are named."""

    def run(m: Steps, x: Tensor) -> Tensor:
        return m[1](functional.pad(m[0](functional.pad(x, (1, 1))), (2, 0, 0, 3)))

    model = Steps(run, nn.Conv1d(3, 4, 3), nn.Conv1d(7, 2, 1))
    edges = {e.name: e for e in map_dof(record(model, torch.randn(2, 3, 9))).edges}
    first, padded = (edges[name] for name in ("layers/0/conv1d/0", "pad/1"))
    assert (first.channels, first.free, first.reason) == (4, 4, "")
    assert (padded.channels, padded.free, padded.reason) == (7, 4, "a constant 0")


@pytest.mark.parametrize("length", [4, 8])
def test_the_axis_of_the_channels_of_an_activation(length: int) -> None:
    """Between convolutions over sequences it is 1, between linear layers the last one, as long as either."""
    conv = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1)).double()
    dof = mapped(conv, torch.randn(2, 3, length, dtype=torch.float64))
    inside = dof.layers[1].inputs[0]
    assert dof.channel_axes[inside] == 1
    assert dof.channel_index[inside].tolist() == dof.layers[1].in_index.tolist()
    linear = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    dof = mapped(linear, torch.randn(2, length, 3, dtype=torch.float64))
    inside = dof.layers[1].inputs[0]
    assert dof.channel_axes[inside] == 2
    assert dof.channel_index[inside].tolist() == dof.layers[1].in_index.tolist()
    dof = mapped(linear, torch.randn(2, length, 8, 3, dtype=torch.float64))
    inside = dof.layers[1].inputs[0]
    assert dof.channel_axes[inside] == 3
    assert dof.channel_index[inside].tolist() == dof.layers[1].in_index.tolist()
    assert dof.all_pinned("for a reason").channel_axes == dof.channel_axes
