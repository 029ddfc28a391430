"""Recording a network as torch sees it run: names, arguments, outputs; and looking at single calls later."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from graphs import hooks_and_modes, record
from models import BLOCKS, Apply, Small, chained, image
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import PINNED, Const, LayerGraph, Op, Ref
from qft_plugin.graph.record import record as record_call


def recorded(run: Callable[[Small, Tensor], Any]) -> LayerGraph:
    return record(Small(run), torch.randn(2, 3, 5, 5))


def op_of(graph: LayerGraph, function: str) -> Op:
    """Return the only operation of a function."""
    (op,) = (op for op in graph.ops if op.function == function)
    return op


def test_operations_are_named_by_module_function_and_number() -> None:
    """A name is the path of the module in whose forward the call stands, its function, and its number among all such
    calls; what stands in the forward of the whole model has no path.
    """

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(x + self.body(x))

    model = nn.Sequential(Block(), Block())
    graph = record(Apply(lambda x: model(x).flatten(1)), torch.randn(1, 3, 2, 2))
    assert [op.name for op in graph.ops][-3:] == ["add/1", "relu/3", "flatten/0"]
    graph = record(model, torch.randn(1, 3, 2, 2))
    assert [op.name for op in graph.ops] == [
        "0/body/0/conv2d/0",
        "0/body/1/relu/0",
        "0/add/0",
        "0/relu/1",
        "1/body/0/conv2d/1",
        "1/body/1/relu/2",
        "1/add/1",
        "1/relu/3",
    ]
    assert graph.inputs == ("input/0",)
    assert graph.outputs == ("1/relu/3",)


def test_a_module_outside_the_tree_counts_as_the_one_around_it() -> None:
    """A module that no attribute holds has no name of its own: its calls bear the name of the caller."""
    loose = [nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))]
    graph = record(nn.Sequential(Apply(lambda x: loose[0](x))), torch.randn(1, 3, 2, 2))
    assert [op.name for op in graph.ops] == ["0/relu/0", "0/conv2d/0"]


def test_the_path_survives_an_exception_that_the_model_handles() -> None:
    """A module that raised is left, so that what comes after it is named by the module it stands in."""

    def run(m: Small, x: Tensor) -> Tensor:
        try:
            m.b(x)
        except RuntimeError:
            x = m.a(x)
        return x.relu()

    assert [op.name for op in recorded(run).ops] == ["a/conv2d/1", "relu/0"]


def test_tensors_are_told_apart_by_where_they_come_from() -> None:
    """Parameters and buffers are constants by name, plain tensors are nameless constants, and a tensor that a call
    makes is an activation, even one that is made of numbers alone.
    """
    graph = recorded(lambda m, x: (m.a(x) - m.mean) / m.plain + torch.ones(4, 1, 1))
    conv, minus, over = (op_of(graph, function) for function in ("conv2d", "sub", "div"))
    ones, plus = op_of(graph, "ones"), op_of(graph, "add")
    assert conv.args[:3] == (Ref(0), Const("a.weight", (4, 3, 1, 1)), Const("a.bias", (4,)))
    assert conv.inputs == ("input/0",)
    assert minus.args == (Ref(0), Const("mean", (4, 1, 1)))
    assert over.args == (Ref(0), Const("a tensor made inside the forward", (4, 1, 1)))
    assert (ones.inputs, ones.args) == ((), (4, 1, 1))
    assert plus.inputs == (over.outputs[0], ones.outputs[0])
    assert plus.args == (Ref(0), Ref(1))
    assert graph.shapes[plus.outputs[0]] == (2, 4, 5, 5)
    assert graph.shapes["ones/0"] == (4, 1, 1)


def test_tensors_that_are_gone_are_not_confused_with_new_ones() -> None:
    """A tensor that no torch call made is a nameless constant, also where it stands at the address of an activation
    that the model dropped.
    """

    def run(m: Small, x: Tensor) -> Tensor:
        h = m.a(x)
        for _ in range(20):
            h.relu()
            h = h + torch.from_numpy(np.ones((4, 1, 1), dtype=np.float32))
        return h

    sums = [op for op in recorded(run).ops if op.function == "add"]
    assert len(sums) == 20
    assert all(op.args == (Ref(0), Const("a tensor made inside the forward", (4, 1, 1))) for op in sums)


def test_a_parameter_with_two_names_has_one() -> None:
    """A tied weight is the same constant in both layers, so that whoever reads the graph sees that it is shared."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    weights = [op.args[1] for op in record(model, torch.randn(2, 3)).ops]
    assert weights == [Const("0.weight", (3, 3))] * 2


