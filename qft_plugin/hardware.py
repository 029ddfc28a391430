"""What the target hardware can do, as settings."""

from dataclasses import dataclass
from typing import Literal

from qft_plugin.checks import check_choice, check_flag, check_number
from qft_plugin.errors import ConfigError

Rescale = Literal["layerwise", "channelwise"]
Elementwise = Literal["none", "tensor", "channel", "power_of_two"]


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """Constraints of the target hardware; each is simulated while training.

    Attributes:
        rescale: rank of the factor between a layer's accumulator and its output. `"channelwise"` (CPUs, most NPUs)
            gives weights a scale per output channel, `"layerwise"` one scale per tensor (Sec. 3.3).
        doubly_per_channel: weights have a scale of their own per input channel too (Eq. 5). For weights that are
            dequantized before they are multiplied (4/32), and for QONNX; an integer kernel cannot use it.
        activation_bits: bit width of activations, 4 to 8; `None` quantizes weights only (4/32).
        rescale_factor: how the rescale factor F is held: any `"float"`, a `"power_of_two"` (a shift), or a whole
            number of significant bits, 2 to 24, before a shift (an integer multiplier).
        bias_bits: bit width of biases, held as integers in the accumulator's scale; `None` leaves them in float.
        accumulator_bits: width of the accumulator; a layer that could overflow it is named in a warning.
        elementwise_rescale: scales of the inputs of an elementwise add: `"none"` one scale for all of them,
            `"tensor"` each a scale of its own, `"channel"` each a scale of its own in every channel, which costs a
            factor for each channel in front of the addition, `"power_of_two"` scales that differ by a shift (App. D).
        activation_scale: where the scale of an activation may differ by channel. `"folded"`: where the factors can be
            folded into the weights on both sides. `"explicit"`: after SiLU, GELU and their like too, at the price of a
            factor for each channel in front of the quantizer.
    """

    rescale: Rescale = "channelwise"
    doubly_per_channel: bool = False
    activation_bits: int | None = 8
    rescale_factor: Literal["float", "power_of_two"] | int = "float"
    bias_bits: int | None = None
    accumulator_bits: int | None = None
    elementwise_rescale: Elementwise = "tensor"
    activation_scale: Literal["folded", "explicit"] = "folded"

    def __post_init__(self) -> None:
        check_choice(self, "rescale", ("layerwise", "channelwise"))
        check_choice(self, "elementwise_rescale", ("none", "tensor", "channel", "power_of_two"))
        check_choice(self, "activation_scale", ("folded", "explicit"))
        check_flag(self, "doubly_per_channel")
        limits = {"activation_bits": (4, 8), "bias_bits": (4, 32), "accumulator_bits": (8, 64)}
        for name, (least, most) in limits.items():
            if getattr(self, name) is not None:
                check_number(self, name, at_least=least, at_most=most, whole=True)
        if isinstance(self.rescale_factor, str):
            check_choice(self, "rescale_factor", ("float", "power_of_two"))
        else:
            check_number(self, "rescale_factor", at_least=2, at_most=24, whole=True)
        if self.activation_bits is None and self.needs_accumulators:
            raise ConfigError(
                "HardwareSpec.bias_bits, accumulator_bits and rescale_factor should be left at their defaults where "
                "activation_bits is None: there is no integer accumulator."
            )
        if self.doubly_per_channel and self.bias_bits is not None:
            raise ConfigError(
                "HardwareSpec.bias_bits should be None with doubly_per_channel: such a kernel has no accumulator in "
                f"one scale. Found {self.bias_bits}."
            )

    @property
    def ties_addends(self) -> bool:
        """Whether the scales of the inputs of an elementwise add depend on each other."""
        return self.elementwise_rescale in ("none", "power_of_two")

    @property
    def quantizes_addends(self) -> bool:
        """Whether the inputs of an elementwise add must be integers: a CPU adds in float before it quantizes."""
        return self.ties_addends or self.rescale_factor != "float"

    @property
    def needs_accumulators(self) -> bool:
        """Whether a constraint is about integer accumulators, which have one scale for all that a kernel reads."""
        return (self.bias_bits, self.accumulator_bits) != (None, None) or self.rescale_factor != "float"

    @classmethod
    def openvino_cpu(cls) -> "HardwareSpec":
        """int8 kernels of OpenVINO's CPU plugin: float rescaling per channel, biases and additions in float."""
        return cls()

    @classmethod
    def finn(cls) -> "HardwareSpec":
        """Dataflow accelerators generated from QONNX (FINN): additions in one scale, integer biases."""
        return cls(bias_bits=24, accumulator_bits=32, elementwise_rescale="none")

    @classmethod
    def integer_only(cls) -> "HardwareSpec":
        """An all-integer accelerator: rescaling and additions by shifts, 32-bit accumulators, integer biases."""
        return cls(rescale_factor="power_of_two", bias_bits=32, accumulator_bits=32, elementwise_rescale="power_of_two")
