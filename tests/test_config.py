"""The settings: every wrong value is refused by the name of its field, and bit widths follow the 1 % rule."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.config import EfQAT, FinetuneConfig, HardwareSpec, QFTConfig
from qft_plugin.errors import ConfigError, QFTError
from qft_plugin.tensors.grid import largest_integer

WRONG: list[tuple[type, str, Any]] = [
    (HardwareSpec, "rescale", "per-tensor"),
    (HardwareSpec, "rescale", None),
    *((HardwareSpec, "elementwise_rescale", bad) for bad in ("channelwise", None, True, 2)),
    *((HardwareSpec, "doubly_per_channel", bad) for bad in (1, None, "yes")),
    *((HardwareSpec, "activation_bits", bad) for bad in (3, 9, 0, -8, 8.0, "8", True, math.nan)),
    *((HardwareSpec, "bias_bits", bad) for bad in (3, 33, 16.0, "32", True)),
    *((HardwareSpec, "accumulator_bits", bad) for bad in (7, 65, 32.0, "32", False)),
    *((HardwareSpec, "rescale_factor", bad) for bad in ("shift", "", None, 1, 25, 8.0, True, -4, math.inf)),
    *((FinetuneConfig, name, bad) for name in ("images_fed", "max_images", "batch_size", "restarts")
      for bad in (0, -1, 1.5, "8", True, None)),
    *((FinetuneConfig, name, bad)
      for name in ("learning_rate", "scale_learning_rate", "cross_entropy", "rounding_weight")
      for bad in (-0.1, math.nan, "fast", True, None)),
    (FinetuneConfig, "cross_entropy", 1.01),
    *((FinetuneConfig, "blocks", bad) for bad in (7, None, "a", ["a", "a"], ["a", 1], {"a": 1.0})),
    (FinetuneConfig, "memory_limit", -1),
    (FinetuneConfig, "memory_limit", 0.5),
    (FinetuneConfig, "seed", -1),
    (FinetuneConfig, "seed", 2**63),
    (FinetuneConfig, "seed", "0"),
    *((FinetuneConfig, "loss_at", bad) for bad in (7, [], {}, ["a", "a"], ["a", 1], {1: 1.0}, {"a"})),
    *((FinetuneConfig, "loss_at", {"a": bad}) for bad in (0, -1.0, math.nan, math.inf, "1", True, None)),
    (FinetuneConfig, "compile", 1),
    *((FinetuneConfig, "train", bad) for bad in ("cwpl", 0.05, True, {"ratio": 0.05}, EfQAT)),
    *((EfQAT, "mode", bad) for bad in ("CWPL", "layer", None, 1)),
    *((EfQAT, "ratio", bad) for bad in (-0.01, 1.01, math.nan, "0.05", True, None)),
    *((EfQAT, "refresh_images", bad) for bad in (0, -1, 0.5, "4096", True, None)),
    *((QFTConfig, name, bad) for name in ("weight_bits", "small_layer_bits") for bad in (1, 9, 4.0, "4", False)),
    *((QFTConfig, "small_layer_share", bad) for bad in (-0.01, 1.01, math.nan, None)),
    *((QFTConfig, "activation_range", bad) for bad in ("minmax", True, "")),
    *((QFTConfig, "rounding", bad) for bad in ("nearest", None, True)),
    *((QFTConfig, "sparsity", bad) for bad in (-0.1, 1, 1.5, "1:2", True, math.nan, math.inf)),
    *((QFTConfig, "layer_bits", bad) for bad in (8, [("a", 8)], {"a": 1}, {"a": 9}, {"a": 8.0}, {"a": True}, {1: 8})),
    *((QFTConfig, name, 1)
      for name in ("equalize", "compensate", "bias_correction", "train_cross_layer", "train_scales")),
    *((QFTConfig, "bounded", bad) for bad in ("relu6", None, True)),
    *((QFTConfig, "layer_activation_bits", bad)
      for bad in (8, [("a", 8)], {"a": 3}, {"a": 9}, {"a": 8.0}, {"a": True}, {1: 8}, {"a": None})),
    (QFTConfig, "hardware", "channelwise"),
    (QFTConfig, "finetune", True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_wrong_value_is_refused_by_the_name_of_its_field(kind: type, name: str, value: Any) -> None:
    """The message names class and field and shows what was found."""
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert f"{kind.__name__}.{name}" in message
    assert "should" in message
    shown = value if not isinstance(value, dict) or not value else next(iter(value.values()))
    assert repr(shown) in message
    assert isinstance(caught.value, (QFTError, ValueError))


@pytest.mark.parametrize("kind", [HardwareSpec, EfQAT, FinetuneConfig, QFTConfig])
def test_every_field_is_checked(kind: type) -> None:
    """No field of any of them can be set to something absurd."""
    for field in dataclasses.fields(kind):
        with pytest.raises(ConfigError, match=field.name):
            kind(**{field.name: object()})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (HardwareSpec, {"rescale": "layerwise"}),
        (HardwareSpec, {"activation_bits": 4, "bias_bits": 4, "accumulator_bits": 8, "rescale_factor": 2}),
        (HardwareSpec, {"activation_bits": 8, "bias_bits": 32, "accumulator_bits": 64, "rescale_factor": 24}),
        (HardwareSpec, {"doubly_per_channel": True, "accumulator_bits": 32}),
        (HardwareSpec, {"rescale_factor": "power_of_two", "elementwise_rescale": "none"}),
        (QFTConfig, {"layer_activation_bits": {"a": 4, "b.*": 8}, "bounded": "relu", "train_scales": False}),
        (FinetuneConfig, {"images_fed": 1, "max_images": 1, "batch_size": 1, "restarts": 1, "seed": 2**63 - 1}),
        (FinetuneConfig, {"learning_rate": 0, "scale_learning_rate": 0, "cross_entropy": 1, "memory_limit": 0}),
        (FinetuneConfig, {"loss_at": {"a": 1, "b": 1e-9}}),
        (FinetuneConfig, {"loss_at": ("a", "b.c"), "blocks": ()}),
        (FinetuneConfig, {"blocks": ["a", "b.c"]}),
        (EfQAT, {"mode": "lwpn", "ratio": 0, "refresh_images": 1}),
        (EfQAT, {"mode": "cwpn", "ratio": 1}),
        (FinetuneConfig, {"blocks": ["a"], "train": EfQAT(ratio=1)}),
        (QFTConfig, {"rounding": "soft", "sparsity": "2:4", "finetune": FinetuneConfig(train=EfQAT(ratio=1))}),
        (QFTConfig, {"sparsity": 0, "rounding": "soft"}),
        (QFTConfig, {"average_bits": 4, "analyse": True}),
        (QFTConfig, {"average_bits": 8.0, "weight_bits": 8}),
        (QFTConfig, {"target_agreement": 100}),
        (QFTConfig, {"evaluate": len, "max_drop": 0}),
        (QFTConfig, {"sparsity": "2:4", "rounding": "blend"}),
        (QFTConfig, {"weight_bits": 2, "small_layer_bits": 8, "small_layer_share": 1, "finetune": None}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(kind: type, values: dict[str, Any]) -> None:
    """Bounds are inclusive and the values are kept as given."""
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_settings_cannot_be_changed() -> None:
    """A config is frozen; a variation is a new one, and it is checked again."""
    config = QFTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="weight_bits"):
        dataclasses.replace(config, weight_bits=1)


def test_smallest_layers_up_to_one_percent() -> None:
    """Sec. 4 by hand: of 10,000 weights, 10 + 20 + 70 = 100 make just 1 %; the next layer is not small."""
    config = QFTConfig(weight_bits=4, small_layer_bits=8, small_layer_share=0.01)
    found = config.weight_bits_of({"head": 200, "a": 70, "body": 9700, "b": 10, "c": 20})
    assert found == {"head": 4, "a": 8, "body": 4, "b": 8, "c": 8}


def test_one_weight_too_many_is_not_small() -> None:
    """With 71 instead of 70 weights the third layer would make 101 of 10,001: it stays at 4 bits."""
    config = QFTConfig(weight_bits=4, small_layer_bits=8, small_layer_share=0.01)
    found = config.weight_bits_of({"head": 200, "a": 71, "body": 9700, "b": 10, "c": 20})
    assert found == {"head": 4, "a": 4, "body": 4, "b": 8, "c": 8}


@pytest.mark.parametrize(("share", "bits"), [(0.0, 3), (1.0, 6)])
def test_a_share_of_none_or_all(share: float, bits: int) -> None:
    """A share of 0 makes no layer small, a share of 1 all of them."""
    config = QFTConfig(weight_bits=3, small_layer_bits=6, small_layer_share=share)
    assert config.weight_bits_of({"a": 1, "b": 100}) == {"a": bits, "b": bits}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0, 1))
def test_small_layers_fit_and_the_next_does_not(sizes: dict[str, int], share: float) -> None:
    """The small layers hold at most the share, no other layer is smaller, and one more would be too much."""
    config = QFTConfig(weight_bits=4, small_layer_bits=8, small_layer_share=share)
    found = config.weight_bits_of(sizes)
    small = sorted(sizes[n] for n, bits in found.items() if bits == 8)
    large = sorted(sizes[n] for n, bits in found.items() if bits == 4)
    rounding = 1e-6 * sum(sizes.values())
    assert sum(small) <= share * sum(sizes.values()) + rounding
    if large:
        assert sum(small) + large[0] > share * sum(sizes.values()) - rounding
        assert not small or small[-1] <= large[0]


def test_patterns_win_over_sizes_and_later_ones_over_earlier() -> None:
    """`layer_bits` takes names and shell patterns; of two that match, the later one counts."""
    config = QFTConfig(weight_bits=4, small_layer_share=0.0, layer_bits={"body.*": 6, "body.1.weight": 2, "head": 8})
    sizes = {"stem": 10, "body.0.weight": 10, "body.1.weight": 10, "head": 10}
    assert config.weight_bits_of(sizes) == {"stem": 4, "body.0.weight": 6, "body.1.weight": 2, "head": 8}


def test_a_pattern_without_a_match_is_an_error() -> None:
    """A misspelt name is not ignored: the message shows it and the names there are."""
    with pytest.raises(ConfigError, match=r"layer_bits.*'haed'.*'body', 'head'"):
        QFTConfig(layer_bits={"haed": 8}).weight_bits_of({"head": 1, "body": 2})


def test_a_kernel_without_an_accumulator_has_no_integer_bias() -> None:
    """Doubly per-channel kernels and integer biases contradict each other, which is said by the name of the field."""
    with pytest.raises(ConfigError, match=r"HardwareSpec\.bias_bits.*doubly_per_channel.*16"):
        HardwareSpec(doubly_per_channel=True, bias_bits=16)


def test_activations_that_are_floats_have_no_bits() -> None:
    """Bit widths of single activations need quantized ones; an empty mapping does not."""
    floats = HardwareSpec(activation_bits=None)
    with pytest.raises(ConfigError, match=r"layer_activation_bits.*activation_bits is None.*'a': 6"):
        QFTConfig(hardware=floats, layer_activation_bits={"a": 6})
    assert QFTConfig(hardware=floats).layer_activation_bits == {}


@pytest.mark.parametrize(
    ("made", "constraints"),
    [
        (HardwareSpec.openvino_cpu(), {}),
        (HardwareSpec.finn(), {"bias_bits": 24, "accumulator_bits": 32, "elementwise_rescale": "none"}),
        (
            HardwareSpec.integer_only(),
            {
                "rescale_factor": "power_of_two",
                "bias_bits": 32,
                "accumulator_bits": 32,
                "elementwise_rescale": "power_of_two",
            },
        ),
    ],
)
def test_presets(made: HardwareSpec, constraints: dict[str, Any]) -> None:
    """A preset is a specification like any other: the defaults with the constraints of its target."""
    assert made == HardwareSpec(**constraints)


@pytest.mark.parametrize(
    ("settings", "quantizes"),
    [
        ({}, False),
        ({"bias_bits": 24}, False),
        ({"elementwise_rescale": "none"}, True),
        ({"elementwise_rescale": "power_of_two"}, True),
        ({"elementwise_rescale": "channel"}, False),
        ({"elementwise_rescale": "channel", "rescale_factor": 4}, True),
        ({"rescale_factor": "power_of_two"}, True),
        ({"rescale_factor": 4}, True),
    ],
)
def test_when_addends_are_integers(settings: dict[str, Any], quantizes: bool) -> None:
    """Additions are of integers as soon as their scales, or the factors that lead to them, are constrained."""
    assert HardwareSpec(**settings).quantizes_addends is quantizes


def test_activation_bits_follow_patterns() -> None:
    """All layers read the hardware's width but those that a pattern names; of two that match, the later one counts."""
    names = ["stem.weight", "body.0.weight", "body.1.weight", "head.weight"]
    config = QFTConfig(
        layer_activation_bits={"body.*": 4, "body.1.weight": 7, "head.*": 8}, hardware=HardwareSpec(activation_bits=6)
    )
    assert list(config.activation_bits_of(names).values()) == [6, 4, 7, 8]
    assert list(QFTConfig().activation_bits_of(names).values()) == [8, 8, 8, 8]


