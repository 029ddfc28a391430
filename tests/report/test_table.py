"""The text at the end of a job: what it says in each case, and that it is short."""

from dataclasses import replace

import pytest
from reports import REPORT, layer

from qft_plugin.report.data import Report
from qft_plugin.report.table import LISTED


@pytest.mark.parametrize(
    "line",
    [
        "ResNet, quantized under nncf (torch 2.13.0)",
        "images        512, 64 of them held out of training",
        "loss          0.50000 -> 0.25000 in 2 steps, compared at the input of avgpool",
        "agreement     50.0 % -> 75.0 % of the 64 images get the class of the float network",
        "layers        3: 1 of 4 bits, 1 of 8 bits, 1 in floating point",
        "stayed float  c: why c",
        "warnings      1",
        "seconds       3.5: images 1.0, finetune 2.5",
        "peak memory   3.22 GB",
    ],
)
def test_what_is_said(line: str) -> None:
    """Each thing stands in a line of its own."""
    assert line in [text.strip() for text in str(REPORT).splitlines()]


def test_a_finetune_that_gained_nothing_says_so() -> None:
    """In plain words, beside the loss."""
    report = replace(REPORT, final_loss=0.5)
    assert not report.gained
    assert "the finetune gained nothing in 2 steps: the start is returned" in str(report)


def test_without_a_finetune_no_loss_is_told() -> None:
    """Nor an agreement that was not measured."""
    report = replace(REPORT, start_loss=None, final_loss=None, losses=(), agreement=None, start_agreement=None)
    assert "nothing was trained" in str(report)
    assert "agreement" not in str(report) + repr(report)


@pytest.mark.parametrize("count", [0, LISTED, LISTED + 3])
def test_few_of_the_layers_in_floating_point_are_named(count: int) -> None:
    """The first ones, and how many more there are."""
    report = replace(REPORT, layers=(layer("a"), *(layer(f"f{k}", None) for k in range(count))))
    lines = [line for line in str(report).splitlines() if ": why" in line]
    assert len(lines) == min(count, LISTED)
    assert (f"and {count - LISTED} more layers" in str(report)) == (count > LISTED)


def test_the_short_form_is_one_line() -> None:
    """However long the name of the model is."""
    assert repr(REPORT) == "Report(nncf, ResNet: 3 layers, loss 0.5 -> 0.25, agreement 75.0 %)"
    assert len(repr(replace(REPORT, model="N" * 500))) <= 200


def test_it_comes_back_from_json() -> None:
    """Every field, in its own type."""
    assert Report.from_json(REPORT.to_json()) == REPORT
