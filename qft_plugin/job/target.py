"""Bit widths that meet a target: a mean bit width, an agreement with the float network, or the user's own measure."""

import contextlib
import glob
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from qft_plugin.config import QFTConfig
from qft_plugin.errors import ConfigError, QFTWarning, collected_warnings, warn
from qft_plugin.graph.torch_model import evaluating, tensors_in
from qft_plugin.job.host import Host, PlacedT, SourceT
from qft_plugin.job.layer_errors import with_errors
from qft_plugin.job.raising import WIDE, Analysis, Candidate, analyse, between, enough, extra_of, within
from qft_plugin.job.run import Callback, Ended, Job, analysed, finished, run, run_on
from qft_plugin.job.understand import images, understand
from qft_plugin.report.progress import following, phase
from qft_plugin.training.data import Inputs
from qft_plugin.training.keeping import FORGETFUL, Keeper
from qft_plugin.training.loss import classes_of

MOST_JOBS: Final = 5
"""Jobs on the way to a target of accuracy, at most: with no layer raised, with the layers that the errors ask for, and
three on the way between what was too little and what was enough."""

ROUNDED: Final = 1e-9
"""What a difference of two scores may be off by their rounding: a drop of 0.1 from 0.8 is more than 0.1 in floats."""

FEW: Final = 4
"""Images that a result may name otherwise than the float network; with fewer, one of them more or less decides."""

CLOSE: Final = 0.02
"""Share of the bits that all layers take, below which two choices need no third one between them."""


def run_to_target(
    host: Host[SourceT, PlacedT],
    config: QFTConfig,
    *,
    callback: Callback | None = None,
    keeper: Keeper = FORGETFUL,
) -> Job:
    """Quantize a model so that the target of the settings is met, or as `job.run.run` does where they have none.

    The images are read once. A mean bit width takes an analysis of the layers and one job; a target of accuracy takes
    one job where that meets it, else an analysis and two to `MOST_JOBS` jobs.

    Args:
        host: has the user's model and dataset, and the quantizers; bit widths are those of the settings.
        config: the settings.
        callback: called after each finetuning step of each job.
        keeper: keeps the work now and then, and has what an earlier run of the same call has kept.

    Raises:
        ConfigError: the target does not fit the model, or several processes train.
    """
    if not config.has_target:
        return run(host, config, callback=callback, keeper=keeper)
    with following() as progress:
        with phase("images"):
            inputs = images(host.model, host.items(), config, head_items=host.head_items)
        if inputs.world.size > 1:
            raise ConfigError(
                f"QFTConfig should have no target where several processes train. Found {inputs.world.size}. Find the "
                "bit widths in one process, and pass them as QFTConfig.layer_bits."
            )
        plain = replace(config, average_bits=None, target_agreement=None, evaluate=None, max_drop=None, analyse=False)
        jobs = _Jobs(host, inputs, plain, callback, keeper)
        best = _of_size(jobs, config) if config.average_bits is not None else _as_small_as_possible(jobs, config)
        report = replace(best.ended.job.report, decisions=tuple(jobs.decisions))
        reason = f"{_setting(config)}: raised to {WIDE} bits"
        layers = [replace(la, reason=reason) if la.weight in best.raised else la for la in report.layers]
        report = replace(report, layers=tuple(layers), warnings=(*report.warnings, *jobs.warnings))
        if config.analyse:
            report = with_errors(report, analysed(best.ended.start, best.ended.problem, plain))
        report = replace(report, seconds=dict(progress.seconds))
        return finished(replace(best.ended.job, report=report), progress)


def _setting(config: QFTConfig) -> str:
    names = ("average_bits", "target_agreement", "max_drop")
    return next(name for name in names if getattr(config, name) is not None)


@dataclass(frozen=True)
class _Tried:
    """One job.

    Attributes:
        ended: the job.
        raised: names of the weights that were raised.
        missing: by how much it misses the target; 0 or less where it meets it.
        words: what was found, in words.
    """

    ended: Ended
    raised: frozenset[str]
    missing: float = 0.0
    words: str = ""

    @property
    def rank(self) -> tuple[float, float]:
        """The smaller the better: what meets the target by its size, what does not by how much it misses."""
        size = sum(layer.weights * (layer.bits or 0) for layer in self.ended.job.report.layers)
        return (max(self.missing, 0.0), size)


