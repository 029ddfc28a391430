"""The whole job step by step, the same for every host."""

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from qft_plugin.config import FinetuneConfig, QFTConfig
from qft_plugin.errors import ConfigError, QFTError, collected_warnings, warn
from qft_plugin.graph.layer_graph import DofMap
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.accumulators import check_accumulators
from qft_plugin.job.checkpoint import identity_of
from qft_plugin.job.health import check_squares, is_finite, not_finite, warn_of_targets
from qft_plugin.job.host import Host, Placed, PlacedT, Problem, Source, SourceT, Start
from qft_plugin.job.layer_errors import Measured, measure, with_errors
from qft_plugin.job.report import About, agreement_of, report_of_job
from qft_plugin.job.understand import images, understand
from qft_plugin.report.data import Report
from qft_plugin.report.kept import keep_report
from qft_plugin.report.progress import Advance, Progress, following, phase
from qft_plugin.tensors.partial_gradients import PartialBackward
from qft_plugin.training.blocks import split
from qft_plugin.training.data import Inputs
from qft_plugin.training.distributed import agreed
from qft_plugin.training.dof import parameter_groups
from qft_plugin.training.efqat import PartialTraining, release
from qft_plugin.training.finetune import PART, FinetuneResult, Goal, finetune
from qft_plugin.training.integers import deployed_weights
from qft_plugin.training.keeping import FORGETFUL, Keeper, take_state
from qft_plugin.training.loss import Loss, Network, Prediction
from qft_plugin.training.phases import Options, Phase, Step
from qft_plugin.training.solve import solve
from qft_plugin.training.student import copies_for_gradients
from qft_plugin.training.teacher import Recomputed, Targets, images_meet, is_random, teacher_predictions

logger = logging.getLogger("qft_plugin")

Callback = Callable[[Step], None]

TEACHER_BATCH: Final = 64

USELESS: Final = 0.3
"""Normalised L2 from which on a result is of little use. ResNet-20 agreed with float on 93 % of test images at 0.02, 89
at 0.08, 85 at 0.10, 81 at 0.14, 79 at 0.25, 71 at 0.30, 48 to 66 at 0.33, and on 10 % and less above 0.70."""

USELESS_DIVERGENCE: Final = 1.0
"""Likewise of the divergence of class probabilities: 93 % at 0.02, 68 % and less above 2."""


@dataclass(frozen=True)
class Job:
    """The result of one quantization.

    Attributes:
        model: the quantized model, the host's own kind.
        dof_map: which per-channel scales were shared, free, or pinned.
        result: how the finetune went; `None` where none was asked for.
        report: what the job did, and how good its result is; the model keeps it too.
    """

    model: nn.Module
    dof_map: DofMap
    result: FinetuneResult | None
    report: Report

    def __repr__(self) -> str:
        """Say in one short line what it is."""
        return f"Job({self.report!r})"


def run(
    host: Host[SourceT, PlacedT],
    config: QFTConfig,
    *,
    callback: Callback | None = None,
    keeper: Keeper = FORGETFUL,
) -> Job:
    """Quantize a model: the steps of a job, each of which is described where it stands.

    Of several processes, all fail together up to where training begins.

    Args:
        host: has the user's model and dataset, and the quantizers.
        config: the settings.
        callback: called after each finetuning step.
        keeper: keeps the work now and then, and has what an earlier run of the same job has kept.
    """
    with following() as progress:
        with phase("images"):
            inputs = images(host.model, host.items(), config, head_items=host.head_items)
        return finished(run_on(inputs, host, config=config, callback=callback, keeper=keeper).job, progress)


@dataclass(frozen=True)
class Ended:
    """A job that is done, while all that it was made with is still at hand.

    Attributes:
        job: its result.
        start: holds the degrees of freedom at the end.
        problem: the network and the images.
    """

    job: Job
    start: Start[Placed]
    problem: Problem[Source]


def run_on(
    inputs: Inputs,
    host: Host[SourceT, PlacedT],
    *,
    config: QFTConfig,
    callback: Callback | None = None,
    keeper: Keeper = FORGETFUL,
) -> Ended:
    """Quantize a model on images that were read: all of a job but its first step, and but telling of it.

    Args:
        inputs: the images.
        host: has the user's model and the quantizers.
        config: the settings.
        callback: called after each finetuning step.
        keeper: as in `run`.
    """
    keeper.identify(lambda: identity_of(host.model, inputs, config, host=host.name, asked=host.asked()))
    with collected_warnings() as warned, following() as progress:
        with agreed(inputs.world):
            with phase("reading the model"):
                problem = replace(understand(host.read(inputs, config), inputs, config), keeper=keeper)
            targets = targets_of(host, problem, config)
            start = host.initialize(problem, config)
        result = train(start, problem, targets, config, callback=callback)
        deployed = deployed_weights(start.dof)
        if targets is not None or config.finetune is None:  # else a job that trains will say so
            check_accumulators(start.dof, deployed)
        agreement = None
        if result is None:
            with phase("comparing"):
                with agreed(inputs.world):
                    counted = agreement_of(start, problem)
                agreement = counted.of_all(inputs.world)
        measured = analysed(start, problem, config) if config.analyse else None
        with phase("writing"):
            model = host.write(problem, start, deployed)
        about = About(host, agreement, warned, progress.seconds)
        report = report_of_job(problem, start, deployed, config, result, about)
        report = report if measured is None else with_errors(report, measured)
        return Ended(Job(model, problem.source.dof_map, result, report), start, problem)


