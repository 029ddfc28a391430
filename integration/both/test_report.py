"""What a user is told of a job under each host: the report of its model, its files, and what is shown meanwhile."""

import copy
import importlib

import nets
import pytest
import torch
from conftest import few_steps, four_bits
from hosts import EACH_HOST, host_of

from qft_plugin import QFTConfig
from qft_plugin.errors import ConfigError

NAMES = ["stem", "conv1", "conv2", "conv3", "fc"]
"""The modules with a weight in the network `residual`."""


def images(count=10):
    """Return 160 images, of which 20 are held out."""
    return [torch.randn(16, *nets.items("residual")[0].shape[1:]) for _ in range(count)]


def quantized(name, items, config, **settings):
    """Quantize a network under a host; returns the host's module, the float network and the quantized one."""
    host_of(name)
    host, model = importlib.import_module(f"qft_plugin.{name}"), nets.build("residual").eval()
    if name == "nncf":
        import nncf

        return host, model, nncf.quantize(model, nncf.Dataset(items), algorithm=config, **settings)
    return host, model, host.quantize(model, items, config=config, **settings)


def classes(name, host, model, x):
    """Return the class that a network names for each image."""
    with torch.no_grad():
        if name == "brevitas":
            return model(x).argmax(1)
        with host.without_compiler():
            return model(x).argmax(1)


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("name", EACH_HOST)
def test_agreement_is_that_of_the_returned_model(name, finetune):
    """On the images that were held out, to two images; a copy tells the same."""
    items = images()
    config = four_bits(finetune=few_steps() if finetune else None)
    host, model, result = quantized(name, items, config, verbose=False)
    report = host.report_of(copy.deepcopy(result))
    held = torch.cat(items)[140:]
    by_hand = (model(held).argmax(1) == classes(name, host, result, held)).double().mean()
    assert abs(report.agreement - float(by_hand)) <= 2 / 20
    assert (report.host, report.images, report.held_out) == (name, 160, 20)
    assert (report.final_loss is not None) == finetune
    assert (report.start_agreement is not None) == finetune
    if name == "brevitas":
        folded = host.fold(result)
        assert host.report_of(folded) == report
        again = (model(held).argmax(1) == folded(held).argmax(1)).double().mean()
        assert abs(report.agreement - float(again)) <= 2 / 20
    with pytest.raises(ConfigError, match="without a report"):
        host.report_of(model)


@pytest.mark.parametrize("name", EACH_HOST)
def test_layers_and_nodes_have_the_names_of_the_user(name):
    """With their bits, and what an operation reads."""
    host, _, result = quantized(name, images(2), QFTConfig(finetune=None, layer_bits={"fc*": 6}), verbose=False)
    report = host.report_of(result)
    assert [layer.name for layer in report.layers] == NAMES
    assert [layer.weight for layer in report.layers] == [f"{n}.weight" for n in NAMES]
    assert report.layers[-1].bits == 6
    assert report.layers[-1].reason == "layer_bits: 'fc*'"
    assert {layer.activation_bits for layer in report.layers} == {8}
    assert all(layer.scales == layer.shape[0] for layer in report.layers)
    assert [node.layer for node in report.nodes if node.layer] == NAMES
    known = set()
    for node in report.nodes:
        assert set(node.inputs) <= known
        known.add(node.name)
    assert [len(node.inputs) for node in report.nodes if node.function == "add"] == [2]
    assert name in report.versions


@pytest.mark.nncf_only
def test_a_layer_that_nncf_leaves_out_says_so():
    """One that the user ignores is named, and stays in floating point."""
    pytest.importorskip("nncf")
    import nncf

    items = images(2)
    ignored = nncf.IgnoredScope(patterns=[".*conv1.*"])
    host, _, result = quantized("nncf", items, QFTConfig(finetune=None), verbose=False, ignored_scope=ignored)
    layer = host.report_of(result).layers[1]
    assert (layer.name, layer.bits, layer.scales) == ("conv1", None, 0)
    assert layer.reason == "nncf has placed no quantizer on its weight"


