"""The proof that a file holds the integers of a network and computes what it computes."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.errors import ParityError

OUTPUT_TOLERANCE: Final = 0.02
"""Largest relative L2 difference of an output: runtimes round a few activations the other way, each by one step of 8
bits; a wrong weight or scale shows as 0.1 and more."""


def find_integers(constants: Sequence[np.ndarray[Any, Any]], integers: Mapping[str, Tensor]) -> None:
    """Find every weight among the constants of a file, equal in every integer.

    Exporters rename and reshape constants, so they are found by their content.

    Args:
        constants: the integer constants of the file, flat.
        integers: the integers of every quantized weight by name.

    Raises:
        ParityError: a weight is not there; it names it.
    """
    for name, expected in integers.items():
        W_int = expected.detach().cpu().to(torch.int64).numpy()
        # A linear layer on tokens is exported as a product with the transposed weight.
        forms = [W_int.reshape(-1), *([W_int.T.reshape(-1)] if W_int.ndim == 2 else [])]
        candidates = [c for c in constants if c.size == W_int.size]
        if not any(np.array_equal(c, form) for c in candidates for form in forms):
            least = min((int((c != form).sum()) for c in candidates for form in forms), default=W_int.size)
            raise ParityError(
                f"Weight {name}: its integers should be in the file. Found {least} of {W_int.size} that differ "
                "from the closest constant. Please report the model."
            )


def compare_outputs(
    found: Sequence[Tensor], expected: Sequence[Tensor], *, runtime: str, tolerance: float = OUTPUT_TOLERANCE
) -> float:
    """Return the largest relative L2 difference of an output.

    Args:
        found: what the runtime computed.
        expected: what torch computed.
        runtime: who computed, for the message.
        tolerance: the largest difference that is accepted.

    Raises:
        ParityError: an output differs by more, or their number differs.
    """
    if len(found) != len(expected):
        raise ParityError(
            f"The outputs of {runtime} should be the model's {len(expected)}. Found {len(found)}. "
            "Please report the model."
        )
    worst = 0.0
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        e = e.detach().cpu()
        error = float((f - e).norm() / e.norm().clamp(min=1e-12)) if e.is_floating_point() else float((f != e).any())
        if not error <= tolerance:
            raise ParityError(
                f"Output {number} of {runtime} should be the model's within {tolerance} "
                f"(relative L2, f32). Found {error:.3g}. Please report the model."
            )
        worst = max(worst, error)
    return worst
