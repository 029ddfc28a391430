"""The settings: frozen dataclasses that refuse a wrong value by the name of its field."""

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qft_plugin.checks import check_choice, check_flag, check_instance, check_names, check_number
from qft_plugin.errors import ConfigError
from qft_plugin.hardware import HardwareSpec

__all__ = ["EfQAT", "FinetuneConfig", "HardwareSpec", "QFTConfig"]

Range = Literal["host", "max", "mse"]
Bounded = Literal["exact", "relu"]
Rounding = Literal["ste", "soft", "blend"]
Sparsity = float | Literal["2:4"] | None
Trained = Literal["cwpl", "cwpn", "lwpn"]
Precision = Literal["float32", "bfloat16"]


def _sparsity(found: object) -> None:
    if found is None or found == "2:4":
        return
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < 1:
        raise ConfigError(f"QFTConfig.sparsity should be a share from 0 to below 1, '2:4', or None. Found {found!r}.")


@dataclass(frozen=True, kw_only=True)
class EfQAT:
    """Train only the most important weights, so that the backward pass is cheaper (EfQAT, arXiv 2411.11038).

    The importance of an output channel is the mean magnitude of its weights, in real units of the folded network. The
    integers of all other channels are fixed until the next choice. Scales, biases and the weights of normalisations
    always train; below a ratio of 1, factors that fixed integers cannot follow do not: the cross-layer factors, and the
    left scales of doubly per-channel kernels.

    Attributes:
        mode: the unit of the choice: `"cwpl"` the most important channels of each layer, `"cwpn"` those of the whole
            network, `"lwpn"` whole layers, by the mean of their channels.
        ratio: share that trains: of the channels of each layer (cwpl), rounded, or of the weights of all quantized
            kernels, not exceeded (cwpn, lwpn); but at least one channel (of each layer) or layer where it is not 0.
            0 trains nothing but scales, biases and normalisations, 1 everything, as without this setting.
        refresh_images: the choice is made anew each time that so many images have been fed.
    """

    mode: Trained = "cwpl"
    ratio: float = 0.05
    refresh_images: int = 4_096

    def __post_init__(self) -> None:
        check_choice(self, "mode", ("cwpl", "cwpn", "lwpn"))
        check_number(self, "ratio", at_least=0, at_most=1)
        check_number(self, "refresh_images", at_least=1, whole=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The distillation of the float network into the fake-quantized one.

    Attributes:
        images_fed: how many images are shown in total; with fewer images there are more epochs (Fig. 5).
        max_images: how many images are read from the dataset at most.
        batch_size: images per step, whatever the batches of the dataset are.
        learning_rate: of weights and biases, relative to their own quantization step.
        scale_learning_rate: of the logarithms of the scales.
        restarts: number of cosine cycles, each starting at half the learning rate of the one before.
        loss_at: the module or operation whose input is compared with the teacher's: one name, several names, or a
            mapping of names to the positive weight of each. `None` finds the backbone's output: the input of the last
            global pool, else of the last linear layer, else the output of the network.
        cross_entropy: proportion p of the cross entropy between the two networks' class probabilities in the loss,
            (1 - p) * features + p * cross entropy (Fig. 6); 1 uses it alone.
        blocks: names of the modules or operations whose inputs end the blocks of the network, in the order of
            execution. With any, training runs one phase for each block, against the teacher's activation at its end,
            and only what belongs to the block trains; the last phase is the loss above. Each phase gets an equal
            share of the images fed, an optimizer, and `restarts` cosine cycles of its own.
        train: which weights train: all (`None`), or the most important ones.
        rounding_weight: weight of soft rounding's regulariser in the loss. It is a mean over all weights, 0 where all
            are decided and 1 where none is, so each weight has little of it.
        memory_limit: bytes of images and teacher outputs held in memory; above it they are memory-mapped files.
        precision: of the layers in a training step. With `"bfloat16"` they run under `torch.autocast`, faster where the
            hardware has such arithmetic. Parameters, the arithmetic of the quantizers, the loss, and the choice of the
            state that is kept stay in float32; but layers read and write 8 significant bits, by which a value on a
            grid of 8 bits moves by up to half a step.
        compile: fuse the fake-quantization with `torch.compile` (a GPU's many small kernels gain; on CPUs the
            built-in function is as fast and needs no compiler). Falls back with a log line where it does not work.
        seed: of the order of the images.
    """

    images_fed: int = 6_144
    max_images: int = 8_192
    batch_size: int = 32
    learning_rate: float = 0.01
    scale_learning_rate: float = 3e-3
    restarts: int = 1
    loss_at: str | Mapping[str, float] | Sequence[str] | None = None
    cross_entropy: float = 0.0
    blocks: Sequence[str] = ()
    train: EfQAT | None = None
    rounding_weight: float = 300.0
    memory_limit: int = 2 * 2**30
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images_fed", "max_images", "batch_size", "restarts"):
            check_number(self, name, at_least=1, whole=True)
        for name in ("learning_rate", "scale_learning_rate", "rounding_weight"):
            check_number(self, name, at_least=0)
        check_number(self, "cross_entropy", at_least=0, at_most=1)
        check_number(self, "memory_limit", at_least=0, whole=True)
        check_number(self, "seed", at_least=0, at_most=2**63 - 1, whole=True)
        if self.loss_at is not None and not isinstance(self.loss_at, str):
            check_names(self, "loss_at", empty=False)
        if isinstance(self.blocks, Mapping):
            raise ConfigError(f"FinetuneConfig.blocks should be a list of names. Found {self.blocks!r}.")
        check_names(self, "blocks", empty=True)
        if isinstance(self.loss_at, Mapping):
            for name, weight in self.loss_at.items():
                number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
                if not number or not math.isfinite(weight) or weight <= 0:
                    raise ConfigError(
                        "FinetuneConfig.loss_at should map names to positive finite weights. Found "
                        f"{name!r}: {weight!r}. Leave out what should not count."
                    )
        check_flag(self, "compile")
        check_choice(self, "precision", ("float32", "bfloat16"))
        if not isinstance(self.train, EfQAT | None):
            raise ConfigError(f"FinetuneConfig.train should be an EfQAT, or None to train all. Found {self.train!r}.")
        if self.trains_part is not None and self.blocks:
            raise ConfigError(
                "FinetuneConfig.blocks should be empty where EfQAT.ratio is below 1: the weights that train are chosen "
                f"in the whole network. Found {list(self.blocks)} with a ratio of {self.trains_part.ratio}. Use one of "
                "them."
            )

    @property
    def trains_part(self) -> EfQAT | None:
        """Which weights train, `None` where all do."""
        return self.train if self.train is not None and self.train.ratio < 1 else None


@dataclass(frozen=True, kw_only=True)
class QFTConfig:
    """One quantization job.

    Attributes:
        weight_bits: bit width of the weights.
        small_layer_bits: bit width of the smallest layers. CPUs without VNNI add the products of two weights and 8-bit
            activations in 16 bits, which hold the sum for weights of 7 bits and not of 8.
        small_layer_share: the smallest layers get `small_layer_bits` until they hold this share of weights (Sec. 4).
        layer_bits: bit width by name of the weight, or by shell pattern (`{"features.0.*": 8}`); wins over all others.
        layer_activation_bits: bit width of the input of a layer, 4 to 8, likewise by name or pattern of its weight.
            Where layers share one activation, the widest wins.
        activation_range: where activation scales start: `"mse"` (the smallest squared error on the first 256 images,
            however they are batched), `"max"` (nothing is clipped), or `"host"` (the host's own calibration). `None` is
            `"mse"`, but `"host"` where the user set how NNCF estimates ranges.
        equalize: start from 4-bit cross-layer equalization (Eq. 19-21) instead of equal factors.
        compensate: start from weights whose rounding errors, and those of the layers before, compensate each other, and
            from biases that bring the means back, instead of the nearest weights.
        bias_correction: start from biases that undo the mean error of each layer's output (Nagel et al. 2019); a
            finetune trains all biases anyway, without one this is a heuristic of its own.
        train_cross_layer: train the per-channel factors that tie neighbouring layers (with `rounding="ste"` only).
        train_scales: train all scales and zero points, cross-layer factors included; else weights and biases alone.
        bounded: treatment of ReLU6 and Hardtanh modules. `"exact"` keeps them, with a bound for each channel where
            its scale is free; `"relu"` drops the upper bound of those that start at 0: only a finetune makes it good.
        rounding: how weights become integers in training: `"ste"` rounds to the nearest with the straight-through
            estimator, `"soft"` learns for each weight whether it goes up or down (AdaRound), `"blend"` fades the
            quantized weight in (alpha-blending).
        sparsity: share of each layer's weights that become 0, or `"2:4"`: at most two of every four consecutive input
            channels are not 0, at each position of a kernel.
        hardware: constraints of the target.
        finetune: the distillation; `None` returns the initialization (calibration, PPQ, equalization) untrained.
        analyse: measure at the end what quantization does to each layer, and by it to the network.
        average_bits: a target: the mean bit width over all weights that are quantized. Layers are raised from
            `weight_bits` to 7 bits until it is reached, those first whose rounding costs most for their size. Of this
            target and the next two there may be one.
        target_agreement: a target: on how many percent of the held-out images the result names the class of the float
            network. As few weights as possible are raised to 7 bits; it takes several jobs.
        evaluate: a target: called with the float model, and then with each result, returns how good a model is, the
            higher the better, such as its top-1 accuracy in percent; comes with `max_drop`.
        max_drop: by how much `evaluate` of the result may be below that of the float model.
    """

    weight_bits: int = 4
    small_layer_bits: int = 7
    small_layer_share: float = 0.01
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    layer_activation_bits: Mapping[str, int] = field(default_factory=dict)
    activation_range: Range | None = None
    equalize: bool = True
    compensate: bool = True
    bias_correction: bool = False
    train_cross_layer: bool = True
    train_scales: bool = True
    bounded: Bounded = "exact"
    rounding: Rounding = "ste"
    sparsity: Sparsity = None
    hardware: HardwareSpec = field(default_factory=HardwareSpec)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    analyse: bool = False
    average_bits: float | None = None
    target_agreement: float | None = None
    evaluate: Callable[[Any], float] | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        check_instance(self, "hardware", HardwareSpec)
        if self.finetune is not None:
            check_instance(self, "finetune", FinetuneConfig)
        for name in ("weight_bits", "small_layer_bits"):
            check_number(self, name, at_least=2, at_most=8, whole=True)
        check_number(self, "small_layer_share", at_least=0, at_most=1)
        if self.activation_range is not None:
            check_choice(self, "activation_range", ("host", "max", "mse"))
        check_choice(self, "rounding", ("ste", "soft", "blend"))
        _sparsity(self.sparsity)
        check_choice(self, "bounded", ("exact", "relu"))
        for name, least in {"layer_bits": 2, "layer_activation_bits": 4}.items():
            found = getattr(self, name)
            if not isinstance(found, Mapping):
                raise ConfigError(f"QFTConfig.{name} should map patterns to bits. Found {found!r}.")
            for pattern, bits in found.items():
                if not isinstance(pattern, str) or type(bits) is not int or not least <= bits <= 8:
                    raise ConfigError(
                        f"QFTConfig.{name} should map names to {least} to 8 bits. Found {pattern!r}: {bits!r}."
                    )
        for name in ("equalize", "compensate", "bias_correction", "train_cross_layer", "train_scales", "analyse"):
            check_flag(self, name)
        if self.layer_activation_bits and self.hardware.activation_bits is None:
            raise ConfigError(
                "QFTConfig.layer_activation_bits should be empty where HardwareSpec.activation_bits is None. "
                f"Found {dict(self.layer_activation_bits)}."
            )
        if self.rounding != "ste" and self.finetune is not None and self.finetune.blocks:
            raise ConfigError(
                'FinetuneConfig.blocks should be empty unless QFTConfig.rounding is "ste": other elements decide over '
                f"the whole of a training. Found {list(self.finetune.blocks)} with {self.rounding!r}."
            )
        part = None if self.finetune is None else self.finetune.trains_part
        if part is not None and self.rounding != "ste":
            raise ConfigError(
                'QFTConfig.rounding should be "ste" where EfQAT.ratio is below 1: other elements decide over the whole '
                f"of a training. Found {self.rounding!r} with a ratio of {part.ratio}. Leave out FinetuneConfig.train."
            )
        if part is not None and self.sparsity is not None:
            raise ConfigError(
                "QFTConfig.sparsity should be None where EfQAT.ratio is below 1: which weights are 0 is chosen among "
                f"all weights of a layer. Found {self.sparsity!r} with a ratio of {part.ratio}. Leave out "
                "FinetuneConfig.train."
            )
        self._check_target()
        shifts = "power_of_two" in (self.hardware.rescale_factor, self.hardware.elementwise_rescale)
        if self.rounding == "soft" and shifts:
            raise ConfigError(
                'QFTConfig.rounding should not be "soft" with scales that are powers of two: its integers do not '
                'follow a step that doubles. Use "ste".'
            )
        if part is not None and shifts:
            raise ConfigError(
                "FinetuneConfig.train should be None with scales that are powers of two: integers that are fixed do "
                f"not follow a step that doubles. Found {part}. Leave it out."
            )

    @property
    def has_target(self) -> bool:
        """Whether bit widths are chosen so that a target is met."""
        return (self.average_bits, self.target_agreement, self.evaluate) != (None, None, None)

    def _check_target(self) -> None:
        limits = {"average_bits": (self.weight_bits, 8), "target_agreement": (0, 100), "max_drop": (0, None)}
        for name, (least, most) in limits.items():
            if getattr(self, name) is not None:
                check_number(self, name, at_least=least, at_most=most)
        if self.evaluate is not None and not callable(self.evaluate):
            raise ConfigError(f"QFTConfig.evaluate should be a function of a model. Found {self.evaluate!r}.")
        if (self.evaluate is None) != (self.max_drop is None):
            raise ConfigError(
                "QFTConfig.evaluate and max_drop should be set together. Found "
                f"evaluate={self.evaluate!r} and max_drop={self.max_drop!r}."
            )
        asked = [n for n in ("average_bits", "target_agreement", "evaluate") if getattr(self, n) is not None]
        if len(asked) > 1:
            raise ConfigError(f"QFTConfig should have one target. Found {' and '.join(asked)}. Leave the others out.")

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
        bits.update(self._matched("layer_bits", sizes))
        return bits

    def activation_bits_of(self, weights: Collection[str]) -> dict[str, int]:
        """Choose the bit width of the input of each layer.

        Args:
            weights: names of the quantized weights.

        Returns:
            Bits by name of the weight.

        Raises:
            ConfigError: a pattern of `layer_activation_bits` matches no layer.
        """
        bits = dict.fromkeys(weights, self.hardware.activation_bits or 8)
        bits.update(self._matched("layer_activation_bits", weights))
        return bits

    def _matched(self, setting: str, weights: Collection[str]) -> dict[str, int]:
        """Look every pattern of a setting up among the names of the weights."""
        found: dict[str, int] = {}
        for pattern, bits in getattr(self, setting).items():
            matches = fnmatch.filter(weights, pattern)
            if not matches:
                raise ConfigError(
                    f"QFTConfig.{setting}: {pattern!r} matches no quantized weight. Found {sorted(weights)}. "
                    "Use a weight's parameter name or a shell pattern of it."
                )
            found.update(dict.fromkeys(matches, bits))
        return found
