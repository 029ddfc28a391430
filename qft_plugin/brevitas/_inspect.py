"""A dry run under Brevitas."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qft_plugin.brevitas._attach import teacher
from qft_plugin.brevitas._host import Brevitas
from qft_plugin.brevitas._read import Source, check, made_in_inference_mode
from qft_plugin.brevitas._run import checked_config, config_beside
from qft_plugin.brevitas._twin import weight_scaling
from qft_plugin.brevitas._version import check_version
from qft_plugin.config import QFTConfig
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.torch_model import check_finite, check_model
from qft_plugin.job.host import Problem
from qft_plugin.job.inspect import inspect as job_inspect
from qft_plugin.report.display import shown
from qft_plugin.report.inspection import Inspection
from qft_plugin.training.distributed import joined
from qft_plugin.training.loss import Network


def inspect(
    model: nn.Module,
    data: Iterable[Any],
    example_input: Any = None,
    config: QFTConfig | None = None,
    *,
    verbose: bool = True,
) -> Inspection:
    """Say what `quantize`, or `initialize` and `finetune`, would decide and cost; nothing is trained or written.

    It takes seconds: a copy of the model is read, linked and started on the first 64 images, without compensation, and
    a few steps are timed. Warnings of this library are collected in the result and not shown.

    Args:
        model: a float torch model, as for `quantize`, or one with quantizers of this package, as for `initialize`. It
            is never changed, and random numbers go on as if nothing had been drawn.
        data: batches of unlabeled inputs: tensors, tuples of tensors, or dicts of tensors.
        example_input: one input to trace a float model with; `None` takes the first images.
        config: the settings.
        verbose: show the phases on stderr while they run.

    Raises:
        QFTError: what the functions would raise before they train, as far as the first images show it.
    """
    check_version()
    check_model(model)
    own = any(weight_scaling(m) is not None for m in model.modules())
    config = config_beside(example_input, config)
    config = checked_config(config, model) if own else config
    with torch.inference_mode(False), torch.enable_grad(), joined(model) as world, shown(verbose and world.is_first):
        if own:
            check(model)
            host: Brevitas = _Own(copy_of(model), data, None, calibrates=True)
        else:
            check_finite(dict(model.named_parameters()))
            taken = copy_of(model) if made_in_inference_mode(model) else model
            host = Brevitas(taken, data, taken, calibrates=True, swaps=True, example_input=example_input)
        items = len(data) if isinstance(data, Sized) else None
        return job_inspect(host, config, items=items, once=isinstance(data, Iterator))


@dataclass(frozen=True)
class _Own(Brevitas):
    """A model with quantizers of its own, whose teacher is not known: the same network in float stands for it."""

    def teacher(self, problem: Problem[Source]) -> Network:
        """Return the model without its quantizers as a function."""
        return teacher(problem.source.model, problem.source, problem.at, problem.inputs.first())
