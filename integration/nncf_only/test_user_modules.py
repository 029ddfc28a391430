"""Networks that strangers bring to NNCF: subclasses of torch's modules, modules with two names, computed weights."""

from collections.abc import Callable

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nncf
from nncf.common.tensor_statistics.aggregator import StatisticsAggregator
from nncf.torch.function_hook import get_hook_storage

import qft_plugin.nncf as host
from qft_plugin import ConfigError, EfQAT, ModelError, QFTConfig, QFTWarning

EIGHT_BITS = 0.04
"""Relative L2 error of 8-bit weights and activations; a lost activation function shows as 0.3 and more."""

START = 0.1
"""Loss at the start in 4 bits, over the images; of another network it is 0.3 and more."""


class NormAct(nn.BatchNorm2d):
    """A BatchNorm whose forward ends in an activation function, as in timm."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(
            functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        )


class Chain(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu())


class ActInNorm(Chain):
    """Every activation function is inside a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = NormAct(8, nn.ReLU()), NormAct(8, nn.SiLU())
        self.norm3 = NormAct(8, nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm3(self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(x))))))
        return self.head(x)


class ActInNormFirst(Chain):
    """Norms with an activation function in front of the layers, and after an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = NormAct(8, nn.ReLU()), NormAct(8, nn.Hardtanh(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + self.conv2(self.norm1(x))
        x = x + self.conv3(self.norm2(x))
        return self.head(x)


class OtherEps(nn.BatchNorm2d):
    """A norm that divides by another epsilon than its own attribute says."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 0.5)


class OwnEps(Chain):
    """A subclass of BatchNorm that hands something else than its own attributes to torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = OtherEps(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.conv3(self.norm2(self.conv2(x)).relu()).relu())


class TwoNames(Chain):
    """Layer and norm are registered under a second name, by which the forward calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.again = nn.ModuleList([self.conv1, self.norm, self.conv2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.again[1](self.again[0](x)).relu()
        return self.head(self.conv3(self.again[2](x).relu()).relu())


class Blur(Chain):
    """A depthwise convolution whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", (row[:, None] * row / 16).repeat(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.conv1(x).relu(), self.filter, stride=2, padding=1, groups=8)
        return self.head(self.conv3(self.conv2(x).relu()).relu())


class Preactivation(nn.Module):
    """Blocks in a list that adds in place, so that NNCF knows the names of none of their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([
                nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False),
            ])
            for _ in range(3)
        )  # fmt: skip
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm1, conv1, norm2, conv2 in self.blocks:
            y = conv2(norm2(conv1(norm1(x).relu())).relu())
            y += x
            x = y
        return self.fc(x.relu().mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "act_in_norm": ActInNorm,
    "act_in_norm_first": ActInNormFirst,
    "own_eps": OwnEps,
    "two_names": TwoNames,
    "blur": Blur,
    "preactivation": Preactivation,
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def built(name: str) -> tuple[nn.Module, list[Tensor]]:
    """Make a network with statistics in its norms, and its images."""
    return nets.settled(NETWORKS[name]()), list(torch.randn(4, 16, 3, 8, 8))


@every_network
def test_eight_bits_compute_what_the_float_network_computes(name, outputs):
    """Without a finetune and with 8 bits the result is the user's network, and the user's own is as it was."""
    model, items = built(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = outputs(model, items[0])
    config = QFTConfig(weight_bits=8, small_layer_bits=8, finetune=None)
    result = nncf.quantize(model, nncf.Dataset(items), algorithm=config)
    assert 0 < relative_error(outputs(result, items[0]), expected) < EIGHT_BITS
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@every_network
def test_the_student_is_the_network(name, outputs, tmp_path):
    """The finetune starts near the teacher, what is written is what was trained, and its file is that too."""
    model, items = built(name)
    job = host.quantize(model, nncf.Dataset(items), four_bits())
    assert 0 < job.result.final_loss <= job.result.start_loss < START
    types = [type(m) for m in model.modules()]
    assert [type(m) for n, m in job.model.named_modules() if "__nncf_hooks" not in n] == types
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < 5 * EIGHT_BITS
    host.save_openvino(job.model, tmp_path / "net.xml", items[0][:2])


def test_a_preactivation_network_adds_floats():
    """What is only added is not quantized, whether NNCF has put the quantizer after its maker or in front of `+=`."""
    model, items = built("preactivation")
    q = host.quantize(model, nncf.Dataset(items), four_bits(finetune=None)).model
    names = [name for name, _ in get_hook_storage(q).named_hooks(remove_duplicate=False)]
    assert not [name for name in names if "/add_/" in name]
    assert len([name for name in names if "/conv2d/" in name and name.startswith("pre_hooks")]) == 7


@pytest.mark.parametrize("rounding", ["ste", "soft", "blend"])
def test_a_model_that_nncf_has_pruned_stays_pruned(rounding, outputs, tmp_path):
    """Weights that a mask holds at 0 are 0 in the result too, the others train, and the file proves to be the same."""
    model, items = built("two_names")
    pytest.importorskip("nncf.torch.function_hook.pruning.prune_model")
    model = nncf.prune(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=items[0])
    masks = {n: t for n, t in model.state_dict().items() if n.endswith("binary_mask")}
    expected = outputs(model, items[0])
    job = host.quantize(model, nncf.Dataset(items), four_bits(rounding=rounding))
    assert job.result.final_loss < START
    assert relative_error(outputs(job.model, items[0]), expected) < 5 * EIGHT_BITS
    weights = dict(job.model.named_parameters())
    assert len(masks) == 4
    for name, mask in masks.items():
        weight = name.split(".")[-3].rpartition("__")[0].replace(":", ".")
        assert not bool(weights[weight][~mask].any())
        assert bool(weights[weight][mask].any())
    assert all(torch.equal(t, masks[n]) for n, t in model.state_dict().items() if n in masks)
    host.save_openvino(job.model, tmp_path / "net.xml", items[0][:2])


def test_a_pruned_model_and_a_part_that_trains():
    """Which weights train is chosen among all of a layer, which a mask contradicts: refused before any step."""
    model, items = built("two_names")
    pytest.importorskip("nncf.torch.function_hook.pruning.prune_model")
    model = nncf.prune(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=items[0])
    config = four_bits(finetune=few_steps(train=EfQAT(ratio=0.25)))
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.train.*pruned.*0\.25"):
        nncf.quantize(model, nncf.Dataset(items), algorithm=config)


class BatchAsConcatenation(Chain):
    """Puts two views of every image one after the other, along the axis of the images."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.head(self.conv3(self.conv2(torch.cat([x, x.flip(-1)])).relu()).relu())


class FirstTwo(Chain):
    """Goes on with the first two images of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv3(self.conv2(self.conv1(x).relu()[:2]).relu()).relu())


class Centered(Chain):
    """Takes the mean over the batch off every image."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.head(self.conv3(self.conv2(x - x.mean(0, keepdim=True)).relu()).relu())


class SequenceFirst(nn.Module):
    """Attention over sequences whose first axis is the time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2))
        return self.fc((x + self.attention(x, x, x, need_weights=False)[0]).mean(0))


