"""What makes right QCDQ files compute wrong values in OpenVINO's CPU plugin (2026.4), and the same maths otherwise.

The remedies are those of `openvino_defects`, which says more about each, for an `onnx.ModelProto`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from qft_plugin.deploy.onnx_view import PRODUCTS, constants_of
from qft_plugin.deploy.openvino_defects import (
    LOWEST,
    TINY,
    is_merged_wrongly,
    is_skipped_wrongly,
    is_upsampled_wrongly,
)

REDUCTIONS: Final = frozenset(
    ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"]
)
MOVES: Final = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten"])
POOLS: Final = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}
"""What OpenVINO makes of them."""
CONVOLUTIONS: Final = frozenset(["Conv", "ConvTranspose"])
BETWEEN: Final = frozenset(["Relu", "MaxPool", "Identity", "Reshape", "Flatten", "Transpose", "Slice", "Split", "Clip"])
"""Operations that may stand between a concatenation and its quantizer."""


def count_axes_from_first(model: Any) -> int:
    """Let transpositions name their axes from 0 on, in place: torch exports `movedim(-1, 1)` with an axis -1 (2.13).

    ONNX has no such permutation; no runtime reads the file.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many were changed.
    """
    changed = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Transpose" and attribute.name == "perm" and min(attribute.ints) < 0:
                attribute.ints[:] = [axis % len(attribute.ints) for axis in attribute.ints]
                changed += 1
    return changed


def bias_shared_products(model: Any) -> int:
    """Give a tiny bias to each convolution or product in integers that has none and several readers, in place.

    OpenVINO's CPU plugin multiplies by their scale once too often for some of the readers (2026.4).

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many were changed.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = constants_of(graph)
    changed = 0
    for node in list(graph.node):
        convolves = node.op_type in CONVOLUTIONS
        if not convolves and node.op_type != "MatMul":
            continue
        quantized = [_dequantizer(name, makers) for name in node.input[:2]]
        if quantized[1] is None or (not convolves and any(q is None or q.input[0] in constants for q in quantized)):
            continue
        if len(node.input) > 2 and not _is_zero(node.input[2], makers, constants):
            continue
        made = node.output[0]
        readers = _readers(graph, made)
        ends = sum(o.name == made for o in graph.output)
        # Quantizers read the scale as a part of their own.
        if len(readers) + ends < 2 or (not ends and all(r.op_type == "QuantizeLinear" for r in readers)):
            continue
        tiny = f"{made}_tiny_bias"
        if convolves:
            shape = constants[quantized[1].input[0]].shape
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            value = np.full(shape[0] if node.op_type == "Conv" else shape[1] * groups, TINY, np.float32)
            del node.input[2:]
            node.input.append(tiny)
        else:
            value = np.float32(TINY)
            node.output[0] = f"{made}_product"
            add = helper.make_node("Add", [node.output[0], tiny], [made], name=f"{made}_biased")
            graph.node.insert(list(graph.node).index(node) + 1, add)
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), tiny))
        changed += 1
    return changed


def skip_before_convolutions(model: Any) -> int:
    """Let a maximum pool of single positions leave out what strided 1x1 convolutions do not read, in place.

    The threads of OpenVINO's CPU plugin write over each other's numbers there (2026.4). A pool passes a signed
    quantizer's numbers on to a convolution: `shift_signed_quantizers` is to come after this.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many were changed.
    """
    from onnx import helper

    graph = model.graph
    changed = 0
    for node, shape in _quantized_kernels(graph, "Conv"):
        given = {a.name: a for a in node.attribute}
        # Convolutions in groups are computed otherwise.
        if "strides" not in given or ("group" in given and given["group"].i > 1):
            continue
        strides, pads = (list(given[name].ints) if name in given else [] for name in ("strides", "pads"))
        if is_skipped_wrongly(shape[1:], strides, pads):
            ones = [1] * len(strides)
            read = f"{node.output[0]}_read"
            pool = helper.make_node("MaxPool", [node.input[0]], [read], kernel_shape=ones, strides=strides)
            graph.node.insert(list(graph.node).index(node), pool)
            node.input[0] = read
            given["strides"].ints[:] = ones
            changed += 1
    return changed