def test_arguments_in_lists_and_by_keyword_are_followed() -> None:
    """A list or tuple of tensors becomes one of references, numbered in the order of the arguments; so do keywords."""
    graph = recorded(
        lambda m, x: torch.cat([m.a(x), functional.conv2d(input=x, weight=m.a.weight, stride=1), m.a(x)], dim=1)
    )
    first, by_keyword, last = (op for op in graph.ops if op.function == "conv2d")
    assert by_keyword.args == ()
    assert by_keyword.kwargs == {"input": Ref(0), "weight": Const("a.weight", (4, 3, 1, 1)), "stride": 1}
    assert by_keyword.argument(0, "input") == Ref(0)
    cat = op_of(graph, "cat")
    assert cat.args == ([Ref(0), Ref(1), Ref(2)],)
    assert cat.kwargs == {"dim": 1}
    assert cat.inputs == (first.outputs[0], by_keyword.outputs[0], last.outputs[0])


class Levels(NamedTuple):
    fine: Tensor
    coarse: Tensor


def test_a_named_tuple_as_an_argument_is_followed() -> None:
    """`torch.cat` and the like take named tuples as they take tuples."""
    graph = recorded(lambda m, x: torch.cat(Levels(m.a(x), m.a(x)), dim=1))
    assert op_of(graph, "cat").args == ((Ref(0), Ref(1)),)
    assert map_dof(graph).layer("a.weight").out_index.tolist() == [PINNED] * 4


def test_calls_by_position_and_keyword_name_their_inputs() -> None:
    """Inputs of the network are called by their position or their name, and have their shapes."""

    class TwoInputs(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    x, y = torch.randn(2, 3), torch.randn(3)
    graph = record_call(TwoInputs(), ((x,), {"y": y}))
    assert graph.inputs == ("input/0", "input/y")
    assert graph.shapes["input/0"] == (2, 3)
    assert graph.shapes["input/y"] == (3,)
    assert graph.ops[0].inputs == ("input/0", "input/y")


def test_operations_in_place_make_a_new_activation() -> None:
    """After `x.relu_()` or `x += y`, whoever reads x reads the result; the function has the name without underscore."""

    def run(m: Small, x: Tensor) -> Tensor:
        h = m.a(x)
        h.relu_()
        h += m.mean
        return m.b(h)

    graph = recorded(run)
    first, relu, plus, last = graph.ops
    assert [op.function for op in graph.ops] == ["conv2d", "relu", "add", "conv2d"]
    assert relu.inputs == first.outputs
    assert plus.inputs == relu.outputs
    assert last.inputs == plus.outputs
    assert graph.outputs == last.outputs


def test_assigning_to_a_slice_makes_a_new_activation() -> None:
    """`x[i] = y` returns nothing, but reads x and y and makes what x is from then on."""

    def run(m: Small, x: Tensor) -> Tensor:
        h = m.a(x)
        h[:, 1:4] = x
        return m.b(h)

    graph = recorded(run)
    first, assign, last = graph.ops
    assert assign.function == "__setitem__"
    assert assign.inputs == (first.outputs[0], "input/0")
    assert (assign.args[0], assign.args[2]) == (Ref(0), Ref(1))
    assert last.inputs == assign.outputs
    assert graph.shapes[assign.outputs[0]] == (2, 4, 5, 5)


def test_attributes_that_are_tensors_are_operations() -> None:
    """`x.mT` is recorded as a call that reads x, and `x.shape` or `x.dtype` as none."""

    def run(m: Small, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h.mT if h.shape[0] == x.size(0) and h.dtype == x.dtype and h.dim() else h)

    graph = recorded(run)
    assert [op.function for op in graph.ops] == ["conv2d", "__get__", "conv2d"]
    assert graph.ops[1].inputs == graph.ops[0].outputs
    assert graph.ops[2].inputs == graph.ops[1].outputs


def test_a_module_called_twice_has_two_calls_of_one_weight() -> None:
    """Both calls bear the module's name, have numbers of their own, and share the weight."""
    graph = recorded(lambda m, x: m.b(m.b(m.a(x)).relu()))
    _, first, _, second = graph.ops
    assert (first.name, second.name) == ("b/conv2d/1", "b/conv2d/2")
    assert first.args[1] == second.args[1] == Const("b.weight", (4, 4, 1, 1))
    assert map_dof(graph).layer("b.weight").calls == (first.name, second.name)


def test_calls_with_several_results() -> None:
    """Each tensor of a result has a name, the first one that of the call, and readers name the one that they read."""

    def run(m: Small, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, dim=1)
        values, _ = torch.max(right, dim=1, keepdim=True)
        return left + values

    graph = recorded(run)
    _, chunk, largest, plus = graph.ops
    assert chunk.outputs == (chunk.name, f"{chunk.name}:1")
    assert largest.inputs == (f"{chunk.name}:1",)
    assert largest.outputs == (largest.name, f"{largest.name}:1")
    assert plus.inputs == (chunk.name, largest.name)
    assert all(graph.shapes[name] == (2, 2, 5, 5) for name in chunk.outputs)


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]


