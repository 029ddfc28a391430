"""The report as plain data."""

import dataclasses

import reports

from qft_plugin.report.data import LayerErrors, LayerFigures, Node, Report

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
REPORT = dataclasses.replace(
    reports.REPORT,
    start_agreement=None,
    layers=(
        reports.layer("conv", errors=ERRORS, figures=FIGURES),
        reports.layer("fc", None, shape=(4, 8), activation_bits=None),
    ),
    nodes=(Node(name="conv2d/0", function="conv2d", inputs=("input",), layer="conv", bits=8),),
)


def test_json_keeps_everything() -> None:
    """What is read is equal to what was written."""
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_a_finetune_gained_where_the_loss_fell() -> None:
    """Neither an equal loss nor no finetune is a gain."""
    assert REPORT.gained
    assert not dataclasses.replace(REPORT, final_loss=REPORT.start_loss).gained
    assert not dataclasses.replace(REPORT, start_loss=None, final_loss=None).gained


def test_a_layer_counts_its_weights() -> None:
    """The count is the product of the shape."""
    assert [layer.weights for layer in REPORT.layers] == [216, 32]
