"""Targets under a host of a few lines: what is chosen, what is run, and what is said."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_host import SmallHost
from test_run import network, settings
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.errors import ConfigError, QFTWarning
from qft_plugin.job import target
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.raising import WIDE
from qft_plugin.job.run import Job
from qft_plugin.job.target import MOST_JOBS, run_to_target
from qft_plugin.report.data import Report
from qft_plugin.report.kept import report_of
from qft_plugin.training.distributed import World

ALL = 216 + 576 + 32
"""Weights of the network."""


class Once:
    """A dataset that can be read once."""

    def __init__(self, items: list[Tensor]) -> None:
        self._items, self.read = items, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.read += 1
        assert self.read == 1
        return iter(self._items)


def images(count: int = 64) -> Any:
    return Once([torch.randn(16, 3, 6, 6, dtype=torch.float64) for _ in range(count // 16)])


def untrained(**changes: Any) -> QFTConfig:
    """Return the settings of a coarse start that nothing trains."""
    return replace(settings(weight_bits=2), finetune=None, **changes)


def bits_of(report: Report) -> dict[str, int | None]:
    return {layer.weight: layer.bits for layer in report.layers}


def average(report: Report) -> float:
    return sum(layer.weights * (layer.bits or 0) for layer in report.layers) / ALL


class Scores:
    """Returns given scores one after the other, and keeps the models."""

    def __init__(self, *scores: Any) -> None:
        self.left, self.models = list(scores), list[nn.Module]()

    def __call__(self, model: nn.Module) -> Any:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.models.append(model)
        return self.left.pop(0)


@pytest.mark.parametrize("limit", [2, 2.5, 4, 5.49, 5.5, 8])
def test_a_mean_bit_width_is_kept(limit: float) -> None:
    """It is at most what was asked for, and the next layer would not fit; the images are read once."""
    job = run_to_target(SmallHost(network(), images()), untrained(average_bits=limit))
    assert average(job.report) <= limit
    low = min(layer.weights for layer in job.report.layers if layer.bits == 2) if limit < WIDE else ALL
    assert average(job.report) + (WIDE - 2) * low / ALL > limit
    assert job.report.decisions[0].startswith("Measured on 64 images what rounding costs in 3 layers, ")
    assert len(job.report.decisions) == 2
    assert report_of(job.model) == job.report
    raised = {la.weight for la in job.report.layers if la.bits == WIDE}
    assert {la.weight for la in job.report.layers if la.reason == "average_bits: raised to 7 bits"} == raised


def test_a_mean_bit_width_that_other_settings_exceed() -> None:
    """Small layers with 8 bits, or what the user has fixed, take more than asked for."""
    with pytest.raises(ConfigError, match=r"at least what the other settings ask for, 3.57\d bits.*Found 3"):
        run_to_target(SmallHost(network(), images()), untrained(average_bits=3, layer_bits={"0.weight": 8}))


def test_the_settings_of_the_user_stay() -> None:
    """A layer that has its bits by name or by pattern keeps them, whatever the target is."""
    config = untrained(average_bits=7.9, layer_bits={"[0]*": 3})
    bits = bits_of(run_to_target(SmallHost(network(), images()), config).report)
    assert bits == {"0.weight": 3, "2.weight": 7, "6.weight": 7}


def test_without_a_target_it_is_a_job() -> None:
    """The same model as without this function, and no decision."""
    job = run_to_target(SmallHost(network(), images()), untrained())
    assert job.report.decisions == ()
    assert set(bits_of(job.report).values()) == {2}


def test_an_easy_target_takes_one_job() -> None:
    """What the first job gives is enough: nothing is raised and nothing analysed."""
    scores = Scores(90.0, 89.5)
    job = run_to_target(SmallHost(network(), images()), untrained(evaluate=scores, max_drop=0.5))
    assert scores.left == []
    assert set(bits_of(job.report).values()) == {2}
    assert scores.models[1] is job.model
    assert job.report.decisions == ("Raised to 7 bits: no layer. Found 89.5, of 90 for the float model: enough.",)


def test_a_target_that_is_just_met() -> None:
    """0.8 - 0.7 is more than 0.1 in floats; it counts as met."""
    scores = Scores(0.8, 0.7)
    job = run_to_target(SmallHost(network(), images()), untrained(evaluate=scores, max_drop=0.1))
    assert len(job.report.decisions) == 1


@pytest.mark.parametrize("needed", [2.1, 3.7, 4.0, 6.2, 6.9])
def test_a_target_is_met_with_few_bits(needed: float) -> None:
    """Enough bits are found in few jobs, and of those that are enough the fewest that were tried are returned."""
    tried = list[float]()

    def score(bits: float) -> float:
        tried.append(bits)
        return 1.0 if bits >= needed else 0.2

    # The score depends on the report of a model, which it has when it is told of.
    host = SmallHost(network(), images())
    found = run_scored(host, untrained(max_drop=0.1, evaluate=len), score)
    assert average(found.report) >= needed
    assert average(found.report) == min(bits for bits in tried if needed <= bits <= WIDE)
    assert len(tried) <= MOST_JOBS + 1
    assert found.report.decisions[-1].endswith("the target is met.")


def run_scored(host: SmallHost, config: QFTConfig, score: Callable[[float], float]) -> Job:
    """Run with a score of the mean bit width."""

    def scored(_: Any, model: nn.Module) -> float:
        layers = [(m.weight.numel(), len(m.weight.unique())) for m in model.modules() if hasattr(m, "weight")]
        floats = model is host.model
        return score(32.0 if floats else sum(n * bits_from(n, values) for n, values in layers) / ALL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "_number", scored)
        return run_to_target(host, config)


def bits_from(weights: int, values: int) -> int:
    """Return 2 for a weight that has at most three integers in each channel, else 7."""
    return 2 if values <= 3 * 8 else WIDE


@pytest.mark.parametrize("steps", [1, 2])
def test_a_target_that_cannot_be_met(steps: int) -> None:
    """A warning says so, in the report too; the best of the results is returned, and all layers were tried."""
    host = SmallHost(network(), images())
    with pytest.warns(QFTWarning, match=r"max_drop=0.1 should be met by some choice of bit widths. Found "):
        job = run_scored(host, untrained(max_drop=0.1, evaluate=len), lambda bits: bits**steps)
    assert set(bits_of(job.report).values()) == {WIDE}
    assert "cannot" not in job.report.warnings[-1]
    assert job.report.decisions[-1].endswith("the target is not met.")


def test_the_best_may_have_fewer_bits() -> None:
    """Where more bits are worse, the first result is the best one."""
    host = SmallHost(network(), images())
    with pytest.warns(QFTWarning, match="with 0 of 3 layers"):
        job = run_scored(host, untrained(max_drop=0.1, evaluate=len), lambda bits: 99 if bits > WIDE else -bits)
    assert set(bits_of(job.report).values()) == {2}


def test_an_agreement() -> None:
    """Coarse weights name other classes; with some layers raised the result names those of the float network."""
    body = (nn.Linear(108, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    model, config = nn.Sequential(nn.Flatten(), *body).double().eval(), untrained(target_agreement=85.0)
    plain = run_to_target(SmallHost(model, images(512)), untrained()).report
    report = run_to_target(SmallHost(model, images(512)), config).report
    assert plain.agreement is not None
    assert report.agreement is not None
    assert plain.agreement < 0.85 <= report.agreement
    assert WIDE in bits_of(report).values()
    assert 2 in bits_of(report).values()


def test_too_few_images_for_a_share() -> None:
    """Of 64 images, 99 percent are all of them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        job = run_to_target(SmallHost(network(), images()), replace(untrained(target_agreement=99), weight_bits=8))
    assert any("chance decides" in str(w.message) for w in found)
    assert any("chance decides" in message for message in job.report.warnings)


