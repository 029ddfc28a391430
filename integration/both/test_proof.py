"""What the proof of a file notices, by name, and what it lets pass."""

import importlib.util
import re
import warnings

import corruptions
import pytest
import torch
from conftest import four_bits
from torch import nn

from qft_plugin import HardwareSpec, ParityError, QFTWarning

SHORT = [("ir", "residual", "zeros"), ("ir", "inverted", "eight images"), ("qcdq", "inverted", "ones")]
"""Formats, networks and examples of the default run."""

TABLE = [pytest.mark.table, pytest.mark.wide]

HOST = {"ir": "nncf", "qcdq": "brevitas", "qonnx": "brevitas"}


def case(style, *where, marks=()):
    """Return a case of a format, with the mark of its host."""
    return pytest.param(style, *where, marks=[*marks, *([pytest.mark.nncf_only] if HOST[style] == "nncf" else [])])


LONG = [
    case(style, network, example, marks=TABLE)
    for style in ("ir", "qcdq", "qonnx")
    for network in corruptions.NETWORKS
    for example in corruptions.EXAMPLES
    if (style, network, example) not in SHORT and not (style == "qonnx" and network in ("deep", "mobile", "wide"))
]
"""All others; the executor of QONNX is too slow for large networks."""

RIGHT = [("ir", "transformer"), ("qonnx", "residual"), ("ir", "deep"), ("qcdq", "wide")]
"""Formats and networks whose right files are proved in the default run."""


def right(style, network, example):
    """Return a right file; skip the test where its host is not installed."""
    if importlib.util.find_spec(HOST[style]) is None:
        pytest.skip(f"{HOST[style]} is not installed here")
    return corruptions.right(network, style, example)


@pytest.mark.parametrize(("style", "network", "example"), [*[case(*short) for short in SHORT], *LONG])
def test_corruptions_are_noticed_by_name(style, network, example):
    """A file that is wrong in one place is refused, and the first thing that is said names a layer next to it."""
    file = right(style, network, example)
    found = {c: corruptions.try_out(file, c, example) for c in file.corruptions}
    assert len(found) >= 20
    assert [(c.kind, c.place) for c, outcome in found.items() if not outcome.noticed] == []
    assert [(c.kind, c.layers, outcome.message) for c, outcome in found.items() if not outcome.named] == []


@pytest.mark.parametrize(
    ("style", "network"),
    [
        *[case(*file) for file in RIGHT],
        *[
            case(style, network, marks=TABLE)
            for style in HOST
            for network in corruptions.NETWORKS
            if (style, network) not in RIGHT
        ],
    ],
)
def test_right_files_pass(style, network):
    """A right file is proved with each kind of example, without a warning."""
    for example in corruptions.EXAMPLES:
        file = right(style, network, example)
        proof = file.prove(file.file(), example)
        assert proof.weights > 0
        assert proof.stretch_error < 1e-4
        assert proof.roundings == ()


@pytest.fixture
def nncf_host():
    """Return NNCF and its part of the package."""
    pytest.importorskip("nncf", reason="these files are OpenVINO's")
    import nncf

    import qft_plugin.nncf as host

    return nncf, host


def quantized(nncf_host, model, items, **settings):
    """Quantize a network without a finetune."""
    nncf, host = nncf_host
    config = four_bits(compensate=False, finetune=None, **settings)
    return host.quantize(model.eval(), nncf.Dataset(items), config).model


class Sum(nn.Module):
    """The sum of two convolutions: a runtime fuses the addition into one of them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last((self.left(x) + self.right(x)).relu())


@pytest.mark.nncf_only
def test_a_rounding_that_the_runtime_drops_is_told(nncf_host, tmp_path):
    """OpenVINO leaves out the rounding in front of a fused addition: a warning names the layer, with its share."""
    items = [torch.randn(16, 3, 8, 8)]
    hardware = HardwareSpec(elementwise_rescale="power_of_two")
    model = quantized(nncf_host, Sum(), items, hardware=hardware)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = nncf_host[1].save_openvino(model, tmp_path / "net.xml", items[0])
    (message,) = [str(w.message) for w in warned if issubclass(w.category, QFTWarning)]
    assert re.search(r"Quantizer relu/0, after layer (left|right)\.weight \(\d+ % of the values\)", message)
    (rounding,) = {r.place: r for r in report.proof.roundings}.values()
    assert 0.02 < rounding.unexplained_share < 0.5
    assert rounding.far == 0


@pytest.mark.nncf_only
def test_without_quantized_addends_nothing_is_told(nncf_host, tmp_path):
    """The same network without quantizers of the addends is proved without a warning."""
    items = [torch.randn(16, 3, 8, 8)]
    report = nncf_host[1].save_openvino(quantized(nncf_host, Sum(), items), tmp_path / "net.xml", items[0])
    assert report.proof.roundings == ()


class Pooled(nn.Module):
    """A pool between two convolutions."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.pool, self.second = nn.Conv2d(3, 8, 3, padding=1), pool, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.second(self.pool(self.first(x).relu()))