class ActiveDropout(Chain):
    """Drops something in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv3(functional.dropout(self.conv2(self.conv1(x).relu()).relu(), 0.05)).relu())


@pytest.mark.parametrize(("build", "shape", "words"), [
    (BatchAsConcatenation, (16, 3, 8, 8), "other images of the batch"),
    (FirstTwo, (16, 3, 8, 8), "other images of the batch"),
    (Centered, (16, 3, 8, 8), "other images of the batch"),
    (SequenceFirst, (12, 8, 2, 3), "other images of the batch"),
    (ActiveDropout, (16, 3, 8, 8), "something random is still active"),
])  # fmt: skip
def test_what_belongs_to_no_single_image_is_compared_by_batch(build, shape, words, outputs):
    """Where images of a batch meet, or numbers are drawn, the teacher runs along, and a warning says so."""
    model, items = build().eval(), list(torch.randn(4, *shape))
    with pytest.warns(QFTWarning, match=words):
        job = host.quantize(model, nncf.Dataset(items), four_bits())
    assert 0 < job.result.final_loss <= job.result.start_loss < (0.3 if build is ActiveDropout else START)
    if build is not ActiveDropout:
        assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < 5 * EIGHT_BITS


class SometimesLonger(Chain):
    """Leaves an operation out where it is told to, as by a random number."""

    short = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.short else 2 * x)


def test_operations_that_calibration_does_not_see_are_named(monkeypatch):
    """NNCF has no range for them, and says so in its own words only."""
    collect = StatisticsAggregator.collect_statistics

    def without(*arguments):
        monkeypatch.setattr(SometimesLonger, "short", True)
        return collect(*arguments)

    monkeypatch.setattr(StatisticsAggregator, "collect_statistics", without)
    items = list(torch.randn(4, 16, 3, 8, 8))
    with pytest.raises(ModelError, match=r"run the same operations.*'?/mul/0.*Look for an `if`"):
        host.quantize(SometimesLonger().eval(), nncf.Dataset(items), four_bits())
