"""Brevitas as a host of a job."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from qft_plugin.brevitas._attach import Placed, Student, place, teacher
from qft_plugin.brevitas._link import link_on, shared_factors
from qft_plugin.brevitas._read import Source
from qft_plugin.brevitas._swap import swap
from qft_plugin.brevitas._write import write
from qft_plugin.config import QFTConfig
from qft_plugin.deploy.images import keep_images, kept_images
from qft_plugin.errors import warn
from qft_plugin.graph.torch_model import accepts, tensors_in
from qft_plugin.job.checkpoint import digest, digests
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.start import initialize, start
from qft_plugin.report.progress import phase
from qft_plugin.training.data import Inputs, as_call, check_batches
from qft_plugin.training.integers import DeployedWeight, deployed_weights
from qft_plugin.training.loss import Network
from qft_plugin.training.student import Unfold

logger = logging.getLogger("qft_plugin")

LISTED: Final = 3
"""How many quantizers a warning names."""


@dataclass(frozen=True)
class Brevitas:
    """The host of one job; see `job.host.Host`.

    Attributes:
        model: the user's model.
        data: batches of unlabeled inputs.
        float_model: the teacher; `None` where nothing trains yet.
        calibrates: choose the start anew, else that which the model holds is trained.
        swaps: `model` is a float one, whose layers become Brevitas' own in a copy; else it is changed itself.
        example_input: one input to trace a float model with; `None` takes the first images.
        head_items: see `Host`.
        name: likewise.
    """

    model: nn.Module
    data: Iterable[Any]
    float_model: nn.Module | None
    calibrates: bool
    swaps: bool = False
    example_input: Any = None
    head_items: int = 0
    name: str = "brevitas"

    def asked(self) -> Mapping[str, str]:
        """Return which of the functions for users runs, and digests of teacher and example, where they are others."""
        asked = {"calibrates": str(self.calibrates), "swaps": str(self.swaps)}
        if self.float_model is not None and self.float_model is not self.model:
            asked |= {f"teacher {name}": found for name, found in digests(self.float_model).items()}
        example = list(tensors_in(self.example_input))
        return asked | {f"example_input {number}": digest(t) for number, t in enumerate(example)}

    def items(self) -> Iterable[Any]:
        """Return the batches.

        Raises:
            DataError: there can be none in it.
        """
        check_batches(self.data)
        return self.data

    def read(self, inputs: Inputs, config: QFTConfig) -> Source:
        """Link the model, after it was made from a float one where that is asked for."""
        model, call = self.model, inputs.first()
        pruned: dict[str, Tensor] = {}
        if self.swaps:
            example = self.example_input
            traced = call if example is None else as_call(example, accepts=accepts(model))
            model, pruned = swap(model, traced, inputs, config)
        source = link_on(model, call, explicit=config.hardware.activation_scale == "explicit")
        return replace(source, kept={name: mask for name, mask in pruned.items() if name in source.weights})

    def teacher(self, problem: Problem[Source]) -> Network | None:
        """Return the float model as a function."""
        if self.float_model is None:
            return None
        return teacher(self.float_model, problem.source, problem.at, problem.inputs.first())

    def initialize(self, problem: Problem[Source], config: QFTConfig) -> Start[Placed]:
        """Choose where the finetune starts: it trains what the model holds, before or after calibration."""
        if self.calibrates:
            chosen = initialize(self, problem, config)
            if self.float_model is None or config.finetune is None:
                return chosen
            write(problem.source, chosen, deployed_weights(chosen.dof))
            problem = replace(problem, source=problem.source.again())
        else:
            _look_at_start(problem.source)
        factors = shared_factors(problem.source.linked)
        assert factors is not None
        with phase("taking over the start"):
            return start(
                replace(self, calibrates=False),
                problem,
                replace(config, activation_range="host"),
                log_c=factors.log_c.detach().clone(),
                compensate=False,
            )

    def place(self, source: Source, tensors: Mapping[str, Tensor], inputs: Inputs) -> Placed:
        """Describe the quantizers that the model has."""
        return place(source, tensors, inputs, calibrate=self.calibrates)

    def student(
        self, problem: Problem[Source], placed: Placed, unfolds: Sequence[Unfold | None], *, compiled: bool
    ) -> Student:
        """Give the twin's stand-ins their grids."""
        return Student(placed, problem.source, problem.at, unfolds, compiled=compiled)

    def write(
        self, problem: Problem[Source], start: Start[Placed], deployed: Mapping[str, DeployedWeight]
    ) -> nn.Module:
        """Put the degrees of freedom into the linked model."""
        write(problem.source, start, deployed)
        keep_images(problem.source.linked, problem.inputs.laid_out(channels_last=False))
        return problem.source.linked


def _look_at_start(source: Source) -> None:
    """Warn where activations would train from the range of an example, and log where no job has chosen a start."""
    missing = [name for name, scaling in source.activations.items() if not scaling.calibrated]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        warn(
            "Quantizers of activations should have ranges from several batches before a finetune. Found "
            f"{len(missing)} of {len(source.activations)} that have seen one example, or nothing: "
            f"{', '.join(missing[:LISTED])}{more}. Call qft_plugin.brevitas.initialize(model, data, config) first; it "
            "chooses ranges, and weights whose rounding errors compensate each other.",
            stacklevel=2,
        )
    elif not kept_images(source.linked):
        logger.info("finetune: the start is what the quantizers have; initialize was not called on this model")
