"""Every claim of the table of operations, checked by running the function that it is about."""

import contextlib
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import record
from models import Apply
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.batch_norms import CONVOLUTIONS, NORMS
from qft_plugin.graph.channel_affine import channel_affine
from qft_plugin.graph.channel_clip import hardtanh
from qft_plugin.graph.layer_graph import Const, LayerGraph, Op, Ref
from qft_plugin.graph.operations import (
    ABSORBS_INPUT,
    JOINS,
    KEEPS_GRID,
    KEEPS_ORDER,
    LAYERS,
    ROWS,
    TABLE,
    Operation,
    Rule,
)
from qft_plugin.graph.rules import RULES, apply_rule
from qft_plugin.graph.solver import FREE_ZERO, Solver
from qft_plugin.tensors.partial_gradients import FUNCTIONS

OWN: dict[str, Callable[..., Any]] = {"hardtanh": hardtanh, "channel_affine": channel_affine, "identity": lambda x: x}
"""What stands under these names is this package's, or no function at all."""


def new(*shape: int) -> Tensor:
    """Return values of both signs, all different, none of them minus another; 8 bits hold those of 128."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, dtype=torch.float64) - count // 2 + 0.25).view(shape)


def image(dim: int = 2) -> Tensor:
    return new(2, 4, *(4,) * dim)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)


EXAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    **{f"conv{n}d": lambda n=n: (image(n), weight(3, 4, *(2,) * n), weight(3), 1, 0, 1, 1) for n in (1, 2, 3)},
    **{
        f"conv_transpose{n}d": lambda n=n: (image(n), weight(4, 3, *(2,) * n), weight(3), 1, 0, 0, 1, 1)
        for n in (1, 2, 3)
    },
    "linear": lambda: (image(), weight(3, 4), weight(3)),
    "matmul": lambda: (new(3, 4), new(4, 5)),
    "mm": lambda: (new(3, 4), new(4, 5)),
    "bmm": lambda: (new(2, 3, 4), new(2, 4, 5)),
    "addmm": lambda: (new(5), new(3, 4), new(4, 5)),
    "scaled_dot_product_attention": lambda: (new(2, 3, 4) / 9, new(2, 5, 4) / 9, new(2, 5, 6) / 9),
    "batch_norm": lambda: (image(), weight(4), weight(4), weight(4), weight(4), False, 0.1, 1e-5),
    "layer_norm": lambda: (image(), (4,), weight(4), weight(4), 1e-5),
    "rms_norm": lambda: (image(), (4,), weight(4), 1e-5),
    "group_norm": lambda: (image(), 2, weight(4), weight(4), 1e-5),
    "instance_norm": lambda: (image(), None, None, weight(4), weight(4)),
    "channel_affine": lambda: (image(), weight(4), weight(4), -3),
    "hardtanh": lambda: (image(), nn.Parameter(-weight(4).detach()), weight(4), -3, False),
    "clamp": lambda: (image(), -1.0, 2.0),
    "prelu": lambda: (image(), weight(4)),
    **{name: lambda: (image(), image()) for name in ("add", "sub", "mul", "multiply", "div")},
    **{name: lambda: (image(), 0.5, False) for name in TABLE if "dropout" in name},
    "dropout1d": lambda: (image(1), 0.5, False),
    "to": lambda: (image(), torch.float32),
    "type_as": lambda: (image(), torch.zeros(1)),
    "max_pool1d": lambda: (image(1), 2),
    "avg_pool1d": lambda: (image(1), 4),
    **{f"max_pool{n}d": lambda n=n: (image(n), 2) for n in (1, 2, 3)},
    "max_pool2d_with_indices": lambda: (image(), 2),
    **{f"avg_pool{n}d": lambda n=n: (image(n), 4) for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": lambda n=n: (image(n), 1) for n in (1, 2, 3) for kind in ("avg", "max")},
    **{name: lambda: (image(), (2, 3), True) for name in ("mean", "sum", "amax", "amin")},
    **{name: lambda: (image(), None, 2) for name in ("interpolate", "upsample", "upsample_nearest")},
    "upsample_bilinear": lambda: (image(), None, 2),
    "pad": lambda: (image(), (1, 2)),
    "flatten": lambda: (image(), 1),
    "reshape": lambda: (image(), (8, 16)),
    "view": lambda: (image(), (8, 16)),
    "reshape_as": lambda: (image(), torch.zeros(8, 16)),
    "view_as": lambda: (image(), torch.zeros(8, 16)),
    "unflatten": lambda: (image(), 1, (2, 2)),
    "permute": lambda: (image(), (0, 2, 3, 1)),
    **{name: lambda: (image(), 1, 2) for name in ("transpose", "swapaxes", "swapdims", "movedim")},
    "t": lambda: (new(3, 4),),
    "squeeze": lambda: (image()[:, :1], 1),
    "unsqueeze": lambda: (image(), 1),
    "__getitem__": lambda: (image(), (slice(None), slice(1, 3))),
    "select": lambda: (image(), 1, 2),
    "narrow": lambda: (image(), 1, 2, 1),
    **{name: lambda: (image(), 2, 1) for name in ("chunk", "split", "tensor_split")},
    "unbind": lambda: (image(), 1),
    "expand": lambda: (image()[..., :1], (2, 4, 4, 3)),
    "expand_as": lambda: (image()[..., :1], torch.zeros(2, 4, 4, 3)),
    "broadcast_to": lambda: (image()[..., :1], (2, 4, 4, 3)),
    "repeat": lambda: (image(), (1, 2, 1, 1)),
    "repeat_interleave": lambda: (image(), 2, 1),
    "tile": lambda: (image(), (1, 2, 1, 1)),
    "flip": lambda: (image(), (1,)),
    "roll": lambda: (image(), 1, 1),
    **{name: lambda: (image(), 2) for name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")},
    **{name: lambda: ([image(), image()],) for name in ("cat", "stack", "hstack", "vstack")},
}
"""Positional arguments of one call of each function; an activation alone where nothing is said."""


def example(name: str) -> tuple[Any, ...]:
    """Return the arguments of one call of a function, under whatever name."""
    return EXAMPLES.get(TABLE[name].name, lambda: (image(),))()


def function_of(name: str) -> Callable[..., Any]:
    """Return the function that a name in the table stands for: this package's, torch's, or a method of a tensor."""
    places = (functional, Tensor, torch)
    found = OWN.get(name) or next((getattr(p, name) for p in places if hasattr(p, name)), None)
    assert found is not None, f"torch has no function {name}"
    return found


def call(name: str, args: tuple[Any, ...]) -> Any:
    """Call a function with copies of the activations."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # of functions that are going to leave torch
        return function_of(name)(*replaced(args, lambda t: t.clone() if type(t) is Tensor else t))


