"""How each operation ties the per-channel scales of its inputs and outputs together (Sec. 3.3, App. D).

Scaling a channel of an activation by 1/c and everything around it accordingly leaves a network's function unchanged
as long as every operation in between is positively homogeneous in that channel. A rule either hands the shadow of
its inputs on, ties shadows, makes new variables (a layer can absorb any factor), or pins: an operation without a
rule is a barrier, so that an unknown network is never rescaled wrongly. An operation that only moves elements
(reshape, slice, concatenation, channel shuffle, padding) is simply executed on the shadows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from qft_plugin.graph import operations
from qft_plugin.graph.layer_graph import Const, Op, Ref, on_axis
from qft_plugin.graph.operations import ABSORBS_OUTPUT, DIVIDES, MULTIPLIES, TABLE
from qft_plugin.graph.solver import FREE_ZERO, Call, Solver

Rule = Callable[[Solver, Op], None]


def apply_rule(solver: Solver, op: Op) -> None:
    """Give the outputs of one operation their shadows.

    Anything that the rule of the operation cannot express exactly falls back to a barrier.
    """
    _note_other_users(solver, op, absorbs=op.function in ABSORBS_OUTPUT)
    if not op.inputs or not op.outputs:
        _barrier(solver, op, f"made by {op.function} from constants")
        return
    row = TABLE.get(op.function)
    if row is None or row.rule is None:
        _barrier(solver, op, f"{op.function} is not homogeneous")
        return
    try:
        RULES[row.rule](solver, op)
        _check_shapes(solver, op)
    except _NotExpressibleError as why:
        _note_other_users(solver, op, absorbs=False)
        _barrier(solver, op, f"{op.function} {why}")


class _NotExpressibleError(Exception):
    """The arguments of this call are outside what the rule covers."""


def _barrier(solver: Solver, op: Op, reason: str) -> None:
    for name in op.inputs:
        solver.pin(solver.shadows[name], reason)
    for name in op.outputs:
        solver.pinned(name, reason)


def _check_shapes(solver: Solver, op: Op) -> None:
    for name in op.outputs:
        shadow = solver.shadows.get(name)
        if shadow is None or tuple(shadow.shape) != tuple(solver.graph.shapes[name]):
            raise _NotExpressibleError("was called in a way that could not be followed")


def _note_other_users(solver: Solver, op: Op, *, absorbs: bool) -> None:
    """A weight that something else reads too must not be rescaled: that reader would see it."""
    for position, value in enumerate([*op.args, *(op.kwargs or {}).values()]):
        if not (absorbs and position > 0):
            for name in _constants(value):
                solver.other_users[name] = op.name


def _constants(value: Any) -> Iterator[str]:
    """Yield the names of all parameters in an argument, lists and tuples included."""
    if isinstance(value, Const):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _constants(part)


def _same(solver: Solver, op: Op) -> None:
    for value in (*op.args, *(op.kwargs or {}).values()):
        if isinstance(value, torch.dtype) and not value.is_floating_point:
            raise _NotExpressibleError(f"rounds to {value}")
    solver.shadows[op.outputs[0]] = solver.shadows[op.inputs[0]]


def _spatial(solver: Solver, op: Op) -> None:
    shadow = solver.shadows[op.inputs[0]]
    shape = solver.graph.shapes[op.outputs[0]]
    if shadow.dim() < 3 or len(shape) != shadow.dim():
        raise _NotExpressibleError("has no channel axis")
    channel = solver.per_channel(shadow, 1)
    for name in op.outputs:
        solver.shadows[name] = channel.view(1, -1, *(1,) * (shadow.dim() - 2)).expand(solver.graph.shapes[name])


def _resolve(solver: Solver, op: Op, value: Any) -> Any:
    """Replace the references in an argument by shadows."""
    if isinstance(value, Ref):
        return solver.shadows[op.inputs[value.index]]
    if isinstance(value, Const):
        raise _NotExpressibleError("mixes activations with a constant")
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_resolve(solver, op, v) for v in value)
    return value


def _move(solver: Solver, op: Op) -> None:
    if op.function == "__getitem__" and len(op.inputs) > 1:
        raise _NotExpressibleError("has an index that is computed")
    moves = TABLE[op.function].moves
    assert moves is not None
    try:
        args = [_resolve(solver, op, v) for v in op.args]
        kwargs = {k: _resolve(solver, op, v) for k, v in (op.kwargs or {}).items()}
        result = moves(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise _NotExpressibleError(f"could not be followed ({str(error).splitlines()[0]})") from error
    results = [result] if isinstance(result, Tensor) else list(result)
    if len(op.outputs) > len(results):
        raise _NotExpressibleError("returned an unexpected number of tensors")
    solver.shadows.update(zip(op.outputs, results, strict=False))


def _reduce(solver: Solver, op: Op) -> None:
    shadow = solver.shadows[op.inputs[0]]
    dims = op.argument(1, "dim")
    keep = op.argument(2, "keepdim", False)
    dims = range(shadow.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    for dim in sorted((d % shadow.dim() for d in dims), reverse=True):
        solver.tie(shadow, shadow.amax(dim, keepdim=True))
        shadow = shadow.amax(dim, keepdim=keep)
    solver.shadows[op.outputs[0]] = shadow


def _add(solver: Solver, op: Op) -> None:
    operands = op.args[:2]
    if len(op.inputs) == 1 and Ref(0) in operands and all(v == Ref(0) or _is_zero(v) for v in operands):
        solver.shadows[op.outputs[0]] = solver.shadows[op.inputs[0]].expand(solver.graph.shapes[op.outputs[0]])
        return
    if len(op.inputs) != 2 or not all(isinstance(v, Ref) for v in operands):
        raise _NotExpressibleError("of a constant would need the constant rescaled")
    shape = solver.graph.shapes[op.outputs[0]]
    a, b = (solver.shadows[op.inputs[v.index]].expand(shape) for v in operands if isinstance(v, Ref))
    solver.tie(a, b)
    solver.shadows[op.outputs[0]] = a if not (a == FREE_ZERO).any() else torch.where(a == FREE_ZERO, b, a)


def _is_zero(value: Any) -> bool:
    """Whether an operand is the number 0, as in  `sum(branches)`,  which begins with  `0 + first`."""
    return isinstance(value, (int, float)) and value == 0


def _multiply(solver: Solver, op: Op) -> None:
    """A product is homogeneous in one factor while the others stay: the gate is pinned, the feature passes."""
    if (op.kwargs or {}).get("rounding_mode") is not None:
        raise _NotExpressibleError("rounds")
    refs = [v for v in op.args[:2] if isinstance(v, Ref)]
    if len(refs) != len(op.inputs) or not refs:
        raise _NotExpressibleError("was called in a way that could not be followed")
    shadows = [solver.shadows[op.inputs[v.index]] for v in refs]
    if len(refs) == 1:
        if op.function in DIVIDES and not isinstance(op.args[0], Ref):
            raise _NotExpressibleError("of a constant by an activation is not homogeneous")
        feature = shadows[0]
    else:
        by_size = op.function in MULTIPLIES and shadows[0].numel() < shadows[1].numel()
        feature, gate = shadows[::-1] if by_size else shadows
        solver.pin(gate, f"gate of {op.function}")
    solver.shadows[op.outputs[0]] = feature.expand(solver.graph.shapes[op.outputs[0]])


def _matrix_product(solver: Solver, op: Op) -> None:
    """A product of matrices is homogeneous in each column of its right factor while the left one stays.

    So what attention makes has the scales of the values that it mixes.
    """
    if len(op.inputs) != 2 or op.args[:2] != (Ref(0), Ref(1)):
        raise _NotExpressibleError("is not a product of two activations")
    left, right = (solver.shadows[name] for name in op.inputs)
    if min(left.dim(), right.dim()) < 2:
        raise _NotExpressibleError("of a vector mixes the channels")
    solver.pin(left, f"left factor of {op.function}")
    solver.shadows[op.outputs[0]] = _columns(solver, right).expand(solver.graph.shapes[op.outputs[0]])


def _attention(solver: Solver, op: Op) -> None:
    """Attention is a matrix product whose left factor comes from queries and keys, and its right one is the values."""
    names = ("query", "key", "value")
    places = [op.argument(i, name) for i, name in enumerate(names)]
    if places != [Ref(0), Ref(1), Ref(2)] or op.argument(7, "enable_gqa", False):
        raise _NotExpressibleError("was called in a way that could not be followed")
    for i, name in enumerate(op.inputs):
        if i != 2:
            solver.pin(solver.shadows[name], f"{names[i] if i < 2 else 'mask'} of {op.function}")
    values = solver.shadows[op.inputs[2]]
    solver.shadows[op.outputs[0]] = _columns(solver, values).expand(solver.graph.shapes[op.outputs[0]])


def _columns(solver: Solver, matrices: Tensor) -> Tensor:
    """Return one variable per column, `[..., 1, columns]`, after forcing each column to have one over all rows."""
    columns = matrices.amax(-2, keepdim=True)
    solver.tie(matrices, columns)
    return columns


def _pad(solver: Solver, op: Op) -> None:
    shadow = solver.shadows[op.inputs[0]]
    mode = op.argument(2, "mode", "constant")
    pads = list(op.argument(1, "pad"))
    if mode == "constant":
        if op.argument(3, "value") not in (None, 0, 0.0):
            raise _NotExpressibleError("with a value other than 0 would need the value rescaled")
        solver.shadows[op.outputs[0]] = functional.pad(shadow, pads, value=FREE_ZERO)
    else:
        # Reflection and replication have no integer kernel; float64 holds the variables exactly.
        solver.shadows[op.outputs[0]] = functional.pad(shadow.double(), pads, mode=mode).long()


def _parameter(op: Op, position: int, name: str) -> Const | None:
    value = op.argument(position, name)
    if value is None or isinstance(value, Const):
        return value
    raise _NotExpressibleError(f"has a {name} that is computed")


def _layer(solver: Solver, op: Op) -> None:
    """Eq. (2): a kernel absorbs any factor of its input on its left and of its output on its right side."""
    weight, bias = _parameter(op, 1, "weight"), _parameter(op, 2, "bias")
    if weight is None or op.argument(0, "input") != Ref(0):
        raise _NotExpressibleError("has a weight that is computed")
    shape = solver.graph.shapes[op.outputs[0]]
    transposed = op.function.startswith("conv_transpose")
    groups = 1 if op.function == "linear" else int(op.argument(6, "groups", 1))
    axis = -1 if op.function == "linear" else 1 - len(weight.shape)
    ins = solver.per_channel(solver.shadows[op.inputs[0]], axis)
    outs = solver.new(weight.shape[1] * groups if transposed else weight.shape[0])
    call = Call(op, op.function, bias.name if bias else None, groups, ins, outs, axis)
    solver.calls.setdefault(weight.name, []).append(call)
    solver.shadows[op.outputs[0]] = on_axis(outs, axis).expand(shape)


def _norm(solver: Solver, op: Op) -> None:
    """A normalisation ends every scale before it; its gamma and beta absorb the one of each channel after it."""
    names = TABLE[op.function].arguments
    weight, bias = (_parameter(op, names.index(name), name) if name in names else None for name in ("weight", "bias"))
    if weight is None or len(weight.shape) != 1:
        raise _NotExpressibleError("has no per-channel weight")
    shadow, shape = solver.shadows[op.inputs[0]], solver.graph.shapes[op.outputs[0]]
    axis = -1 if "normalized_shape" in names else 1 - len(shape)  # that of the last axes
    solver.pin(shadow, f"{op.function} mixes the channels")
    outs = solver.new(weight.shape[0])
    ins = solver.new(1)
    solver.pin(ins, f"{op.function} mixes the channels")
    call = Call(op, "layer_norm", bias.name if bias else None, 1, ins.expand(weight.shape[0]), outs, axis)
    solver.calls.setdefault(weight.name, []).append(call)
    solver.shadows[op.outputs[0]] = on_axis(outs, axis).expand(shape)


def _bounded(solver: Solver, op: Op) -> None:
    """A function with bounds is homogeneous where each channel has bounds of its own, which are scaled with it."""
    low, high = op.argument(1, "low"), op.argument(2, "high")
    if not isinstance(low, Const) or not isinstance(high, Const):
        raise _NotExpressibleError("has one bound for all channels")
    shadow = solver.shadows[op.inputs[0]]
    axis = int(op.argument(3, "axis"))
    channel = solver.per_channel(shadow, axis)
    call = Call(op, op.function, low.name, 1, channel, channel, axis)
    solver.calls.setdefault(high.name, []).append(call)
    solver.shadows[op.outputs[0]] = on_axis(channel, axis).expand(solver.graph.shapes[op.outputs[0]])


def _one_bound(_: Solver, __: Op) -> None:
    raise _NotExpressibleError("has one bound for all channels")


def _affine(solver: Solver, op: Op) -> None:
    """A factor for each channel absorbs those on both sides, and a shift the one after it."""
    weight, bias, axis = op.argument(1, "weight"), op.argument(2, "bias"), int(op.argument(3, "axis"))
    assert isinstance(weight, Const)
    ins = solver.per_channel(solver.shadows[op.inputs[0]], axis)
    outs = solver.new(ins.numel())
    call = Call(op, op.function, bias.name if isinstance(bias, Const) else None, 1, ins, outs, axis)
    solver.calls.setdefault(weight.name, []).append(call)
    solver.shadows[op.outputs[0]] = on_axis(outs, axis).expand(solver.graph.shapes[op.outputs[0]])


RULES: Final[Mapping[operations.Rule, Rule]] = {
    "same": _same,
    "spatial": _spatial,
    "moved": _move,
    "joined": _move,
    "reduced": _reduce,
    "added": _add,
    "multiplied": _multiply,
    "divided": _multiply,
    "matrix product": _matrix_product,
    "attention": _attention,
    "padded": _pad,
    "layer": _layer,
    "normalised": _norm,
    "affine": _affine,
    "bounded": _bounded,
    "one bound": _one_bound,
}
"""The code of each rule of `operations.TABLE`."""