def test_an_activation_pattern_without_a_match_is_an_error() -> None:
    """A misspelt name is not ignored: the message shows it and the names there are."""
    with pytest.raises(ConfigError, match=r"layer_activation_bits.*'haed'.*'body', 'head'"):
        QFTConfig(layer_activation_bits={"haed": 8}).activation_bits_of(["head", "body"])


def test_wrong_hardware_is_refused_before_what_depends_on_it() -> None:
    """A field of the wrong kind is named, whatever else is set."""
    with pytest.raises(ConfigError, match=r"QFTConfig\.hardware"):
        QFTConfig(hardware="x", layer_activation_bits={"a": 8})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounding": "soft", "finetune": FinetuneConfig(blocks=["a"])}, r"FinetuneConfig\.blocks should be empty"),
        ({"rounding": "soft", "hardware": HardwareSpec.integer_only()}, r"QFTConfig\.rounding should not be"),
        ({"rounding": "soft", "finetune": FinetuneConfig(train=EfQAT())}, r'QFTConfig\.rounding should be "ste"'),
        ({"rounding": "blend", "finetune": FinetuneConfig(train=EfQAT())}, r'QFTConfig\.rounding should be "ste"'),
        ({"sparsity": 0.5, "finetune": FinetuneConfig(train=EfQAT())}, r"QFTConfig\.sparsity should be None"),
        (
            {"hardware": HardwareSpec.integer_only(), "finetune": FinetuneConfig(train=EfQAT())},
            r"FinetuneConfig\.train should be None",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], words: str) -> None:
    """What cannot be had together is refused before anything runs."""
    with pytest.raises(ConfigError, match=words):
        QFTConfig(**settings)


