"""What a report says in sentences."""

import dataclasses
import math

import pytest
from mobile_report import mobile_report

from qft_plugin.report.page.words import bits_in_words, grade, judged, verdict

REPORT = mobile_report(analysed=False)


@pytest.mark.parametrize(
    ("agreement", "loss", "expected"),
    [
        (0.99, 5.0, "good"),
        (0.95, 0.0, "good"),
        (0.93, 0.0, "fair"),
        (0.8, 0.0, "poor"),
        (0.1, 0.0, "poor"),
        (None, 0.01, "good"),
        (math.nan, 0.08, "fair"),
        (None, 0.2, "poor"),
        (None, 7.0, "poor"),
        (None, None, "unknown"),
        (None, math.nan, "unknown"),
    ],
)
def test_agreement_counts_and_the_loss_where_there_is_none(
    agreement: float | None, loss: float | None, expected: str
) -> None:
    """The grade follows the agreement with the float network, else the loss."""
    assert grade(dataclasses.replace(REPORT, agreement=agreement, final_loss=loss))[0] == expected


def test_a_gain_is_told() -> None:
    """With its size, and the agreement with its standard error."""
    said = " ".join(verdict(REPORT)).replace("\N{NO-BREAK SPACE}", " ")
    assert "90.6 % of the images (standard error 2.6 points), before the finetune 81.2 %" in said
    assert "4.4 times smaller, 0.0713 to 0.0162" in said
    assert "128 images of 1,000 that were held out" in said


def test_a_small_gain_is_told_in_percent() -> None:
    """Not as 1.0 times smaller."""
    said = " ".join(verdict(dataclasses.replace(REPORT, start_loss=0.00143, final_loss=0.0014)))
    assert "made the loss 2.1 % smaller, 0.00143 to 0.00140." in said.replace("\N{NO-BREAK SPACE}", " ")


def test_no_gain_and_no_finetune_are_told() -> None:
    """A finetune that kept its start says so; a job without one too."""
    same = dataclasses.replace(REPORT, final_loss=REPORT.start_loss)
    assert "gained nothing" in " ".join(verdict(same))
    none = dataclasses.replace(REPORT, start_loss=None, losses=(), start_agreement=None)
    assert "There was no finetune." in verdict(none)
    assert "0.0713 to 0" in " ".join(verdict(dataclasses.replace(REPORT, final_loss=0.0))).replace("from ", "")


def test_images_that_were_trained_on_flatter() -> None:
    """Where nothing was held out, the report says so."""
    few = dataclasses.replace(REPORT, held_out=0, images=8)
    assert "figures flatter" in " ".join(verdict(few))
    assert judged(few) == 8
    untrained = dataclasses.replace(few, start_loss=None, losses=())
    assert "8 images that the job read" in " ".join(verdict(untrained))


def test_full_agreement_has_an_error_too() -> None:
    """All of 8 images do not mean that there is no doubt."""
    sure = dataclasses.replace(REPORT, agreement=1.0, held_out=8)
    assert "standard error 0 " not in " ".join(verdict(sure))


def test_layers_and_weights_by_bits() -> None:
    """All are counted, the most weights first."""
    found = bits_in_words(REPORT)
    assert [name for name, _, _ in found] == ["4 bits", "8 bits"]
    assert sum(layers for _, layers, _ in found) == len(REPORT.layers)
    assert sum(weights for _, _, weights in found) == sum(layer.weights for layer in REPORT.layers)
