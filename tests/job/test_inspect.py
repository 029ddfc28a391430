"""A dry run under a host of a few lines: it decides what a job decides, and leaves everything as it was."""

import copy
import logging
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_host import SmallHost
from test_run import Noted, batches, network, settings
from torch import Tensor, nn

from qft_plugin import ConfigError, DataError, HardwareSpec, ModelError, QFTError
from qft_plugin.job import run as job
from qft_plugin.job.inspect import inspect
from qft_plugin.report.inspection import Inspection


def found(model: nn.Module, data: Any = None, config: Any = None, **changes: Any) -> Inspection:
    host = SmallHost(model, batches() if data is None else data, name="brevitas")
    return inspect(host, config or settings(), **{"items": 4, **changes})


def test_it_decides_what_a_job_decides() -> None:
    """Layers, bits, granularity and degrees of freedom are those of the start that a job trains."""
    config = settings(layer_bits={"0.weight": 5}, small_layer_share=0.05, layer_activation_bits={"2.weight": 6})
    dry = found(network(), config=config)
    host = Noted(network(), batches())
    job.run(host, config)
    dof = host.starts[0].dof
    assert {layer.weight: layer.bits for layer in dry.layers} == {n: grid.bits for n, grid in dof.weight_grids.items()}
    assert [(la.name, la.bits, la.activation_bits, la.reason) for la in dry.layers] == [
        ("0", 5, 8, "layer_bits: '0.weight'"),
        ("2", 4, 6, ""),
        ("6", 7, 8, "small_layer_share: one of the smallest layers, which have 7 bits"),
    ]
    assert {layer.granularity for layer in dry.layers} == {"per channel"}
    assert [(layer.kind, layer.shape) for layer in dry.layers][2] == ("linear", (4, 8))
    assert dry.degrees == {
        "weights": sum(d.W.numel() for d in dof.quantized()),
        "biases": 8 + 8 + 4,
        "rescale factors": 8 + 8 + 4,
        "activation scales": 3,
        "cross-layer factors": dof.log_c.numel(),
    }
    assert not any(layer.not_int8 for layer in dry.layers)
    assert dry.model == "Sequential"


def test_activations_and_what_pins_them() -> None:
    """Each has the bits of its quantizer, how many of its scales are free, why the others are not, and its readers."""
    dry = found(network())
    assert [(a.made_by, a.bits, a.channels, a.free, a.pinned_by, a.layers) for a in dry.activations] == [
        ("input", 8, 3, 0, "input of the network", ("0.weight",)),
        ("relu", 8, 8, 8, "", ("2.weight",)),
        ("flatten", 8, 8, 8, "", ("6.weight",)),
    ]


