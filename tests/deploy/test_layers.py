"""Names of the layers of a file, as far as they can be told without a runtime."""

from qft_plugin.deploy.layers import RuntimeOp, constants_of, module_name, precisions

OPS = [
    RuntimeOp("Multiply_1", "Convolution", "u8", ("Multiply_1", "Multiply_7", "relu")),
    RuntimeOp("b/Conv/WithoutBiases", "GroupConvolution", "u8", ("b/Conv/WithoutBiases", "b/Conv")),
    RuntimeOp("shared_1", "Convolution", "f32", ("shared_1",)),
    RuntimeOp("fc/Dequantized", "FullyConnected", "i8", ("other",)),
    RuntimeOp("attention", "MatMul", "f32", ("attention",)),
]


def test_a_runtime_runs_what_it_is_made_of() -> None:
    """By one of its names, or by a part of an operation; a name that only begins alike is another one."""
    assert OPS[0].runs("Multiply_7")
    assert OPS[1].runs("b/Conv")
    assert OPS[3].runs("fc")
    assert not OPS[0].runs("Multiply")
    assert not OPS[2].runs("shared")


def test_layers_have_the_names_of_their_modules() -> None:
    """Each call of a module has a name of its own, and what no proof has found keeps the runtime's."""
    weights = {"Multiply_1": "a.0.weight", "b/Conv": "a.0.weight", "fc": "head.weight"}
    convolutions, linear = precisions(OPS, weights)
    assert convolutions == {"a.0": "u8", "a.0 (2)": "u8", "shared_1": "f32"}
    assert linear == {"head": "i8", "attention": "f32"}


def test_a_weight_that_is_not_called_weight_keeps_its_name() -> None:
    """A module may have several."""
    assert module_name("attention.in_proj_weight") == "attention.in_proj_weight"
    assert module_name("conv.weight") == "conv"


class Node:
    """Stands in for an operation of OpenVINO's: a name, a type, and what it reads."""

    def __init__(self, kind: str, *reads: "Node") -> None:
        self.kind, self.reads, self.asked = kind, reads, 0

    def get_name(self) -> str:
        return str(id(self))

    def get_type_name(self) -> str:
        return self.kind

    def get_node(self) -> "Node":
        return self

    def get_source_output(self) -> "Node":
        return self

    def inputs(self) -> tuple["Node", ...]:
        self.asked += 1
        return self.reads


def test_the_constants_of_an_expression_are_found() -> None:
    """All of them, where nothing else is in it."""
    weight, scale = Node("Constant"), Node("Constant")
    assert set(constants_of(Node("Multiply", Node("Convert", weight), scale))) == {weight, scale}
    assert constants_of(Node("Multiply", weight, Node("Parameter"))) == []
    assert constants_of(Node("Relu", Node("Convolution", weight, weight))) == []


def test_each_operation_of_a_deep_network_is_looked_at_once() -> None:
    """After 200 additions of an activation to itself there are 2^200 ways back to the input."""
    x = start = Node("Relu", Node("Parameter"))
    for _ in range(200):
        x = Node("Add", x, x)
    assert constants_of(x) == []
    assert start.asked <= 2
