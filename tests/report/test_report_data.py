"""The report as plain data."""

import dataclasses

from qft_plugin.report.data import Layer, LayerErrors, LayerFigures, Node, Report

ERRORS = LayerErrors(
    weight=0.1,
    output_alone=0.05,
    output_accumulated=0.2,
    loss_only=0.001,
    loss_without=0.01,
    agreement_only=0.99,
    agreement_without=None,
    clipped=0.001,
    dead=0.2,
)
FIGURES = LayerFigures(
    integers=(1, 2, 3),
    low=-1,
    before=(1, 1, 2, 2),
    scales_before=(0.1,),
    scales_after=(0.2,),
    granularity={"per-tensor": 0.1},
)
REPORT = Report(
    host="nncf",
    versions={"torch": "2.13.0"},
    model="Net",
    images=1024,
    held_out=128,
    compared_at=("avg_pool2d/0",),
    start_loss=0.2,
    final_loss=0.1,
    losses=(0.3, 0.2),
    agreement=0.97,
    start_agreement=None,
    layers=(
        Layer(
            name="conv",
            weight="conv.weight",
            kind="conv2d",
            shape=(8, 3, 3, 3),
            bits=4,
            activation_bits=8,
            scales=8,
            errors=ERRORS,
            figures=FIGURES,
        ),
        Layer(name="fc", weight="fc.weight", kind="linear", shape=(4, 8), bits=None, activation_bits=None, scales=0),
    ),
    nodes=(Node(name="conv2d/0", function="conv2d", inputs=("input",), layer="conv", bits=8),),
    warnings=("a", "b"),
    seconds={"images": 0.5},
)


def test_json_keeps_everything() -> None:
    """What is read is equal to what was written."""
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_a_finetune_gained_where_the_loss_fell() -> None:
    """Neither an equal loss nor no finetune is a gain."""
    assert REPORT.gained
    assert not dataclasses.replace(REPORT, final_loss=0.2).gained
    assert not dataclasses.replace(REPORT, start_loss=None, final_loss=None).gained


def test_a_layer_counts_its_weights() -> None:
    """The count is the product of the shape."""
    assert [layer.weights for layer in REPORT.layers] == [216, 32]
