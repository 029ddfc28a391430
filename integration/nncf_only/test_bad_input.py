"""Wrong models, datasets, settings and hosts: each has its own clear error, before any training step."""

import importlib.metadata
import warnings

import numpy as np
import openvino
import pytest
import torch
from torch import nn

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
from conftest import few_steps, four_bits, quantized_once

from qft_plugin import (
    ConfigError,
    DataError,
    FinetuneConfig,
    HardwareSpec,
    HostError,
    ModelError,
    QFTConfig,
    QFTError,
)
from qft_plugin.nncf import check_version

pytestmark = pytest.mark.core


def refused(error, words, *, model=None, dataset=None, algorithm=None):
    """Check that a quantization raises an error of this kind with these words, and never comes to a first step."""
    steps = []
    model = nets.build("residual") if model is None else model
    dataset = nncf.Dataset(nets.items("residual")) if dataset is None else dataset
    with pytest.raises(error, match=words) as caught:
        nncf.quantize(model, dataset, algorithm=algorithm or four_bits(), callback=steps.append)
    assert steps == []
    assert isinstance(caught.value, QFTError)
    assert str(caught.value).rstrip().endswith((".", "?"))


def scripted():
    """Script a network, without the announcement of torch 2.13 that this will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(3, 3))


def openvino_model():
    """Build an OpenVINO model of one operation."""
    x = openvino.opset13.parameter([1, 3], np.float32)
    return openvino.Model([openvino.opset13.relu(x)], [x])


class ModelProto:
    """Stands in for an ONNX model: neither a module nor anything else of torch."""


def lazy():
    """Make a network whose shapes are not known yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that lazy modules may change
        return nn.LazyLinear(4)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: torch.fx.symbolic_trace(nets.build("linear_only")), "original torch.nn.Module.*GraphModule"),
    (scripted, "plain torch.nn.Module.*before scripting"),
    (openvino_model, r"should be a torch\.nn\.Module.*openvino.*save_openvino"),
    (ModelProto, r"should be a torch\.nn\.Module.*ModelProto"),
    (lambda: nets.NETS["residual"].build, r"should be a torch\.nn\.Module"),
    (lambda: quantized_once("linear_only").job.model, "already.*quantized.*before nncf.quantize"),
    (lambda: nn.ReLU(), "parameters.*none"),
    (lambda: nets.build("residual").to("meta"), "meta"),
    (lazy, "LazyLinear|uninitialized"),
    (lambda: nn.DataParallel(nets.build("residual")), "DataParallel"),
    (lambda: torch.compile(nets.build("residual"), backend="eager"), "torch.compile|OptimizedModule"),
], ids=["fx", "jit", "openvino", "onnx", "class", "quantized", "empty", "meta", "lazy", "parallel",
        "compiled"])  # fmt: skip
def test_what_is_not_a_plain_float_module(make, words):
    """A model of another kind is refused by its kind, with what to pass instead."""
    refused(ModelError, words, model=make())


def test_a_bare_sequential():
    """NNCF's hooks cannot live in a container that calls its children in order, which is said in these words."""
    refused(
        ModelError, "Sequential", model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    )


def test_a_dtype_that_is_too_coarse():
    """A bfloat16 model is refused by its dtype: its outputs are too coarse to compare."""
    dataset = nncf.Dataset([x.bfloat16() for x in nets.items("residual")])
    refused(ModelError, "bfloat16", model=nets.build("residual").bfloat16(), dataset=dataset)


def test_two_dtypes():
    """A model in two floating dtypes is refused with both."""
    model = nets.build("residual")
    model.fc.double()
    refused(ModelError, r"one floating dtype.*float", model=model)


class NoLayer(nn.Module):
    """Has parameters, but no convolution or linear layer that reads one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).relu()


class NanOutput(nets.Residual):
    """Computes the logarithm of a negative number."""

    def forward(self, x):
        return torch.log(super().forward(x) * 0 - 1)


class Untraceable(nets.Residual):
    """Runs twice only: whether it computes the same is seen before it is traced."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        if self.runs > 2:
            raise OSError("the third run")
        return super().forward(x)