class Called(nn.Module):
    """Calls one layer as a function, and one with a weight that the forward computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.middle, self.gain = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.first(x).relu(), self.gain * self.middle)
        return self.last(x.mean((2, 3)))


def test_what_stays_in_float() -> None:
    """A layer without a quantizer is listed with its reason, in its place, and the warning about it is collected."""
    dry = found(Called().double().eval())
    assert [(layer.weight, layer.bits) for layer in dry.layers] == [("first.weight", 4), ("", None), ("last.weight", 4)]
    assert dry.layers[1].reason == dry.layers[1].not_int8 == "its weight is computed in the forward"
    assert any("The weights of layers should be parameters" in line for line in dry.warnings)
    assert len(dry.int8_layers) == 2


@pytest.mark.parametrize(("hardware", "reason"), [
    ({"activation_bits": None}, r"activations are in float (HardwareSpec.activation_bits=None)"),
    ({"rescale": "layerwise"}, ""),
])  # fmt: skip
def test_hardware(hardware: dict[str, Any], reason: str) -> None:
    """Without integers to read no layer runs in int8; a scale for the whole layer is told."""
    dry = found(network(), config=settings(hardware=HardwareSpec(**hardware)))
    assert {layer.not_int8 for layer in dry.layers} == {reason}
    assert {layer.granularity for layer in dry.layers} == {"per channel" if reason else "per tensor"}


def test_nothing_changes() -> None:
    """Parameters, modes, every random state, filters of warnings and the log are as they were, and nothing is shown."""

    class Drawing(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for item in super().__iter__():
                yield item + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002

    model, data = network(), Drawing(batches())
    model[1].train()
    before = copy.deepcopy(model.state_dict())
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]  # type: ignore[union-attr]  # noqa: NPY002
    filters, handlers = list(warnings.filters), list(logging.getLogger("qft_plugin").handlers)
    found(model, data)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model] == [False, True, *[False] * 5]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert warnings.filters == filters
    assert logging.getLogger("qft_plugin").handlers == handlers
    assert not logging.getLogger("qft_plugin").filters


def test_it_is_short_and_writes_nothing() -> None:
    """It reads 64 images of a long dataset, and its host writes no model."""
    taken = []

    def items() -> Iterator[Tensor]:
        for item in 10 * batches():
            taken.append(item)
            yield item

    host = Noted(network(), items(), name="brevitas")  # type: ignore[arg-type]
    dry = inspect(host, settings(), items=None)
    assert len(taken) == 4
    assert "write" not in host.asked
    assert dry.cost.images_seen == 64


@pytest.mark.parametrize(("length", "images", "known"), [(40, 640, True), (None, 8192, False), (2, 64, True)])
def test_the_size_of_the_job(length: int | None, images: int, *, known: bool) -> None:
    """With a length it is that of all items, else the most that is read; a dataset that ends is counted."""
    cost = found(network(), 10 * batches(), items=length).cost
    assert (cost.images, cost.images_known) == (images, known)


def test_all_images_were_seen() -> None:
    """A dataset that ends within the first images has no need of a length."""
    cost = found(network(), batches()[:3], items=None).cost
    assert (cost.images, cost.images_known, cost.images_seen) == (48, True, 48)


def test_costs() -> None:
    """Steps are those of the job; the parts add up to all of it; compensation costs nothing where it is off."""
    dry = found(network(), 10 * batches(), items=40)
    cost = dry.cost
    assert cost.steps == 40
    assert cost.compensation_seconds == 0
    assert min(cost.step_seconds, cost.teacher_batch_seconds, cost.start_seconds, cost.finetune_seconds) > 0
    assert cost.finetune_seconds > 40 * cost.step_seconds
    assert cost.teacher_seconds == pytest.approx(cost.teacher_batch_seconds * 640 / 64)
    assert cost.total_seconds == cost.start_seconds + cost.teacher_seconds + cost.finetune_seconds
    compensated = found(network(), config=settings(compensate=True))
    assert compensated.cost.compensation_seconds > 0
    assert compensated.memory.compensation > 0


def test_memory() -> None:
    """Images and teacher outputs are counted for the whole job, and are on disk above the limit of each."""
    small = found(network(), 10 * batches(), items=40).memory
    assert small.images == 640 * 3 * 36 * 8
    assert small.teacher == 640 * 8 * (8 * 36 + 4)  # what the global pool reads, and the logits
    assert small.step > 0
    assert small.compensation == 0
    assert not small.images_on_disk
    assert small.peak == small.images + small.teacher + small.step
    tight = found(network(), 10 * batches(), items=40, config=settings(finetune={"memory_limit": 10_000})).memory
    assert tight.images_on_disk
    assert tight.teacher_on_disk
    assert tight.peak == tight.step


def test_sizes() -> None:
    """The float size is that of the parameters; of the file, every weight is a byte, and the rest is more."""
    model = network()
    dry = found(model)
    assert dry.float_bytes == 8 * sum(p.numel() for p in model.parameters())
    assert dry.file_bytes > sum(m.weight.numel() for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_without_a_finetune() -> None:
    """No teacher and no step is timed, and none is counted."""
    dry = found(network(), config=replace(settings(), finetune=None))
    assert (dry.cost.steps, dry.cost.teacher_seconds, dry.cost.finetune_seconds, dry.memory.teacher) == (0, 0, 0, 0)
    assert dry.cost.start_seconds > 0


def test_steps_of_blocks_and_large_batches() -> None:
    """A finetune by blocks, or with batches larger than all images, is timed as well."""
    assert found(network(), config=settings(finetune={"blocks": ["1"]})).cost.step_seconds > 0
    cost = found(network(), 10 * batches(), items=40, config=settings(finetune={"batch_size": 128})).cost
    assert cost.steps == 5


def test_warnings_are_collected(recwarn: pytest.WarningsRecorder) -> None:
    """What a job would warn of is in the result, once, beside a dataset that can be read once; nothing is shown."""
    same = [torch.ones(16, 3, 6, 6).double()] * 4
    dry = found(network(), same, once=True)
    assert sum("Found 64 times the same one" in line for line in dry.warnings) == 1
    assert sum("of which this dry run has taken 4 items" in line for line in dry.warnings) == 1
    assert not any("Finetune" in line for line in dry.warnings)
    assert not recwarn.list
    hardware = HardwareSpec(accumulator_bits=8)
    assert any("An accumulator of 8 bits" in w for w in found(network(), config=settings(hardware=hardware)).warnings)


def test_nothing_is_logged_of_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    """The training that is thrown away says nothing, and a later job says what it always says."""
    with caplog.at_level("INFO", logger="qft_plugin"):
        found(network())
        assert not [r for r in caplog.records if "finetune" in r.getMessage()]
        job.run(SmallHost(network(), batches()), settings())
    assert [r for r in caplog.records if "finetune" in r.getMessage()]


@pytest.mark.parametrize(("model", "items", "config", "error"), [
    (network(), [], settings(), DataError),
    (network(), [torch.full((16, 3, 6, 6), torch.nan).double()], settings(), DataError),
    (network(), None, settings(layer_bits={"absent": 4}), ConfigError),
    (network(), None, settings(finetune={"loss_at": "absent"}), ConfigError),
    (nn.Sequential(nn.BatchNorm2d(3)).double().eval(), None, settings(), ModelError),
])  # fmt: skip
def test_errors_are_those_of_a_job(model: nn.Module, items: Any, config: Any, error: type[QFTError]) -> None:
    """What a job would refuse before it trains is refused in the same words."""
    told = []
    for run in (lambda h: inspect(h, config, items=4), lambda h: job.run(h, config)):
        with pytest.raises(error) as caught:
            run(SmallHost(model, batches() if items is None else items))
        told.append(str(caught.value))
    assert told[0] == told[1]
