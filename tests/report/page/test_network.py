"""The picture of the network."""

from xml.etree import ElementTree

from mobile_report import mobile_report

from qft_plugin.report.page.network import MOST, boxes_of, merged, network
from qft_plugin.report.record import Layer, Node


def layer(name: str, bits: int | None) -> Layer:
    """Make a layer."""
    return Layer(
        name=name, weight=f"{name}.weight", kind="linear", shape=(2, 2), bits=bits, activation_bits=8, scales=2
    )


def chain(length: int) -> list[Node]:
    """Make a layer and many operations after it."""
    nodes = [Node(name="fc", function="linear", inputs=("x",), layer="fc", bits=8)]
    for n in range(length):
        nodes.append(Node(name=f"op{n}", function=f"f{n}", inputs=(nodes[-1].name,)))
    return nodes


def test_every_operation_and_layer_is_there() -> None:
    """Each operation has one box with its precision in letters; the picture is XML."""
    report = mobile_report()
    figure = network(report.nodes, report.layers)
    assert figure is not None
    root = ElementTree.fromstring(figure.svg)
    assert len(list(root.iter("g"))) == len(report.nodes) + 1  # and the input
    words = [node.text for node in root.iter("text")]
    assert words.count("W4 A8") == sum(layer.bits == 4 for layer in report.layers)
    assert {layer.name for layer in report.layers} <= set(words)
    assert f"{len(report.nodes)} operations" in figure.svg
    assert network((), report.layers) is None


def test_precisions_have_a_kind_each() -> None:
    """Bits of weights, floats, and operations without weights are told apart, by letters too."""
    layers = [layer(f"l{n}", bits) for n, bits in enumerate((2, 4, 6, 8, None))]
    nodes = [Node(name=x.name, function="linear", inputs=("x",), layer=x.name, bits=8) for x in layers]
    nodes += [
        Node(name="relu", function="relu", inputs=("l0",), bits=8),
        Node(name="norm", function="norm", inputs=("l1",)),
    ]
    boxes = boxes_of(nodes, {x.name: (n, x) for n, x in enumerate(layers, 1)})
    assert [b.kind for b in boxes] == ["in", "q2", "q4", "q6", "q8", "qf", "oi", "of"]
    assert [b.badge for b in boxes] == ["", "W2 A8", "W4 A8", "W6 A8", "W8 A8", "float A8", "A8", ""]


def test_chains_of_a_large_network_are_one_box() -> None:
    """Operations without weights that only feed each other are put together, others are not."""
    nodes = chain(MOST)
    figure = network(nodes, [layer("fc", 4)])
    assert figure is not None
    assert len(list(ElementTree.fromstring(figure.svg).iter("g"))) == 3
    assert "one box" in figure.caption
    few = network(nodes[:5], [layer("fc", 4)])
    assert few is not None
    assert len(list(ElementTree.fromstring(few.svg).iter("g"))) == 6


def test_a_value_that_two_read_ends_a_chain() -> None:
    """What is read elsewhere too must stay a box of its own."""
    nodes = [*chain(3), Node(name="add", function="add", inputs=("op1", "op2"))]
    boxes = merged(boxes_of(nodes, {"fc": (1, layer("fc", 4))}))
    assert [b.label for b in boxes] == ["x", "linear", "f0 … f1", "f2", "add"]
    assert boxes[-1].inputs == (2, 3)


def test_an_unknown_or_later_input_is_no_error() -> None:
    """A name that no operation makes is an input; one that is made later cannot be read."""
    nodes = [Node(name="a", function="f", inputs=("b", "image")), Node(name="b", function="g", inputs=("a",))]
    assert [b.inputs for b in boxes_of(nodes, {})] == [(), (0,), (1,)]
