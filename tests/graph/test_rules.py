"""How every operation ties scales: which channels share a variable, which are pinned and why; checked by folding."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from graphs import chain, checked, conv_op, folding_error, mapped, unary_op
from models import Apply, LastAxis, Residual, shuffle
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import PINNED, Const, DofMap, Op, Ref


def between(middle: nn.Module | Callable[[Tensor], Tensor], *, channels: int = 8, dim: int = 2) -> nn.Module:
    """Return a network with one operation between two convolutions, the second of `channels` inputs."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim]
    module = middle if isinstance(middle, nn.Module) else Apply(middle)
    return nn.Sequential(kind(3, 8, 3, padding=1), module, kind(channels, 5, 1)).double().eval()


def image(dim: int = 2) -> Tensor:
    return torch.randn(2, 3, *(8,) * dim, dtype=torch.float64)


def through(dof: DofMap) -> tuple[list[int], list[int]]:
    """Return the variables of the first layer's outputs and of the last layer's inputs."""
    return dof.layers[0].out_index.tolist(), dof.layers[-1].in_index.tolist()


TRANSPARENT: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu in place": nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(8),
    "abs": torch.abs,
    "negative": torch.neg,
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "max pool": nn.MaxPool2d(2),
    "average pool": nn.AvgPool2d(2),
    "adaptive average pool": nn.AdaptiveAvgPool2d(2),
    "adaptive max pool": nn.AdaptiveMaxPool2d(3),
    "mean over space": lambda x: x.mean((2, 3), keepdim=True),
    "sum over one axis": lambda x: torch.sum(x, 3, keepdim=True),
    "maximum over space": lambda x: x.amax(dim=(-1, -2), keepdim=True),
    "zero pad": nn.ZeroPad2d(1),
    "reflection pad": nn.ReflectionPad2d(2),
    "replication pad": nn.ReplicationPad2d(1),
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "slice in space": lambda x: x[..., 1:-1, ::2],
    "there and back": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).transpose(-1, -2).unflatten(2, (8, 8)),
    "times a scalar": lambda x: 0.5 * x,
    "over a scalar": lambda x: x / 4,
    "twice itself": lambda x: x + x,
    "contiguous": lambda x: x.contiguous().clone(),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "varargs reshape": lambda x: x.reshape(2, 8, 4, 16),
    "tuple reshape": lambda x: torch.reshape(x, (2, 8, 4, 16)),
    "varargs flip": lambda x: x.flip(2, 3),
    "zero added": lambda x: sum([x]) - 0 + torch.add(x, 0.0) * 0.5,
    "reshape as": lambda x: x.reshape_as(x.flatten(2)).view_as(x),
    "expand as": lambda x: x[:, :, :1].expand_as(x),
    "broadcast to": lambda x: torch.broadcast_to(x[..., :1], x.shape),
    "no channels": lambda x: torch.cat([x[:, :0], x], 1),
    "repeated pixels": lambda x: torch.repeat_interleave(x, 2, dim=3),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_the_scale_passes_through(name: str) -> None:
    """Channel i of the reader has the variable of channel i of the producer, all of them free and different."""
    outs, ins = through(checked(between(TRANSPARENT[name]), image()))
    assert outs == ins == list(range(1, 9))


