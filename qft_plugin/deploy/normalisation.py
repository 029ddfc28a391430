"""Normalisations of an IR that OpenVINO's CPU plugin would compute with another epsilon."""

from typing import Any, Final

import numpy as np

NORMALISATIONS: Final = frozenset(["MVN", "GroupNormalization"])


def keep_epsilon(model: Any) -> int:
    """Let normalisations read real numbers and not the integers of a quantizer, in place: the same function.

    The CPU plugin moves the scale of a quantizer or of an int8 layer past a normalisation, which does not change with
    the scale of what it reads, but leaves its epsilon as it was (OpenVINO 2026.4): it then counts in steps, and the
    outputs are off by 16 % where the variance is not much larger. A maximum with the lowest number, which changes
    nothing, keeps the scale in front.

    Args:
        model: an `openvino.Model`.

    Returns:
        How many normalisations were found.
    """
    from openvino import opset13

    found = [op for op in model.get_ops() if op.get_type_name() in NORMALISATIONS]
    lowest = np.finfo(np.float32).min
    for op in found:
        source = op.input_value(0)
        op.input(0).replace_source_output(opset13.maximum(source, np.array(lowest, dtype=np.float32)).output(0))
    return len(found)
