"""What a user can set: three frozen dataclasses that refuse a wrong value by the name of its field."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qft_plugin.errors import ConfigError

Rescale = Literal["layerwise", "channelwise"]
Range = Literal["host", "max", "mse"]
Rounding = Literal["ste", "soft", "blend"]
Sparsity = float | Literal["2:4"] | None


def _choice(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    found = getattr(owner, name)
    if found not in allowed:
        raise ConfigError(f"{type(owner).__name__}.{name} should be one of {allowed}. Found {found!r}.")


def _number(
    owner: object, name: str, *, at_least: float | None = None, at_most: float | None = None, whole: bool = False
) -> None:
    found = getattr(owner, name)
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(found, int) if whole else isinstance(found, (int, float))
    if isinstance(found, bool) or not right_type or not math.isfinite(found):
        raise ConfigError(f"{type(owner).__name__}.{name} should be {kind}. Found {found!r}.")
    if at_least is not None and found < at_least:
        raise ConfigError(f"{type(owner).__name__}.{name} should be at least {at_least}. Found {found!r}.")
    if at_most is not None and found > at_most:
        raise ConfigError(f"{type(owner).__name__}.{name} should be at most {at_most}. Found {found!r}.")


def _sparsity(found: object) -> None:
    if found is None or found == "2:4":
        return
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < 1:
        raise ConfigError(f"QFTConfig.sparsity should be a share from 0 to below 1, '2:4', or None. Found {found!r}.")


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """What the target hardware can do.

    Attributes:
        rescale: rank of the factor between a layer's accumulator and its output. `"channelwise"` (CPUs, most NPUs)
            gives weights a scale per output channel, `"layerwise"` one scale per tensor (Sec. 3.3).
    """

    rescale: Rescale = "channelwise"

    def __post_init__(self) -> None:
        _choice(self, "rescale", ("layerwise", "channelwise"))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The distillation of the float network into the fake-quantized one.

    Attributes:
        images_fed: how many images are shown in total; with fewer images there are more epochs (Fig. 5).
        max_images: how many images are read from the dataset at most.
        batch_size: images per step, whatever the batches of the dataset are.
        learning_rate: of weights and biases, relative to their own quantization step (see `offline.Dof`).
        scale_learning_rate: of the logarithms of the scales.
        restarts: number of cosine cycles, each starting at half the learning rate of the one before.
        loss_at: name of the module whose input is compared with the teacher's, `None` to find the backbone's output:
            the input of the last global pool, else of the last linear layer, else the output of the network.
        cross_entropy: weight of the cross entropy between the two networks' class probabilities, added to the loss.
        rounding_weight: weight of soft rounding's regulariser in the loss. It is a mean over all weights, 0 where all
            are decided and 1 where none is, so each weight has little of it.
        memory_limit: bytes of images and teacher outputs held in memory; above it they are memory-mapped files.
        compile: fuse the fake-quantization with `torch.compile` (a GPU's many small kernels gain; on CPUs the
            built-in function is as fast and needs no compiler). Falls back with a log line where it does not work.
        seed: of the order of the images.
    """

    images_fed: int = 12_288
    max_images: int = 8_192
    batch_size: int = 32
    learning_rate: float = 0.015
    scale_learning_rate: float = 3e-3
    restarts: int = 1
    loss_at: str | None = None
    cross_entropy: float = 0.0
    rounding_weight: float = 300.0
    memory_limit: int = 2 * 2**30
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images_fed", "max_images", "batch_size", "restarts"):
            _number(self, name, at_least=1, whole=True)
        for name in ("learning_rate", "scale_learning_rate", "cross_entropy", "rounding_weight"):
            _number(self, name, at_least=0)
        _number(self, "memory_limit", at_least=0, whole=True)
        _number(self, "seed", at_least=0, at_most=2**63 - 1, whole=True)
        if self.loss_at is not None and not isinstance(self.loss_at, str):
            raise ConfigError(f"FinetuneConfig.loss_at should be a module's name or None. Found {self.loss_at!r}.")
        if not isinstance(self.compile, bool):
            raise ConfigError(f"FinetuneConfig.compile should be True or False. Found {self.compile!r}.")