@pytest.mark.parametrize(
    "pack",
    [lambda y, h: (y, [h]), lambda y, h: {"y": y, "more": {"h": h}}, lambda y, h: Output(y, [h])],
    ids=["tuple", "dict", "dataclass"],
)
def test_outputs_are_found_in_any_container(pack: Callable[[Tensor, Tensor], Any]) -> None:
    """A tensor inside the model that it also returns is an output, once, however it is packed."""

    def run(m: Small, x: Tensor) -> Any:
        h = m.a(x)
        return pack(m.b(h), h)

    graph = recorded(run)
    assert graph.outputs == ("b/conv2d/1", "a/conv2d/0")
    assert map_dof(graph).layer("a.weight").out_index.tolist() == [PINNED] * 4


def test_inputs_and_constants_may_be_returned() -> None:
    """An input that is handed through is an output as well; a parameter is not an activation."""
    graph = recorded(lambda m, x: (x, m.mean, m.a(x), x))
    assert graph.outputs == ("input/0", "a/conv2d/0")


def test_what_nothing_reads_is_an_output() -> None:
    """A result that seems to be dropped may have gone somewhere that is not seen, so it is not rescaled."""
    kept: list[Tensor] = []

    def run(m: Small, x: Tensor) -> Tensor:
        kept.append(m.a(x))
        return m.b(m.a(x))

    graph = recorded(run)
    assert graph.outputs == ("b/conv2d/2", "a/conv2d/0")
    assert map_dof(graph).layer("a.weight").out_index.tolist() == [PINNED] * 4


LEAKS: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "tolist": lambda m, h: m.b(h) * h.tolist()[0][0][0][0],
    "numpy": lambda m, h: m.b(h) * float(h.numpy()[0, 0, 0, 0]),
    "item": lambda m, h: m.b(h + (total := h.sum())) * total.item(),
    "branch": lambda m, h: m.b(h + (total := h.sum())) * (2.0 if total > 1 else 1.0),
    "float": lambda m, h: m.b(h + (total := h.sum())) * float(total),
}


def leaky(name: str) -> LayerGraph:
    return recorded(lambda m, x: LEAKS[name](m, m.a(x)))


@pytest.mark.parametrize("name", ["tolist", "numpy", "item", "float"])
def test_values_that_become_numbers_leave_the_network(name: str) -> None:
    """A tensor that something outside of torch looks at is not rescaled, also where a layer reads it too."""
    assert map_dof(leaky(name)).layer("a.weight").out_index.tolist() == [PINNED] * 4


def test_a_comparison_is_an_operation() -> None:
    """What decides a branch of the model is recorded as a reader of its tensor, and leaves the network."""
    graph = leaky("branch")
    comparison = op_of(graph, "gt")
    assert comparison.inputs == op_of(graph, "sum").outputs
    assert comparison.outputs[0] in graph.outputs


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails: bool) -> None:
    """After recording, and after a model that raised, no hook and no mode is left, and gradients are as before."""

    def run(m: Small, x: Tensor) -> Tensor:
        h = m.a(x)
        assert not h.requires_grad
        return m.b(x) if fails else m.b(h)

    before = hooks_and_modes()
    model = Small(run)
    if fails:
        with pytest.raises(RuntimeError, match="channels"):
            record(model, torch.randn(1, 3, 2, 2))
    else:
        record(model, torch.randn(1, 3, 2, 2))
    assert hooks_and_modes() == before
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.a(torch.randn(1, 3, 2, 2)).requires_grad


def test_recording_changes_nothing() -> None:
    """The model computes under the recorder what it computes without, and two recordings are equal."""
    model, x = chained("residual", "halves", "gate", "layer norm"), image()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seen: list[Tensor] = []
    handle = model[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    first = record(model, x)
    handle.remove()
    assert torch.equal(seen[0], model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert record(model, x) == first


@pytest.mark.parametrize("block", BLOCKS)
def test_graphs_hang_together(block: str) -> None:
    """In every recorded graph names are unique, and what is read was made before and has a shape."""
    graph = record(chained(block, "conv"), image())
    known = set(graph.inputs)
    for op in graph.ops:
        assert known.issuperset(op.inputs), op.name
        assert not known.intersection(op.outputs), op.name
        known.update(op.outputs)
    assert known == set(graph.shapes)
    assert known.issuperset(graph.outputs)
    assert len({op.name for op in graph.ops}) == len(graph.ops)