MOVED: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "slice": (lambda x: x[:, 2:6], [3, 4, 5, 6]),
    "strided slice": (lambda x: x[:, ::4], [1, 5]),
    "narrow": (lambda x: x.narrow(1, 3, 2), [4, 5]),
    "second chunk": (lambda x: x.chunk(2, 1)[1], [5, 6, 7, 8]),
    "uneven split": (lambda x: torch.split(x, [1, 4, 3], dim=1)[1], [2, 3, 4, 5]),
    "flip of channels": (lambda x: torch.flip(x, (1,)), [8, 7, 6, 5, 4, 3, 2, 1]),
    "roll of channels": (lambda x: torch.roll(x, 1, 1), [8, 1, 2, 3, 4, 5, 6, 7]),
    "shuffle": (partial(shuffle, groups=4), [1, 3, 5, 7, 2, 4, 6, 8]),
    "shuffle by view": (
        lambda x: torch.transpose(x.view(2, 2, 4, 8, 8), 1, 2).contiguous().view(2, 8, 8, 8),
        [1, 5, 2, 6, 3, 7, 4, 8],
    ),
    "built-in shuffle": (lambda x: functional.channel_shuffle(x, 2), [1, 5, 2, 6, 3, 7, 4, 8]),
    "concatenation": (lambda x: torch.cat([x[:, 6:], x], 1), [7, 8, 1, 2, 3, 4, 5, 6, 7, 8]),
    "zero channels": (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 2)), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]),
    "tied halves": (lambda x: x[:, :4] + x[:, 4:], [1, 2, 3, 4]),
    "space to depth": (lambda x: functional.pixel_unshuffle(x, 2)[:, :6], [1, 1, 1, 1, 2, 2]),
    "depth to space": (lambda x: functional.pixel_shuffle(x, 2), [1, 2]),
    "select and stack": (lambda x: torch.stack([x[:, 1], x[:, 0]], dim=1), [2, 1]),
    "repeat": (lambda x: x[:, :2].repeat(1, 2, 1, 1), [1, 2, 1, 2]),
    "varargs tile": (lambda x: x[:, :2].tile(1, 2, 1, 1), [1, 2, 1, 2]),
}


@pytest.mark.parametrize("name", MOVED)
def test_channels_are_followed_where_they_move(name: str) -> None:
    """Each channel of the reader has the variable of the channel that it came from, a constant 0 has none."""
    function, expected = MOVED[name]
    dof = checked(between(function, channels=len(expected)), image())
    assert through(dof)[1] == expected


BARRIERS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "relu6": functional.relu6,
    "hardtanh": nn.Hardtanh(-2, 2),
    "clamp": lambda x: x.clamp(-1, 1),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": nn.Softmax(1),
    "batch_norm": nn.BatchNorm2d(8),
    "group_norm": nn.GroupNorm(2, 8, affine=False),
    "pad": nn.ConstantPad2d(1, 0.5),
    "add": lambda x: x + 1,
    "rsub": lambda x: 1 - x,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "matmul": lambda x: torch.matmul(x, x),
    "round": torch.round,
    "to": lambda x: x.to(torch.int64).to(torch.float64),
    "div": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_barriers_pin_and_name_the_reason(name: str) -> None:
    """What is not homogeneous pins all channels on both sides, and the map names the operation as the reason."""
    model = nn.Sequential(between(BARRIERS[name]), nn.ReLU(), nn.Conv2d(5, 4, 1)).double().eval()
    dof = checked(model, image())
    assert dof.layer("0.0.weight").out_index.tolist() == [PINNED] * 8
    assert dof.layer("0.2.weight").in_index.tolist() == [PINNED] * 8
    edge = next(e for e in dof.edges if e.name == dof.layer("0.0.weight").outputs[0])
    assert edge.free == 0
    assert name in edge.reason or name in ("reciprocal",)
    assert edge.reason in str(dof)


