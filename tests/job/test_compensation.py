"""Compensation over a whole network: on the inputs that its quantized layers have."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_host import SmallHost, SmallNetwork, SmallSource
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qft_plugin import QFTConfig
from qft_plugin.graph.torch_model import Call
from qft_plugin.job import compensation
from qft_plugin.job.compensation import COMPENSATION_IMAGES, LIVE, ONE_CALL, Changes, compensated, images_at_once
from qft_plugin.job.health import Ranges
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.start import initialize
from qft_plugin.job.understand import images, understand
from qft_plugin.tensors.gptq import Compensation
from qft_plugin.training.solve import solve

BITS_3 = QFTConfig(weight_bits=3, small_layer_share=0, compensate=False, finetune=None)


def deep(*, bias: bool = True) -> nn.Module:
    """Return six convolutions and a linear layer: the errors of each reach all after it."""
    layers: list[nn.Module] = []
    for channels in (3, 12, 12, 12, 12, 12):
        layers += [nn.Conv2d(channels, 12, 3, padding=1, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4, bias=bias)).double().eval()


def some(count: int) -> list[Tensor]:
    """Return images whose neighbours are alike."""
    return [(torch.randn(count, 3, 1, 1) + 0.5 * torch.randn(count, 3, 8, 8)).double()]


def begun(model: nn.Module, batches: list[Tensor]) -> tuple[Problem[SmallSource], Start[Any]]:
    """Return a problem and a start from rounding to nearest."""
    host = SmallHost(model, batches)
    inputs = images(host.model, host.items(), BITS_3)
    problem = understand(host.read(inputs, BITS_3), inputs, BITS_3)
    return problem, initialize(host, problem, BITS_3)


def changed(problem: Problem[SmallSource], begin: Start[Any]) -> Changes:
    """Return what compensation chooses."""
    return compensated(begin.student, problem, begin.dof, begin.placed.tensors, Ranges())


def put(begin: Start[Any], changes: Changes) -> None:
    """Write weights, steps and biases into the degrees of freedom as they were at the start."""
    tensors = changes.tensors
    with torch.no_grad():
        for module in begin.dof.quantized():
            name = module.layer.weight
            multiple = changes.multiples.get(name, torch.ones_like(module.log_F))
            step = module.unit * module.layer.axes.on_weight(multiple, None, module.W)
            module.W.copy_(tensors.get(name, module.W * step) / step)
            module.log_F.copy_(begin.dof.weight_grids[name].scale.log() + multiple.log())
            for side, sign in ((begin.dof.weight_grids[name].s_in, 1), (begin.dof.weight_grids[name].s_out, -1)):
                if side is not None:
                    module.log_F.add_(sign * begin.dof.activations.steps()[side].log())
            if module.bias is not None and module.layer.bias in tensors:
                module.bias.copy_(tensors[module.layer.bias] / module.bias_unit)


def outputs(problem: Problem[SmallSource], begin: Start[Any], batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the quantized and the float network compute at the end of the backbone."""
    call: Call = ((batch,), {})
    with torch.no_grad():
        (found,) = begin.student(solve(begin.dof), call).features
        (wanted,) = SmallNetwork(problem).predict(problem.source.tensors, call).features
    return found, wanted


def error(problem: Problem[SmallSource], begin: Start[Any], batch: Tensor) -> float:
    found, wanted = outputs(problem, begin, batch)
    return float((found - wanted).norm() / wanted.norm())