@pytest.mark.nncf_only
@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2)], ids=str
)
def test_pools_round_once(pool, nncf_host, tmp_path):
    """What a u8 pool of OpenVINO gives differs from torch's on ties alone."""
    items = [torch.randn(32, 3, 16, 16)]
    report = nncf_host[1].save_openvino(quantized(nncf_host, Pooled(pool), items), tmp_path / "net.xml", items[0])
    assert report.proof.roundings == ()
    assert report.proof.ties < 1e-3


class OnValues(nn.Module):
    """Takes another layer for bright images."""

    def __init__(self):
        super().__init__()
        self.stem, self.dark, self.bright = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        y = self.stem(x).relu()
        return (self.bright(y).relu() if x.mean() > 1 else self.dark(y)).mean((2, 3))


class OnBatch(OnValues):
    """Takes another layer for many images."""

    def forward(self, x):
        y = self.stem(x).relu()
        return (self.bright(y).relu() if len(x) > 4 else self.dark(y)).mean((2, 3))


@pytest.mark.filterwarnings("ignore:The file should compute what the model computes for every input")
@pytest.mark.nncf_only
@pytest.mark.parametrize(
    ("build", "other"),
    [(OnValues, torch.ones(2, 3, 8, 8) * 3), (OnBatch, torch.zeros(8, 3, 8, 8))],
    ids=["value", "batch"],
)
def test_a_model_with_two_paths_is_refused(build, other, nncf_host, tmp_path):
    """A model that takes another path for other images or another number of them is not saved as one of its paths."""
    model = quantized(nncf_host, build(), [torch.randn(4, 3, 8, 8)])
    with pytest.raises(ParityError, match=r"one path.*branches on the number of images or on their values"):
        nncf_host[1].save_openvino(model, tmp_path / "net.xml", torch.randn(2, 3, 8, 8), images=[other])
    assert list(tmp_path.iterdir()) == []


class Pairs(nn.Module):
    """Compares each two images, and so takes an even number of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.stem(x).relu().mean((2, 3)).reshape(-1, 16))


def test_a_model_of_pairs_is_proved_on_pairs(nncf_host, tmp_path):
    """Where the model does not take the few images that a proof would like, it is proved on those that were given."""
    x = torch.randn(16, 3, 8, 8)
    model = quantized(nncf_host, Pairs(), [x])
    report = nncf_host[1].save_openvino(model, tmp_path / "net.xml", x[:2], images=[x[:8]])
    assert report.proof.from_torch.images == 5  # outputs of a pair each: of the example and of all others
    assert report.relative_error < 1e-5


class Heads(nn.Module):
    """Two heads; the second one is computed last and returned first."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        one = self.first(x)
        return self.second(x), one


@pytest.mark.nncf_only
def test_outputs_are_named_by_their_own_layer(nncf_host):
    """What is known of an output is the weight on its own way, and not the one that was used last of all."""
    from qft_plugin.nncf._save import watched
    from qft_plugin.nncf._write import without_compiler

    x = torch.randn(4, 3, 8, 8)
    model = quantized(nncf_host, Heads(), [x])
    with without_compiler(), warnings.catch_warnings():
        assert watched(model).run(((x,), {})).layers == ["second.weight", "first.weight"]


class Words(nn.Module):
    """An embedding in front of a linear layer, and a product with a weight that is stored as `[in, out]`."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first = nn.Embedding(16, 8), nn.Linear(8, 12)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8))
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            # On ties between two of 255 integers, which runtimes round to either side.
            self.embedding.weight.copy_(torch.randint(-127, 127, (16, 8)) + 0.5)
            self.embedding.weight[0, 0] = 127

    def forward(self, words):
        x = self.first(self.embedding(words) / 64).relu().flatten(0, 1)
        x = torch.addmm(self.bias, x, self.weight).relu()
        return self.last(x.unflatten(0, (-1, words.shape[1]))).mean(1)


@pytest.mark.nncf_only
def test_embeddings_and_transposed_weights_are_in_the_file(nncf_host, tmp_path):
    """Their integers are compared too, and those of an embedding are on its grid already when it is exported."""
    items = [torch.randint(16, (16, 6)) for _ in range(4)]
    model = quantized(nncf_host, Words(), items)
    report = nncf_host[1].save_openvino(model, tmp_path / "net.xml", items[0])
    assert report.weights == 4
    assert report.relative_error < 1e-5
    W = model.embedding.weight.detach()
    steps = 127 * W / W.abs().amax(1, keepdim=True)  # a scale for each word
    assert float((steps - steps.round()).abs().max()) < 1e-3
