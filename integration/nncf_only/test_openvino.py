"""The written OpenVINO files: what is stored, what runs, and what a failed save leaves behind."""

import copy

import numpy as np
import openvino
import pytest
import torch

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
import nncf.torch
from conftest import four_bits, quantized_once, relative_error, weight_quantizers
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
from nncf.torch.quantization.layers import SymmetricQuantizer

import qft_plugin.nncf as host
from qft_plugin import DeployabilityError, ParityError
from qft_plugin.deploy.ir_view import EXACT
from qft_plugin.deploy.layers import precisions, runtime_ops
from qft_plugin.deploy.openvino import INT8, inspect_file, save, set_weight_storage
from qft_plugin.graph.layer_graph import is_kernel
from qft_plugin.nncf._save import watched, weight_integers
from qft_plugin.nncf._write import without_compiler

FLOAT_SUMS = 3e-3
"""Relative L2 difference of the same integers summed in another order, with a few activations rounded the other way
in networks of at most 1,000 activations (GELU and softmax round most)."""


def constants(path):
    """Count the constants of a file by element type, biases and bounds left out."""
    found = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    kinds = [op.get_element_type().get_type_name() for op in found]
    return {kind: kinds.count(kind) for kind in ("i4", "i8")}


CORE = {"residual", "transformer", "transposed", "two_inputs"}
"""What an older version of the host saves."""

NAMES = sorted(nets.NETS.keys() - {"in_place"})
"""All networks but one whose file would be that of "residual"."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.core] * (n in CORE)) for n in NAMES])
def test_four_bit_weights_are_stored_in_four_bits_and_run_in_int8(name, quantized, tmp_path):
    """Every quantized weight is one 4-bit constant, and every convolution with one runs in int8."""
    q, net = quantized(name), nets.NETS[name]
    report = host.save_openvino(q.job.model, tmp_path / "net.xml", q.items[0])
    kinds = {layer.weight: layer.kind for layer in q.job.dof_map.layers}
    quantized_weights = {weight for weight, _ in weight_quantizers(q.job)}
    layers = {weight for weight, kind in kinds.items() if is_kernel(kind)}
    assert len(quantized_weights & layers) == len(layers) - net.not_quantized
    assert report.weights == len(quantized_weights)
    # A weight that two calls read may be stored once for each.
    fours = constants(report.path)["i4"]
    assert len(quantized_weights & layers) <= fours <= len(quantized_weights & layers) + (name == "twice")
    assert len(report.convolutions) == net.convolutions
    assert report.int8_convolutions == net.convolutions - net.not_int8
    assert set(report.linear.values()) <= INT8
    assert 0 <= report.relative_error < FLOAT_SUMS
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.core
def test_storages_compute_the_same_and_differ_in_size(quantized, tmp_path):
    """Storage "i8" is larger by half a byte per weight, "i4_plain" has plain constants; outputs are those of "i4"."""
    q = quantized("residual")
    reports, results = {}, {}
    for storage in ("i4", "i8", "i4_plain"):
        report = host.save_openvino(q.job.model, tmp_path / f"{storage}.xml", q.items[0], weights=storage)
        compiled = openvino.Core().compile_model(report.path, "CPU", EXACT)
        reports[storage], results[storage] = report, compiled([q.items[0].numpy()])[0]
    layers = reports["i4"].weights
    assert constants(reports["i8"].path) == {"i4": 0, "i8": layers}
    assert constants(reports["i4_plain"].path) == {"i4": layers, "i8": 0}
    bins = {k: r.path.with_suffix(".bin").stat().st_size for k, r in reports.items()}
    weights = sum(q.model.get_parameter(layer.weight).numel() for layer in q.job.dof_map.layers)
    # OpenVINO may add a few bytes between constants.
    assert bins["i8"] - bins["i4"] == pytest.approx(weights / 2, rel=0.05)
    assert bins["i4"] < 0.5 * 4 * weights
    assert reports["i8"].int8_convolutions == reports["i4"].int8_convolutions
    for storage in ("i8", "i4_plain"):
        difference = np.linalg.norm(results[storage] - results["i4"]) / np.linalg.norm(results["i4"])
        assert difference < FLOAT_SUMS


def test_the_batch_axis_is_free(quantized, outputs, tmp_path):
    """A file that was saved with 16 images runs on 3."""
    q = quantized("residual")
    report = host.save_openvino(q.job.model, tmp_path / "net.xml", q.items[0])
    compiled = openvino.Core().compile_model(report.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled([q.items[1][:3].numpy()])[0])
    (expected,) = outputs(q.job.model, q.items[1][:3])
    assert (found - expected).norm() < FLOAT_SUMS * expected.norm()


def test_keywords_may_come_in_any_order(quantized, tmp_path):
    """A dictionary of inputs is matched by its keys, not by its order."""
    q = quantized("keywords")
    reverse = dict(reversed(q.items[0].items()))
    report = host.save_openvino(q.job.model, tmp_path / "net.xml", reverse)
    assert report.relative_error < FLOAT_SUMS


def test_without_the_check_nothing_is_compared(quantized, tmp_path):
    """`check=False` writes the file and reports that no weight and no output was compared."""
    q = quantized("residual")
    report = host.save_openvino(q.job.model, tmp_path / "net.xml", q.items[0], check=False)
    assert report.weights == 0
    assert np.isnan(report.relative_error)
    assert report.int8_convolutions == nets.NETS["residual"].convolutions


def test_saving_changes_nothing_in_the_model(tmp_path):
    """Saving leaves weights, the mode of every module, and NNCF's extension as they were."""
    model = nets.build("residual")
    result = nncf.quantize(model, nncf.Dataset(nets.items("residual")), algorithm=four_bits(finetune=None))
    result.train()
    result.bn1.eval()
    modes = [m.training for m in result.modules()]
    state = {n: t.clone() for n, t in result.state_dict().items()}
    loaded = QuantizedFunctionsCPU._loaded_namespace
    host.save_openvino(result, tmp_path / "net.xml", nets.items("residual")[0])
    assert [m.training for m in result.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in result.state_dict().items())
    assert QuantizedFunctionsCPU._loaded_namespace is loaded


