"""Operations without weights: arithmetic, and what moves elements."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn

from qft_plugin.onnx_import.node import Made, Node, Unsupported, parameter

UNARY: Final = {
    "Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Log": "log",
    "Neg": "neg", "Reciprocal": "reciprocal", "Round": "round", "Sign": "sign", "Sin": "sin", "Sqrt": "sqrt",
}  # fmt: skip
BINARY: Final = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "Pow": "**"}
REDUCED: Final = {
    "ReduceMax": "{{0}}.amax({axes}, keepdim={keep})",
    "ReduceMin": "{{0}}.amin({axes}, keepdim={keep})",
    "ReduceSum": "{{0}}.sum({axes}, keepdim={keep})",
    "ReduceL2": "torch.linalg.vector_norm({{0}}, dim={axes}, keepdim={keep})",
}
FOLDED: Final = {"Max": "torch.maximum({}, {})", "Min": "torch.minimum({}, {})", "Sum": "{} + {}"}
DTYPES: Final = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}
"""By their number in the format."""


def _binary(node: Node) -> Made:
    return Made(f"{{0}} {BINARY[node.kind]} {{1}}")


def _folded(node: Node) -> Made:
    text = "{0}"
    for place in range(1, len(node.inputs)):
        text = FOLDED[node.kind].format(text, f"{{{place}}}")
    return Made(text)


def _mean(node: Node) -> Made:
    count = len(node.inputs)
    return Made(f"({' + '.join(f'{{{place}}}' for place in range(count))}) / {count}")


def _reduced(node: Node) -> Made:
    axes = node.ints("axes", 1)
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return Made("{0}")
    chosen = tuple(sorted(axis % node.rank for axis in axes or range(node.rank)))
    return Made(REDUCED[node.kind].format(axes=chosen, keep=bool(node.attributes.get("keepdims", 1))))


def _concat(node: Node) -> Made:
    return Made(f"torch.cat(({', '.join(f'{{{place}}}' for place in range(len(node.inputs)))},), {node.axis(1)})")


def _split(node: Node) -> Made:
    axis = node.axis(0)
    sizes = [fewer[axis] for fewer, _ in node.results]
    if sizes != [more[axis] for _, more in node.results]:
        raise Unsupported("it splits the images")
    return Made(f"torch.split({{0}}, {sizes}, {axis})")


def _slice(node: Node) -> Made:
    starts, ends = node.ints("starts", 1) or [], node.ints("ends", 2) or []
    axes = node.ints("axes", 3) or list(range(len(starts)))
    steps = node.ints("steps", 4) or [1] * len(starts)
    if min(steps) < 1:
        raise Unsupported("it runs backwards")
    parts = [":"] * node.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # The largest whole number says "to the end".
        parts[axis] = f"{start}:{'' if end >= 2**31 - 1 else end}:{step}"
    return Made(f"{{0}}[{', '.join(parts)}]")


def _gather(node: Node) -> Made:
    if (
        0 in node.constants
        and 1 not in node.constants
        and int(node.attributes.get("axis", 0)) == 0 == node.constants[0].dim() - 2
    ):
        table = nn.Embedding(*node.constants[0].shape)
        table.weight = parameter(node.constants[0])
        return Made("{m}({1})", table)
    indices, axis = node.constant(1, "indices"), node.axis(0)
    if indices.dim() == 0:
        return Made(f"{{0}}.select({axis}, {int(indices)})")
    if indices.dim() == 1:
        return Made(f"torch.index_select({{0}}, {axis}, {{1}})")
    raise Unsupported("its indices have several axes")


def _reshape(node: Node) -> Made:
    shape = node.shape
    same_images = node.shapes[0][:1] == node.results[0][0][:1]
    if len(shape) == 2 and node.rank > 2 and same_images:
        return Made("torch.flatten({0}, 1)")  # for the hosts, which know it
    return Made(f"{{0}}.reshape({tuple(shape)})")


def _squeezed(node: Node) -> Made:
    axes = node.ints("axes", 1)
    chosen = axes if axes else [axis for axis, size in enumerate(node.shapes[0]) if size == 1]
    return Made("{0}" + "".join(f".squeeze({axis})" for axis in sorted((a % node.rank for a in chosen), reverse=True)))


def _unsqueezed(node: Node) -> Made:
    axes = node.ints("axes", 1) or []
    rank = node.rank + len(axes)
    return Made("{0}" + "".join(f".unsqueeze({axis})" for axis in sorted(axis % rank for axis in axes)))


def _transposed(node: Node) -> Made:
    order = node.ints("perm") or list(reversed(range(node.rank)))
    return Made(f"{{0}}.permute({tuple(order)})")


def _expanded(node: Node) -> Made:
    # -1 keeps an axis, which is right where it is that of the images.
    return Made(f"{{0}}.expand({tuple(node.shape)})")


def _cast(node: Node) -> Made:
    dtype = DTYPES.get(int(node.attributes["to"]))
    if dtype is None:
        raise Unsupported("it casts to a type that torch or training does not have")
    return Made(f"{{0}}.to({dtype})")


def _pad(node: Node) -> Made:
    pads = node.ints("pads", 1) or []
    axes = node.ints("axes", 3) or list(range(node.rank))
    count = len(axes)
    before, after = [0] * node.rank, [0] * node.rank
    for axis, low, high in zip(axes, pads[:count], pads[count:], strict=True):
        before[axis], after[axis] = low, high
    if any(before[:1] + after[:1]):
        raise Unsupported("it pads the images")
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(
        node.attributes.get("mode", "constant")
    )
    last = node.rank if mode == "constant" else node.rank - 2  # the other modes pad spatial axes only
    if mode is None or any(before[: node.rank - last] + after[: node.rank - last]):
        raise Unsupported("torch has no such padding")
    value = float(node.constant(2, "value")) if node.has(2) else node.number("value", 0.0)
    ends = [p for pair in list(zip(reversed(before), reversed(after), strict=True))[:last] for p in pair]
    filled = f", value=float('{value}')" if mode == "constant" and value else ""
    return Made(f"functional.pad({{0}}, {tuple(ends)}, mode={mode!r}{filled})")


def _resized(node: Node) -> Made:
    mode = node.attributes.get("mode", "nearest")
    where = node.attributes.get("coordinate_transformation_mode", "half_pixel" if node.version > 10 else "asymmetric")
    nearest = node.attributes.get("nearest_mode", "round_prefer_floor")
    size = tuple(node.shape[2:])
    if -1 in size or node.shapes[0][:2] != node.results[0][0][:2]:
        raise Unsupported("it resizes images or channels")
    if mode == "nearest":
        kind = {("asymmetric", "floor"): "nearest", ("half_pixel", "round_prefer_floor"): "nearest-exact"}
        if (where, nearest) not in kind and node.version > 10:
            raise Unsupported(f"torch has no {mode!r} of {where!r} and {nearest!r}")
        return Made(f"functional.interpolate({{0}}, {size}, mode={kind.get((where, nearest), 'nearest')!r})")
    kind_of = {3: "linear", 4: "bilinear", 5: "trilinear"} if mode == "linear" else {4: "bicubic"}
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners") or node.rank not in kind_of:
        raise Unsupported(f"torch has no {mode!r} of {where!r} for {node.rank} axes")
    aligned = where == "align_corners"
    return Made(f"functional.interpolate({{0}}, {size}, mode={kind_of[node.rank]!r}, align_corners={aligned})")


def _depth_to_space(node: Node) -> Made:
    if node.attributes.get("mode", "DCR") != "CRD":
        raise Unsupported("torch has the mode CRD only")
    return Made("{m}({0})", nn.PixelShuffle(int(node.attributes["blocksize"])))


FUNCTIONS: Final[Mapping[str, Callable[[Node], Made]]] = {
    **{kind: lambda _, name=name: Made(f"torch.{name}({{0}})") for kind, name in UNARY.items()},  # type: ignore[misc]
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(FOLDED, _folded),
    "Cast": _cast,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda _: Made("{0}"),
    "Expand": _expanded,
    "Flatten": _reshape,
    "Gather": _gather,
    "Identity": lambda _: Made("{0}"),
    "Mean": _mean,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resized,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
    "Upsample": _resized,
}
"""What each operation becomes."""