@dataclass(frozen=True, kw_only=True)
class QFTConfig:
    """One quantization job.

    Attributes:
        weight_bits: bit width of the weights.
        small_layer_bits: bit width of the smallest layers.
        small_layer_share: the smallest layers get `small_layer_bits` until they hold this share of weights (Sec. 4).
        layer_bits: bit width by name of the weight, or by shell pattern (`{"features.0.*": 8}`); wins over all others.
        activation_range: where activation scales start: `"host"` (the host's own calibration), `"max"` or `"mse"`.
        equalize: start from 4-bit cross-layer equalization (Eq. 19-21) instead of equal factors.
        compensate: start from weights whose rounding errors compensate each other (GPTQ) instead of the nearest ones.
        train_cross_layer: train the per-channel factors that tie neighbouring layers (with `rounding="ste"` only).
        rounding: what makes integers of weights in training: `"ste"` rounds to the nearest with the straight-through
            estimator, `"soft"` learns for each weight whether it goes up or down (AdaRound), `"blend"` fades the
            quantized weight in (alpha-blending).
        sparsity: share of each layer's weights that become 0, or `"2:4"`: at most two of every four consecutive input
            channels are not 0, at each position of a kernel.
        hardware: what the target can do.
        finetune: the distillation; `None` returns the initialization (calibration, PPQ, equalization) untrained.
    """

    weight_bits: int = 4
    small_layer_bits: int = 8
    small_layer_share: float = 0.01
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    activation_range: Range = "host"
    equalize: bool = True
    compensate: bool = True
    train_cross_layer: bool = True
    rounding: Rounding = "ste"
    sparsity: Sparsity = None
    hardware: HardwareSpec = field(default_factory=HardwareSpec)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "small_layer_bits"):
            _number(self, name, at_least=2, at_most=8, whole=True)
        _number(self, "small_layer_share", at_least=0, at_most=1)
        _choice(self, "activation_range", ("host", "max", "mse"))
        _choice(self, "rounding", ("ste", "soft", "blend"))
        _sparsity(self.sparsity)
        if not isinstance(self.layer_bits, Mapping):
            raise ConfigError(f"QFTConfig.layer_bits should map patterns to bits. Found {self.layer_bits!r}.")
        for pattern, bits in self.layer_bits.items():
            if not isinstance(pattern, str) or type(bits) is not int or not 2 <= bits <= 8:
                raise ConfigError(f"QFTConfig.layer_bits should map names to 2 to 8 bits. Found {pattern!r}: {bits!r}.")
        for name in ("equalize", "compensate", "train_cross_layer"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"QFTConfig.{name} should be True or False. Found {getattr(self, name)!r}.")
        _instance(self, "hardware", HardwareSpec)
        if self.finetune is not None:
            _instance(self, "finetune", FinetuneConfig)

    def weight_bits_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Choose the bit width of every layer.

        Sec. 4: the smallest layers are added up until they hold `small_layer_share` of all weights.

        Args:
            sizes: number of weights by name of the weight.

        Returns:
            Bits by name of the weight.

        Raises:
            ConfigError: a pattern of `layer_bits` matches no layer.
        """
        bits = dict.fromkeys(sizes, self.weight_bits)
        budget = self.small_layer_share * sum(sizes.values())
        for name, size in sorted(sizes.items(), key=lambda item: item[1]):
            budget -= size
            if budget < 0:
                break
            bits[name] = self.small_layer_bits
        for pattern, wanted in self.layer_bits.items():
            matches = fnmatch.filter(sizes, pattern)
            if not matches:
                raise ConfigError(
                    f"QFTConfig.layer_bits: {pattern!r} matches no quantized weight. Found {sorted(sizes)}. "
                    "Use a weight's parameter name or a shell pattern of it."
                )
            bits.update(dict.fromkeys(matches, wanted))
        return bits


def _instance(owner: object, name: str, kind: type[Any]) -> None:
    found = getattr(owner, name)
    if not isinstance(found, kind):
        raise ConfigError(f"{type(owner).__name__}.{name} should be a {kind.__name__}. Found {found!r}.")