def test_bounds_say_that_the_bound_is_the_reason() -> None:
    """ReLU6 and its kind would be homogeneous if their bound differed by channel; the reason says so."""
    assert any("bound" in edge.reason for edge in mapped(between(nn.ReLU6()), image()).edges)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, stride=2)), (2, 3, 12)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, dilation=2)), (2, 3, 9, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 8, 3), nn.MaxPool3d(2), nn.Conv3d(8, 4, 1)), (2, 3, 6, 6, 6)),
    "pools in 1d": (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.AvgPool1d(2), nn.AdaptiveMaxPool1d(3), nn.Conv1d(8, 4, 1)),
        (2, 3, 12),
    ),
    "linear": (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), (2, 3)),
    "linear on tokens": (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), (2, 5, 3)),
    "transposed 1d": (nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3)), (2, 3, 6)),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)),
        (2, 3, 6, 6),
    ),
    "transposed 3d": (
        nn.Sequential(nn.ConvTranspose3d(3, 8, 2), nn.ReLU(), nn.ConvTranspose3d(8, 4, 1)),
        (2, 3, 3, 3, 3),
    ),
    "grouped": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)), (2, 3, 9, 9)),
    "grouped transposed": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, groups=2)), (2, 3, 9, 9)),
    "reflecting": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")),
        (2, 3, 9, 9),
    ),
    "one image": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind_absorb_factors(name: str) -> None:
    """Between two layers every channel has a free variable of its own; the network's ends are pinned."""
    model, shape = LAYERS[name]
    dof = checked(model.double(), torch.randn(shape, dtype=torch.float64))
    assert through(dof) == (list(range(1, 9)), list(range(1, 9)))
    assert dof.layers[0].in_index.tolist() == [PINNED] * 3
    assert dof.layers[-1].out_index.tolist() == [PINNED] * 4
    assert {dof.edges[0].reason, dof.edges[-1].reason} == {"input of the network", "output of the network"}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_depthwise_layer_separates_two_sets_of_factors(transposed: bool) -> None:
    """A depthwise kernel has one scale in and one out for every channel: 8 + 8 free variables."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    dof = checked(nn.Sequential(between(kind(8, 8, 3, groups=8))).double(), image())
    assert dof.size == 16
    assert dof.layers[1].in_index.tolist() == dof.layers[0].out_index.tolist()
    assert dof.layers[1].out_index.tolist() == dof.layers[2].in_index.tolist()


@pytest.mark.parametrize("flatten", [nn.Flatten(), lambda x: x.view(2, -1), lambda x: x.reshape(2, -1)])
def test_flatten_into_linear_repeats_each_channel(flatten: Callable[[Tensor], Tensor]) -> None:
    """The inputs of the linear layer that stand for positions of one channel share its variable."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Apply(flatten), nn.Linear(4 * 36, 5)).double()
    outs, ins = through(checked(model, image()))
    assert outs == [1, 2, 3, 4]
    assert ins == [c for c in outs for _ in range(36)]


def test_flatten_in_the_other_order() -> None:
    """Flattened after a permutation, the channels alternate in the linear layer's inputs."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Apply(lambda x: x.permute(0, 2, 3, 1).flatten(1)), nn.Linear(4 * 36, 5)
    ).double()
    assert through(checked(model, image()))[1] == [1, 2, 3, 4] * 36


def test_add_ties_its_inputs() -> None:
    """Both producers and the consumer of a sum have the same variables."""
    dof = checked(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1)).double(), image())
    assert dof.size == 8
    assert all(torch.equal(dof.layers[i].out_index, dof.layers[2].in_index) for i in (0, 1))


@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_with_a_pinned_input_is_pinned(turned: bool) -> None:
    """Tied to something that cannot be rescaled, on whichever side, the other input cannot be rescaled either."""

    def meet(a: Tensor, b: Tensor) -> Tensor:
        return b.sigmoid() + a if turned else a + b.sigmoid()

    dof, error = folding_error(TwoInputs(meet).double(), image())
    assert dof.size == 0
    assert error == 0
    assert "sigmoid" in next(e.reason for e in dof.edges if e.name == dof.layer("a.weight").outputs[0])


def test_add_of_one_channel_to_all_ties_them_together() -> None:
    """A broadcast sum leaves one variable for all channels."""
    dof = checked(between(lambda x: x + x.mean(1, keepdim=True)), image())
    assert dof.size == 1


@pytest.mark.parametrize("name", ["mean", "sum", "amax", "amin"])
def test_a_reduction_over_channels_ties_them(name: str) -> None:
    """What a number is made of in all channels has one scale in them."""
    dof = checked(between(lambda x: getattr(x.relu(), name)(1, keepdim=True), channels=1), image())
    assert through(dof) == ([1] * 8, [1])


class TwoInputs(nn.Module):
    """Two branches that meet in a given function."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.meet = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), meet
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.meet(self.a(x), self.b(x)))