def analysed(start: Start[Placed], problem: Problem[Source], config: QFTConfig) -> Measured:
    """Measure the errors of the layers, as a phase of the job."""
    with phase("measuring layers"), agreed(problem.inputs.world):
        return measure(start, problem, config)


def finished(job: Job, progress: Progress) -> Job:
    """Keep the report of a job with its model, and tell the user of it."""
    keep_report(job.model, job.report)
    logger.info("%s", job.report)
    progress.say(str(job.report))
    return job


def targets_of(
    host: Host[SourceT, PlacedT], problem: Problem[SourceT], config: QFTConfig
) -> Targets | Recomputed | None:
    """Run the teacher once over the images of this process; without a finetune there is nothing to compare with.

    Args:
        host: makes the teacher.
        problem: the result of `understand`.
        config: the settings.
    """
    settings = config.finetune
    teacher = None if settings is None else host.teacher(problem)
    if settings is None or teacher is None:
        return None
    with phase("teacher", total=len(problem.inputs.share)) as advance:
        return _targets(teacher, problem, settings, advance)


def _targets(
    teacher: Network, problem: Problem[Source], settings: FinetuneConfig, advance: Advance
) -> Targets | Recomputed:
    random = is_random(teacher, problem.inputs)
    if random or images_meet(teacher, problem.inputs):
        warn(
            (
                "The model should compute the same for the same images. Found that it does not: in eval mode something "
                "random is still active, such as functional.dropout without training=self.training, and the "
                "student learns from noisy outputs. A file leaves a dropout out, and can be made of nothing else that "
                "is random."
            )
            if random
            else (
                "The output of the model for an image should not depend on the other images of the batch. Found that "
                "it does, so the teacher runs again in every step. Where the first axis is not that of the images (of "
                "sequences in front of batches, for example), put it first."
            ),
            stacklevel=2,
        )
        first = teacher(problem.inputs.first())
        _check_logits(settings, first.logits)
        return Recomputed(teacher, problem.inputs.share, len(first.features), settings.cross_entropy > 0)
    size = max(settings.batch_size, TEACHER_BATCH)
    share = problem.inputs.share

    def counted(call: Call) -> Prediction:
        prediction = teacher(call)
        advance(len(next(iter([*call[0], *call[1].values()]))))
        return prediction

    targets = teacher_predictions(counted, share, batch_size=size, memory_limit=settings.memory_limit)
    check_squares(targets, problem.at.weights(len(targets.features)), problem.inputs)
    _check_logits(settings, targets.logits)
    return replace(targets, logits=targets.logits if settings.cross_entropy else None)


def _check_logits(settings: FinetuneConfig, logits: object) -> None:
    if settings.cross_entropy and logits is None:
        raise ConfigError(
            "FinetuneConfig.cross_entropy should be 0 for a model that does not return one tensor [images, classes]. "
            f"Found {settings.cross_entropy}."
        )


def train(
    start: Start[Placed],
    problem: Problem[Source],
    targets: Targets | Recomputed | None,
    config: QFTConfig,
    *,
    callback: Callback | None,
) -> FinetuneResult | None:
    """Finetune against the teacher's outputs; leaves the best state in `start.dof`.

    Args:
        start: the result of `initialize`.
        problem: the result of `understand`.
        targets: the result of `targets_of`.
        config: the settings; without a finetune in them the start is looked at, and nothing trains.
        callback: called after each finetuning step.

    Raises:
        ModelError: the student computes NaN or infinity at the start.
    """
    settings = config.finetune
    if settings is None:
        check_start(start, problem)
    if settings is None or targets is None:
        return None
    with phase("finetune") as advance:

        def told(step: Step) -> None:
            advance(note=f"loss {step.loss:#.3g}", total=step.total)
            if callback is not None:
                callback(step)

        try:
            result = _finetuned(start, problem, targets, settings, told)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            # `a += 1` after a layer has read `a` is nothing wrong where nothing trains. The first step has found it.
            result = _finetuned(start, problem, targets, settings, told, copies=True)
    _warn_of_loss(result, settings)
    return result


