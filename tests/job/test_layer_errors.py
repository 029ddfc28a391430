"""Errors of layers: by hand on small networks, and where they must be equal."""

import contextlib
from typing import Any

import pytest
import torch
from small_host import quantized
from test_parts import looked, one_layer
from test_run import batches, network, settings
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.config import QFTConfig
from qft_plugin.job import layer_errors
from qft_plugin.job.layer_errors import Measured, measure, with_errors
from qft_plugin.job.parts import Parts
from qft_plugin.report.data import Layer, Report
from qft_plugin.training.integers import deployed_weights

SAME = 1e-9
"""float64: other orders of sums."""


class TwoHeads(nn.Module):
    """Two layers read one activation, one of them is called twice; there are no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(self.a(x).relu()), self.b(x)


def untrained(**changes: Any) -> QFTConfig:
    """Return the settings of a start that nothing trains."""
    return QFTConfig(**{"small_layer_share": 0, "compensate": False, "finetune": None, **changes})


def measured(model: nn.Module, items: list[Tensor], config: QFTConfig) -> Measured:
    return measure(*looked(model, items, config), config)


def test_of_one_layer_alone_is_accumulated() -> None:
    """In a network with one layer, this layer alone is the whole network, and without it there is no error."""
    model, items, config = one_layer(), batches(), settings()
    start, problem = looked(model, items, config)
    found = measure(start, problem, config).errors["1.weight"]
    parts = Parts(start, problem, config)
    ((call, count),) = parts.batches(64)
    whole = parts.difference(parts.run(parts.quantized, call), parts.run(parts.none(), call), images=count)
    assert found.output_alone == found.output_accumulated
    assert 0 < found.loss_only == pytest.approx(whole.loss, rel=SAME)
    assert found.agreement_only == whole.agreement
    assert (found.loss_without, found.agreement_without) == (0.0, 1.0)


def test_errors_by_hand() -> None:
    """Relative errors of a layer of a chain, from the tensors of its network, images and grids."""
    model, items, config = network(), batches(), settings()
    start, problem = looked(model, items, config)
    found = measure(start, problem, config)
    parts, x = Parts(start, problem, config), torch.cat(items)
    W, V = parts.floating["2.weight"], parts.quantized.tensors["2.weight"]
    assert found.images == 64
    errors = found.errors["2.weight"]
    assert errors.weight == pytest.approx(float((V - W).norm() / W.norm()), rel=SAME)
    integers = deployed_weights(start.dof)["2.weight"].integers
    assert errors.dead == pytest.approx(float((integers == 0).double().mean()))
    hidden = functional.conv2d(x, parts.floating["0.weight"], parts.floating["0.bias"], padding=1).relu()
    scale = parts.quantized.activation_scales["2.quantizer"]
    assert errors.clipped == pytest.approx(float(((hidden / scale).round().abs() > 127).double().mean()))
    read = (hidden / scale).round().clamp(-127, 127) * scale
    y = functional.conv2d(hidden, W, parts.floating["2.bias"], padding=1)
    q = functional.conv2d(read, V, parts.quantized.tensors["2.bias"], padding=1)
    assert errors.output_alone == pytest.approx(float((q - y).norm() / y.norm()), rel=1e-6)


def test_clipped_values_are_counted() -> None:
    """Half of the input is far beyond a grid that was chosen without it."""
    items, config = batches(), untrained(activation_range="max")
    start, problem = looked(one_layer(), items, config)
    x = problem.inputs.args[0]
    x[:, :, :3] = 1e3
    found = measure(start, problem, config).errors["1.weight"]
    assert found.clipped == pytest.approx(0.5)


def test_layers_that_share_and_repeat() -> None:
    """Both calls of a layer count, networks without classes have no agreement, and nothing else is missing."""
    config = settings(finetune={"loss_at": None})
    found = measured(TwoHeads().double().eval(), batches(), config)
    assert set(found.errors) == {"a.weight", "b.weight"}
    for errors in found.errors.values():
        assert errors.agreement_only is None
        assert errors.agreement_without is None
        assert errors.output_alone is not None
        assert 0 < errors.output_alone < 0.3
        assert errors.loss_only > 0


def test_figures() -> None:
    """Every weight is in both histograms once; steps are those of the start and of the end."""
    config = settings()
    start, problem = looked(network(), batches(), config)
    figures = measure(start, problem, config).figures["2.weight"]
    deployed = deployed_weights(start.dof)["2.weight"]
    assert figures.low == -7
    assert figures.integers == tuple(int((deployed.integers == q).sum()) for q in range(-7, 8))
    assert len(figures.before) == 64
    assert sum(figures.before) == sum(figures.integers) == 8 * 8 * 9
    assert figures.scales_before == tuple(start.dof.weight_grids["2.weight"].scale.tolist())
    assert figures.scales_after == tuple(deployed.step.tolist())
    assert set(figures.granularity) == {"per-tensor", "per-channel", "doubly per-channel"}


def test_a_float_weight_falls_into_the_bin_of_its_step() -> None:
    """Untrained and not equalized, the float weights over their steps round to the integers."""
    config = untrained(equalize=False)
    start, problem = looked(network(), batches(), config)
    figures = measure(start, problem, config).figures["2.weight"]
    W, step = problem.source.tensors["2.weight"], start.dof.weight_grids["2.weight"].scale
    units = (W / step.view(-1, 1, 1, 1)).clamp(-8, 8)
    assert figures.before == tuple(units.flatten().histc(64, -8, 8).int().tolist())


def test_a_job_measures_where_it_is_asked_to() -> None:
    """The result is the same model; only with the setting is something measured."""
    torch.manual_seed(0)
    model, items = network(), batches()
    plain, analysed = (quantized(model, items, settings(analyse=on)) for on in (False, True))
    assert plain.report.analysed == 0
    assert all(layer.errors is None for layer in plain.report.layers)
    assert analysed.report.analysed == 64
    assert all(layer.errors is not None and layer.figures is not None for layer in analysed.report.layers)
    x = torch.cat(items)
    assert torch.equal(plain.model(x), analysed.model(x))


def test_errors_in_a_report() -> None:
    """They come to the layers of their weights; a layer in floating point has none."""
    found = measured(network(), batches(), settings())
    layers = [
        Layer(name=n, weight=f"{n}.weight", kind="conv2d", shape=(1,), bits=4, activation_bits=8, scales=1)
        for n in ("0", "floating")
    ]
    report = Report(
        host="small", versions={}, model="Net", images=64, held_out=0, compared_at=(), start_loss=None,
        final_loss=None, losses=(), agreement=None, start_agreement=None, layers=tuple(layers),
    )  # fmt: skip
    filled = with_errors(report, found)
    assert filled.layers[0].errors == found.errors["0.weight"]
    assert filled.layers[0].figures == found.figures["0.weight"]
    assert filled.layers[1] == layers[1]
    assert filled.analysed == 64
    assert Report.from_json(filled.to_json()) == filled


def test_outputs_that_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer runs with another tensor than its weight, what its output is like is not known; all else is."""
    monkeypatch.setattr(layer_errors, "Outputs", lambda *_: contextlib.nullcontext())
    found = measured(network(), batches(), settings()).errors["2.weight"]
    assert found.output_alone is None
    assert found.output_accumulated is None
    assert found.loss_only > 0