class _Jobs:
    """Runs jobs with different bit widths on the same images, and notes what is decided."""

    def __init__(
        self, host: Host[Any, Any], inputs: Inputs, config: QFTConfig, callback: Callback | None, keeper: Keeper
    ) -> None:
        self.host, self.inputs, self._config, self._callback = host, inputs, config, callback
        self._keeper, self._count = keeper, 0
        self.decisions: list[str] = []
        self.warnings: list[str] = []

    def analysis(self) -> Analysis:
        """Find what the rounding of each layer costs, in the network as it is before it is trained."""
        config = replace(self._config, finetune=None, compensate=False, bias_correction=False)
        with _quiet(), phase("measuring layers"):
            problem = understand(self.host.read(self.inputs, config), self.inputs, config)
            found = analyse(self.host.initialize(problem, config), problem, config)
        worst = f", {found.candidates[0].weight} the worst for its size" if found.candidates else ""
        self.decisions.append(
            f"Measured on {found.images} images what rounding costs in {len(found.candidates)} layers{worst}."
        )
        return found

    def run(self, raised: Sequence[Candidate]) -> Ended:
        """Run a job with some layers raised."""
        bits = {**self._config.layer_bits, **{glob.escape(c.weight): WIDE for c in raised}}
        config, self._count = replace(self._config, layer_bits=bits), self._count + 1
        keeper = self._keeper.inner(f"job_{self._count}")
        return run_on(self.inputs, self.host, config=config, callback=self._callback, keeper=keeper)

    def warn(self, message: str) -> None:
        """Warn, in the report of the result too."""
        with collected_warnings() as found:
            warn(message, stacklevel=4)
        self.warnings += found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of jobs back, of which only one is returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QFTWarning)
        yield


def _of_size(jobs: _Jobs, config: QFTConfig) -> _Tried:
    """Run the job whose mean bit width is at most that of the settings."""
    assert config.average_bits is not None
    analysis = jobs.analysis()
    least = analysis.average(())
    if least > config.average_bits * (1 + 1e-9):
        raise ConfigError(
            f"QFTConfig.average_bits should be at least what the other settings ask for, {least:.4g} bits on average. "
            f"Found {config.average_bits}. Raise it, lower weight_bits or layer_bits, or set small_layer_share to 0."
        )
    raised = within(analysis, config.average_bits)
    jobs.decisions.append(
        f"{_names(raised)} raised to {WIDE} bits: {analysis.average(raised):.4g} bits on average, of at most "
        f"{config.average_bits:g}."
    )
    return _Tried(jobs.run(raised), frozenset(c.weight for c in raised))


def _as_small_as_possible(jobs: _Jobs, config: QFTConfig) -> _Tried:
    """Run jobs until one meets the target with few bits, and none that is much smaller does."""
    aim = _aim(jobs, config)
    best = first = _tried(jobs, aim, [], None)
    if first.missing > 0:
        analysis = jobs.analysis()
        best = min([first, *_search(jobs, aim, analysis, first)], key=lambda tried: tried.rank)
        raised, count = len(best.raised), len(analysis.candidates)
        if best.missing > 0:
            jobs.warn(
                f"{aim.words} should be met by some choice of bit widths. Found {best.words} at best, with {raised} of "
                f"{count} layers at {WIDE} bits, and not with all of them. This result is returned. Feed more images "
                "(FinetuneConfig.images_fed), give activations more bits, or ask for less."
            )
        jobs.decisions.append(
            f"Returned the result with {raised} of {count} layers raised: {best.words}, the target is "
            f"{'met' if best.missing <= 0 else 'not met'}."
        )
    for message in best.ended.job.report.warnings:  # they were kept back while it was one of several
        warn(message, stacklevel=3)
    return best


