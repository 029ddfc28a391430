"""What holds for every test: one seed, and few, repeatable Hypothesis examples."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("unit", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers."""
    torch.manual_seed(0)