def test_an_agreement_needs_classes() -> None:
    """A network that returns an image has none: that is said before anything is quantized."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).double().eval()
    with pytest.raises(ConfigError, match="target_agreement should be None for a model"):
        run_to_target(SmallHost(model, images()), untrained(target_agreement=90))


@pytest.mark.parametrize("wrong", [None, "a", float("nan"), float("inf")])
def test_a_measure_that_is_no_number(wrong: Any) -> None:
    """The message shows what came back."""
    with pytest.raises(ConfigError, match=r"evaluate should return a finite number\. Found"):
        run_to_target(SmallHost(network(), images()), untrained(evaluate=Scores(wrong), max_drop=1))


def test_the_mode_of_the_users_model_stays() -> None:
    """It is evaluated in eval mode, and is in its own afterwards."""
    model, modes = network().train(), list[bool]()

    def evaluate(model: nn.Module) -> float:
        modes.append(model.training)
        return 1.0

    run_to_target(SmallHost(model, images()), untrained(evaluate=evaluate, max_drop=0))
    assert modes[0] is False
    assert model.training


def test_warnings_of_the_result_alone() -> None:
    """What other jobs warned of is not shown; what the one that is returned warned of is, once."""

    class Warns(SmallHost):
        def initialize(self, problem: Problem[Any], config: QFTConfig) -> Start[Any]:
            target.warn(f"layers: {sorted(config.layer_bits)}")
            return super().initialize(problem, config)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        job = run_to_target(Warns(network(), images()), untrained(evaluate=Scores(9, 1, 9, 9, 9, 9), max_drop=0))
    assert [str(w.message) for w in found] == list(job.report.warnings)
    assert len(found) == 1
    assert "weight" in str(found[0].message)


def test_the_errors_of_the_result() -> None:
    """They are measured once, for the job that is returned, and the report has both."""
    config = untrained(average_bits=6.2, analyse=True)
    report = run_to_target(SmallHost(network(), images()), config).report
    assert report.analysed == 64
    errors = {layer.weight: layer.errors for layer in report.layers}
    for layer in report.layers:
        assert layer.errors is not None
        assert (errors[layer.weight].weight < 0.02) == (layer.bits == WIDE)  # type: ignore[union-attr]


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit widths are chosen in one process."""
    read = target.images

    def shared(*args: Any, **kwargs: Any) -> Any:
        return replace(read(*args, **kwargs), world=World(0, 2))

    monkeypatch.setattr(target, "images", shared)
    with pytest.raises(ConfigError, match=r"no target where several processes train. Found 2"):
        run_to_target(SmallHost(network(), images()), untrained(average_bits=4))