@torch.no_grad()
def check_start(start: Start[Placed], problem: Problem[Source]) -> None:
    """Refuse a start that computes NaN or infinity, where no finetune follows that would look at its loss.

    Raises:
        ModelError: it names where the first number that is not finite is computed.
    """
    call, solution = problem.inputs.first(TEACHER_BATCH), solve(start.dof)
    # One run is not worth compiling for.
    with torch.compiler.set_stance("force_eager"):
        prediction = start.student(solution, call)
    if not is_finite(prediction):
        raise not_finite(start.student, problem.source.graph, start.placed.placement, solution, [call])


def _warn_of_loss(result: FinetuneResult, settings: FinetuneConfig) -> None:
    """Warn of a result that agrees with the float network too little to be of use."""
    p = settings.cross_entropy
    limit = (1 - p) * USELESS + p * USELESS_DIVERGENCE
    if result.final_loss > limit:
        warn(
            f"Finetune: the loss should end below {limit:.2g}. Found {result.final_loss:.3g} (of the float network: 0, "
            "of activations that are all 0: 1), with which a classifier names another class than the float network on "
            "a quarter to all of the images. Use more bits (weight_bits, layer_bits, HardwareSpec.bias_bits, "
            "activation_bits), less sparsity, or feed more images (FinetuneConfig.images_fed).",
            stacklevel=3,
        )


def predicted(start: Start[Placed], settings: FinetuneConfig, call: Call, *, copies: bool = False) -> Prediction:
    """Run the student in the present state of its degrees of freedom, with gradients to those that train.

    Args:
        start: the result of `initialize`.
        settings: of the finetune.
        call: the batch.
        copies: keep copies of tensors that the gradients need, because the network works in place.
    """
    solution = solve(start.dof)
    # The state that is kept is chosen by a loss in full precision.
    low = settings.precision == "bfloat16" and torch.is_grad_enabled()
    with (
        torch.autocast(start.dof.log_c.device.type, torch.bfloat16) if low else contextlib.nullcontext(),
        PartialBackward(solution.partial) if solution.partial else contextlib.nullcontext(),
        copies_for_gradients() if copies and torch.is_grad_enabled() else contextlib.nullcontext(),
    ):
        prediction = start.student(solution, call)
    return prediction.to(torch.float32) if low else prediction


def _finetuned(
    start: Start[Placed],
    problem: Problem[Source],
    targets: Targets | Recomputed,
    settings: FinetuneConfig,
    callback: Callback | None,
    *,
    copies: bool = False,
) -> FinetuneResult:
    dof = start.dof
    loss = Loss(problem.at.weights(targets.count), settings.cross_entropy)
    part = settings.trains_part
    if isinstance(targets, Targets):  # else the teacher runs along
        warn_of_targets(targets, loss.weights, problem.inputs)
    if part is not None:
        # The choice of what trains depends on every bit of the state; `finetune` shares it where all trains.
        problem.inputs.world.share_state(dof)
    try:
        partial = None if part is None else PartialTraining(dof, part)
        saved = problem.keeper.saved(PART)
        if saved is not None:
            take_state(dof, partial, saved)
        return finetune(
            functools.partial(predicted, start, settings, copies=copies),
            dof,
            _phases(start, problem, loss, settings),
            goal=Goal(problem.inputs, targets, loss),
            config=settings,
            options=Options(
                callback=callback,
                schedule=dof.set_progress,
                penalty=dof.penalty,
                partial=partial,
                not_finite=functools.partial(_not_finite, start, problem),
                keeper=problem.keeper,
                resumed=saved,
            ),
        )
    finally:
        release(dof)


def _not_finite(start: Start[Placed], problem: Problem[Source]) -> QFTError:
    share = problem.inputs.share
    calls = share.batches(share.at_once(TEACHER_BATCH))
    return not_finite(start.student, problem.source.graph, start.placed.placement, solve(start.dof), calls)


def _phases(start: Start[Placed], problem: Problem[Source], loss: Loss, settings: FinetuneConfig) -> list[Phase]:
    """Plan the phases: everything at once, or one block after the other."""
    dof, at, ends = start.dof, problem.at, problem.at.inputs[: problem.at.blocks]
    grouped = functools.partial(
        parameter_groups,
        dof,
        learning_rate=settings.learning_rate,
        scale_learning_rate=settings.scale_learning_rate,
    )
    if not ends:
        return [Phase(loss, grouped())]
    phases = []
    for number, block in enumerate(split(problem.source.graph, dof.map, start.placed.placement, ends)):
        factors = block.factors.to(dof.log_c.device)
        groups = grouped(layers=block.layers, quantizers=block.quantizers, factors=bool(factors.any()))
        alone = Loss(tuple(float(n == number) for n in range(len(loss.weights))), 0.0)
        if any(group["params"] for group in groups):
            phases.append(Phase(alone if number < at.blocks else loss, groups, [(dof.log_c, factors)]))
    return phases
