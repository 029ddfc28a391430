"""What goes wrong around a job: a clear error or a right result, and the user's things are afterwards as before."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from hosts import EACH_HOST, host_of
from limited import limited_images
from untouched import untouched

from qft_plugin import ConfigError, DataError, DeployabilityError

INTEGRATION = Path(__file__).parents[1]
SECONDS = 300
"""Much longer than it takes, which is about 15."""

FILES = {"nncf": ["net.bin", "net.xml"], "brevitas": ["net.onnx"]}

SAME_NETWORK = 0.05
"""Relative L2 difference of outputs; one network differs by roundings, two by 0.5 and more."""

UNDISTURBED = 1e-6
"""Sums may be in another order; a network in bfloat16 differs by 1e-2."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and forks of Linux")
@pytest.mark.parametrize("name", EACH_HOST)
def test_what_the_system_refuses(name):
    """A full disk, a full temporary folder, a folder that is read only, and no memory.

    Two processes that save to one path leave one of the two networks there, and a job in a fork is one like others.

    `RLIMIT_FSIZE` stands for the full disks and `RLIMIT_DATA` for the memory, both in a process of their own.
    """
    host_of(name)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # for a reader without rights
        done = subprocess.run(
            [sys.executable, str(INTEGRATION / "limited.py"), name, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        found = json.loads(done.stdout.splitlines()[-1] if done.stdout else "{}")
        left = sorted(path.name for path in Path(folder).rglob(".*"))
        files = sorted(path.name for path in (Path(folder) / "two").iterdir())
        outputs = outputs_of(next(path for path in (Path(folder) / "two").iterdir() if path.suffix != ".bin"))
    assert done.returncode == 0, done.stderr
    assert files == FILES[name]
    errors = [relative_error([outputs], [torch.tensor(expected)]) for expected in found["two networks"]]
    assert min(errors) < SAME_NETWORK < max(errors)
    kind, words = found["full disk"]
    assert kind == "DeployabilityError"
    assert "MiB free in" in words
    kind, words = found["full temporary folder"]
    assert kind == "ConfigError"
    assert "FinetuneConfig.memory_limit" in words
    assert "TMPDIR" in words
    kind, words = found["no memory"]
    assert kind == "OutOfMemoryError"
    assert "FinetuneConfig.batch_size" in words
    kind, words = found["read-only folder"]
    assert kind == "DeployabilityError"
    assert "PermissionError" in words
    assert found["kept"]
    assert left == []
    assert found["fork"] is True


def test_where_a_file_cannot_go_is_said_before_any_work(host, tmp_path):
    """Before the example is looked at, which is missing here: a folder of that name is not taken away."""
    model = nets.build("residual")
    for name in ("net.xml", "net.onnx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("text")
    _, quantized = host.finetuned(model, nets.items("residual"), four_bits(finetune=None))
    with pytest.raises(DeployabilityError, match="Found a folder at"):
        host.save(quantized, tmp_path, None)
    assert len(list(tmp_path.rglob("precious"))) == 2
    with pytest.raises(DeployabilityError, match=r"in an existing folder\. Found '.*missing"):
        host.save(quantized, tmp_path / "missing", None)
    with pytest.raises(DeployabilityError, match=r"model should be the quantized torch\.nn\.Module. Found dict"):
        host.save_folded({}, tmp_path, None)


def test_two_saves_in_two_threads(host, tmp_path):
    """Torch traces one model at a time."""
    items = nets.items("residual")
    quantized = [host.quantize(nets.build("residual"), items, four_bits(finetune=None)) for _ in range(2)]
    both = threading.Barrier(2)

    def save(number):
        both.wait(SECONDS)
        folder = tmp_path / str(number)
        folder.mkdir()
        return host.save_folded(quantized[number], folder, items[0][:2])

    with ThreadPoolExecutor() as threads:
        saving = [threads.submit(save, number) for number in range(2)]
    assert [each.result().proof.weights for each in saving] == [5, 5]


def outputs_of(path):
    """Run a file in OpenVINO on the images that `limited.py` has."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(limited_images().numpy())[0].copy())


class Stopped(Exception):  # noqa: N818  (a user's own name)
    """What a user's code raises."""


def test_a_callback_that_raises(host):
    """Its error comes through as it is, and the next job is as if there had been none."""
    model, items = nets.build("residual"), nets.items("residual")
    config = four_bits(finetune=few_steps(images_fed=32))

    def stop(step):
        if step.number == 2:
            raise KeyboardInterrupt("by the user")

    with untouched(model):
        expected = host.integers(host.quantize(model, items, config), items[0])
        with pytest.raises(KeyboardInterrupt, match="by the user"):
            host.run(model, items, config, callback=stop)
        found = host.integers(host.quantize(model, items, config), items[0])
    assert all(torch.equal(W, found[name]) for name, W in expected.items())


@pytest.mark.parametrize("callback", [3, "print", lambda: None, lambda step, loss: None])  # noqa: ARG005
def test_a_callback_that_takes_no_step(callback, host):
    """It is refused before the first image is read."""

    def data():
        raise AssertionError
        yield

    with pytest.raises(ConfigError, match="callback should be a function of one Step"):
        host.run(nets.build("residual"), data(), four_bits(), callback=callback)


class Images:
    """A dataset that counts how often it is begun and how many batches it has given; each pass has other images."""

    def __init__(self, batches, fails_at=None):
        self.batches, self.fails_at, self.passes, self.given = batches, fails_at, 0, 0

    def __iter__(self):
        self.passes += 1
        while self.batches is None or self.given < self.batches:
            if self.given == self.fails_at:
                raise Stopped("image_7.png")
            self.given += 1
            yield torch.randn(16, 3, 8, 8)


def test_a_dataset_that_raises(host):
    """Its error comes through as it is."""
    model, items = nets.build("residual"), Images(4, fails_at=2)
    with pytest.raises(Stopped, match=r"image_7\.png"):
        host.run(model, items, four_bits(), callback=None)


def test_a_dataset_without_end_that_differs_in_each_pass(host):
    """It is read once, up to `max_images`: all that a job does is done on the same images."""
    model, items = nets.build("residual"), Images(None)
    report = host.report(model, items, four_bits(finetune=few_steps(images_fed=64, max_images=40)))
    assert (items.passes, items.given) == (1, 3)
    assert report.images == 40


def test_float16_images(host):
    """Only bytes are to be divided by 255."""
    for dtype, remedy in ((torch.float16, r"image\.to\(torch\.float32\)\.$"), (torch.uint8, r"torch\.float32\) / 255")):
        items = [x.mul(50).to(dtype) for x in nets.items("residual")]
        with pytest.raises(DataError, match=remedy):
            host.run(nets.build("residual"), items, four_bits(), callback=None)


def test_an_autocast_around_it(host, tmp_path):
    """Jobs and files are in the model's own precision."""
    model, items = nets.build("residual"), nets.items("residual")
    config = four_bits(finetune=few_steps(images_fed=32))
    expected = host.outputs(host.finetuned(model, items, config)[1], items[0])
    with torch.autocast("cpu", torch.bfloat16):
        _, quantized = host.finetuned(model, items, config)
        report = host.save(quantized, tmp_path, items[0][:2])
    assert report.proof.weights == 5
    assert relative_error(host.outputs(quantized, items[0]), expected) < UNDISTURBED


@pytest.mark.nncf_only
def test_nncf_quantizes_as_before_after_a_job_that_failed():
    """Nothing of NNCF stays changed."""
    host = host_of("nncf")
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

    model, items = nets.build("residual"), nets.items("residual")

    def own():
        advanced = AdvancedQuantizationParameters(disable_bias_correction=True)  # which would compile
        quantized = nncf.quantize(model, nncf.Dataset(items), subset_size=4, advanced_parameters=advanced)
        return host.outputs(quantized, items[0])

    def stop(_):
        raise Stopped

    expected = own()
    with pytest.raises(Stopped):
        host.run(model, items, four_bits(), callback=stop)
    with untouched(model):
        host.quantize(model, items, four_bits(finetune=None))
    assert all(torch.equal(a, b) for a, b in zip(expected, own(), strict=True))
