"""The settings of NNCF and of the algorithm, each with its effect on the result."""

import logging

import pytest
import torch

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nets
import nncf
from conftest import activation_quantizers, few_steps, four_bits, relative_error, weight_quantizers
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import (
    AdvancedBiasCorrectionParameters,
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer

import qft_plugin.nncf as host
from qft_plugin import ConfigError, HostError, ModelError, QFTConfig

CLOSE = 0.25
"""Relative L2 error of 4-bit weights after a few steps; a network with a wrong scale is at 0.5 and more."""

ESTIMATOR = {
    "advanced_parameters": AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MEAN_QUANTILE
    )
}
"""A user's own range estimator."""

ONE_STEP = 1 / 127
"""A quantizer's range may end one step before the largest value."""


FLOAT_ORDER = 1e-3
"""Relative L2 difference of two trainings that compute the same in another order of floating-point operations."""


def never(step):
    """Stand in for a callback that must not be called."""
    pytest.fail(f"training has started: {step}")


def quantize(name="residual", config=None, **settings):
    """Quantize a network of the collection with some settings of NNCF."""
    model, items = nets.build(name), nets.items(name)
    return model, items, host.quantize(model, nncf.Dataset(items), config or four_bits(), **settings)


@pytest.mark.core
def test_ignored_scope(outputs):
    """An ignored layer keeps its float weight up to the factors that are folded into it, and gets no quantizer."""
    config = four_bits(equalize=False, train_cross_layer=False)
    model, items, job = quantize("branches", config, ignored_scope=nncf.IgnoredScope(names=["join/conv2d/0"]))
    assert {weight for weight, _ in weight_quantizers(job)} == {"left.weight", "right.weight", "fc.weight"}
    assert torch.equal(job.model.join.weight, model.join.weight)
    assert not torch.equal(job.model.left.weight, model.left.weight)
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


@pytest.mark.parametrize(("trained", "rates"), [
    ("weights", {"scale_learning_rate": 0}),
    ("scales", {"learning_rate": 0, "scale_learning_rate": 0.01}),
])  # fmt: skip
def test_values_and_scales_train_at_rates_of_their_own(trained, rates):
    """At a rate of 0 what it is the rate of stays where it started, while the rest gains something."""
    config = {"weight_bits": 3, "compensate": False}  # so that there is something to gain
    jobs = []
    for finetune in (None, few_steps(images_fed=512, **rates)):
        torch.manual_seed(0)
        jobs.append(quantize(config=four_bits(finetune=finetune, **config))[2])
    start, end = jobs
    assert end.result.final_loss < end.result.start_loss
    before, after = (
        {name: (hook.scale if hasattr(hook, "scale") else hook.input_range).detach().clone()
         for name, hook in activation_quantizers(job).items()}
        for job in (start, end)
    )  # fmt: skip
    assert before.keys() == after.keys()
    same = [torch.equal(scale, after[name]) for name, scale in before.items()]
    assert all(same) == (trained == "weights")


def test_everything_ignored():
    """Where NNCF is told to leave every layer alone, that is an error and not a float model."""
    scope = nncf.IgnoredScope(types=["conv2d", "linear"])
    with pytest.raises(ModelError, match="ignored_scope"):
        quantize("branches", ignored_scope=scope)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_mixed_preset(name, outputs):
    """`preset=MIXED` gives asymmetric activation quantizers, and the result stays close."""
    model, items, job = quantize(name, preset=nncf.QuantizationPreset.MIXED)
    kinds = {type(hook) for hook in activation_quantizers(job).values()}
    assert AsymmetricQuantizer in kinds
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


def test_transformer_model_type(outputs):
    """`model_type=TRANSFORMER` works; `test_smooth_quant.py` is about the SmoothQuant that it stands for in NNCF."""
    model, items, job = quantize("transformer", model_type=nncf.ModelType.TRANSFORMER)
    assert len(weight_quantizers(job)) >= 8
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


@pytest.mark.core
@pytest.mark.parametrize("device", ["CPU", "NPU", "ANY", "GPU"])
def test_target_device(device, outputs):
    """Every target device of OpenVINO gets 4-bit weights."""
    model, items, job = quantize("branches", target_device=nncf.TargetDevice[device])
    assert {quantizer.num_bits for _, quantizer in weight_quantizers(job)} == {4}
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