class NoTensor(nets.Residual):
    """Returns something without tensors."""

    def forward(self, x):
        super().forward(x)
        return {"text": "done"}


@pytest.mark.parametrize(("model", "error", "words"), [
    (NoLayer, ModelError, "at least one convolution or linear layer"),
    (NanOutput, ModelError, "finite numbers.*NaN"),
    (Untraceable, ModelError, "traced.*OSError: the third run"),
    (NoTensor, ModelError, "return tensors"),
])  # fmt: skip
def test_models_that_cannot_be_used(model, error, words):
    """A model that cannot be traced, quantized or compared is refused with the reason."""
    refused(error, words, model=model().eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    """The parameter that holds a NaN or infinity is named."""
    model = nets.build("residual")
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = value
    refused(ModelError, r"Parameter conv2\.weight.*finite", model=model)


def test_statistics_that_are_not_finite():
    """A NaN in a BatchNorm's statistics shows in the outputs, which is said."""
    model = nets.build("residual")
    model.bn1.running_var[0] = float("nan")
    refused(ModelError, "finite", model=model)


def test_a_model_that_does_not_run_on_the_images():
    """Where the model fails on the images, the error repeats what the model said, and the shape of the images."""
    dataset = nncf.Dataset([torch.randn(4, 5, 8, 8)])
    refused(DataError, r"should run.*RuntimeError.*\[2, 5, 8, 8\]", dataset=dataset)


IMAGES = (4, 3, 8, 8)


def pair():
    """Make one batch of images and one of labels."""
    return torch.randn(IMAGES), torch.arange(4)


def exhausted():
    """Make a generator that has been used up."""
    generator = (torch.randn(IMAGES) for _ in range(2))
    list(generator)
    return generator


@pytest.mark.parametrize(("items", "words"), [
    (list, "at least one batch.*none"),
    (exhausted, "none.*generator.*used up"),
    (lambda: [pair()], r"inputs only.*tuple of \(float32 \[4, 3, 8, 8\], int64 \[4\]\).*labels.*batch\[0\]"),
    (lambda: [list(pair())], r"inputs only.*list of.*labels.*batch\[0\]"),
    (lambda: [dict(zip(("x", "label"), pair(), strict=True))], r"inputs only.*dict of.*labels"),
    (lambda: [torch.randn(IMAGES), torch.randn(4, 3, 9, 9)], r"item 1.*\[0, 3, 8, 8\].*\[4, 3, 9, 9\].*one size"),
    (lambda: [torch.randn(IMAGES), torch.randn(4, 3, 8, 8).double()], r"item 1.*float32.*float64"),
    (lambda: [torch.randint(0, 255, IMAGES, dtype=torch.uint8)], r"item 0.*float32.*uint8.*255"),
    (lambda: [torch.randn(IMAGES).double()], r"item 0.*float32.*float64"),
    (lambda: [torch.randn(IMAGES).half()], r"item 0.*float32.*float16"),
    (lambda: [torch.randn(IMAGES), torch.full(IMAGES, float("nan"))], r"item 1.*finite"),
    (lambda: [torch.full(IMAGES, float("inf"))], r"item 0.*finite"),
    (lambda: [torch.randn(IMAGES).numpy()], "tensor.*ndarray"),
    (lambda: ["image.png"], "tensor.*str"),
    (lambda: [torch.randn(())], "first axis of images.*batch axis"),
    (lambda: [torch.randn(0, 3, 8, 8)], "first axis of images, at least 1"),
], ids=["empty", "exhausted", "labels", "labels_list", "labels_dict", "shapes", "dtypes", "uint8", "float64", "float16",
        "nan", "inf", "numpy", "text", "scalar", "no_images"])  # fmt: skip
def test_datasets_that_cannot_be_used(items, words):
    """A dataset that the model cannot be run on is refused with the item, what it is, and what it should be."""
    refused(DataError, words, dataset=nncf.Dataset(items()))


@pytest.mark.parametrize("dataset", [[torch.randn(IMAGES)], torch.utils.data.DataLoader([1]), torch.randn(IMAGES)])
def test_what_is_not_an_nncf_dataset(dataset):
    """Anything but an `nncf.Dataset` is refused, with the line that makes one."""
    refused(DataError, r"nncf\.Dataset\(loader, lambda batch: batch\[0\]\)", dataset=dataset)


def test_errors_of_the_dataset_come_through():
    """An error that the user's own loader raises is not hidden by another one."""

    def broken():
        yield torch.randn(IMAGES)
        raise FileNotFoundError("image_7.png")

    with pytest.raises(FileNotFoundError, match=r"image_7\.png"):
        nncf.quantize(nets.build("residual"), nncf.Dataset(broken()), algorithm=four_bits())


@pytest.mark.parametrize("algorithm", ["QFT", "gptq", 4, QFTConfig, {"weight_bits": 4}])
def test_an_unknown_algorithm(algorithm):
    """An algorithm that does not exist is refused with the ones that do."""
    refused(ConfigError, 'algorithm should be "qft", a QFTConfig, or None', algorithm=algorithm)


def test_an_unknown_place_of_the_loss():
    """A name that no module has is refused with the names that there are."""
    algorithm = four_bits(finetune=few_steps(loss_at="backbone"))
    refused(ConfigError, r"loss_at.*'backbone'.*conv1/conv2d/0", algorithm=algorithm)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: QFTConfig(weight_bits=1), r"QFTConfig\.weight_bits.*at least 2.*1"),
    (lambda: QFTConfig(weight_bits=9), r"QFTConfig\.weight_bits.*at most 8.*9"),
    (lambda: QFTConfig(weight_bits=4.0), r"QFTConfig\.weight_bits.*whole number.*4\.0"),
    (lambda: QFTConfig(weight_bits="4"), r"QFTConfig\.weight_bits.*whole number.*'4'"),
    (lambda: QFTConfig(small_layer_share=2), r"small_layer_share.*at most 1"),
    (lambda: QFTConfig(layer_bits={"fc.weight": 16}), r"layer_bits.*2 to 8 bits.*16"),
    (lambda: QFTConfig(layer_bits=[4]), r"layer_bits.*map"),
    (lambda: QFTConfig(activation_range="minmax"), r"activation_range.*host.*minmax"),
    (lambda: QFTConfig(equalize="yes"), r"equalize.*True or False"),
    (lambda: QFTConfig(hardware="layerwise"), r"hardware.*HardwareSpec"),
    (lambda: QFTConfig(finetune=True), r"finetune.*FinetuneConfig"),
    (lambda: HardwareSpec(rescale="per_channel"), r"HardwareSpec\.rescale.*layerwise"),
    (lambda: FinetuneConfig(batch_size=0), r"FinetuneConfig\.batch_size.*at least 1"),
    (lambda: FinetuneConfig(learning_rate=-1), r"learning_rate.*at least 0"),
    (lambda: FinetuneConfig(learning_rate=float("nan")), r"learning_rate.*number.*nan"),
    (lambda: FinetuneConfig(seed=-1), r"seed.*at least 0"),
])  # fmt: skip
def test_wrong_values_of_the_settings(make, words):
    """A setting out of range or of the wrong type is refused where it is made, by the name of its field."""
    with pytest.raises(ConfigError, match=words):
        make()


def installed(version, monkeypatch):
    """Let every package seem to be installed in this version, `None` for not at all."""

    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)


@pytest.mark.parametrize(("version", "words"), [
    (None, r"NNCF 2\.17.*none.*pip install"),
    ("2.16.0", r"at least 2\.17.*2\.16\.0.*pip install"),
    ("1.7", r"at least 2\.17.*1\.7"),
])  # fmt: skip
def test_a_host_that_is_missing_or_too_old(version, words, monkeypatch):
    """Without NNCF or with one that is too old, the version that is needed and the command to get it are named."""
    installed(version, monkeypatch)
    refused(HostError, words)


@pytest.mark.parametrize("version", ["2.17.0", "2.19.0rc1", "3.0.0", "3.5.0.dev0+abc", "10.0"])
def test_hosts_that_are_new_enough(version, monkeypatch):
    """Release candidates, development builds and versions of two digits are taken for what they are."""
    installed(version, monkeypatch)
    check_version()
