"""What holds for well-known architectures: first without any host, then quantized and exported under each of them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import structures
import torch
from conftest import four_bits, relative_error

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.record import record
from qft_plugin.graph.torch_model import tensors_in

pytestmark = pytest.mark.wide

ROOT = Path(__file__).parents[2]

EXACT = 1e-9
"""float64 keeps 16 digits; the networks are at most a few dozen layers deep."""

every_structure = pytest.mark.parametrize("name", structures.STRUCTURES)


@every_structure
def test_what_is_not_free_has_a_reason(name):
    """The map describes every activation, and each that cannot be rescaled says why."""
    model, inputs = structures.folded_norms(name)
    dof_map = map_dof(record(model, (inputs, {})))
    assert [e.name for e in dof_map.edges if (e.free < e.channels) != bool(e.reason)] == []
    assert all(bool((layer.in_index > 0).all()) or layer.inputs[0] for layer in dof_map.layers)


@every_structure
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_factors_fold(name, kind):
    """Factors of any size, folded into the weights on both sides, leave every output as it is."""
    model, inputs = structures.folded_norms(name)
    dof_map = map_dof(record(model, (inputs, {})))
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if kind == "normal":
        log_c = 0.5 * torch.randn(dof_map.size, dtype=torch.float64)
    else:
        log_c = torch.empty(dof_map.size, dtype=torch.float64).uniform_(1 / 8, 8).log()
    with torch.no_grad():
        folded = fold_network(dof_map, log_c, {n: parameters[n] for n in names_of(dof_map.layers)})
        expected = list(tensors_in(model(*inputs)))
        found = list(tensors_in(torch.func.functional_call(model, folded, inputs)))
    assert relative_error(found, expected) < EXACT


def installed(host):
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed here")


def few(item):
    """Return two images of a batch."""
    return tuple(t[:2] for t in item) if isinstance(item, tuple) else item[:2]


# OpenVINO adds roundings in front of pools and concatenations in float (DenseNet, PoolFormer), which it is told of.
@pytest.mark.filterwarnings("ignore:OpenVINO should round where the model rounds")
@pytest.mark.nncf_only
@every_structure
def test_nncf(name, tmp_path):
    """NNCF quantizes the network, QFT finetunes it, and OpenVINO's file proves to compute the same."""
    installed("nncf")
    import nncf

    import qft_plugin.nncf as host

    model, items = structures.build(name), structures.items(name)
    job = host.quantize(model, nncf.Dataset(items), four_bits())
    assert job.result.final_loss <= job.result.start_loss
    report = host.save_openvino(job.model, tmp_path / "net.xml", few(items[0]))
    assert report is not None


@pytest.mark.filterwarnings("ignore:OpenVINO should round where the model rounds")
@every_structure
def test_brevitas(name, tmp_path):
    """A float network becomes one of Brevitas in one call, and both of its files prove to compute the same."""
    installed("brevitas")
    from qft_plugin import brevitas as host

    model, items = structures.build(name), structures.items(name)
    folded = host.fold(host.quantize(model, items, config=four_bits()))
    host.save_qonnx(folded, tmp_path / "qonnx.onnx", few(items[0]))
    host.save_qcdq(folded, tmp_path / "qcdq.onnx", few(items[0]))


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("networks", ROOT / "benchmarks" / "networks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(networks):
    return networks.measured(structures)


@every_structure
def test_the_free_share_does_not_shrink(name, measured):
    """As many inputs of layers can be rescaled as ever."""
    assert measured[name].free_layers >= structures.STRUCTURES[name].free
    assert measured[name].free_layers + sum(n for _, n in measured[name].reasons) == measured[name].layers


def test_the_page_in_the_docs_is_what_the_script_prints(networks, measured):
    """The first table in docs/networks.md is up to date."""
    assert (ROOT / "docs" / "networks.md").read_text().startswith(networks.page(measured))