@pytest.mark.core
@pytest.mark.parametrize("loaded", [None, "something that was loaded before"])
def test_the_extension_is_put_back(loaded, monkeypatch):
    """Inside the block no compiler is needed, a loaded extension stays, and an error inside restores it too."""
    monkeypatch.setattr(QuantizedFunctionsCPU, "_loaded_namespace", loaded)

    def use():
        with without_compiler():
            assert QuantizedFunctionsCPU._loaded_namespace is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert QuantizedFunctionsCPU._loaded_namespace == loaded


@pytest.mark.core
def test_a_restored_model_is_saved_alike(quantized, tmp_path):
    """A model from NNCF's config and a state dict gives the file that the original gives."""
    q = quantized("residual")
    again = nncf.torch.load_from_config(nets.NETS["residual"].build(), nncf.torch.get_config(q.job.model))
    again.load_state_dict(q.job.model.state_dict())
    first = host.save_openvino(q.job.model, tmp_path / "first.xml", q.items[0])
    second = host.save_openvino(again, tmp_path / "second.xml", q.items[0])
    assert second.weights == first.weights == 5
    assert second.int8_convolutions == nets.NETS["residual"].convolutions
    assert (tmp_path / "first.bin").read_bytes() == (tmp_path / "second.bin").read_bytes()


@pytest.fixture(scope="module")
def converted_once():
    """Convert a network once, with what is needed to prove it."""
    q = quantized_once("residual")
    with torch.no_grad(), without_compiler():
        model = openvino.convert_model(q.job.model, example_input=q.items[0])
    return {"model": model, "watched": watched(q.job.model), "example": ((q.items[0],), {})}


@pytest.fixture
def converted(converted_once):
    """Return a converted network with what is needed to prove it, ready to be saved."""
    with without_compiler():
        yield {**converted_once, "model": converted_once["model"].clone()}


def with_another(converted, name, change):
    """Let the proof compare with a model of which one tensor differs."""
    model = copy.deepcopy(converted["watched"].model)
    with torch.no_grad():
        change(model.get_parameter(name))
    return {**converted, "watched": watched(model)}


def tampered(converted):
    """Change one integer of one weight by one step."""
    name = "conv1.weight"
    integers = converted["watched"].run(converted["example"]).weights[name]
    W = converted["watched"].model.get_parameter(name).detach()
    step = float(W.view(-1)[0] / integers.view(-1)[0])

    def change(W):
        W.view(-1)[0] -= step * float(integers.view(-1)[0].sign())

    assert integers.view(-1)[0] != 0
    return with_another(converted, name, change)


