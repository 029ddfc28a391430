"""A dry run of a job: everything that it would decide, and what it would cost, with nothing trained and kept."""

import contextlib
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, TextIO

import torch
from torch import Tensor

from qft_plugin.config import FinetuneConfig, QFTConfig
from qft_plugin.errors import QFTWarning
from qft_plugin.graph.surroundings import undisturbed
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job.accumulators import check_accumulators
from qft_plugin.job.expected import Measured, Scale, batch_size_of, cost_of, file_bytes, memory_of
from qft_plugin.job.health import warn_of_targets
from qft_plugin.job.host import Host, Placed, PlacedT, Problem, Source, SourceT, Start
from qft_plugin.job.layers import layers_of
from qft_plugin.job.planned import activations_of, degrees_of, float_bytes, planned_layers
from qft_plugin.job.report import compared_at
from qft_plugin.job.run import check_start, predicted, targets_of, train
from qft_plugin.job.understand import images, understand
from qft_plugin.report.inspection import Inspection
from qft_plugin.report.progress import following, phase
from qft_plugin.training.distributed import agreed
from qft_plugin.training.integers import deployed_weights
from qft_plugin.training.loss import Prediction
from qft_plugin.training.phases import Step
from qft_plugin.training.teacher import Recomputed, Targets

logger = logging.getLogger("qft_plugin")

LOOKED_AT: Final = 64
"""Images that a dry run reads."""

WARM_UP: Final = 2
TIMED: Final = 3


def inspect(host: Host[SourceT, PlacedT], config: QFTConfig, *, items: int | None, once: bool = False) -> Inspection:
    """Do what a job does up to where it trains, but for compensation, on a few images; random numbers stay as they are.

    Args:
        host: has the user's model and dataset, and the quantizers; its `write` is not called.
        config: the settings.
        items: how many items the dataset has; `None` where it does not say.
        once: the dataset can be iterated over once only.

    Raises:
        QFTError: what the job would raise before it trains, as far as the first images show it.
    """
    heard: list[str] = []
    head = _Head(host.items())
    with undisturbed(), _listening(heard), following():
        begin = time.perf_counter()
        settings = config.finetune or FinetuneConfig()
        few = replace(settings, max_images=min(settings.max_images, LOOKED_AT))
        with phase("images"):
            inputs = images(host.model, head, replace(config, finetune=few), head_items=host.head_items)
        read = time.perf_counter()
        with agreed(inputs.world):
            with phase("reading the model"):
                source = host.read(inputs, config)
                problem = understand(source, inputs, config)
            understood = time.perf_counter()
            targets = targets_of(host, problem, config)
            compared = time.perf_counter()
            start = host.initialize(problem, replace(config, compensate=False, bias_correction=False))
        started = time.perf_counter()
        deployed = deployed_weights(start.dof)
        check_accumulators(start.dof, deployed)
        if isinstance(targets, Targets):
            warn_of_targets(targets, problem.at.weights(targets.count), problem.inputs)
        degrees = degrees_of(start.dof)
        with phase("timing"):
            measured = Measured(read - begin, understood - read + started - compared, *_forward(start, problem))
            prediction, kept = None, 0
            if targets is None or config.finetune is None:
                check_start(start, problem)
            else:
                kept = _kept_by_step(start, problem, config.finetune)
                measured, prediction = _timed(host, start, problem, targets, config, measured)
    if once:
        heard.append(
            "The dataset should be one that can be iterated over again, such as a list or a DataLoader. Found an "
            f"iterator, of which this dry run has taken {len(inputs.sizes)} items: quantize will not see them."
        )
    scale = _scale(head, items, len(inputs), settings)
    layers = layers_of(host, problem, start, deployed, config=config)
    return Inspection(
        host=host.name,
        model=type(host.model).__name__,
        compared_at=compared_at(problem, config),
        layers=planned_layers(layers, source, start, config),
        activations=activations_of(source, start.placed.placement),
        degrees=degrees,
        float_bytes=float_bytes(host.model),
        file_bytes=file_bytes(source, start, host.name),
        cost=cost_of(measured, scale, start, source, inputs=inputs, config=config),
        memory=memory_of(scale, prediction, kept, source, inputs=inputs, config=config),
        warnings=tuple(dict.fromkeys(heard)),
        refusals=_refusals(start, host.name),
    )