class Sequences(nn.Module):
    """Two linear layers on sequences that meet in a given function."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.meet = nn.Linear(3, 4), nn.Linear(3, 4), meet
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.meet(self.a(x), self.b(x)))


def test_subtraction_ties_and_concatenation_does_not() -> None:
    """A difference has one vector for both inputs, a concatenation one after the other."""
    dof = checked(TwoInputs(lambda a, b: a - b).double(), image())
    assert dof.layers[0].out_index.tolist() == dof.layers[1].out_index.tolist() == dof.layers[2].in_index.tolist()
    dof = checked(TwoInputs(lambda a, b: torch.cat((b, a), dim=1), 8).double(), image())
    assert dof.layers[2].in_index.tolist() == [*dof.layers[1].out_index.tolist(), *dof.layers[0].out_index.tolist()]
    assert dof.size == 8


@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_is_pinned_and_the_feature_passes(turned: bool) -> None:
    """The smaller factor of a product is the gate, on whichever side it stands."""

    def meet(a: Tensor, b: Tensor) -> Tensor:
        gate = b.mean((2, 3), keepdim=True)
        return gate * a if turned else a * gate

    dof = checked(TwoInputs(meet).double(), image())
    assert through(dof) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert dof.layer("b.weight").out_index.tolist() == [PINNED] * 4
    assert any("gate" in edge.reason for edge in dof.edges)


def test_the_divisor_is_pinned() -> None:
    """A quotient is homogeneous in its numerator only."""
    dof = checked(TwoInputs(lambda a, b: a / (b.abs())).double(), image())
    assert dof.layer("a.weight").out_index.tolist() == [1, 2, 3, 4]
    assert dof.layer("b.weight").out_index.tolist() == [PINNED] * 4


def test_a_matrix_product_passes_the_columns_of_its_right_factor() -> None:
    """The left factor is pinned; a column of the right one has one variable over all rows and keeps it."""
    model = Sequences(lambda a, b: torch.matmul(a.transpose(1, 2), b)).double()
    dof = checked(model, torch.randn(2, 7, 3, dtype=torch.float64))
    assert dof.layer("a.weight").out_index.tolist() == [PINNED] * 4
    assert dof.layer("b.weight").out_index.tolist() == [1, 2, 3, 4]
    assert dof.layer("last.weight").in_index.tolist() == [1, 2, 3, 4]
    assert "left factor of matmul" in str(dof)


def test_a_matrix_product_that_mixes_channels_ties_them() -> None:
    """Where the rows of the right factor are the channels, they are summed, so they have one variable together."""
    mixed = Sequences(lambda a, b: torch.matmul(b.transpose(1, 2) @ a, b.transpose(1, 2)).transpose(1, 2)).double()
    dof, error = folding_error(mixed, torch.randn(2, 7, 3, dtype=torch.float64))
    assert dof.size == 0  # b is a left factor as well
    assert error < 1e-10
    mixed = Sequences(lambda a, b: torch.matmul(a.transpose(1, 2) @ a, b.transpose(1, 2)).transpose(1, 2)).double()
    dof = checked(mixed, torch.randn(2, 7, 3, dtype=torch.float64))
    assert dof.layer("b.weight").out_index.tolist() == [1] * 4
    assert dof.layer("a.weight").out_index.tolist() == [PINNED] * 4


@pytest.mark.parametrize(
    "product", [lambda a, _: a @ torch.ones(4, 4).double(), lambda a, _: a @ a[0, 0], lambda a, b: torch.mm(a[0], b[0])]
)
def test_other_matrix_products(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A product with a constant or with a vector is a barrier, one of two plain matrices is not."""
    dof, error = folding_error(Sequences(product).double(), torch.randn(2, 4, 3, dtype=torch.float64))
    assert error < 1e-10
    assert (dof.size > 0) == (product.__code__.co_names == ("torch", "mm"))


def test_attention_passes_the_values() -> None:
    """What attention makes has the scales of the values; queries, keys and a mask are pinned."""

    def attention(a: Tensor, b: Tensor) -> Tensor:
        mask = (a @ a.transpose(1, 2)).sigmoid()
        return functional.scaled_dot_product_attention(a, a + 1, b, attn_mask=mask)

    dof = checked(Sequences(attention).double(), torch.randn(2, 7, 3, dtype=torch.float64))
    assert dof.layer("a.weight").out_index.tolist() == [PINNED] * 4
    assert dof.layer("b.weight").out_index.tolist() == [1, 2, 3, 4]
    assert dof.layer("last.weight").in_index.tolist() == [1, 2, 3, 4]