def upsample_in_float(model: Any) -> int:
    """Let transposed convolutions with large strides or dilations read real numbers, in place: the same function.

    OpenVINO's CPU plugin computes wrong values from integers there (2026.4).

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many were changed.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    changed = 0
    for node, shape in _quantized_kernels(graph, "ConvTranspose"):
        kernel = shape[2:]
        given = {a.name: list(a.ints) for a in node.attribute if a.name in ("strides", "dilations")}
        strides, dilations = (given.get(name, [1] * len(kernel)) for name in ("strides", "dilations"))
        if is_upsampled_wrongly(kernel, strides, dilations):
            read, lowest = f"{node.output[0]}_read", f"{node.output[0]}_lowest"
            graph.initializer.append(numpy_helper.from_array(np.asarray(LOWEST), lowest))
            graph.node.insert(list(graph.node).index(node), helper.make_node("Max", [node.input[0], lowest], [read]))
            node.input[0] = read
            changed += 1
    return changed


def widen_reductions(model: Any) -> int:
    """Let means, maxima and other reductions go over one axis more, of length 1, in place.

    OpenVINO's CPU plugin merges the operations after some of them into them, with wrong results (2026.4).

    Args:
        model: an `onnx.ModelProto` with opset 13 or later.

    Returns:
        How many reductions were changed.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in [*inferred.value_info, *inferred.input]
        if v.type.tensor_type.HasField("shape")
    }
    makers = {name: node for node in graph.node for name in node.output}
    constants = constants_of(graph)
    changed = 0
    for node in list(graph.node):
        kind, rank = POOLS.get(node.op_type, node.op_type), ranks.get(node.input[0]) if node.input else None
        if kind not in REDUCTIONS or rank is None:
            continue
        pool, before = node.op_type in POOLS, makers.get(node.input[0])
        places = list(range(2, rank)) if pool else _axes(node, constants, rank)
        transposed = before is not None and before.op_type == "Transpose"
        if not is_merged_wrongly(kind, rank, places, transposed=transposed) or _of_a_norm(graph, node, before):
            continue
        made, added = node.output[0], places[-1] + 1
        keep = pool or next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        numbers = {"added": [added], "axes": [*places, added], "removed": [added] if keep else [*places, added]}
        names = {key: f"{made}_{key}" for key in numbers}
        graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), names[k]) for k, v in numbers.items())
        wide, reduced = f"{made}_wide", f"{made}_reduced"
        unsqueeze = helper.make_node("Unsqueeze", [node.input[0], names["added"]], [wide], name=f"{made}_unsqueeze")
        squeeze = helper.make_node("Squeeze", [reduced, names["removed"]], [made], name=f"{made}_squeeze")
        node.input[0], node.output[0] = wide, reduced
        if not pool:
            by_input = len(node.input) > 1
            kept = [a for a in node.attribute if a.name not in ("axes", "keepdims")]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("keepdims", 1)])
            if by_input:
                node.input[1] = names["axes"]
            else:
                node.attribute.append(helper.make_attribute("axes", numbers["axes"]))
        position = list(graph.node).index(node)
        graph.node.insert(position + 1, squeeze)
        graph.node.insert(position, unsqueeze)
        changed += 1
    return changed