class _Head:
    """A dataset of which the first items are read; notes how many images the first one has, and whether all were."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self.first, self.ended = 0, False

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self._items):
            if not number:
                tensor = next(tensors_in(item), None)
                self.first = tensor.shape[0] if tensor is not None and tensor.dim() else 0
            yield item
        self.ended = True


def _scale(head: _Head, items: int | None, seen: int, settings: FinetuneConfig) -> Scale:
    """Say how many images a job would read."""
    if head.ended:
        return Scale(seen, known=True, seen=seen)
    if items is None:
        return Scale(settings.max_images, known=False, seen=seen)
    return Scale(max(seen, min(settings.max_images, items * head.first)), known=True, seen=seen)


class _Ear(logging.Handler):
    """Adds what is logged as a warning to a list."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(record.getMessage())


@contextlib.contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """Collect the warnings of this library, as they come; those of others go where they always go."""
    ear, shown = _Ear(heard), warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, QFTWarning):
            heard.append(str(message))
        else:
            shown(message, category, filename, lineno, file, line)

    logger.addHandler(ear)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", QFTWarning)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(ear)


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Let a training that is thrown away say nothing."""

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QFTWarning)
            yield
    finally:
        logger.removeFilter(nothing)


def _median_of(run: Callable[[], object]) -> float:
    """Return the seconds of a call: the median of a few, after a few that do not count."""
    times = []
    for _ in range(WARM_UP + TIMED):
        begin = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def _wait() -> None:
    """Wait until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def _forward(start: Start[Placed], problem: Problem[Source]) -> tuple[float, int]:
    """Time one run of the folded network; returns the seconds and how many images it had."""
    inputs = problem.inputs
    size = min(len(inputs), inputs.at_once(LOOKED_AT))
    call = inputs.first(size)
    return _median_of(lambda: start.student.watch(start.placed.tensors, call, {})), inputs.fitting(size)


def _timed(
    host: Host[SourceT, PlacedT],
    start: Start[PlacedT],
    problem: Problem[SourceT],
    targets: Targets | Recomputed,
    config: QFTConfig,
    measured: Measured,
) -> tuple[Measured, Prediction]:
    """Time a batch of the teacher, and steps of a real finetune, whose result is thrown away."""
    settings, inputs = config.finetune, problem.inputs
    assert settings is not None
    teacher = host.teacher(problem)
    assert teacher is not None
    size = inputs.fitting(min(len(inputs), inputs.at_once(LOOKED_AT)))
    call = inputs.first(size)
    with torch.no_grad():
        seconds = _median_of(lambda: teacher(call))
        prediction = teacher(call)
    ends: list[float] = []

    def note(_: Step) -> None:
        _wait()
        ends.append(time.perf_counter())

    batch = batch_size_of(settings, len(inputs), inputs)
    count = (1 + WARM_UP + TIMED) * (1 + len(settings.blocks))
    short = replace(settings, images_fed=count * batch)
    with _in_silence():
        train(start, problem, targets, replace(config, finetune=short), callback=note)
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    times = gaps[WARM_UP:] or gaps or [0.0]  # a loss that is not finite ends a finetune early
    # Of several phases each has a cost of its own.
    step = statistics.fmean(times) if settings.blocks else statistics.median(times)
    return replace(measured, teacher=seconds, teacher_images=size, step=step), prediction


def _kept_by_step(start: Start[Placed], problem: Problem[Source], settings: FinetuneConfig) -> int:
    """Return the bytes that a step holds: what its gradients need, gradients, optimizer, and the best state."""
    inputs, dof = problem.inputs, start.dof
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    call = inputs.first(batch_size_of(settings, len(inputs), inputs))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prediction = predicted(start, settings, call)
    del prediction
    state: int = sum(t.numel() * t.element_size() for t in dof.state_dict().values())
    trained: int = sum(p.numel() * p.element_size() for p in dof.parameters() if p.requires_grad)
    return sum(seen.values()) + 3 * trained + state


def _refusals(start: Start[Placed], host: str) -> tuple[str, ...]:
    """Name what a save is known to refuse."""
    doubly = [name for name, grid in start.dof.weight_grids.items() if grid.scale_in is not None]
    if doubly and host == "brevitas":
        return (
            "save_qcdq refuses scales that differ by input channel, as HardwareSpec.doubly_per_channel and "
            f"QFTInt4WeightDoublyPerChannelFloat ask for, in {', '.join(doubly)}. save_qonnx writes them.",
        )
    return ()
