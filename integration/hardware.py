"""The quantizers of a result, read back from the objects of each host, for tests of the constraints of hardware."""

from dataclasses import dataclass

import nets
import pytest
import torch
from conftest import activation_quantizers, weight_quantizers

from qft_plugin import DeployabilityError
from qft_plugin.graph.torch_model import tensors_in


@dataclass(frozen=True)
class Places:
    """The quantizers around each layer of a network, in the words of one host.

    Attributes:
        around: the quantizers of what a layer reads and of what it makes, by name of its weight.
        addends: the quantizers of what the network adds.
    """

    around: dict[str, tuple[str, str | None]]
    addends: tuple[str, str]


def hook(op: str, number: int = 0) -> str:
    """Name NNCF's quantizer after an operation."""
    return f"post_hooks.{op}__0.{number}"


PLACES = {
    ("nncf", "residual"): Places(
        {
            "stem.weight": (hook("x"), hook("/relu/0")),
            "conv1.weight": (hook("/relu/0"), hook("/relu/1")),
            "conv2.weight": (hook("/relu/1"), hook("bn2/batch_norm/0")),
            "conv3.weight": (hook("/relu/2"), hook("/relu/3")),
            "fc.weight": (hook("/adaptive_avg_pool2d/0"), None),
        },
        (hook("/relu/0"), hook("bn2/batch_norm/0")),
    ),
    # The first hook after a ReLU6 is the factor of its channels.
    ("nncf", "inverted"): Places(
        {
            "stem.0.weight": (hook("x"), hook("stem/2/hardtanh/0", 1)),
            "expand.0.weight": (hook("stem/2/hardtanh/0", 1), hook("expand/2/hardtanh/0", 1)),
            "depth.0.weight": (hook("expand/2/hardtanh/0", 1), hook("depth/2/hardtanh/0", 1)),
            "project.0.weight": (hook("depth/2/hardtanh/0", 1), hook("project/1/batch_norm/0")),
            "head.weight": (hook("/mean/0"), None),
        },
        (hook("stem/2/hardtanh/0", 1), hook("project/1/batch_norm/0")),
    ),
    ("nncf", "branches"): Places(
        {
            "left.weight": (hook("x"), hook("/relu/0")),
            "right.weight": (hook("x"), hook("/relu/0")),  # one quantizer for both parts
            "join.weight": (hook("/relu/0"), hook("/relu/2")),
            "fc.weight": (hook("/relu/2"), None),
        },
        (),
    ),
    ("brevitas", "branches"): Places(
        {
            "left.weight": ("quantizer_0", "quantizer_1"),
            "right.weight": ("quantizer_0", "quantizer_1"),
            "join.weight": ("quantizer_1", "quantizer_2"),
            "fc.weight": ("quantizer_2", None),
        },
        (),
    ),
    ("brevitas", "residual"): Places(
        {
            "stem.weight": ("quantizer_0", "quantizer_1"),
            "conv1.weight": ("quantizer_1", "quantizer_2"),
            "conv2.weight": ("quantizer_2", "quantizer_5"),
            "conv3.weight": ("quantizer_3", None),
            "fc.weight": ("quantizer_4", None),
        },
        ("quantizer_1", "quantizer_5"),
    ),
    ("brevitas", "inverted"): Places(
        {
            "stem.0.weight": ("quantizer_0", "quantizer_1"),
            "expand.0.weight": ("quantizer_1", "quantizer_2"),
            "depth.0.weight": ("quantizer_2", "quantizer_3"),
            "project.0.weight": ("quantizer_3", "quantizer_5"),
            "head.weight": ("quantizer_4", None),
        },
        ("quantizer_1", "quantizer_5"),
    ),
}


@dataclass(frozen=True)
class Activation:
    """A quantizer of an activation, as its host describes it."""

    scale: float
    zero_point: float
    bits: int
    signed: bool


@dataclass(frozen=True)
class Kernel:
    """A quantized weight, as its host describes it: the step is `[1]` or `[out]`."""

    step: torch.Tensor
    bits: int
    weight: torch.Tensor
    bias: torch.Tensor


class UnderNNCF:
    """Quantizes with NNCF."""

    name = "nncf"

    def quantize(self, model, items, config, **settings):
        import nncf

        import qft_plugin.nncf as host

        self.job = host.quantize(model, nncf.Dataset(items), config, **settings)
        self.model, self.dof_map = self.job.model, self.job.dof_map
        return self

    def outputs(self, item):
        from qft_plugin.nncf import without_compiler

        with torch.no_grad(), without_compiler():
            return list(tensors_in(nets.call(self.model, item)))

    def activations(self):
        found = {}
        for name, quantizer in activation_quantizers(self.job).items():
            low, _, scale, zero_point = quantizer.get_parameters_for_torch_fq()
            if scale.numel() == 1:  # NNCF may give what a depthwise layer reads a scale for each channel
                found[name] = Activation(scale.item(), zero_point.item(), quantizer.num_bits, bool(low < 0))
        return found

    def kernels(self):
        found = {}
        for name, quantizer in weight_quantizers(self.job):
            step = (quantizer.scale / quantizer.level_high).detach().flatten()
            tensors = self.model.get_parameter(name), self.model.get_parameter(self.dof_map.layer(name).bias)
            found[name] = Kernel(step, quantizer.num_bits, *(t.detach() for t in tensors))
        return found

    def save(self, folder, item):
        from qft_plugin.nncf import save_openvino

        return [save_openvino(self.model, folder / "model.xml", item)]


class UnderBrevitas:
    """Quantizes with Brevitas, and folds."""

    name = "brevitas"

    def quantize(self, model, items, config):
        from qft_plugin.brevitas import dof_map_of, fold, quantize

        self.linked = quantize(model, items, config=config)
        self.dof_map = dof_map_of(self.linked)
        self.model = fold(self.linked)
        return self

    def outputs(self, item):
        with torch.no_grad():
            return list(tensors_in(nets.call(self.model, item)))

    def activations(self):
        found = {}
        for name, module in self.model.named_modules():
            proxy = getattr(module, "act_quant", None)
            if "." not in name and proxy is not None and proxy.is_quant_enabled:
                values = (proxy.scale(), proxy.zero_point(), proxy.bit_width())
                scale, zero_point, bits = (v.detach().item() for v in values)
                found[name] = Activation(scale, zero_point, int(bits), proxy.is_signed)
        return found

    def kernels(self):
        found = {}
        for name, module in self.model.named_modules():
            proxy = getattr(module, "weight_quant", None)
            if proxy is not None and proxy.is_quant_enabled:
                bits, step = int(proxy.bit_width().item()), proxy.scale().detach()
                kept = step if step.dim() and max(step.shape[1:], default=1) > 1 else step.flatten()
                bias = module.bias
                if module.bias_quant.is_quant_enabled:
                    bias = module.bias_quant(bias).value
                found[f"{name}.weight"] = Kernel(kept, bits, module.weight.detach(), bias.detach())
        return found

    def save(self, folder, item):
        from qft_plugin.brevitas import save_qcdq, save_qonnx

        saved = [save_qonnx(self.linked, folder / "linked.onnx", item), save_qonnx(self.model, folder / "q.onnx", item)]
        if any(kernel.step.dim() > 1 for kernel in self.kernels().values()):
            with pytest.raises(DeployabilityError, match="differ by input channel"):
                save_qcdq(self.model, folder / "qcdq.onnx", item)
            return saved
        return [*saved, save_qcdq(self.model, folder / "qcdq.onnx", item)]


HOSTS = {"nncf": UnderNNCF, "brevitas": UnderBrevitas}