def test_attention_whose_heads_share_values() -> None:
    """Grouped-query attention is a barrier."""

    def attention(a: Tensor, b: Tensor) -> Tensor:
        query, key = a.unflatten(2, (2, 2)).transpose(1, 2), a[..., :2].unsqueeze(1)
        y = functional.scaled_dot_product_attention(query, key, b[..., :2].unsqueeze(1), enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    dof, error = folding_error(Sequences(attention).double(), torch.randn(2, 7, 3, dtype=torch.float64))
    assert error < 1e-10
    assert "scaled_dot_product_attention was called in a way" in str(dof)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_normalisation_with_gamma_is_a_producer(norm: type[nn.Module]) -> None:
    """What is before it is pinned; its gamma and beta absorb the factors of what is after it."""
    body = nn.Sequential(norm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    dof = checked(nn.Sequential(nn.Conv2d(3, 8, 1), LastAxis(body), nn.Conv2d(8, 2, 1)).double(), image())
    gamma, reader = dof.layer("1.body.0.weight"), dof.layer("1.body.1.weight")
    assert gamma.kind == "layer_norm"
    assert torch.equal(gamma.out_index, reader.in_index)
    assert bool((reader.in_index > 0).all())
    assert dof.layer("0.weight").out_index.tolist() == [PINNED] * 8


NORMS = {
    "groups": nn.GroupNorm(2, 8),
    "one group": nn.GroupNorm(1, 8),
    "each image": nn.InstanceNorm2d(8, affine=True),
    "as trained": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_of_groups_absorbs_what_is_after_it(name: str) -> None:
    """Gamma and beta of each channel, which is axis 1, absorb its factor; what is before the norm is pinned."""
    dof = checked(
        nn.Sequential(nn.Conv2d(3, 8, 1), NORMS[name], nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval(), image()
    )
    gamma, reader = dof.layer("1.weight"), dof.layer("3.weight")
    assert (gamma.kind, gamma.axis, gamma.bias) == ("layer_norm", -3, "1.bias")
    assert gamma.out_index.tolist() == reader.in_index.tolist() == list(range(1, 9))
    assert dof.layer("0.weight").out_index.tolist() == [PINNED] * 8


@pytest.mark.parametrize("norm", [partial(nn.LayerNorm, 8, elementwise_affine=False), partial(nn.LayerNorm, (8, 8))])
def test_a_normalisation_without_a_channel_gamma_is_a_barrier(norm: Callable[[], nn.Module]) -> None:
    """Without one gamma per channel there is nothing to fold into."""
    dof, error = folding_error(between(norm()), image())
    assert dof.size == 0
    assert error == 0


def test_a_computed_index_is_a_barrier() -> None:
    """Which channels a computed index picks is not known before the network runs, so none of them is rescaled."""
    shape = (1, 4, 4, 4)
    graph = chain(
        unary_op("index", "my_choice", "x"),
        conv_op("a", "x", shape=(4, 3)),
        Op("pick", "__getitem__", ("a", "index"), ("pick",), (Ref(0), (slice(None), Ref(1)))),
        conv_op("c", "pick", shape=(2, 4)),
        shapes={"x": (1, 3, 4, 4), "a": shape, "index": (4,), "pick": shape, "c": (1, 2, 4, 4)},
        outputs=("c",),
    )
    dof = map_dof(graph)
    assert dof.layer("a.weight").out_index.tolist() == [PINNED] * 4


def test_constants_and_shapes_that_do_not_fit_are_barriers() -> None:
    """An operation on a constant, and a call whose result has another shape than the host saw, pin what they touch."""
    shapes = {"x": (1, 3, 2, 2), "a": (1, 4, 2, 2), "c": (1, 2, 2, 2)}
    constant = Op("plus", "add", ("a",), ("plus",), (Ref(0), Const("table", (4, 1, 1))))
    odd = unary_op("plus", "flatten", "a", 1)
    unknown = unary_op("plus", "my_own_kernel", "a")
    for middle, words in ((constant, "constant"), (odd, "could not be followed"), (unknown, "my_own_kernel")):
        graph = chain(
            conv_op("a", "x", shape=(4, 3)),
            middle,
            conv_op("c", "plus", shape=(2, 4)),
            shapes=shapes | {"plus": (1, 4, 2, 2)},
            outputs=("c",),
        )
        dof = map_dof(graph)
        assert dof.size == 0
        assert words in next(e for e in dof.edges if e.name == "a").reason
