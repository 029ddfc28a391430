"""The report of a job under a host of a few lines: layers by name, reasons, agreement, warnings, seconds."""

import contextlib
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from small_host import SmallHost, quantized
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.errors import QFTWarning, collected_warnings, warn
from qft_plugin.job.report import peak_memory
from qft_plugin.job.run import Job
from qft_plugin.report.kept import report_of


class Network(nn.Module):
    """Convolutions of each kind: ordinary ones, one whose weight is computed, one that is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Conv2d(3, 8, 3, padding=1), "second": nn.Conv2d(8, 64, 3, padding=1)})
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.computed = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["first"](x).relu()
        x = nn.functional.conv2d(x, self.computed.weight / 2)
        x = x + nn.functional.conv2d(x, self.kernel)
        return self.linear(self.body["second"](x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def batches(count: int = 10) -> list[Tensor]:
    """Return batches of 16 images."""
    return [(torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 6, 6)).double() for _ in range(count)]


def settings() -> QFTConfig:
    """Return the settings of a finetune of 10 steps."""
    return QFTConfig(finetune=FinetuneConfig(images_fed=160, batch_size=16))


def job_of(model: nn.Module, items: list[Tensor], config: QFTConfig) -> Job:
    """Quantize a model."""
    with pytest.warns(QFTWarning, match="weights of layers should be parameters"):
        return quantized(model.double().eval(), items, config)


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("count", [10, 4])
def test_agreement_is_that_of_the_returned_model(finetune: bool, count: int) -> None:
    """On the images that are held out of training, or the first ones where none is; the finetune's own too."""
    model, items = Network(), batches(count)
    config = settings() if finetune else replace(settings(), finetune=None)
    job = job_of(model, items, config)
    first, end = (140, 160) if count == 10 else (0, 64)
    images = torch.cat(items)[first:end]
    with torch.no_grad():
        same = (model(images).argmax(1) == job.model(images).argmax(1)).double().mean()
    report = job.report
    assert report.agreement == pytest.approx(float(same), abs=1e-9)
    assert report.held_out == (20 if count == 10 else 0)
    assert (report.start_agreement is None) == (report.final_loss is None) == (not finetune)
    if job.result is not None:
        assert (report.start_loss, report.final_loss) == (job.result.start_loss, job.result.final_loss)
        assert report.losses == job.result.losses
        assert report.compared_at == ("the input of mean",)


def test_every_layer_has_a_name_and_a_reason() -> None:
    """The user's names, in the order of execution; what stayed in floating point, and what has more bits, says why."""
    config = replace(settings(), layer_bits={"linear*": 6}, small_layer_share=0.06)
    layers = job_of(Network(), batches(), config).report.layers
    assert [layer.name for layer in layers] == ["body.first", "conv2d", "kernel", "body.second", "linear"]
    assert [layer.bits for layer in layers] == [7, None, 7, 4, 6]
    assert [layer.shape for layer in layers] == [(8, 3, 3, 3), (8, 8, 1, 1), (8, 8, 1, 1), (64, 8, 3, 3), (4, 64)]
    assert [layer.scales for layer in layers] == [8, 0, 8, 64, 4]
    assert [layer.activation_bits for layer in layers] == [8, None, None, 8, 8]
    reasons = [layer.reason for layer in layers]
    assert "smallest layers" in reasons[0]
    assert reasons[1] == "its weight is computed in the forward"
    assert reasons[3:] == ["", "layer_bits: 'linear*'"]


def test_nodes_are_the_operations_of_the_network() -> None:
    """Each reads others by their names, and quantizers are none of them."""
    report = job_of(Network(), batches(), settings()).report
    names = [node.name for node in report.nodes]
    assert len(set(names)) == len(names)
    assert [node.function for node in report.nodes if node.layer] == ["conv2d", "conv2d", "conv2d", "conv2d", "linear"]
    assert "clone" not in [node.function for node in report.nodes]
    for number, node in enumerate(report.nodes):
        assert set(node.inputs) <= set(names[:number])
        assert bool(node.inputs) == (number > 0 and node.function != "truediv" and node.function != "div")
    add = next(node for node in report.nodes if node.function == "add")
    assert len(add.inputs) == 2
    assert {node.layer: node.bits for node in report.nodes}["body.second"] == 8


