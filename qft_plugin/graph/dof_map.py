"""From a network to its degrees of freedom: which per-channel scales are shared, free, or pinned (Sec. 3.3, App. D)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qft_plugin.errors import ModelError
from qft_plugin.graph.layer_graph import PINNED, DofMap, Edge, Layer, LayerGraph, VectorScale, channel_axis, is_kernel
from qft_plugin.graph.rules import apply_rule
from qft_plugin.graph.solver import FREE_ZERO, Solver, rows_of


def map_dof(graph: LayerGraph) -> DofMap:
    """Find which per-channel scales of a network are shared, free, or pinned (Sec. 3.3, App. D).

    Raises:
        ModelError: the graph has no layer whose weight could be quantized.
    """
    solver = Solver(graph)
    for name in graph.inputs:
        solver.pinned(name, "input of the network")
    for op in graph.ops:
        apply_rule(solver, op)
    for name in graph.outputs:
        solver.pin(solver.shadows[name], "output of the network")
    axes = {group[0]: _tie_vector(solver, group) for group in graph.vectors}
    _tie_repeated_calls(solver)
    if not any(is_kernel(calls[0].kind) for calls in solver.calls.values()):
        raise ModelError(
            "The model should have at least one convolution or linear layer whose weight is a parameter. "
            "Found none. Check that the model's forward really calls its layers."
        )
    return _collect(solver, axes)


def _tie_repeated_calls(solver: Solver) -> None:
    """A weight that is used several times has one scale on each side: tie the edges of all its calls."""
    holders: dict[str, set[str]] = {}
    for weight, calls in solver.calls.items():
        for name in (weight, *(call.bias for call in calls if call.bias)):
            holders.setdefault(name, set()).add(weight)
    for weight, calls in solver.calls.items():
        first = calls[0]
        names = (weight, *(call.bias for call in calls if call.bias))
        others = [
            user for name in names for user in (*sorted(holders[name] - {weight}), solver.other_users.get(name)) if user
        ]
        alike = all((c.bias, c.kind, c.groups) == (first.bias, first.kind, first.groups) for c in calls)
        for call in calls:
            if alike and not others:
                solver.tie(call.ins, first.ins)
                solver.tie(call.outs, first.outs)
            else:
                reason = f"{weight} or its bias is also used by {others[0] if others else 'another kind of call'}"
                solver.pin(call.ins, reason)
                solver.pin(call.outs, reason)


def _tie_vector(solver: Solver, group: tuple[str, ...]) -> int:
    """A quantizer with a scale per channel has one vector for all tensors that it reads; returns its axis."""
    shadows = [solver.shadows[name] for name in group]
    candidates = [1, -1] if all(s.dim() > 2 for s in shadows) else [-1]
    axis = min(candidates, key=lambda a: max(_variety(rows_of(s, a)) for s in shadows))
    if len({(s.dim(), s.shape[axis]) for s in shadows}) > 1:
        for shadow in shadows:
            solver.pin(shadow, "one quantizer reads activations of different shapes")
        return axis
    first = solver.per_channel(shadows[0], axis)
    for shadow in shadows[1:]:
        solver.tie(solver.per_channel(shadow, axis), first)
    return axis


def _variety(rows: Tensor) -> int:
    """Count the variables that would be tied to each other in the channel that has most of them; 0 fits all."""
    ids = rows.sort(1).values
    first = ids[:, :1] != FREE_ZERO
    return int(torch.cat([first, (ids[:, 1:] != ids[:, :-1])], dim=1).sum(1).amax())


def _is_uniform(rows: Tensor) -> bool:
    """Whether each channel has one variable over all other axes."""
    return bool((rows == rows[:, :1]).all())


def _filled(rows: Tensor) -> Tensor:
    """Give zeros that were padded to a channel the variable of the channel: any scale represents them."""
    return torch.where(rows == FREE_ZERO, rows.amax(1, keepdim=True), rows)


def _edge(solver: Solver, name: str, function: str, number: Mapping[int, int]) -> Edge:
    """Describe an activation by its channels, which in `[images, a, b]` are those of a sequence or of a 1-d image."""
    shadow = solver.shadows[name]
    axis = channel_axis(tuple(shadow.shape))
    if shadow.dim() == 3 and _variety(rows_of(shadow, 1)) < _variety(rows_of(shadow, axis)):
        axis = 1
    rows = _filled(rows_of(shadow, axis))
    free = (solver.numbered(rows, number) != PINNED).all(1)
    reason = solver.reason(rows) or ("a constant 0" if bool((rows == FREE_ZERO).any()) else "")
    return Edge(name, function, shadow.shape[axis], int(free.sum()), reason)


def _collect(solver: Solver, axes: Mapping[str, int]) -> DofMap:
    """Number the free variables and describe layers and edges."""
    # A variable that stands on no layer is left out: rescaling it would have nothing to fold into.
    on_layers = torch.cat([t for calls in solver.calls.values() for c in calls for t in (c.ins, c.outs)])
    roots = dict.fromkeys(solver.find(i) for i in torch.unique(on_layers).tolist() if i != FREE_ZERO)
    free = [root for root in roots if root not in solver.pinned_classes]
    number = {root: k for k, root in enumerate(free, start=PINNED + 1)}
    layers = tuple(
        Layer(
            weight=weight,
            bias=calls[0].bias,
            kind=calls[0].kind,
            groups=calls[0].groups,
            calls=tuple(c.op.name for c in calls),
            inputs=tuple(c.op.inputs[0] for c in calls),
            outputs=tuple(c.op.outputs[0] for c in calls),
            in_index=solver.numbered(calls[0].ins, number),
            out_index=solver.numbered(calls[0].outs, number),
            axis=calls[0].axis,
        )
        for weight, calls in solver.calls.items()
    )
    made_by = dict.fromkeys(solver.graph.inputs, "input")
    made_by |= {name: op.function for op in solver.graph.ops for name in op.outputs}
    edges, channel_index, channel_axes = [], {}, {}
    for name, function in made_by.items():
        shape = solver.graph.shapes[name]
        if not shape:
            continue
        edges.append(_edge(solver, name, function, number))
        for axis in dict.fromkeys([channel_axis(shape), *([1, len(shape) - 1] if len(shape) > 2 else [])]):
            along = solver.numbered(_filled(rows_of(solver.shadows[name], axis)), number)
            if _is_uniform(along):
                channel_index[name], channel_axes[name] = along[:, 0], axis
                break
    vectors = {
        name: VectorScale(axis, solver.numbered(rows_of(solver.shadows[name], axis).amax(1), number))
        for name, axis in axes.items()
    }
    return DofMap(layers, tuple(edges), len(number), channel_index, vectors, channel_axes)