def test_blocks_contradict_a_choice_over_the_whole_network() -> None:
    """What trains is chosen among all layers, so a phase cannot have a choice of its own."""
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.blocks should be empty where EfQAT\.ratio"):
        FinetuneConfig(blocks=["a"], train=EfQAT())


def test_a_ratio_of_one_is_no_part() -> None:
    """Everything trains without the setting and with a ratio of 1; below, a part."""
    assert FinetuneConfig().trains_part is None
    assert FinetuneConfig(train=EfQAT(ratio=1)).trains_part is None
    assert FinetuneConfig(train=EfQAT(ratio=0)).trains_part == EfQAT(ratio=0)


@pytest.mark.parametrize("name", ["bias_bits", "accumulator_bits", "rescale_factor"])
def test_weights_alone_have_no_accumulator(name: str) -> None:
    """Constraints on integers that there are not are refused."""
    with pytest.raises(ConfigError, match="activation_bits is None"):
        HardwareSpec(activation_bits=None, **{name: 16})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"average_bits": 3.9}, r"average_bits should be at least 4\. Found 3\.9"),
        ({"average_bits": 8.1}, r"average_bits should be at most 8\. Found 8\.1"),
        ({"target_agreement": 101}, r"target_agreement should be at most 100\. Found 101"),
        ({"evaluate": len}, "evaluate and max_drop should be set together"),
        ({"max_drop": 0.5}, "evaluate and max_drop should be set together"),
        ({"evaluate": len, "max_drop": -1}, r"max_drop should be at least 0\. Found -1"),
        ({"evaluate": "top1", "max_drop": 1}, "evaluate should be a function of a model"),
        ({"average_bits": 5, "target_agreement": 98}, "one target. Found average_bits and target_agreement"),
        ({"average_bits": 5, "evaluate": len, "max_drop": 1}, "one target. Found average_bits and evaluate"),
    ],
)
def test_targets_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    """Out of range, half of a pair, or two at once."""
    with pytest.raises(ConfigError, match=words):
        QFTConfig(**settings)


def test_what_has_a_target() -> None:
    """Each of the three is one; an analysis alone is none."""
    assert not QFTConfig(analyse=True).has_target
    for settings in ({"average_bits": 5.0}, {"target_agreement": 98.0}, {"evaluate": len, "max_drop": 1.0}):
        assert QFTConfig(**settings).has_target  # type: ignore[arg-type]


def test_the_smallest_layers_fit_the_kernels_of_every_cpu() -> None:
    """Two products of their largest integers and of 8-bit activations fit 16 bits, which those of 8 bits do not."""
    assert 2 * 255 * largest_integer(QFTConfig().small_layer_bits) < 2**15 < 2 * 255 * largest_integer(8)