def _search(jobs: _Jobs, aim: "_Aim", analysis: Analysis, first: _Tried) -> list[_Tried]:
    """Try numbers of layers, worst first, between what is too little and what is enough; returns the best of them."""
    order, best = analysis.candidates, list[_Tried]()
    low, high, count = 0, None, max(1, enough(analysis, aim.share(first.missing)))
    for left in range(MOST_JOBS - 2, -1, -1):
        if not order:
            break
        tried = _tried(jobs, aim, order[:count], analysis)
        best = [min([*best, tried], key=lambda t: t.rank)]
        low, high = (low, count) if tried.missing <= 0 else (count, high)
        if high is None and low == len(order):
            break
        top = len(order) if high is None else high
        apart = extra_of(order, top) - extra_of(order, low)
        if high is not None and (high - low < 2 or apart <= CLOSE * extra_of(order, len(order))):
            break
        # The last job says whether the target can be met at all.
        count = top if top - low < 2 or (high is None and left == 1) else between(order, low, top)
    return best


def _tried(jobs: _Jobs, aim: "_Aim", raised: Sequence[Candidate], analysis: Analysis | None) -> _Tried:
    with _quiet():
        ended = jobs.run(raised)
    missing, words = aim.look(ended)
    missing = missing if missing > ROUNDED else 0.0
    what = "no layer" if analysis is None else f"{_names(raised)}, {analysis.average(raised):.4g} bits on average"
    met = "enough" if missing <= 0 else "not enough"
    jobs.decisions.append(f"Raised to {WIDE} bits: {what}. Found {words}: {met}.")
    return _Tried(ended, frozenset(c.weight for c in raised), missing, words)


@dataclass(frozen=True)
class _Aim:
    """A target of accuracy.

    Attributes:
        words: the setting, as in a message.
        allowed: by how much a result may be worse than the float network.
        look: returns by how much more a result is worse, and what was found in words.
    """

    words: str
    allowed: float
    look: Callable[[Ended], tuple[float, str]]

    def share(self, missing: float) -> float:
        """Return which share of the cost may remain: images that are named differently go with the root of the cost.

        Args:
            missing: by how much the target was missed.
        """
        return (self.allowed / (self.allowed + missing)) ** 2


def _aim(jobs: _Jobs, config: QFTConfig) -> _Aim:
    if config.target_agreement is not None:
        return _agreement(jobs, config.target_agreement)
    assert config.evaluate is not None
    assert config.max_drop is not None
    evaluate, allowed = config.evaluate, config.max_drop
    with evaluating(jobs.host.model):
        floating = _number(evaluate, jobs.host.model)

    def look(ended: Ended) -> tuple[float, str]:
        found = _number(evaluate, ended.job.model)
        return floating - found - allowed, f"{found:.6g}, of {floating:.6g} for the float model"

    return _Aim(f"QFTConfig.max_drop={allowed:g}", allowed, look)


@torch.no_grad()
def _number(evaluate: Callable[[Any], float], model: torch.nn.Module) -> float:
    found = evaluate(model)
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"QFTConfig.evaluate should return a finite number. Found {found!r}.")
    return value


def _agreement(jobs: _Jobs, wanted: float) -> _Aim:
    inputs, model = jobs.inputs, jobs.host.model
    args, kwargs = inputs.first()
    with evaluating(model), torch.no_grad():
        outputs = [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]
    if len(outputs) != 1 or classes_of(outputs[0]) is None:
        raise ConfigError(
            "QFTConfig.target_agreement should be None for a model that does not return one tensor [images, classes]. "
            f"Found {wanted}. Use QFTConfig.evaluate and max_drop, or average_bits."
        )
    first, end = inputs.judged_on
    others = (100 - wanted) / 100 * (end - first)
    if 0 < others < FEW:
        jobs.warn(
            f"QFTConfig.target_agreement should be a share that the held-out images can show. Found {wanted} with "
            f"{end - first} images, of which the result may name {others:.2g} otherwise: chance decides. Pass more "
            "images; one of eight is held out."
        )

    def look(ended: Ended) -> tuple[float, str]:
        found = ended.job.report.agreement
        assert found is not None
        return wanted - 100 * found, f"an agreement of {100 * found:.4g} % on {end - first} images"

    return _Aim(f"QFTConfig.target_agreement={wanted:g}", 100 - wanted, look)


def _names(raised: Sequence[Candidate]) -> str:
    return ", ".join(c.weight for c in raised) or "no layer"
