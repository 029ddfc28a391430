"""One row of facts about each torch function, and the sets of functions that other files ask for.

A function that has no row is a barrier: no scale passes it, no quantizer is looked for through it. A field that is left
out claims nothing; `tests/graph/test_operations.py` runs every function and checks every claim.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.tensors.partial_gradients import SIMPLE, TRANSPOSED

Rule = Literal[
    "same",
    "spatial",
    "moved",
    "joined",
    "reduced",
    "added",
    "multiplied",
    "divided",
    "matrix product",
    "attention",
    "padded",
    "layer",
    "normalised",
    "affine",
    "bounded",
    "one bound",
]
"""How scales pass a function; `rules.RULES` has the code of each.

`same`: elementwise and positively homogeneous,  f(x / c) = f(x) / c  for every c > 0. `spatial`: homogeneous, mixes
positions inside a channel only, the channels are axis 1. `moved`, `joined`: only moves, repeats or drops elements, of
its first argument or of a list of tensors. `one bound`: it would be homogeneous if its bounds differed by channel.
"""


@dataclass(frozen=True)
class Operation:
    """Facts about one torch function.

    Attributes:
        name: of the function, without the underscore of its in-place form.
        rule: how the scales of its channels are tied to each other (Sec. 3.3, App. D); `None` for a barrier.
        spellings: other names under which torch, or a host, shows the same function.
        moves: does to a tensor of integers the same as a `moved` or `joined` function does to an activation.
        keeps_grid: the values that come out are among those that go in: a quantized input is a quantized output.
        keeps_order: all elements come out in the order in which they went in, a weight's integers too.
        activation: elementwise and never decreasing: it may stand between a layer and the quantizer of its output.
        curve: elementwise, and no scale passes through it.
        global_pool: it can reduce all positions of a channel to one, and keeps a channel whose values are all equal.
        memory: `"new"` where its result is no view of what it reads, except that  `x += y`  returns `x`, which nothing
            else reads as it was; `"argument"` where it writes into its first argument and returns nothing.
        arguments: names of its arguments in their order; of a matrix product, the names that a layer gives them.
        weight_in_out: it multiplies by a weight that is stored as `[in, out]`.
        modules: torch's modules whose forward is one call of it.
        operators: functions of Python's module `operator` that call it on a tensor.
        reads: `"values"` or `"sizes"` of a tensor where it returns them as something else than a tensor.
    """

    name: str
    rule: Rule | None = None
    _: KW_ONLY
    spellings: tuple[str, ...] = ()
    moves: Callable[..., Any] | None = None
    keeps_grid: bool = False
    keeps_order: bool = False
    activation: bool = False
    curve: bool = False
    global_pool: bool = False
    memory: Literal["new", "argument"] | None = None
    arguments: tuple[str, ...] = ()
    weight_in_out: bool = False
    modules: tuple[type[nn.Module], ...] = ()
    operators: tuple[str, ...] = ()
    reads: Literal["values", "sizes"] | None = None


def _move(name: str, moves: Callable[..., Any], **facts: Any) -> Operation:
    """Return the row of a function that only moves elements: each of them keeps its value."""
    return Operation(name, "moved", moves=moves, keeps_grid=True, **facts)


def _join(name: str, moves: Callable[..., Any], *spellings: str) -> Operation:
    """Return the row of a function that puts tensors side by side."""
    return Operation(name, "joined", moves=moves, keeps_grid=True, spellings=spellings)


def _curve(name: str, module: type[nn.Module]) -> Operation:
    """Return the row of an elementwise function that no scale passes through."""
    return Operation(name, curve=True, modules=(module,))


def _layer(name: str, arguments: tuple[str, ...], module: type[nn.Module]) -> Operation:
    """Return the row of a function that multiplies by a weight, Eq. (2)."""
    return Operation(name, "layer", memory="new", arguments=arguments, modules=(module,))


NORM_ARGUMENTS: Final = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

ROWS: Final = (
    # Layers and products of matrices.
    _layer("linear", SIMPLE[:3], nn.Linear),
    _layer("conv1d", SIMPLE, nn.Conv1d),
    _layer("conv2d", SIMPLE, nn.Conv2d),
    _layer("conv3d", SIMPLE, nn.Conv3d),
    _layer("conv_transpose1d", TRANSPOSED, nn.ConvTranspose1d),
    _layer("conv_transpose2d", TRANSPOSED, nn.ConvTranspose2d),
    _layer("conv_transpose3d", TRANSPOSED, nn.ConvTranspose3d),
    Operation("matmul", "matrix product", spellings=("__matmul__",), arguments=("input", "weight"), weight_in_out=True),
    Operation("mm", "matrix product", arguments=("input", "weight"), weight_in_out=True),
    Operation("bmm", "matrix product"),
    Operation("addmm", arguments=("bias", "input", "weight"), weight_in_out=True),
    Operation("scaled_dot_product_attention", "attention"),
    # Normalisations.
    Operation(
        "batch_norm",
        memory="new",
        arguments=NORM_ARGUMENTS,
        modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    ),
    Operation("layer_norm", "normalised", arguments=("input", "normalized_shape", "weight", "bias", "eps")),
    Operation("rms_norm", "normalised", arguments=("input", "normalized_shape", "weight", "eps")),
    Operation("group_norm", "normalised", arguments=("input", "num_groups", "weight", "bias", "eps")),
    Operation("instance_norm", "normalised", arguments=NORM_ARGUMENTS[:5]),
    Operation("channel_affine", "affine"),
    # Arithmetic of two activations, or of one and a number.
    Operation("add", "added", spellings=("__add__", "__radd__", "__iadd__"), memory="new", operators=("add", "iadd")),
    Operation("sub", "added", spellings=("subtract", "__sub__", "__isub__"), memory="new", operators=("sub", "isub")),
    Operation("mul", "multiplied", spellings=("__mul__",), memory="new", operators=("mul",)),
    Operation("multiply", "multiplied", spellings=("__rmul__", "__imul__")),
    Operation(
        "div", "divided", spellings=("divide", "true_divide", "__truediv__", "__itruediv__"), operators=("truediv",)
    ),
    Operation("floor_divide", spellings=("__floordiv__",), operators=("floordiv",)),
    Operation("remainder", operators=("mod",)),
    Operation("pow", operators=("pow",)),
    Operation("ge", operators=("ge",)),
    Operation("gt", operators=("gt",)),
    Operation("le", operators=("le",)),
    Operation("lt", operators=("lt",)),
    Operation("ne", operators=("ne",)),
    Operation("bitwise_and", spellings=("__and__",), operators=("and_",)),
    Operation("bitwise_or", spellings=("__or__",), operators=("or_",)),
    Operation("bitwise_xor", spellings=("__xor__",), operators=("xor",)),
    # Elementwise functions.
    Operation("relu", "same", activation=True),
    Operation("leaky_relu", "same", activation=True),
    Operation("prelu", "same", activation=True),
    Operation("rrelu", "same"),
    Operation("abs", "same", operators=("abs",)),
    Operation("neg", "same", operators=("neg",)),
    Operation("positive", "same", operators=("pos",)),
    Operation("hardtanh", "bounded", activation=True, modules=(nn.ReLU6, nn.Hardtanh)),
    Operation("relu6", "one bound", activation=True),
    Operation("clamp", "one bound", spellings=("clip",)),
    _curve("silu", nn.SiLU),
    _curve("gelu", nn.GELU),
    _curve("hardswish", nn.Hardswish),
    _curve("mish", nn.Mish),
    _curve("elu", nn.ELU),
    _curve("celu", nn.CELU),
    _curve("selu", nn.SELU),
    _curve("softplus", nn.Softplus),
    _curve("tanh", nn.Tanh),
    _curve("sigmoid", nn.Sigmoid),
    _curve("hardsigmoid", nn.Hardsigmoid),
    # Copies, and functions that are the identity outside training.
    Operation("identity", "same", keeps_grid=True, modules=(nn.Identity,)),
    Operation("dropout", "same", keeps_grid=True, modules=(nn.Dropout,)),
    Operation("dropout1d", "same", keeps_grid=True),
    Operation("dropout2d", "same", keeps_grid=True),
    Operation("dropout3d", "same", keeps_grid=True),
    Operation("alpha_dropout", "same", keeps_grid=True),
    Operation("feature_dropout", "same", keeps_grid=True),
    Operation("contiguous", "same", keeps_grid=True, keeps_order=True),
    Operation("clone", "same", keeps_grid=True, keeps_order=True),
    Operation("detach", "same", keeps_grid=True, keeps_order=True),
    Operation("to", "same", keeps_order=True),
    Operation("float", "same", keeps_order=True),
    Operation("double", "same"),
    Operation("half", "same"),
    Operation("bfloat16", "same"),
    Operation("type_as", "same"),
    # Pools, reductions, resizing and padding.
    Operation("max_pool1d", "spatial", keeps_grid=True, modules=(nn.MaxPool1d,)),
    Operation("max_pool2d", "spatial", keeps_grid=True, modules=(nn.MaxPool2d,)),
    Operation("max_pool3d", "spatial", keeps_grid=True, modules=(nn.MaxPool3d,)),
    Operation("max_pool2d_with_indices", "spatial", keeps_grid=True),
    Operation("avg_pool1d", "spatial", global_pool=True),
    Operation("avg_pool2d", "spatial", global_pool=True),
    Operation("avg_pool3d", "spatial", global_pool=True),
    Operation("adaptive_avg_pool1d", "spatial", global_pool=True),
    Operation("adaptive_avg_pool2d", "spatial", global_pool=True),
    Operation("adaptive_avg_pool3d", "spatial", global_pool=True),
    Operation("adaptive_max_pool1d", "spatial", keeps_grid=True, global_pool=True),
    Operation("adaptive_max_pool2d", "spatial", keeps_grid=True, global_pool=True),
    Operation("adaptive_max_pool3d", "spatial", keeps_grid=True, global_pool=True),
    Operation("mean", "reduced", global_pool=True),
    Operation("sum", "reduced"),
    Operation("amax", "reduced", keeps_grid=True, global_pool=True),
    Operation("amin", "reduced", keeps_grid=True),
    Operation("interpolate", "spatial"),
    Operation("upsample", "spatial"),
    Operation("upsample_nearest", "spatial"),
    Operation("upsample_bilinear", "spatial"),
    Operation("pad", "padded"),  # keeps the grid where it pads with 0
    # Functions that only move, repeat or drop elements.
    _move("flatten", torch.flatten, keeps_order=True, modules=(nn.Flatten,)),
    _move("reshape", Tensor.reshape, keeps_order=True),
    _move("view", Tensor.reshape, keeps_order=True),
    _move("reshape_as", Tensor.reshape_as),
    _move("view_as", Tensor.reshape_as),
    _move("unflatten", Tensor.unflatten),
    _move("permute", Tensor.permute),
    _move("transpose", torch.transpose),
    _move("swapaxes", torch.swapaxes),
    _move("swapdims", torch.swapdims),
    _move("movedim", torch.movedim),
    _move("t", torch.t),
    _move("squeeze", torch.squeeze, keeps_order=True),
    _move("unsqueeze", torch.unsqueeze),
    _move("__getitem__", Tensor.__getitem__),
    _move("select", torch.select),
    _move("narrow", torch.narrow),
    _move("chunk", torch.chunk),
    _move("split", torch.split),
    _move("tensor_split", torch.tensor_split),
    _move("unbind", torch.unbind),
    _move("expand", Tensor.expand),
    _move("expand_as", Tensor.expand_as),
    _move("broadcast_to", torch.broadcast_to),
    _move("repeat", Tensor.repeat),
    _move("repeat_interleave", torch.repeat_interleave),
    _move("tile", Tensor.tile),
    _move("flip", Tensor.flip),
    _move("roll", torch.roll),
    _move("pixel_shuffle", torch.pixel_shuffle, modules=(nn.PixelShuffle,)),
    _move("pixel_unshuffle", torch.pixel_unshuffle),
    _move("channel_shuffle", functional.channel_shuffle, modules=(nn.ChannelShuffle,)),
    _join("cat", torch.cat, "concat", "concatenate"),
    _join("stack", torch.stack),
    _join("hstack", torch.hstack),
    _join("vstack", torch.vstack),
    # Functions that take something out of a tensor, or write into one.
    Operation("item", reads="values"),
    Operation("tolist", reads="values"),
    Operation("numpy", reads="values"),
    Operation("__array__", reads="values"),
    Operation("__bool__", reads="values"),
    Operation("__int__", reads="values"),
    Operation("__float__", reads="values"),
    Operation("__complex__", reads="values"),
    Operation("__index__", reads="values"),
    Operation("size", reads="sizes"),
    Operation("numel", reads="sizes"),
    Operation("__len__", reads="sizes"),
    Operation("__setitem__", memory="argument"),
)

TABLE: Final = {name: row for row in ROWS for name in (row.name, *row.spellings)}
"""The row of each name of a function."""


def _names(where: Callable[[Operation], bool]) -> frozenset[str]:
    return frozenset(name for name, row in TABLE.items() if where(row))


def _modules(where: Callable[[Operation], bool]) -> dict[type[nn.Module], str]:
    return {module: row.name for row in ROWS if where(row) for module in row.modules}


ADDS: Final = _names(lambda row: row.rule == "added")
"""Elementwise additions and subtractions."""

TRACED_ADDS: Final = ADDS.union(*(TABLE[name].operators for name in ADDS))
"""The same in a graph of torch.fx, where they may be functions of Python's module `operator`."""