def shift_signed_quantizers(model: Any) -> int:
    """Let signed quantizers count from 0 to 255 around 128 where OpenVINO loses their scale, in place.

    The numbers stay the same.

    OpenVINO's CPU plugin takes int8 for uint8 where convolutions read unsigned integers only: on CPUs without AMX and
    AVX2-VNNI-INT8. It then rounds to whole numbers instead of to the scale (2026.4): in a quantizer of fewer than 8
    bits, which clips its integers, for a convolution; and, if a concatenation stands anywhere in the file, be it of
    shapes, in a quantizer after the concatenation, and in one whose numbers other operations pass on to a convolution,
    such as a reshape or a maximum pool.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        How many quantizers were changed.
    """
    from onnx import numpy_helper

    graph = model.graph
    concatenates = any(node.op_type == "Concat" for node in graph.node)
    makers = {name: node for node in graph.node for name in node.output}
    constants = constants_of(graph)
    changed, shifted = 0, set[str]()
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        after = _readers(graph, node.output[0])
        clips = [n for n in after if n.op_type == "Clip"]
        readers = [n for n in after if n.op_type != "Clip"] + [r for c in clips for r in _readers(graph, c.output[0])]
        if any(n.op_type != "DequantizeLinear" for n in readers):
            continue
        # What counts from 0 on instead of from -128: zero points, and the bounds of clips.
        places = [(n, 2) for n in (node, *readers)] + [(c, k) for c in clips for k in (1, 2)]
        found = [constants.get(n.input[k]) if len(n.input) > k else None for n, k in places]
        if any(number is None or number.dtype != np.int8 for number in found):
            continue
        convolved = (clips or concatenates) and _is_convolved(graph, readers, directly=bool(clips))
        if not convolved and not (concatenates and _follows_concatenation(node, makers)):
            continue
        for (n, k), number in zip(places, found, strict=True):
            n.input[k] = f"{n.output[0]}_from_0_{k}"
            unsigned = (np.asarray(number, dtype=np.int16) + 128).astype(np.uint8)
            graph.initializer.append(numpy_helper.from_array(unsigned, n.input[k]))
        shifted.update(n.output[0] for n in (node, *clips))
        changed += 1
    for value in [v for v in graph.value_info if v.name in shifted]:
        graph.value_info.remove(value)
    return changed


def _follows_concatenation(quantizer: Any, makers: Mapping[str, Any]) -> bool:
    before = makers.get(quantizer.input[0])
    while before is not None and before.op_type in BETWEEN:
        before = makers.get(before.input[0])
    return before is not None and before.op_type == "Concat"


def _is_convolved(graph: Any, dequantizers: Sequence[Any], *, directly: bool) -> bool:
    """Whether a convolution reads dequantized numbers, directly or after operations that are no product or quantizer.

    Args:
        graph: the graph.
        dequantizers: the nodes that make the numbers.
        directly: whether one counts that nothing stands in front of.
    """
    readers = [node for d in dequantizers for node in _readers(graph, d.output[0])]
    waiting = [node for node in readers if directly or node.op_type not in CONVOLUTIONS]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node.op_type in CONVOLUTIONS:
            return True
        if node.op_type in PRODUCTS or node.op_type == "QuantizeLinear" or id(node) in seen:
            continue
        seen.add(id(node))
        waiting.extend(reader for name in node.output for reader in _readers(graph, name))
    return False


def _dequantizer(name: str, makers: Mapping[str, Any]) -> Any | None:
    """Return the DequantizeLinear that makes a tensor, before operations that only move it."""
    node = makers.get(name)
    while node is not None and node.op_type in MOVES:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _quantized_kernels(graph: Any, kind: str) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield each convolution of a kind whose weight is quantized, and the shape of its weight; nodes may be added."""
    makers = {name: node for node in graph.node for name in node.output}
    constants = constants_of(graph)
    for node in list(graph.node):
        quantizer = _dequantizer(node.input[1], makers) if node.op_type == kind else None
        if quantizer is not None:
            yield node, constants[quantizer.input[0]].shape


def _readers(graph: Any, name: str) -> Sequence[Any]:
    return [node for node in graph.node for read in node.input if read == name]


def _is_zero(name: str, makers: Mapping[str, Any], constants: Mapping[str, Any]) -> bool:
    """Whether a bias is 0 everywhere, which is as good as none."""
    maker = makers.get(name)
    if maker is not None and maker.op_type == "DequantizeLinear":
        name = maker.input[0]
    return name in constants and not np.any(constants[name])


def _axes(node: Any, constants: Mapping[str, Any], rank: int) -> list[int]:
    """Return the axes that a reduction goes over; none where these are not known."""
    if len(node.input) > 1:
        found = constants.get(node.input[1])
        return [] if found is None else sorted(int(axis) % rank for axis in np.ravel(found))
    return sorted(axis % rank for a in node.attribute if a.name == "axes" for axis in a.ints)


def _of_a_norm(graph: Any, node: Any, before: Any | None) -> bool:
    """Whether a reduction is the mean that a norm subtracts, or the mean of squares."""
    squared = before is not None and (
        before.op_type == "Pow" or (before.op_type == "Mul" and before.input[0] == before.input[1])
    )
    return squared or any(reader.op_type == "Sub" for reader in _readers(graph, node.output[0]))