@pytest.mark.parametrize("range_", ["host", "max", "mse"])
@pytest.mark.parametrize("device", ["CPU", "NPU"])
def test_operations_in_place(device, range_, outputs):
    """An addition or activation in place, right after a quantizer, does not disturb the training or the ranges."""
    results = []
    for name in ("residual", "in_place"):
        torch.manual_seed(0)
        config = four_bits(activation_range=range_, finetune=few_steps(images_fed=64))
        _, items, job = quantize(name, config, target_device=nncf.TargetDevice[device])
        results.append(outputs(job.model, items[0]))
    assert relative_error(*results) < FLOAT_ORDER


def test_on_cpus_an_addend_is_not_quantized():
    """OpenVINO's CPU plugin would not round it, so for CPUs there is no quantizer that only an addition reads."""
    named = {device: set(activation_quantizers(
        quantize("residual", four_bits(finetune=None), target_device=nncf.TargetDevice[device])[2]
    )) for device in ("CPU", "NPU")}  # fmt: skip
    assert any("bn2" in name for name in named["NPU"])
    assert not any("bn2" in name for name in named["CPU"])
    assert any("relu" in name for name in named["CPU"])


def test_subset_size():
    """NNCF's calibration sees as many items as it was told to, the finetune all of them."""
    model, items = nets.build("residual"), nets.items("residual")
    items[3] = items[3] * 100
    config = four_bits(finetune=None, activation_range="host")
    few = host.quantize(model, nncf.Dataset(items), config, subset_size=1)
    every = host.quantize(model, nncf.Dataset(items), config, subset_size=4)

    assert 10 * float(input_quantizer(few).scale.detach()) < float(input_quantizer(every).scale.detach())


@pytest.mark.core
@pytest.mark.parametrize(("settings", "sizes"), [({}, [64, 16]), ({"subset_size": 80}, [1] * 80)])
def test_what_nncf_calibrates_on(monkeypatch, settings, sizes):
    """NNCF keeps something of every item, so single images come to it in batches, unless it is told how many items."""
    seen = []
    original = nncf.Dataset.get_inference_data

    def counted(dataset, *args):
        for item in original(dataset, *args):
            seen.append(len(item))
            yield item

    items = [image[None] for item in nets.items("residual") for image in item][:20] * 4
    dataset = nncf.Dataset(items)
    monkeypatch.setattr(nncf.Dataset, "get_inference_data", counted)
    host.quantize(nets.build("residual"), dataset, four_bits(finetune=None), **settings)
    assert seen[len(items) :] in (sizes, [*sizes[:1], *sizes])  # the first item is an example for its tracer, too


def test_nncf_calibrates_on_its_default_number_of_items():
    """Of more than 300, the last does not count."""
    model, images = nets.build("residual"), [image[None] for item in nets.items("residual") for image in item]
    items = [images[i % len(images)] for i in range(300)]
    config = four_bits(finetune=None, activation_range="host", compensate=False)
    usual, more = (host.quantize(model, nncf.Dataset(i), config) for i in (items, [*items, 1000 * items[0]]))
    assert torch.equal(input_quantizer(usual).scale, input_quantizer(more).scale)


def test_nncf_says_nothing_about_batches_that_are_made_here(caplog):
    """It would warn of fewer items than its default of 300, which are no items of the user's; it does of the user's."""
    model, items = nets.build("residual"), nets.items("residual")
    logger = logging.getLogger("nncf")
    logger.addHandler(caplog.handler)
    try:
        host.quantize(model, nncf.Dataset(items), four_bits(finetune=None))
        assert "samples" not in caplog.text
        host.quantize(model, nncf.Dataset(items), four_bits(finetune=None), subset_size=300)
        assert "Dataset contains only" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.core
@pytest.mark.parametrize(("settings", "words"), [
    ({"mode": nncf.QuantizationMode.FP8_E4M3}, "mode should be None"),
    ({"fast_bias_correction": False}, "fast_bias_correction"),
    ({"advanced_parameters": AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)}, "overflow_fix"),
    ({"advanced_parameters": AdvancedQuantizationParameters(overflow_fix=OverflowFix.FIRST_LAYER)}, "overflow_fix"),
    ({"advanced_parameters": AdvancedQuantizationParameters(
        bias_correction_params=AdvancedBiasCorrectionParameters(threshold=1.0))}, "bias_correction_params"),
    ({"advanced_parameters": AdvancedQuantizationParameters(
        weights_range_estimator_params=RangeEstimatorParametersSet.MEAN_MINMAX)}, "weights_range_estimator_params"),
    ({"advanced_parameters": AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(num_bits=8))}, "weights_quantization_params"),
    ({"advanced_parameters": AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(mode=QuantizationScheme.ASYMMETRIC))},
        "weights_quantization_params"),
])  # fmt: skip
def test_settings_that_cannot_be_honoured(settings, words):
    """A setting of NNCF that the finetune would override is refused by its name, before any step."""
    with pytest.raises(HostError, match=words):
        quantize("linear_only", callback=never, **settings)