MULTIPLIES: Final = _names(lambda row: row.rule == "multiplied")
DIVIDES: Final = _names(lambda row: row.rule == "divided")
JOINS: Final = _names(lambda row: row.rule == "joined")

LAYERS: Final = _names(lambda row: row.rule == "layer")
"""Functions with a weight that absorbs any factor of the input and of the output."""

ABSORBS_INPUT: Final = _names(lambda row: row.rule in ("layer", "affine"))
"""Functions with parameters that absorb a factor of the input."""

ABSORBS_OUTPUT: Final = _names(lambda row: row.rule in ("layer", "affine", "normalised", "bounded"))
"""Functions with parameters that absorb a factor of the output."""

WEIGHT_IN_OUT: Final = _names(lambda row: row.weight_in_out)
NEW_MEMORY: Final = _names(lambda row: row.memory == "new")
WRITES: Final = _names(lambda row: row.memory == "argument")
KEEPS_GRID: Final = _names(lambda row: row.keeps_grid)
KEEPS_ORDER: Final = _names(lambda row: row.keeps_order)

PASSES_TO_OUTPUT: Final = _names(lambda row: row.keeps_grid or row.activation)
"""Functions that may stand between a layer and the quantizer of its output."""

GLOBAL_POOLS: Final = _names(lambda row: row.global_pool)
GLOBAL_REDUCTIONS: Final = _names(lambda row: row.global_pool and row.rule == "reduced")
"""Those that are told which axes to reduce."""

READS_VALUES: Final = _names(lambda row: row.reads == "values")
READS_SIZES: Final = _names(lambda row: row.reads == "sizes")

OPERATORS: Final = frozenset(row.name for row in ROWS if row.operators)
"""Torch's names of Python's operators on tensors, beside those with two underscores at both ends."""

BOUNDED_MODULES: Final = tuple(_modules(lambda row: row.rule == "bounded"))
CURVE_MODULES: Final = tuple(_modules(lambda row: row.curve))
GRID_MODULES: Final = _modules(lambda row: row.keeps_grid)
"""Modules whose values come out as they went in; the function that each calls."""