@pytest.mark.parametrize("action", ["ignore", "error", "always"])
def test_warnings_are_noted_whatever_the_filters_say(action: str) -> None:
    """A warning that nobody sees, and one that is an error, are in the list as well."""
    with warnings.catch_warnings(record=True), collected_warnings() as found:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        with contextlib.suppress(QFTWarning):
            warn("Said once.")
    assert found == ["Said once."]


def test_a_warning_names_the_line_that_gave_it() -> None:
    """As with `warnings.warn`: the line that calls, or one further out."""

    def inner() -> None:
        warn("Here.", stacklevel=2)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        inner()
        warn("There.")
    assert {w.filename for w in found} == {__file__}
    assert found[1].lineno == found[0].lineno + 1


def test_threads_do_not_mix_their_warnings() -> None:
    """Two jobs at once have each their own."""
    barrier, results = threading.Barrier(2), dict[int, list[str]]()

    def work(number: int) -> None:
        with collected_warnings() as found:
            barrier.wait()
            warn(f"Of {number}.")
            barrier.wait()
            results[number] = found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {0: ["Of 0."], 1: ["Of 1."]}


def test_the_report_of_a_job_holds_its_warnings_and_seconds() -> None:
    """In order, with the phases; the model carries it."""
    job = job_of(Network(), batches(), settings())
    report = report_of(job.model)
    assert report == job.report
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("The weights of layers should be parameters.")
    assert list(report.seconds)[:2] == ["images", "reading the model"]
    assert list(report.seconds)[-1] == "writing"
    assert (report.host, report.model, report.images) == ("small", "Network", 160)
    assert set(report.versions) == {"qft_plugin", "torch"}
    assert "_qft_report" not in job.model.state_dict()


def test_the_summary_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At the level of information, in one message."""
    with caplog.at_level("INFO", logger="qft_plugin"):
        job = job_of(Network(), batches(), settings())
    assert caplog.messages[-1] == str(job.report)


class Boxes(nn.Module):
    """Names no class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def test_a_network_without_classes_has_no_agreement() -> None:
    """Its output is no tensor of images and classes."""
    job = quantized(Boxes().double().eval(), batches(), settings())
    assert job.report.agreement is None
    assert job.report.start_agreement is None
    assert job.report.final_loss is not None


def test_short_forms_are_short() -> None:
    """Of everything that a user may look at: a line of at most 200 characters."""
    host = SmallHost(Network().double().eval(), batches())
    job = job_of(host.model, batches(), settings())
    assert all(len(repr(thing)) <= 200 and "\n" not in repr(thing) for thing in (job, job.result, job.dof_map))
    assert repr(job.dof_map).startswith("DofMap(")


def test_memory_is_counted_in_bytes() -> None:
    """A process that has loaded torch needs more than 50 MB, and less than 50 GB."""
    assert 50e6 < peak_memory() < 50e9


class Computes(nn.Module):
    """Computes the weights of two layers in one forward, and more beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, self.first.weight / 2).relu()
        return x + nn.functional.conv2d(y, self.second.weight / 2)


class Holds(nn.Module):
    """Calls such a block between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Computes(), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_layers_of_one_module_have_names_of_their_own() -> None:
    """And what else the module computes is none of them."""
    report = job_of(Holds(), batches(), replace(settings(), finetune=None)).report
    assert [layer.name for layer in report.layers] == ["block", "block (2)", "last"]
    assert [layer.shape for layer in report.layers] == [(8, 3, 1, 1), (3, 8, 1, 1), (4, 3, 1, 1)]
    assert [(node.function, node.layer) for node in report.nodes if node.layer] == [
        ("conv2d", "block"),
        ("conv2d", "block (2)"),
        ("conv2d", "last"),
    ]
