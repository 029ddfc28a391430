"""Makes a `LayerGraph`: from a torch module by recording its calls, or by hand from a few words."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.layer_graph import Const, DofMap, LayerGraph, Op, Ref
from qft_plugin.graph.record import record as record_call

FOLD_TOLERANCE = 1e-10
"""float64 keeps 16 digits; a dozen layers with factors up to e^3 on either side lose less than five of them."""


def record(model: nn.Module, *inputs: Tensor) -> LayerGraph:
    """Run a model once and return what it called."""
    return record_call(model, (inputs, {}))


def hooks_and_modes() -> tuple[int, ...]:
    """Count the global hooks of modules and the active function modes."""
    return (
        len(torch_module._global_forward_pre_hooks),
        len(torch_module._global_forward_hooks),
        len(torch_module._global_forward_hooks_always_called),
        len(_get_current_function_mode_stack()),
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the detached parameters of a model by name."""
    return {name: p.detach() for name, p in model.named_parameters()}


def mapped(model: nn.Module, *inputs: Tensor) -> DofMap:
    """Return the DoF map of a recorded model."""
    return map_dof(record(model, *inputs))


def folding_error(model: nn.Module, *inputs: Tensor, seed: int = 0) -> tuple[DofMap, float]:
    """Fold random factors into a model; return its map and the largest change of the output, relative to the output."""
    dof = mapped(model, *inputs)
    log_c = torch.randn(dof.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    folded = fold_network(dof, log_c, parameters_of(model))
    with torch.no_grad():
        before = model(*inputs)
        after = torch.func.functional_call(model, folded, inputs)
    return dof, float((before - after).abs().max() / before.abs().max())


def checked(model: nn.Module, *inputs: Tensor) -> DofMap:
    """Return a model's map after proving by folding that it is right, and that it allows something."""
    dof, error = folding_error(model, *inputs)
    assert dof.size > 0
    assert error < FOLD_TOLERANCE
    return dof


def chain(*ops: Op, shapes: dict[str, tuple[int, ...]], outputs: tuple[str, ...]) -> LayerGraph:
    """Return a graph written by hand whose one input is called `x`."""
    return LayerGraph(ops, shapes, ("x",), outputs)


def conv_op(name: str, source: str, *, shape: tuple[int, int], bias: str | None = None, call: str | None = None) -> Op:
    """Return a 1x1 convolution written by hand: weight `name.weight`, output `name` (or `call`)."""
    weight = Const(f"{name}.weight", (*shape, 1, 1))
    made = call or name
    return Op(made, "conv2d", (source,), (made,), (Ref(0), weight, Const(bias, shape[:1]) if bias else None))


def linear_op(name: str, source: str, *, shape: tuple[int, int]) -> Op:
    """Return a linear layer written by hand."""
    return Op(name, "linear", (source,), (name,), (Ref(0), Const(f"{name}.weight", shape), None))


def two_linear(ins: int, width: int, outs: int) -> DofMap:
    """Map two linear layers, `a` and `b`, with a ReLU between them (Eq. 17's toy case)."""
    return map_dof(
        chain(
            linear_op("a", "x", shape=(width, ins)),
            unary_op("act", "relu", "a"),
            linear_op("b", "act", shape=(outs, width)),
            shapes={"x": (2, ins), "a": (2, width), "act": (2, width), "b": (2, outs)},
            outputs=("b",),
        )
    )


def unary_op(name: str, function: str, source: str, *args: Any, **kwargs: Any) -> Op:
    """Return an operation with one activation input and one output."""
    return Op(name, function, (source,), (name,), (Ref(0), *args), kwargs)
