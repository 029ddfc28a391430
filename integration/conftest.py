"""Fixtures: a fixed seed, and each network quantized once for all tests that only look at the result."""

import functools
import os
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job.run import Job

# The tests of one host run where the other is not installed: NNCF is imported by what needs it.

pytest_plugins = ["hosts"]
"""Its fixtures are those of all tests."""

os.environ.setdefault("QFT_SEED", str(secrets.randbits(32)))  # here, so that all processes of one run have the same


def pytest_report_header() -> str | None:
    """Say what draws the same networks again."""
    asked = os.environ.get("QFT_EXAMPLES")
    return f"QFT_EXAMPLES={asked} QFT_SEED={os.environ['QFT_SEED']}" if asked else None


@dataclass(frozen=True)
class Quantized:
    """A float network, its dataset, and what the quantization returned."""

    model: nn.Module
    items: list[Any]
    job: Job


def few_steps(**settings: Any) -> FinetuneConfig:
    """Make a finetune of 8 steps."""
    return FinetuneConfig(**{"images_fed": 128, "batch_size": 16, **settings})


def four_bits(**settings: Any) -> QFTConfig:
    """Ask for 4 bits in every layer, however small it is."""
    return QFTConfig(**{"weight_bits": 4, "small_layer_share": 0, "finetune": few_steps(), **settings})


@functools.cache
def quantized_once(name: str) -> Quantized:
    """Quantize a network of the collection to 4 bits; the same objects at every call."""
    import nncf

    import qft_plugin.nncf as host

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, items = nets.build(name), nets.items(name)
    return Quantized(model, items, host.quantize(model, nncf.Dataset(items), four_bits()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (users' code draws from it)
    torch.manual_seed(0)


@pytest.fixture
def quantized() -> Callable[[str], Quantized]:
    """Return a function that quantizes a network once; its results must not be changed."""
    return quantized_once


@pytest.fixture
def outputs() -> Callable[[nn.Module, Any], list[Tensor]]:
    """Return a function that runs a network on one item without a compiler and lists its tensors."""
    from qft_plugin.nncf._write import without_compiler

    def run(model: nn.Module, item: Any) -> list[Tensor]:
        with torch.no_grad(), without_compiler():
            return list(tensors_in(nets.call(model, item)))

    return run


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative L2 difference of two lists of outputs."""
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def weight_quantizers(job: Job) -> list[tuple[str, Any]]:
    """List the quantized weights of a result: the name of each with its quantizer, once for each call."""
    from nncf.torch.function_hook import get_hook_storage
    from nncf.torch.function_hook.hook_storage import decode_hook_name

    # layer_norm(input, shape, weight, bias) has its weight one place later than convolutions and linear layers.
    weights = {
        (call, 2 if layer.kind == "layer_norm" else 1): layer.weight
        for layer in job.dof_map.layers
        for call in layer.calls
    }
    found = []
    for name, hook in get_hook_storage(job.model).named_hooks(remove_duplicate=False):
        kind, op, port = decode_hook_name(name)
        if kind == "pre_hooks" and (op, port) in weights and hasattr(hook, "num_bits"):
            found.append((weights[op, port], hook))
    return found


def activation_quantizers(job: Job) -> dict[str, nn.Module]:
    """List the activation quantizers of a result by the name of their first hook."""
    from nncf.torch.function_hook import get_hook_storage

    weights = {id(hook) for _, hook in weight_quantizers(job)}
    hooks = get_hook_storage(job.model).named_hooks()
    return {name: hook for name, hook in hooks if hasattr(hook, "num_bits") and id(hook) not in weights}