@pytest.mark.core
def test_one_wrong_integer_is_found_and_no_file_is_left(converted, tmp_path):
    """A file with one integer that differs by one step is not written, and the error names the weight."""
    with pytest.raises(ParityError, match=r"conv1\.weight.*1 of 576"):
        save(path=tmp_path / "net.xml", **tampered(converted))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_outputs_are_found_and_no_file_is_left(factor, converted, tmp_path):
    """A file whose last layer adds another bias than torch, or torch NaN, is not written."""
    with pytest.raises(ParityError, match=r"Output 0"):
        save(path=tmp_path / "net.xml", **with_another(converted, "fc.bias", lambda b: b.mul_(factor)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.core
def test_a_failed_save_keeps_the_file_before_it(converted, tmp_path):
    """Where a proof fails, the files that stood at the path before stay as they were and can be read."""
    good = save(path=tmp_path / "net.xml", **converted)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ParityError):
        save(path=tmp_path / "net.xml", **tampered({**converted, "model": converted["model"].clone()}))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    proof = {key: converted[key] for key in ("watched", "example")}
    assert inspect_file(tmp_path / "net.xml", **proof).weights == good.weights == 5


def test_a_file_can_be_written_over(converted, tmp_path):
    """A second save at the same path takes the place of the first."""
    save(path=tmp_path / "net.xml", **converted)
    (tmp_path / "net.bin").write_bytes(b"old")
    report = save(path=tmp_path / "net.xml", **converted)
    assert (tmp_path / "net.bin").stat().st_size > 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert report.path == tmp_path / "net.xml"


@pytest.mark.core
@pytest.mark.parametrize("path", ["no_such_folder/net.xml", "net.onnx", "net", ""])
def test_a_path_that_cannot_be_written(path, converted, tmp_path, monkeypatch):
    """A path outside an existing folder or of another suffix is refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeployabilityError, match=r"path.*\.xml.*existing folder"):
        save(path=path, **converted)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_storage(converted, tmp_path):
    """A storage that does not exist is refused, and the error lists the ones that do."""
    with pytest.raises(DeployabilityError, match=r"i4_plain.*'i3'"):
        save(path=tmp_path / "net.xml", storage="i3", **converted)
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_refused(tmp_path):
    """A model that NNCF has not quantized is refused, with the way to convert it."""
    with pytest.raises(DeployabilityError, match=r"nncf\.quantize.*openvino\.convert_model"):
        host.save_openvino(nets.build("residual"), tmp_path / "net.xml", torch.zeros(1, 3, 8, 8))


def test_eight_bit_weights_are_not_touched(converted):
    """Choosing a storage changes 4-bit constants only."""
    model = converted["model"]
    set_weight_storage(model, "i8")
    kinds = [op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"]
    eights = kinds.count("i8")
    assert eights == 5
    for storage in ("i4", "i4_plain", "i8"):
        set_weight_storage(model, storage)
    after = [op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"]
    assert after == kinds


def saved_plainly(model, path):
    """Save a converted model with OpenVINO's own function and return how it runs when it is read back."""
    openvino.save_model(model, path, compress_to_fp16=False)
    return precisions(runtime_ops(openvino.Core().read_model(path)), {})[0]


@pytest.mark.core
def test_plain_conversion_runs_in_int8(quantized, tmp_path):
    """From memory as it is; saved with OpenVINO's own function after the storage of its weights was chosen."""
    q = quantized("residual")
    with torch.no_grad(), without_compiler():
        model = openvino.convert_model(q.job.model, example_input=q.items[0])
    assert set(precisions(runtime_ops(model), {})[0].values()) <= INT8
    set_weight_storage(model, "i4")
    assert set(saved_plainly(model, tmp_path / "net.xml").values()) <= INT8
    assert constants(tmp_path / "net.xml")["i4"] == 5


def test_widened_weights_keep_their_integers(quantized, outputs, tmp_path):
    """The copy computes the same in 8-bit quantizers, and its plain conversion runs in int8 after it was saved."""
    q = quantized("residual")
    wide = host.widened(q.job.model)
    bits = {hook.num_bits for hook in get_hook_storage(q.job.model).modules() if isinstance(hook, SymmetricQuantizer)}
    assert bits == {4, 8}
    assert {h.num_bits for h in get_hook_storage(wide).modules() if isinstance(h, SymmetricQuantizer)} == {8}
    with without_compiler():
        before, after = (weight_integers(model, q.items[0]) for model in (q.job.model, wide))
        assert all(torch.equal(integers, after[name]) for name, integers in before.items())
        assert max(int(integers.abs().max()) for integers in after.values()) == 7
        with torch.no_grad():
            model = openvino.convert_model(wide, example_input=q.items[0])
    assert relative_error(outputs(wide, q.items[0]), outputs(q.job.model, q.items[0])) < FLOAT_SUMS
    assert set(saved_plainly(model, tmp_path / "net.xml").values()) <= INT8
    loaded = nncf.torch.load_from_config(nets.build("residual"), nncf.torch.get_config(wide))
    loaded.load_state_dict(wide.state_dict())
    assert relative_error(outputs(loaded.eval(), q.items[0]), outputs(wide, q.items[0])) == 0


@pytest.mark.core
def test_strip_takes_widened_weights(quantized, outputs):
    """NNCF turns them, and not weights of 4 bits, into torch's own quantizers."""
    pytest.importorskip("torchao", reason="NNCF strips with it")
    q = quantized("residual")
    with without_compiler():
        with pytest.raises(nncf.InternalError, match="8"):
            nncf.strip(q.job.model, example_input=q.items[0])
        stripped = nncf.strip(host.widened(q.job.model), example_input=q.items[0])
    assert relative_error(outputs(stripped, q.items[0]), outputs(q.job.model, q.items[0])) < FLOAT_SUMS
