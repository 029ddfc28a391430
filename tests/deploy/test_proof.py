"""What the proof of a file tells of differences between a runtime and torch."""

import warnings

import pytest

from qft_plugin.deploy.proof import OVERFLOW, REPORT, _judge
from qft_plugin.deploy.roundings import Rounding
from qft_plugin.errors import ParityError, QFTWarning


def rounding(**changes):
    given = {"place": "fc", "values": 128, "differ": 2, "unexplained": 2, "far": 0, "steps": 1, "from_tie": 0.0}
    return Rounding(**{**given, **changes})


def test_ties_before_a_mean_explain_what_they_move():
    """One tie of thousands of values moves one of a hundred means: what counts is how many, not which share."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _judge([rounding(moved=1)], "OpenVINO")


def test_a_difference_without_ties_is_told():
    with pytest.warns(QFTWarning, match=r"fc \(1.6 % of the values\)"):
        _judge([rounding()], "OpenVINO")


def test_more_than_roundings_is_refused():
    with pytest.raises(ParityError, match="fc: OpenVINO should compute what the model does"):
        _judge([rounding(far=1, steps=9)], "OpenVINO")


def test_a_refused_file_names_the_overflow_of_openvinos_kernels():
    """And no other runtime's, which has none."""
    for runtime, remedy in (("OpenVINO", OVERFLOW), ("ONNX Runtime", REPORT)):
        with pytest.raises(ParityError) as refused:
            _judge([rounding(far=1, steps=9)], runtime)
        assert str(refused.value).endswith(remedy)
        assert ("VNNI" in str(refused.value)) == (runtime == "OpenVINO")
