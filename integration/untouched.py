"""What a user's program has at hand, bit for bit, to compare before and after a job."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _bits(t: Tensor | None) -> Any:
    return None if t is None else (str(t.dtype), tuple(t.shape), bytes(t.detach().contiguous().numpy().tobytes()))


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: list(vars(module)[name].items()) for name in vars(module) if name.endswith("_hooks")}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a job might change in a model, and in torch, numpy and Python."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": {name: (id(t), t._version, _bits(t)) for name, t in tensors},
        "state": {name: _bits(t) for name, t in model.state_dict().items()},
        "gradients": {name: (p.requires_grad, _bits(p.grad)) for name, p in model.named_parameters()},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "numbers": {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()},
        "hooks": {name: _hooks(m) for name, m in model.named_modules()},
        "random": (_bits(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "defaults": (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
    }


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that what runs inside leaves a model and the program around it as they were, whatever it raises."""
    before = state_of(model)
    classes = {type(m): set(vars(type(m))) for m in model.modules()}
    try:
        yield
    finally:
        after = state_of(model)
        for what, found in before.items():
            assert after[what] == found, f"{what} differ"
        for kind, found in classes.items():
            assert vars(kind).keys() >= found, f"{kind} has lost something"