def test_two_ranges_that_contradict_each_other():
    """A range estimator for NNCF beside a range of the algorithm's own would have no effect, so it is refused."""
    advanced = AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    with pytest.raises(HostError, match="activations_range_estimator_params"):
        quantize("linear_only", four_bits(activation_range="mse"), callback=never, advanced_parameters=advanced)


def test_settings_that_can_be_honoured(outputs):
    """Advanced settings of the activations go through to NNCF, and the user's object is not changed."""
    advanced = AdvancedQuantizationParameters(
        quantize_outputs=True, activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    before = repr(advanced)
    model, items, job = quantize("residual", advanced_parameters=advanced)
    assert repr(advanced) == before
    assert any(name.startswith("post_hooks.fc/linear/0") for name in activation_quantizers(job))
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


@pytest.mark.core
def test_an_argument_that_nncf_does_not_have():
    """An unknown argument is a `TypeError` with its name, as it is without the plugin."""
    with pytest.raises(TypeError, match="presett"):
        nncf.quantize(
            nets.build("linear_only"), nncf.Dataset(nets.items("linear_only")), algorithm="qft", presett="mixed"
        )


def test_layer_bits():
    """Patterns of parameter names choose the widths of single layers."""
    config = four_bits(layer_bits={"conv*": 6, "fc.weight": 3}, small_layer_share=0)
    _, _, job = quantize("residual", config)
    bits = {weight: quantizer.num_bits for weight, quantizer in weight_quantizers(job)}
    assert bits == {"stem.weight": 4, "conv1.weight": 6, "conv2.weight": 6, "conv3.weight": 6, "fc.weight": 3}
    for weight, quantizer in weight_quantizers(job):
        high = 2 ** (quantizer.num_bits - 1) - 1
        integers = job.model.get_parameter(weight) / (quantizer.scale / high)
        assert integers.abs().max().round() <= high
        assert (integers - integers.round()).abs().max() < 1e-3


def test_layer_bits_that_match_nothing():
    """A pattern that matches no weight is refused with the names that there are, before any step."""
    with pytest.raises(ConfigError, match=r"'head\.weight' matches no.*fc\.weight"):
        quantize(
            "residual",
            four_bits(layer_bits={"head.weight": 8}),
            callback=never,
        )


def test_small_layers_keep_seven_bits():
    """The smallest layers keep 7 bits while they hold less than the given share of all weights."""
    _, _, job = quantize("residual", QFTConfig(small_layer_share=0.12, finetune=None))
    bits = {weight: quantizer.num_bits for weight, quantizer in weight_quantizers(job)}
    # Weights: fc 64, stem 216, conv1 and conv2 576, conv3 1152; 12 % of them are 310.
    assert bits == {"fc.weight": 7, "stem.weight": 7, "conv1.weight": 4, "conv2.weight": 4, "conv3.weight": 4}


def input_quantizer(job):
    """Return the quantizer of the image."""
    return next(hook for name, hook in activation_quantizers(job).items() if name.startswith("post_hooks.x__"))


def test_activation_ranges():
    """Range "max" ends at the largest activation, "mse" before it where the tail is long, with a smaller error."""
    items = [x**5 for x in nets.items("residual")]
    images = torch.cat(items)
    error, extent = {}, {}
    for kind in ("max", "mse", "host"):
        config = four_bits(activation_range=kind, finetune=None)
        job = host.quantize(nets.build("residual"), nncf.Dataset(items), config)
        quantizer = input_quantizer(job)
        assert type(quantizer) is SymmetricQuantizer
        extent[kind] = float(quantizer.scale.detach())
        step = extent[kind] / quantizer.level_high
        steps = (images / step).round().clamp(quantizer.level_low, quantizer.level_high)
        error[kind] = float((images - steps * step).square().mean())
    assert extent["max"] == pytest.approx(float(images.abs().max()), rel=ONE_STEP)
    assert extent["mse"] < extent["max"]
    assert error["mse"] < error["max"]
    assert extent["host"] != extent["max"]


def test_the_range_that_is_used_without_a_setting():
    """It is that of the smallest error, and NNCF's where the user says how NNCF estimates ranges."""
    extents = {}
    for kind, settings in ((None, {}), ("mse", {}), ("estimator", ESTIMATOR), ("host", ESTIMATOR)):
        torch.manual_seed(0)
        asked = {} if kind in (None, "estimator") else {"activation_range": kind}
        _, _, job = quantize(config=four_bits(finetune=None, **asked), **settings)
        extents[kind] = float(input_quantizer(job).scale.detach())
    assert extents[None] == extents["mse"] != extents["host"] == extents["estimator"]


@pytest.mark.parametrize("preset", [None, nncf.QuantizationPreset.MIXED])
@pytest.mark.parametrize("kind", ["max", "mse"])
def test_ranges_with_zero_points(kind, preset, outputs):
    """Grids with a zero point of their own start at it too, however the dataset is batched."""
    model, images = nets.build("preactivation"), torch.cat(nets.items("preactivation"))
    config = four_bits(activation_range=kind, finetune=None)
    found = [
        host.quantize(model, nncf.Dataset(list(images.split(size))), config, preset=preset).model for size in (8, 64)
    ]
    assert relative_error(outputs(found[0], images), outputs(found[1], images)) == 0
    assert relative_error(outputs(found[0], images), outputs(model, images)) < CLOSE


@pytest.mark.parametrize("name", ["inverted", "transformer", "features", "keywords"])
@pytest.mark.parametrize("kind", ["max", "mse"])
def test_activation_ranges_of_other_networks(name, kind, outputs):
    """Both own ranges work with bounded activations, attention, dictionaries and several inputs."""
    model, items, job = quantize(name, four_bits(activation_range=kind, finetune=few_steps(images_fed=32)))
    assert relative_error(outputs(job.model, items[0]), outputs(model, items[0])) < CLOSE


def test_loss_at():
    """The networks are compared at the input of the named module: its own loss, and only layers before it train."""
    model, items = nets.build("residual"), nets.items("residual")
    losses = {}
    for at in ("conv2", "fc", None):
        start = {"equalize": False, "compensate": False, "train_cross_layer": False}
        config = four_bits(finetune=few_steps(loss_at=at, images_fed=1600), **start)
        job = host.quantize(model, nncf.Dataset(items), config)
        untrained = host.quantize(model, nncf.Dataset(items), four_bits(finetune=None, **start)).model
        trained = {
            weight for weight, _ in weight_quantizers(job)
            if not torch.equal(job.model.get_parameter(weight), untrained.get_parameter(weight))
        }  # fmt: skip
        losses[at] = job.result.start_loss
        assert "conv1.weight" in trained
        assert ("conv3.weight" in trained) == (at != "conv2")
    assert len(set(losses.values())) == 3


def test_cross_entropy():
    """With a cross entropy the last layer trains too, and the loss is another one."""
    plain, mixed = (quantize("residual", four_bits(finetune=few_steps(cross_entropy=share)))[2] for share in (0, 0.5))
    assert mixed.result.start_loss != plain.result.start_loss
    assert not torch.equal(mixed.model.fc.weight, plain.model.fc.weight)


def test_cross_entropy_without_logits():
    """A model without one tensor of classes cannot have a cross entropy, which is said before any step."""
    with pytest.raises(ConfigError, match=r"cross_entropy.*\[images, classes\]"):
        quantize(
            "features", four_bits(finetune=few_steps(cross_entropy=1.0)),
            callback=never,
        )  # fmt: skip


def test_equalization_and_cross_layer_factors_can_be_left_out():
    """Without both, an unfoldable input and every layer keep the units of the user's model."""
    config = four_bits(equalize=False, train_cross_layer=False, finetune=None)
    model, _, job = quantize("branches", config)
    for weight, quantizer in weight_quantizers(job):
        W, before = job.model.get_parameter(weight), model.get_parameter(weight)
        step = (quantizer.scale / quantizer.level_high).flatten().max()
        assert (W - before).abs().max() < 3 * step  # clipped by MMSE, rounded, but not rescaled
        assert torch.nn.functional.cosine_similarity(W.flatten(), before.flatten(), dim=0) > 0.98


def test_compensation_lowers_the_loss_before_training():
    """Weights whose rounding errors compensate each other start closer to the teacher than the nearest ones."""
    near, compensated = (quantize("residual", four_bits(compensate=on))[2].result.start_loss for on in (False, True))
    assert compensated < 0.9 * near