def test_a_layer_makes_up_for_the_layers_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On images that were not seen, the network is closer to float than on the inputs of the float network alone."""
    errors = {"float": 0.0, "quantized": 0.0}
    for _ in range(4):  # one network alone may be lucky with either
        model, (batch,) = deep(), some(256)
        for name, few in (("float", 10**6), ("quantized", 1)):
            monkeypatch.setattr(compensation, "FEW", few)
            problem, begin = begun(model, [batch[:192]])
            put(begin, changed(problem, begin))
            errors[name] += error(problem, begin, batch[192:])
    assert errors["quantized"] < 0.9 * errors["float"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_answers_for_the_means(bias: bool) -> None:
    """Where every layer has one, each channel's mean is that of the float network; without it, it is not asked for."""
    (batch,) = some(128)
    problem, begin = begun(deep(bias=bias), [batch])
    found = changed(problem, begin)
    names = {name for name, _ in problem.source.model.named_parameters()}
    assert set(found.tensors) == names
    put(begin, found)
    computed, wanted = outputs(problem, begin, batch)
    distance = (computed.mean((0, 2, 3)) - wanted.mean((0, 2, 3))).abs().max() / wanted.abs().max()
    assert float(distance) < (0.02 if bias else 0.2)


def test_the_users_tensors_and_the_degrees_of_freedom_stay() -> None:
    """Weights are chosen in a network of its own."""
    problem, begin = begun(deep(), some(32))
    tensors = {name: t.clone() for name, t in begin.placed.tensors.items()}
    state = {name: t.clone() for name, t in begin.dof.state_dict().items()}
    changed(problem, begin)
    assert all(torch.equal(t, tensors[name]) for name, t in begin.placed.tensors.items())
    assert all(torch.equal(t, state[name]) for name, t in begin.dof.state_dict().items())


def test_a_model_that_takes_one_image_is_compensated_on_float_inputs() -> None:
    """There the inputs of the quantized layers, of one image, would say too little."""
    (batch,) = some(64)
    problem, begin = begun(deep(), [batch])
    near = error(problem, begin, batch)
    problem = replace(problem, inputs=problem.inputs.one_by_one())
    assert images_at_once(problem.source.graph, problem.inputs) == 1
    put(begin, changed(problem, begin))
    assert error(problem, begin, batch) < 0.8 * near


class Counted(TorchFunctionMode):
    """Counts what is called inside it, as the hooks of a host do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_hooks_of_a_host_see_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing weights takes thousands of small operations for each layer; a mode would make each ten times as slow."""
    problem, begin = begun(deep(), some(20))
    before = Compensation.kernel
    seen: list[int] = []

    def kernel(by: Compensation, *args: Any, **kwargs: Any) -> Tensor:
        calls, found = counted.calls, before(by, *args, **kwargs)
        seen.append(counted.calls - calls)
        return found

    monkeypatch.setattr(Compensation, "kernel", kernel)
    with Counted() as counted:
        changed(problem, begin)
    assert counted.calls > 0
    assert seen == [0] * 7


def test_images_at_once_are_limited_by_the_largest_activation() -> None:
    """A call needs a few of the largest activations at once."""
    problem, _ = begun(deep(), some(40))
    graph, inputs = problem.source.graph, problem.inputs
    assert images_at_once(graph, inputs) == 40
    large = replace(graph, shapes={**graph.shapes, "huge": (2, ONE_CALL // (4 * LIVE * 16))})
    assert images_at_once(large, inputs) == 16
    huge = replace(graph, shapes={**graph.shapes, "huge": (2, ONE_CALL)})
    assert images_at_once(huge, inputs) == 1
    assert COMPENSATION_IMAGES <= 1_024


def test_a_layer_whose_moments_cannot_be_factorized_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named, and all others are compensated."""
    problem, begin = begun(deep(), some(32))

    def failing(W: Tensor, *args: Any, **kwargs: Any) -> Compensation:
        if W.dim() == 2:
            raise torch.linalg.LinAlgError("not positive definite")
        return Compensation(W, *args, **kwargs)

    monkeypatch.setattr(compensation, "Compensation", failing)
    with caplog.at_level(logging.WARNING, logger="qft_plugin"):
        found = changed(problem, begin)
    assert "14.weight" not in found.tensors
    assert "0.weight" in found.tensors
    assert "14.weight starts from rounding to nearest: not positive definite" in caplog.text
