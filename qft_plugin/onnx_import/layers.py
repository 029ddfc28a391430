"""Operations with weights, and pools: each becomes a module of torch, so that hosts see layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.onnx_import.node import Made, Node, Unsupported, parameter

CONVOLUTIONS: Final = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
TRANSPOSED: Final = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
NORMS: Final = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS: Final = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
MAX_POOLS: Final = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}
MEAN_POOLS: Final = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}
GLOBAL_MEANS: Final = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
GLOBAL_MAXIMA: Final = {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d, 5: nn.AdaptiveMaxPool3d}


def _of_rank(kinds: Mapping[int, Any], node: Node) -> Any:
    if node.rank not in kinds:
        raise Unsupported(f"its input has {node.rank} axes")
    return kinds[node.rank]


def _window(node: Node, kernel: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the padding before and after each spatial axis."""
    count = len(kernel)
    strides = node.ints("strides") or [1] * count
    dilations = node.ints("dilations") or [1] * count
    how = node.attributes.get("auto_pad", "NOTSET")
    if how in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, k, stride, dilation in zip(node.shapes[0][2:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
            less, more = total // 2, total - total // 2
            before.append(less if how == "SAME_UPPER" else more)
            after.append(more if how == "SAME_UPPER" else less)
        return strides, dilations, before, after
    pads = (None if how == "VALID" else node.ints("pads")) or [0] * 2 * count
    return strides, dilations, pads[:count], pads[count:]


def _padded(before: list[int], after: list[int], value: float = 0.0) -> str:
    """Return the text of an input with a padding that torch's modules do not have: another one before than after."""
    pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    filled = "" if value == 0 else f", value=float('{value}')"
    return f"functional.pad({{0}}, {tuple(pads)}{filled})"


def _with_weights(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = parameter(weight)
    if bias is not None:
        module.bias = parameter(bias)
    made: nn.Module = module
    return made


def _conv(node: Node) -> Made:
    weight = node.constant(1, "weight")
    bias = node.constant(2, "bias") if node.has(2) else None
    kernel, groups = list(weight.shape[2:]), int(node.attributes.get("group", 1))
    strides, dilations, before, after = _window(node, kernel)
    even = before == after
    module = _of_rank(CONVOLUTIONS, node)(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(kernel),
        tuple(strides),
        tuple(before) if even else 0,
        tuple(dilations),
        groups,
        bias=bias is not None,
    )
    text = "{m}({0})" if even else f"{{m}}({_padded(before, after)})"
    return Made(text, _with_weights(module, weight, bias))


def _conv_transposed(node: Node) -> Made:
    weight = node.constant(1, "weight")
    bias = node.constant(2, "bias") if node.has(2) else None
    kernel, groups = list(weight.shape[2:]), int(node.attributes.get("group", 1))
    strides, dilations, before, after = _window(node, kernel)
    odd = node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes
    if before != after or odd:
        raise Unsupported("it is padded otherwise before than after")
    module = _of_rank(TRANSPOSED, node)(
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(kernel),
        tuple(strides),
        tuple(before),
        tuple(node.ints("output_padding") or [0] * len(kernel)),
        groups,
        bias is not None,
        tuple(dilations),
    )
    return Made("{m}({0})", _with_weights(module, weight, bias))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Make a linear layer.

    Args:
        weight: `[out, in]`.
        bias: `[out]`.
    """
    return _with_weights(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias)


def _gemm(node: Node) -> Made:
    if node.attributes.get("transA", 0) or node.rank != 2:
        raise Unsupported("its first matrix is transposed")
    weight = node.constant(1, "second matrix") * node.number("alpha", 1.0)
    weight = weight if node.attributes.get("transB", 0) else weight.T
    bias = None
    if node.has(2):
        bias = node.constant(2, "third matrix") * node.number("beta", 1.0)
        if bias.numel() not in (1, len(weight)) or bias.shape[:-1].numel() != 1:
            raise Unsupported("its third matrix has several rows")
        bias = bias.reshape(-1).expand(len(weight))
    return Made("{m}({0})", linear(weight, bias))


def _matmul(node: Node) -> Made:
    if 1 in node.constants and node.constants[1].dim() == 2:
        return Made("{m}({0})", linear(node.constants[1].T, None))
    return Made("torch.matmul({0}, {1})")


def _batch_norm(node: Node) -> Made:
    if node.attributes.get("training_mode", 0) or len(node.outputs) > 1:
        raise Unsupported("it is in training mode; export the model in eval mode")
    weight, bias, mean, variance = (node.constant(place, "statistics") for place in (1, 2, 3, 4))
    module = _of_rank(NORMS, node)(len(weight), eps=node.number("epsilon", 1e-5))
    _with_weights(module, weight, bias)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)
    return Made("{m}({0})", module)


def _layer_norm(node: Node) -> Made:
    weight = node.constant(1, "weight")
    bias = node.constant(2, "bias") if node.has(2) else None
    shape = node.shapes[0][node.axis(-1) :]
    if weight.shape != shape or len(node.outputs) > 1:
        raise Unsupported("its weight is broadcast, or its statistics are read")
    module = nn.LayerNorm(shape, eps=node.number("epsilon", 1e-5), bias=bias is not None)
    return Made("{m}({0})", _with_weights(module, weight, bias))


def _instance_norm(node: Node) -> Made:
    weight, bias = node.constant(1, "weight"), node.constant(2, "bias")
    module = _of_rank(INSTANCE_NORMS, node)(len(weight), eps=node.number("epsilon", 1e-5), affine=True)
    return Made("{m}({0})", _with_weights(module, weight, bias))


def _group_norm(node: Node) -> Made:
    weight, bias = node.constant(1, "weight"), node.constant(2, "bias")
    groups, channels = int(node.attributes["num_groups"]), node.shapes[0][1]
    if len(weight) == groups != channels:  # opset 18: a weight for each group
        weight, bias = (t.repeat_interleave(channels // groups) for t in (weight, bias))
    module = nn.GroupNorm(groups, channels, eps=node.number("epsilon", 1e-5))
    return Made("{m}({0})", _with_weights(module, weight, bias))


def _max_pool(node: Node) -> Made:
    if len([name for name in node.outputs if name]) > 1:
        raise Unsupported("its indices are read")
    kernel = node.ints("kernel_shape") or []
    strides, dilations, before, after = _window(node, kernel)
    # torch pads by half a kernel at most.
    even = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    module = _of_rank(MAX_POOLS, node)(
        tuple(kernel),
        tuple(strides),
        tuple(before) if even else 0,
        tuple(dilations),
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
    )
    return Made("{m}({0})" if even else f"{{m}}({_padded(before, after, -math.inf)})", module)


def _mean_pool(node: Node) -> Made:
    kernel = node.ints("kernel_shape") or []
    strides, dilations, before, after = _window(node, kernel)
    counted, ceil = bool(node.attributes.get("count_include_pad", 0)), bool(node.attributes.get("ceil_mode", 0))
    even = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if dilations != [1] * len(kernel) or (not even and not counted) or (not even and ceil):
        raise Unsupported("torch's mean of a window has no such padding or dilation")
    module = _of_rank(MEAN_POOLS, node)(
        tuple(kernel), tuple(strides), tuple(before) if even else 0, ceil_mode=ceil, count_include_pad=counted
    )
    return Made("{m}({0})" if even else f"{{m}}({_padded(before, after)})", module)


def _global(kinds: Mapping[int, Any]) -> Callable[[Node], Made]:
    return lambda node: Made("{m}({0})", _of_rank(kinds, node)(1))


def _reduced_mean(node: Node) -> Made:
    """Make a global pool of a mean over all spatial axes, which is what exporters make of one."""
    axes = sorted(axis % node.rank for axis in node.ints("axes", 1) or range(node.rank))
    keep = bool(node.attributes.get("keepdims", 1))
    if keep and node.rank in GLOBAL_MEANS and axes == list(range(2, node.rank)):
        return Made("{m}({0})", GLOBAL_MEANS[node.rank](1))
    return Made(f"{{0}}.mean({tuple(axes)}, keepdim={keep})")


def _clip(node: Node) -> Made:
    low, high = (
        node.number(name, bound)
        if name in node.attributes or not node.has(place)
        else float(node.constant(place, name))
        for name, place, bound in (("min", 1, -math.inf), ("max", 2, math.inf))
    )
    if low <= torch.finfo(torch.float32).min:  # how older versions say that there is none
        low = -math.inf
    if high >= torch.finfo(torch.float32).max:
        high = math.inf
    if (low, high) == (0, math.inf):
        return Made("{m}({0})", nn.ReLU())
    if (low, high) == (0, 6):
        return Made("{m}({0})", nn.ReLU6())
    if math.isfinite(low) and math.isfinite(high):
        return Made("{m}({0})", nn.Hardtanh(low, high))
    bounds = [f"{name}={bound}" for name, bound in (("min", low), ("max", high)) if math.isfinite(bound)]
    return Made(f"torch.clamp({{0}}, {', '.join(bounds)})" if bounds else "{0}")


def _prelu(node: Node) -> Made:
    slope = node.constant(1, "slope")
    channels = 1 if slope.numel() == 1 else node.shapes[0][1]
    if slope.numel() != channels or (channels > 1 and slope.dim() != node.rank - 1 and slope.shape[0] == channels):
        raise Unsupported("its slope is not one for each channel")
    module = nn.PReLU(channels)
    module.weight = parameter(slope.reshape(-1))
    return Made("{m}({0})", module)


def _hard_sigmoid(node: Node) -> Made:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return Made("{m}({0})", nn.Hardsigmoid())
    return Made(f"torch.clamp({{0}} * {alpha} + {beta}, 0.0, 1.0)")


def _softmax(kind: type[nn.Module]) -> Callable[[Node], Made]:
    def make(node: Node) -> Made:
        axis = node.axis(1 if node.version < 13 else -1)
        if node.version < 13 and math.prod(node.shapes[0][axis + 1 :]) != 1:
            raise Unsupported("before opset 13 it is taken over all axes from one on")
        return Made("{m}({0})", kind(axis))

    return make


LAYERS: Final[Mapping[str, Callable[[Node], Made]]] = {
    "AveragePool": _mean_pool,
    "BatchNormalization": _batch_norm,
    "Celu": lambda node: Made("{m}({0})", nn.CELU(node.number("alpha", 1.0))),
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transposed,
    "Elu": lambda node: Made("{m}({0})", nn.ELU(node.number("alpha", 1.0))),
    "Gelu": lambda node: Made("{m}({0})", nn.GELU(node.attributes.get("approximate", "none"))),
    "Gemm": _gemm,
    "GlobalAveragePool": _global(GLOBAL_MEANS),
    "GlobalMaxPool": _global(GLOBAL_MAXIMA),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _: Made("{m}({0})", nn.Hardswish()),
    "InstanceNormalization": _instance_norm,
    "LRN": lambda node: Made(
        "{m}({0})",
        nn.LocalResponseNorm(
            int(node.attributes["size"]),
            node.number("alpha", 1e-4),
            node.number("beta", 0.75),
            node.number("bias", 1.0),
        ),
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node: Made("{m}({0})", nn.LeakyReLU(node.number("alpha", 0.01))),
    "LogSoftmax": _softmax(nn.LogSoftmax),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mish": lambda _: Made("{m}({0})", nn.Mish()),
    "PRelu": _prelu,
    "ReduceMean": _reduced_mean,
    "Relu": lambda _: Made("{m}({0})", nn.ReLU()),
    "Sigmoid": lambda _: Made("{m}({0})", nn.Sigmoid()),
    "Softmax": _softmax(nn.Softmax),
    "Softplus": lambda _: Made("{m}({0})", nn.Softplus(threshold=1e9)),
    "Softsign": lambda _: Made("{m}({0})", nn.Softsign()),
    "Tanh": lambda _: Made("{m}({0})", nn.Tanh()),
}
"""What each operation becomes; what torch has as a module becomes one."""
