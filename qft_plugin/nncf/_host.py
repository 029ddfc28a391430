"""NNCF as a host of a job."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.deploy.images import keep_images
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.start import initialize
from qft_plugin.nncf._attach import Student, teacher
from qft_plugin.nncf._place import Placed, place
from qft_plugin.nncf._read import Source, read
from qft_plugin.nncf._request import Request
from qft_plugin.nncf._write import write
from qft_plugin.training.data import Inputs
from qft_plugin.training.integers import DeployedWeight
from qft_plugin.training.loss import Network
from qft_plugin.training.student import Unfold


@dataclass(frozen=True)
class NNCF:
    """The host of one job; see `job.host.Host`.

    Attributes:
        model: the user's model.
        request: the user's request to NNCF.
        head_items: how many of the first items every one of several processes keeps, at least.
        name: see `Host`.
    """

    model: nn.Module
    request: Request
    head_items: int
    name: str = "nncf"

    def asked(self) -> Mapping[str, str]:
        """Return the other arguments of `nncf.quantize`, in words."""
        return {name: repr(value) for name, value in self.request.settings.items()}

    def items(self) -> Iterable[Any]:
        """Iterate over the model's inputs."""
        return self.request.items()

    def read(self, inputs: Inputs, config: QFTConfig) -> Source:
        """Trace a copy of the model, with every BatchNorm folded that can be."""
        return read(self.model, inputs, config)

    def teacher(self, problem: Problem[Source]) -> Network:
        """Return the untouched model as a function."""
        return teacher(problem.source, problem.at)

    def initialize(self, problem: Problem[Source], config: QFTConfig) -> Start[Placed]:
        """Choose where the finetune starts; NNCF's models hold no start."""
        return initialize(self, problem, config)

    def place(self, source: Source, tensors: Mapping[str, Tensor], inputs: Inputs) -> Placed:
        """Let NNCF place and calibrate its quantizers."""
        return place(source, tensors, self.request, inputs)

    def student(
        self, problem: Problem[Source], placed: Placed, unfolds: Sequence[Unfold | None], *, compiled: bool
    ) -> Student:
        """Replace NNCF's quantizers by light ones."""
        return Student(placed, problem.source, problem.at, unfolds, compiled=compiled)

    def write(
        self, problem: Problem[Source], start: Start[Placed], deployed: Mapping[str, DeployedWeight]
    ) -> nn.Module:
        """Put the trained tensors and NNCF's own quantizers into the model that NNCF made."""
        quantized = write(start.placed, start.dof, deployed)
        keep_images(quantized, problem.inputs.laid_out(channels_last=False))
        return quantized