class Words(torch.nn.Module):
    """Looks words up, and normalises them."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = torch.nn.Embedding(32, 16), torch.nn.LayerNorm(16)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, x):
        """Return four classes."""
        return self.last(self.norm(self.words(x)).mean(1))


@pytest.mark.parametrize("name", EACH_HOST)
def test_embeddings_are_layers(name):
    """One that the host quantizes by itself has its bits and no errors to measure; one in float says why."""
    host_of(name)
    host, items = importlib.import_module(f"qft_plugin.{name}"), [torch.randint(0, 32, (16, 8)) for _ in range(2)]
    config, model = QFTConfig(finetune=None, small_layer_share=0), Words().eval()
    if name == "nncf":
        import nncf

        items = nncf.Dataset(items)
    result = host.quantize(model, items, config=config, verbose=False)
    layers = host.report_of(result.model if name == "nncf" else result).layers
    found = {layer.name: (layer.kind, layer.bits, layer.scales) for layer in layers}
    assert found["last"] == ("linear", 4, 4)
    assert found["words"] == (("embedding", 8, 1) if name == "nncf" else ("embedding", None, 0))
    assert found.keys() == ({"words", "norm", "last"} if name == "nncf" else {"words", "last"})
    assert "table" in layers[0].reason or "no quantizer" in layers[0].reason
    planned = host.inspect(model, items, config=config, verbose=False).layers
    assert [(p.name, p.bits, p.reason) for p in planned] == [(la.name, la.bits, la.reason) for la in layers]


class Called(torch.nn.Module):
    """Calls a function with a parameter of its own, and a layer with a weight that it computes."""

    def __init__(self):
        super().__init__()
        self.conv, self.computed = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1)
        self.kernel = torch.nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x):
        """Return four classes."""
        x = torch.nn.functional.conv2d(self.conv(x).relu(), self.computed.weight * 2)
        return torch.nn.functional.conv2d(x, self.kernel).mean((2, 3))


@pytest.mark.filterwarnings("ignore:The weights of layers should be parameters")
def test_layers_that_brevitas_leaves_out_say_why():
    """A function that is called with a parameter, and a weight that is computed."""
    host_of("brevitas")
    from qft_plugin import brevitas as host

    items = [torch.randn(16, 3, 6, 6) for _ in range(2)]
    layers = host.report_of(host.quantize(Called().eval(), items, config=four_bits(finetune=None))).layers
    assert [layer.bits for layer in layers] == [4, None, None]
    assert layers[1].reason == "its weight is computed in the forward"
    assert layers[2].reason == "conv2d is called as a function"
    assert layers[2].name == "kernel"


def test_each_step_of_brevitas_leaves_a_report():
    """`initialize` and `finetune` too, on the model that they change."""
    host_of("brevitas")
    from qft_plugin import brevitas as host

    items, model = images(), nets.build("residual").eval()
    linked = host.quantize(model, items, config=four_bits(finetune=None), verbose=False)
    host.initialize(linked, items, verbose=False)
    before = host.report_of(linked)
    assert before.final_loss is None
    assert before.agreement is not None
    result = host.finetune(linked, model, items, QFTConfig(finetune=few_steps()), verbose=False)
    after = host.report_of(linked)
    assert (after.start_loss, after.final_loss) == (result.start_loss, result.final_loss)
    assert len(repr(result)) < 200


@pytest.mark.parametrize("name", EACH_HOST)
def test_what_is_shown(name, capsys, tmp_path):
    """Plain lines of the phases and the report on stderr where there is no terminal, and nothing to who asks so."""
    config, items = four_bits(finetune=few_steps()), images(2)
    host, _, result = quantized(name, items, config)
    lines = capsys.readouterr().err.splitlines()
    for phase in ("images", "reading the model", "teacher", "equalization", "calibration", "compensation", "finetune"):
        assert f"qft_plugin: {phase} ..." in lines
    assert str(host.report_of(result)) in "\n".join(lines)
    save(name, host, result, tmp_path, items[0])
    lines = capsys.readouterr().err.splitlines()
    for phase in ("converting", "proof"):
        assert f"qft_plugin: {phase} ..." in lines
    quiet = quantized(name, items, config, verbose=False)[2]
    save(name, host, quiet, tmp_path, items[0], verbose=False)
    out, err = capsys.readouterr()
    assert "qft_plugin" not in out + err
    assert "Statistics collection" not in out + err


def save(name, host, model, folder, item, **settings):
    """Save a quantized model in the format of its host."""
    if name == "nncf":
        return host.save_openvino(model, folder / "net.xml", item, **settings)
    return host.save_qcdq(host.fold(model), folder / "net.onnx", item, **settings)


@pytest.mark.parametrize("name", EACH_HOST)
def test_a_file_is_told_by_the_names_of_the_user(name, tmp_path):
    """Its layers with bits, bytes and precision; without a proof, by those of the file."""
    host, _, model = quantized(name, images(2), four_bits(finetune=None), verbose=False)
    report = save(name, host, model, tmp_path, images(1)[0], verbose=False)
    bits = 4 if name == "nncf" else 8
    assert [layer.name for layer in report.layers] == NAMES
    assert [layer.bits for layer in report.layers] == [bits] * len(NAMES)
    for layer in report.layers:
        weights = dict(nets.build("residual").named_parameters())[f"{layer.name}.weight"].numel()
        assert layer.bytes == weights * bits // 8
        assert layer.precision in ("i8", "u8")
    assert list(report.convolutions) == NAMES[:-1]
    assert list(report.linear) == NAMES[-1:]
    assert report.int8_convolutions == 4
    assert len(repr(report)) <= 200
    unproved = save(name, host, model, tmp_path, images(1)[0], verbose=False, check=False)
    assert len(unproved.layers) == len(NAMES)
    assert set(unproved.convolutions.values()) == set(report.convolutions.values())