def replaced(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return arguments with something else in the place of each tensor."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(replaced(v, function) for v in value)
    return function(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in arguments or results."""
    found: list[Tensor] = []
    replaced(value, found.append)
    return found


def same(found: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def rows(where: Callable[[Operation], object]) -> pytest.MarkDecorator:
    """Run a test for each name of those rows."""
    return pytest.mark.parametrize("name", [name for name, row in TABLE.items() if where(row)])


def test_no_name_has_two_rows() -> None:
    """Each name stands once, and each rule has its code."""
    assert len(TABLE) == sum(1 + len(row.spellings) for row in ROWS)
    assert set(RULES) == {row.rule for row in ROWS} - {None}


@rows(lambda row: row.spellings)
def test_spellings_compute_the_same(name: str) -> None:
    """Every name of a function gives what its first name gives."""
    args = example(name) if TABLE[name].rule else (torch.tensor([7, 5]), torch.tensor([2, 4]))
    assert same(call(name, args), call(TABLE[name].name, args))


class Recorded:
    """A call of one function, every element of whose activations has a variable of its own."""

    def __init__(self, name: str, rule: Rule | None = None) -> None:
        """Apply the rule that the table gives, or another one, to the example."""
        self.name, self.args = name, example(name)
        self.activations: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.results = call(name, self.args)
        words = replaced(self.args, self._word)
        inputs, outputs = (
            {f"{kind}{i}": t for i, t in enumerate(values)}
            for kind, values in (("in", self.activations), ("out", tensors(self.results)))
        )
        self.op = Op(name, name, tuple(inputs), tuple(outputs), words)
        shapes = {key: tuple(t.shape) for key, t in (inputs | outputs).items()}
        self.solver = Solver(LayerGraph((self.op,), shapes, self.op.inputs, self.op.outputs))
        for key, t in inputs.items():
            self.solver.shadows[key] = self.solver.new(t.numel()).view(t.shape)
        apply_rule(self.solver, self.op) if rule is None else RULES[rule](self.solver, self.op)
        self._factors: dict[int, float] = {}

    def _word(self, t: Tensor) -> Ref | Const:
        if isinstance(t, nn.Parameter):
            self.parameters.append(t)
            return Const(str(len(self.parameters) - 1), tuple(t.shape))
        self.activations.append(t)
        return Ref(len(self.activations) - 1)

    def free(self) -> int:
        """Count the free variables of what is read and made."""
        shadows = (self.solver.shadows[key] for key in (*self.op.inputs, *self.op.outputs))
        roots = {self.solver.find(i) for shadow in shadows for i in shadow.unique().tolist() if i != FREE_ZERO}
        return len(roots - set(self.solver.pinned_classes))

    def holds(self) -> bool:
        """Whether the results of rescaled arguments have the factors that the rule gives them."""
        found, expected = tensors(call(self.name, self.rescaled())), tensors(self.results)
        factors = [self.factors(self.solver.shadows[key]) for key in self.op.outputs]
        if any(f.shape != t.shape for f, t in zip(factors, expected, strict=True)):
            return False
        return all(
            torch.equal(a, b * f if b.is_floating_point() else b)
            for a, b, f in zip(found, expected, factors, strict=True)
        )

    def factors(self, ids: Tensor) -> Tensor:
        """Return a power of two for each variable, with which every product and sum is exact; 1 for what is pinned."""
        for i in ids.unique().tolist():
            root = self.solver.find(i) if i != FREE_ZERO else i
            fixed = i == FREE_ZERO or root in self.solver.pinned_classes
            self._factors.setdefault(root, 1.0 if fixed else 2.0 ** int(torch.randint(-3, 4, ())))
            self._factors[i] = self._factors[root]
        return ids.double().apply_(lambda i: self._factors[int(i)])

    def rescaled(self) -> tuple[Any, ...]:
        """Return the arguments with all activations and parameters rescaled."""
        made = {
            id(t): t * self.factors(self.solver.shadows[key])
            for key, t in zip(self.op.inputs, self.activations, strict=True)
        }
        for key, (used,) in self.solver.calls.items():
            W, outs = self.parameters[int(key)], self.factors(used.outs)
            ins = self.factors(used.ins) if used.kind in ABSORBS_INPUT else torch.ones_like(outs)
            if W.dim() == 1:
                made[id(W)] = W * outs / ins
            else:
                outs_at, ins_at = (1, 0) if "transpose" in used.kind else (0, 1)
                made[id(W)] = W * along(outs, outs_at, W) / along(ins, ins_at, W)
            if used.bias is not None:
                bias = self.parameters[int(used.bias)]
                made[id(bias)] = bias * outs
        return tuple(replaced(self.args, lambda t: made.get(id(t), t)))


def along(v: Tensor, axis: int, W: Tensor) -> Tensor:
    return v.view([-1 if a == axis else 1 for a in range(W.dim())])


CALLED = {name for name, row in TABLE.items() if row.rule or row.modules or row.name in EXAMPLES} - {"identity"}
"""Functions that read an activation and make one."""


@pytest.mark.parametrize("name", sorted(CALLED))
def test_the_rule_holds_and_no_other_frees_more(name: str) -> None:
    """With x * c in the place of x, and parameters that absorb c, the results have the factors that the rule gives."""
    seen = Recorded(name)
    assert seen.holds()
    assert (seen.free() > 1) == (TABLE[name].rule not in (None, "one bound"))
    # A BatchNorm that no layer absorbs is replaced by `channel_affine`, which frees both sides.
    for rule in RULES if name != "batch_norm" else ():
        with contextlib.suppress(Exception):  # rules for calls with other arguments fail in any way
            other = Recorded(name, rule)
            free = other.free() if other.holds() else 0
            if free > seen.free():
                pytest.fail(f"{rule} frees {free}")


def is_elementwise(name: str) -> bool:
    """Whether one other element in the activation is one other element at most in the result."""
    x, *rest = example(name)
    before = call(name, (x, *rest))
    if not isinstance(before, Tensor) or before.shape != x.shape:
        return False
    changed = torch.zeros_like(x, dtype=torch.bool)
    changed[1, 2, 3] = True
    others = (call(name, (torch.where(changed, x + step, x), *rest)) != before for step in (3, 50, 200))
    return not any(bool((other & ~changed).any()) for other in others)


@rows(lambda row: row.rule == "same" or row.activation)
def test_elementwise_functions_are(name: str) -> None:
    """No element depends on another one."""
    assert is_elementwise(name)


def test_curves_are_the_elementwise_functions_without_a_rule() -> None:
    """A scale may pass through no other elementwise function."""
    found = {name for name in CALLED if TABLE[name].rule is None and is_elementwise(name)}
    assert found - {"batch_norm"} == {name for name, row in TABLE.items() if row.curve}


@rows(lambda row: row.rule == "spatial")
def test_spatial_functions_mix_positions(name: str) -> None:
    """They are not elementwise, for which each position could have a scale."""
    assert not is_elementwise(name)


@rows(lambda row: row.rule == "one bound")
def test_one_bound_for_all_channels_is_a_barrier(name: str) -> None:
    """It is homogeneous where its bound is not reached, and not where it is."""
    x = torch.tensor([0.25, 100.0])
    assert (call(name, (2 * x, *example(name)[1:])) == 2 * call(name, (x, *example(name)[1:]))).tolist() == [
        True,
        False,
    ]


@rows(lambda row: row.activation)
def test_activation_functions_never_decrease(name: str) -> None:
    """A larger value becomes none that is smaller."""
    x, *rest = example(name)
    assert all((call(name, (x + step, *rest)) >= call(name, (x, *rest))).all() for step in (0.5, 1, 4, 60))


@rows(lambda row: row.moves)
def test_what_moves_elements_does_so_with_integers(name: str) -> None:
    """The function for integers puts each where the function of torch puts the value; a list is `joined`."""
    args = replaced(example(name), lambda t: (4 * t).long())
    moves = TABLE[name].moves
    assert moves is not None
    expected = call(name, replaced(args, lambda t: t.double()))
    assert same([t.double() for t in tensors(moves(*args))], expected)
    assert (TABLE[name].rule == "joined") == isinstance(args[0], list)
    assert TABLE[name].keeps_grid


def values(t: Tensor) -> set[float]:
    return set(t.double().flatten().tolist())


def keeps_grid(name: str, *, zero: bool = False) -> bool:
    """Whether all values of the first result are among those of the activations, or 0."""
    args = example(name)
    read = set().union(*(values(t) for t in tensors(args) if type(t) is Tensor), {0.0} if zero else set())
    return values(tensors(call(name, args))[0]) <= read


@rows(lambda row: row.keeps_grid)
def test_a_grid_is_kept(name: str) -> None:
    """Every value that comes out went in."""
    assert keeps_grid(name)


UNCLAIMED_GRID = {
    "relu": "a host that quantizes what a ReLU reads quantizes what it makes once more",
    "pad": "with 0 only, which its reader asks for",
    "interpolate": "in mode nearest only",
    "upsample": "in mode nearest only",
    "upsample_nearest": "nothing asks for it",
    "positive": "nothing asks for it",
    **dict.fromkeys(["to", "float", "double", "half", "bfloat16", "type_as"], "may round"),
}
"""Functions that keep the grid in this example, and are not said to, with the reason."""


def test_no_grid_is_kept_unclaimed() -> None:
    """What is not claimed is not so, or has its reason."""
    assert {name for name in CALLED if keeps_grid(name, zero=True)} | {"identity"} == KEEPS_GRID | set(UNCLAIMED_GRID)
    assert not KEEPS_GRID & set(UNCLAIMED_GRID)


UNCLAIMED_ORDER = {"reshape_as", "view_as", "unflatten", "unsqueeze", "positive", "double", "half"}
UNCLAIMED_ORDER |= {"bfloat16", "type_as", *(name for name in TABLE if "dropout" in name)}
"""Functions that keep the order of the elements in this example; nothing relies on it."""


def test_order_is_kept() -> None:
    """The elements come out as they went in; what is not claimed is not so, or known."""

    def kept(name: str) -> bool:
        x, *rest = example(name)
        made = call(name, (x, *rest))
        return isinstance(made, Tensor) and torch.equal(made.double().flatten(), x.flatten())

    assert {name for name in CALLED - JOINS if kept(name)} == KEEPS_ORDER | UNCLAIMED_ORDER
    assert not KEEPS_ORDER & UNCLAIMED_ORDER


@rows(lambda row: row.memory == "new")
def test_results_are_new_memory(name: str) -> None:
    """No result is a view of an argument; in place it is the first argument itself."""
    args = example(name)
    held = {t.untyped_storage().data_ptr() for t in tensors(args)}
    with torch.no_grad():
        made = function_of(name)(*args)
    assert made is args[0] if name.startswith("__i") else made.untyped_storage().data_ptr() not in held


@rows(lambda row: row.memory == "argument")
def test_what_writes_into_its_argument_returns_nothing(name: str) -> None:
    """The first argument is another one after the call."""
    x = torch.zeros(2, 3)
    assert function_of(name)(x, 0, 1.0) is None
    assert x.tolist() == [[1, 1, 1], [0, 0, 0]]


@rows(lambda row: row.global_pool)
def test_a_global_pool_makes_one_value_of_a_channel(name: str) -> None:
    """Where all values of a channel are equal, that one is what it makes of them."""
    x, *rest = example(name)
    channels = new(2, 4).view(2, 4, *(1,) * (x.dim() - 2))
    assert torch.equal(call(name, (channels.expand(x.shape), *rest)), channels)


@rows(lambda row: row.arguments and not row.weight_in_out)
def test_arguments_have_these_names_in_this_order(name: str) -> None:
    """A call by name is the call by position."""
    args, names = example(name), TABLE[name].arguments
    with torch.no_grad():
        by_name = function_of(name)(**dict(zip(names, args, strict=True)))
    assert same(by_name, call(name, args))


@rows(lambda row: row.weight_in_out)
def test_a_weight_in_out_is_that_of_a_layer_transposed(name: str) -> None:
    """With the weight turned it is `linear`."""
    args = example(name)
    words = dict(zip(TABLE[name].arguments, args, strict=True))
    assert same(call(name, args), functional.linear(words["input"], words["weight"].T, words.get("bias")))


MODULES = [(module, row.name) for row in ROWS for module in row.modules]
SETTINGS: dict[type[nn.Module], tuple[Any, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, (4, 3, 2)),
    **dict.fromkeys(NORMS, (4,)),
    nn.Linear: (4, 3),
    **dict.fromkeys([nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.PixelShuffle, nn.ChannelShuffle], (2,)),
}


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_a_module_is_one_call_of_its_function(module: type[nn.Module], name: str) -> None:
    """Its forward calls this function and no other; `identity` is none."""
    made = module(*SETTINGS.get(module, ())).double().eval()
    x = image(next((n for n in (1, 3) if f"{n}d" in module.__name__), 2))
    assert [op.function for op in record(made, x).ops] == ([] if name == "identity" else [name])
    assert name != "identity" or (made(x) is x and TABLE[name].rule == "same")


OPERATORS = [(row, used) for row in ROWS for used in row.operators]


@pytest.mark.parametrize(("row", "used"), OPERATORS, ids=[used for _, used in OPERATORS])
def test_an_operator_of_python_calls_its_function(row: Operation, used: str) -> None:
    """A function of Python's module `operator` is seen under a name of the row."""
    others = () if used in ("abs", "neg", "pos") else (torch.tensor([2, 4]),)
    graph = record(Apply(lambda x: getattr(operator, used)(x, *others)), torch.tensor([7, 5]))
    assert {op.function for op in graph.ops} <= {row.name, *row.spellings} != set()
    assert len(graph.ops) == 1


@rows(lambda row: row.reads)
def test_what_is_read_is_no_tensor(name: str) -> None:
    """It depends on the values, or on the shape alone."""
    few, many = (torch.tensor(0), torch.tensor(1)) if TABLE[name].reads == "values" else (torch.zeros(3), torch.ones(3))
    found = [getattr(Tensor, name)(t) for t in (few, many)]
    assert not any(isinstance(f, Tensor) for f in found)
    assert (found[0] == found[1]) == (TABLE[name].reads == "sizes")


def test_other_tables_of_layers_agree() -> None:
    """Where types must be written out, or a folder may not import the table, the same functions stand."""
    assert {name: f for f, (name, _) in FUNCTIONS.items()} == {name: getattr(functional, name) for name in LAYERS}
    assert dict(FUNCTIONS.values()) == {name: TABLE[name].arguments for name in LAYERS}
    assert TABLE["batch_norm"].modules == NORMS
    layers = {module for row in ROWS if row.rule == "layer" for module in row.modules}
    assert layers == {*CONVOLUTIONS, nn.Linear}
