"""A whole job under a host of a few lines: its steps, what a finetune gains, and errors before long work."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models import Apply
from small_host import SmallHost, SmallNetwork, SmallPlaced, SmallSource, quantized
from torch import Tensor, nn

from qft_plugin import EfQAT, FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.errors import ConfigError, DataError, ModelError, QFTWarning
from qft_plugin.job import run as job
from qft_plugin.job.host import Problem, Start
from qft_plugin.training.distributed import World
from qft_plugin.training.efqat import held_kernels
from qft_plugin.training.integers import deployed_weights
from qft_plugin.training.loss import Loss, Network, distillation_loss
from qft_plugin.training.phases import Step
from qft_plugin.training.solve import solve
from qft_plugin.training.teacher import Recomputed, Targets

SAME = 1e-9
"""float64: a product of an integer and a step that was computed in another order."""

KEPT = 1e-5
"""What the teacher computed was kept in half precision, relative to the largest number of each image."""


def network(between: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Return two convolutions, a pool and a linear layer, in float64."""
    body = (nn.Conv2d(3, 8, 3, padding=1), between(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()


def batches() -> list[Tensor]:
    """Return 64 images in batches, whose neighbours are alike."""
    return [(torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 6, 6)).double() for _ in range(4)]


def settings(finetune: Any = None, **changes: Any) -> QFTConfig:
    """Return the settings of a start that is rounded to nearest, and of a finetune of 40 steps."""
    few = FinetuneConfig(**{"images_fed": 640, "batch_size": 16, "compile": False, **(finetune or {})})
    return QFTConfig(**{"small_layer_share": 0, "compensate": False, "finetune": few, **changes})


STEPS = ("items", "read", "teacher", "initialize", "place", "student", "write")


@dataclass(frozen=True)
class Noted(SmallHost):
    """Writes down what it is asked for, and keeps its starts."""

    asked: list[str] = field(default_factory=list)
    starts: list[Start[SmallPlaced]] = field(default_factory=list)

    def __getattribute__(self, name: str) -> Any:
        if name in STEPS:
            self.asked.append(name)
        return super().__getattribute__(name)

    def initialize(self, problem: Problem[SmallSource], config: QFTConfig) -> Start[SmallPlaced]:
        self.starts.append(super().initialize(problem, config))
        return self.starts[-1]


def test_the_steps_of_a_job() -> None:
    """Each method of a host is called once, in the order of the contract; the user hears of every training step."""
    host, steps = Noted(network(), batches()), list[Step]()
    job.run(host, settings(), callback=steps.append)
    assert host.asked == list(STEPS)
    assert [step.number for step in steps] == list(range(1, 41))
    assert {step.total for step in steps} == {40}


def test_a_finetune_beats_its_start() -> None:
    """The loss falls, and that of the state which is left is the one that is told."""
    host = Noted(network(), batches())
    result = job.run(host, settings()).result
    assert result is not None
    assert result.final_loss < 0.9 * result.start_loss
    assert len(result.losses) == result.steps == 40
    problem, begin = problem_of(host, settings()), host.starts[0]
    call = problem.inputs.batch(slice(None))
    with torch.no_grad():
        found = begin.student(solve(begin.dof), call)
        wanted = SmallNetwork(problem).predict(problem.source.tensors, call)
    assert float(distillation_loss(found, wanted, Loss((1.0,), 0.0))) == pytest.approx(result.final_loss, rel=KEPT)


@pytest.mark.parametrize("rates", [{"learning_rate": 3.0}, {"scale_learning_rate": 3.0}])
def test_a_result_is_never_worse_than_its_start(rates: dict[str, float]) -> None:
    """Where training does harm the start is what is returned, to the last bit, and the user hears of it."""
    items = batches()
    torch.manual_seed(1)
    start = Noted(network(), items)
    job.run(start, settings(finetune={"learning_rate": 0, "scale_learning_rate": 0}))
    torch.manual_seed(1)
    trained = Noted(network(), items)
    with pytest.warns(QFTWarning, match="training should lower the loss"):
        result = job.run(trained, settings(finetune=rates)).result
    assert result is not None
    assert result.final_loss == result.start_loss
    states = [host.starts[0].dof.state_dict() for host in (start, trained)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_without_a_finetune_the_start_is_written() -> None:
    """No teacher runs, and nothing trains."""
    host = Noted(network(), batches())
    found = job.run(host, replace(settings(), finetune=None))
    assert found.result is None
    assert host.asked == ["items", "read", "initialize", "place", "student", "write"]
    for name, deployed in deployed_weights(host.starts[0].dof).items():
        layer = host.starts[0].dof.map.layer(name)
        step = deployed.step.view(-1, *(1,) * (deployed.integers.dim() - 1))
        assert layer.is_kernel
        torch.testing.assert_close(
            found.model.get_parameter(name).detach(), deployed.integers * step, rtol=SAME, atol=0
        )


@dataclass(frozen=True)
class TrainsLater(Noted):
    """Chooses a start that another job trains."""

    def teacher(self, _: Problem[SmallSource]) -> Network | None:
        return None


def test_a_start_that_is_trained_later() -> None:
    """A host without a teacher gets its start written, and is told nothing of what the finetune will look at."""
    host = TrainsLater(network(), batches())
    config = settings(hardware=HardwareSpec(accumulator_bits=8))
    assert job.run(host, config).result is None
    assert host.asked[-1] == "write"
    with pytest.warns(QFTWarning, match="An accumulator of 8 bits should hold every sum"):
        job.run(host, replace(config, finetune=None))


def test_a_part_of_the_weights_trains() -> None:
    """With EfQAT the result is no worse than the start, and all weights can train again afterwards."""
    host = Noted(network(), batches())
    result = job.run(host, settings(finetune={"train": EfQAT(ratio=0.25)})).result
    assert result is not None
    assert result.final_loss <= result.start_loss
    assert not held_kernels(host.starts[0].dof)


def test_block_by_block() -> None:
    """Each block trains in a phase of its own, and the whole ends no worse than it started."""
    result = quantized(network(), batches(), settings(finetune={"blocks": ["1"]})).result
    assert result is not None
    assert result.final_loss < result.start_loss


class AddsInPlace(nn.Module):
    """Changes what a layer has read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.sigmoid()
        y += self.second(y.square())
        return y.mean((2, 3))


def test_a_network_that_changes_what_gradients_need() -> None:
    """The first step finds it, and the training begins again with copies."""
    steps: list[Step] = []
    model, config = AddsInPlace().eval(), settings(finetune={"loss_at": None})
    result = job.run(SmallHost(model, batches()), config, callback=steps.append).result
    assert result is not None
    assert [step.number for step in steps] == list(range(1, 41))
    assert result.final_loss <= result.start_loss
    assert len(set(result.losses)) > 1


def problem_of(host: SmallHost, config: QFTConfig) -> Problem[SmallSource]:
    """Read a model and images, and understand them."""
    inputs = job.images(host.model, host.items(), config)
    return job.understand(host.read(inputs, config), inputs, config)


@pytest.mark.parametrize("kind", ["alone", "random", "together"])
def test_what_the_student_learns_from(kind: str) -> None:
    """The teacher runs once; it runs along where it is random, or where the images of a batch meet."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "alone": lambda x: x,
        "random": lambda x: torch.nn.functional.dropout(x, 0.5),
        "together": lambda x: x - x.mean(0),
    }
    host = SmallHost(network(lambda: Apply(functions[kind])), batches())
    if kind == "alone":
        targets = job.targets_of(host, problem_of(host, settings()), settings())
        assert isinstance(targets, Targets)
        assert targets.features[0].values.shape == (64, 8, 6, 6)
        return
    problem = problem_of(host, settings())
    words = {"random": "something random is still active", "together": "depend on the other images of the batch"}
    with pytest.warns(QFTWarning, match=words[kind]):
        assert isinstance(job.targets_of(host, problem, settings()), Recomputed)


@dataclass(frozen=True)
class NotANumber(Noted):
    """Its teacher computes NaN for some image."""

    def teacher(self, problem: Problem[SmallSource]) -> Network:
        run = SmallNetwork(problem).predict

        def predict(call: Any) -> Any:
            prediction = run(problem.source.tensors, call)
            bad = tuple(torch.where(t > t.max() - 1e-9, math.nan, t) for t in prediction.features)
            return replace(prediction, features=bad)

        return predict


class Twice(nn.Module):
    """Returns two tensors, which have no class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, y[:, :2]


@pytest.mark.parametrize(
    ("host", "config", "error", "words"),
    [
        (lambda: Noted(network(), []), settings(), DataError, "Found none"),
        (lambda: Noted(network(), [torch.ones(4, 3, 6, 6)]), settings(), DataError, r"dtype torch\.float64"),
        (lambda: Noted(network(), batches()), settings(finetune={"loss_at": "9"}), ConfigError, "loss_at"),
        (lambda: Noted(Twice(), batches()), settings(finetune={"cross_entropy": 0.5}), ConfigError, "cross_entropy"),
        (lambda: NotANumber(network(), batches()), settings(), ModelError, "finite"),
    ],
    ids=["no images", "another dtype", "no such place", "no logits", "a teacher of NaN"],
)
def test_errors_come_before_long_work(
    host: Callable[[], Noted], config: QFTConfig, error: type[Exception], words: str
) -> None:
    """Before the host calibrates anything."""
    asked = host()
    with pytest.raises(error, match=words):
        job.run(asked, config)
    assert "place" not in asked.asked


@dataclass(frozen=True)
class Broken(SmallHost):
    """Its student divides by 0 in front of the second activation function, once it has scales."""

    def student(self, *args: Any, **kwargs: Any) -> SmallNetwork:
        student = super().student(*args, **kwargs)
        divisor = student.quantizers["2.quantizer"]
        student.model[2].register_forward_hook(lambda _, __, y: y if divisor.scale is None else y / 0)
        return student


@pytest.mark.parametrize("finetune", [True, False])
def test_a_start_that_is_not_finite_is_refused_before_training(finetune: bool) -> None:
    """The error names the first operation that reads what is not finite, and no step is taken."""
    host, steps = Broken(network(), batches()), list[Step]()
    config = settings() if finetune else replace(settings(), finetune=None)
    with pytest.raises(ModelError, match=r"should compute finite numbers before it is trained.*'3/relu/1' reads"):
        job.run(host, config, callback=steps.append)
    assert not steps


def test_a_result_that_is_of_little_use_is_told() -> None:
    """Where the student computes something else than the teacher, whatever was gained."""
    still = {"learning_rate": 0, "scale_learning_rate": 0, "images_fed": 16}
    config = settings(weight_bits=2, activation_range="host", finetune=still)
    with pytest.warns(QFTWarning, match=r"the loss should end below 0\.3"):
        quantized(network(), [1000 * batch for batch in batches()], config)


@pytest.mark.parametrize(("part", "before"), [(None, 1), (EfQAT(ratio=0.5), 2)])
def test_processes_share_the_state(part: EfQAT | None, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before the first step and once at the end; a part that trains is chosen from the state that all have."""
    shared: list[int] = []
    steps: list[Step] = []
    monkeypatch.setattr(World, "share_state", lambda *_: shared.append(len(steps)))
    job.run(SmallHost(network(), batches()), settings(finetune={"train": part}), callback=steps.append)
    assert shared == [0] * before + [40]
