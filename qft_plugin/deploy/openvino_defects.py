"""What makes right files compute wrong values in OpenVINO's CPU plugin (2026.4), and the same maths in other words.

The remedies are for an `openvino.Model` before it is saved; `qcdq_defects` has them for ONNX.
"""

from collections.abc import Collection, Iterator, Sequence
from operator import gt
from typing import Any, Final

import numpy as np

from qft_plugin.deploy.ir_view import integer_constants

TRANSPOSED: Final = frozenset(["ConvolutionBackpropData", "GroupConvolutionBackpropData"])

CONVOLUTIONS: Final = TRANSPOSED | {"Convolution", "GroupConvolution"}

PRODUCTS: Final = CONVOLUTIONS | {"MatMul"}

MOVES: Final = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Transpose"])

TINY: Final = 1e-30
"""A bias that no float32 sum notices, but that is not 0: additions of 0 are optimized away."""

LOWEST: Final = np.float32(np.finfo(np.float32).min)
"""A maximum with it changes nothing."""


def bias_shared_products(model: Any) -> int:
    """Give a tiny bias to each convolution or product in integers that has none and several readers, in place.

    OpenVINO's CPU plugin computes a convolution in integers and multiplies by its scale afterwards. It merges this
    multiplication into the convolution, or into a product of two quantized tensors, without a look at whether others
    read the integers too, who multiply by the scale once more (2026.4, FuseConvMatmulFCDeconvAndDQScales). A bias
    stands between the two and prevents it.

    Args:
        model: an `openvino.Model`.

    Returns:
        How many were changed.
    """
    from openvino import opset13

    changed = 0
    for op in _in_integers(model, PRODUCTS):
        made, readers = op.output(0), _readers(op)
        bias = _zeros(readers)
        if bias is not None:
            made, readers = bias.output(0), _readers(bias)
        # Quantizers read the scale as a part of their own.
        if len(readers) < 2 or all(r.get_type_name() == "FakeQuantize" for r in readers):
            continue
        # An addition to a convolution becomes its bias where it has a number for each channel.
        shape = [1] * len(made.get_partial_shape())
        if op.get_type_name() in CONVOLUTIONS:
            shape[1] = made.get_partial_shape()[1].get_length()
        tiny = opset13.constant(np.full(shape, TINY, np.float32))
        _replace(made, opset13.add(op.output(0), tiny).output(0))
        changed += 1
    return changed


def upsample_in_float(model: Any) -> int:
    """Let transposed convolutions with large strides or dilations read real numbers, in place: the same function.

    OpenVINO's CPU plugin computes one in integers with scale and bias of the first channel in all channels where the
    stride is larger than the kernel; where both stride and dilation are larger than 1, sums of products with 8 bits
    are cut off (2026.4). A maximum with the lowest number, which changes nothing, stands between its quantizer and it,
    and it is computed in float.

    Args:
        model: an `openvino.Model`.

    Returns:
        How many were changed.
    """
    from openvino import opset13

    changed = 0
    for op in _in_integers(model, TRANSPOSED):
        attributes, kernel = op.get_attributes(), op.get_input_partial_shape(1)
        strides, dilations = attributes["strides"], attributes["dilations"]
        if is_upsampled_wrongly(
            [kernel[k - len(strides)].get_length() for k in range(len(strides))], strides, dilations
        ):
            source = op.input_value(0)
            op.input(0).replace_source_output(opset13.maximum(source, opset13.constant(LOWEST)).output(0))
            changed += 1
    return changed


def is_upsampled_wrongly(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> bool:
    """Whether the CPU plugin may compute wrong values in a transposed convolution in integers.

    Args:
        kernel: its sizes, one for each axis, as the others.
        strides: from one input to the next, in outputs.
        dilations: from one weight to the next, in outputs.
    """
    return any(map(gt, strides, kernel)) or (max(strides) > 1 and max(dilations) > 1)


def skip_before_convolutions(model: Any) -> int:
    """Let a maximum pool of single positions leave out what strided 1x1 convolutions do not read, in place.

    OpenVINO's CPU plugin does so itself, in a buffer for each thread. Where the channels are an odd multiple of 8 it
    writes past its end, into what another thread is about to read: some numbers are wrong in some runs (2026.4, CPUs
    with AVX2 and without AVX-512). After the pool the stride is 1, and there is no such buffer.

    Args:
        model: an `openvino.Model`.

    Returns:
        How many were changed.
    """
    from openvino import opset13

    changed = 0
    for op in _in_integers(model, {"Convolution"}):
        attributes, shape = op.get_attributes(), op.get_input_partial_shape(1)
        strides, pads = attributes["strides"], [*attributes["pads_begin"], *attributes["pads_end"]]
        if not is_skipped_wrongly([shape[k].get_length() for k in range(1, len(shape))], strides, pads):
            continue
        ones, zeros = [1] * len(strides), [0] * len(strides)
        pool = opset13.max_pool(op.input_value(0), strides, ones, zeros, zeros, ones)
        new = opset13.convolution(pool.output(0), op.input_value(1), ones, zeros, zeros, ones)
        new.set_friendly_name(op.get_friendly_name())
        _replace(op.output(0), new.output(0))
        changed += 1
    return changed


def is_skipped_wrongly(shape: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> bool:
    """Whether the CPU plugin may compute wrong values in a convolution in integers that skips some of its inputs.

    Args:
        shape: of a filter: input channels, and its size along each axis.
        strides: from one output to the next, in inputs.
        pads: at both ends of each axis.
    """
    channels, *kernel = shape
    return channels % 16 == 8 and len(kernel) < 3 and max(kernel) == 1 < max(strides) and not any(pads)


def widen_reductions(model: Any) -> int:
    """Let means, maxima and other reductions go over one axis more, of length 1, in place.

    OpenVINO's CPU plugin merges the operations after a reduction into it, with wrong results in three cases (2026.4):

    - it reduces the last of three axes, and the operations have a number for each channel, such as the scale of an
      integer tensor: all channels get that of the first. A reduction over the middle axis becomes one of these where a
      transposition stands before it.
    - a maximum or minimum is quantized to 8 bits;
    - it removes axes before the last one, and its result is quantized after operations with a number for each channel,
      such as those of NNCF's SmoothQuant: channels get each other's.

    Nothing is merged where the additional axis is removed in between. Reductions in layer norms, RMS norms and softmax
    stay: OpenVINO knows these by their shape.

    Args:
        model: an `openvino.Model`.

    Returns:
        How many reductions were changed.
    """
    from openvino import opset13

    make = {
        "ReduceMean": opset13.reduce_mean,
        "ReduceSum": opset13.reduce_sum,
        "ReduceMax": opset13.reduce_max,
        "ReduceMin": opset13.reduce_min,
        "ReduceProd": opset13.reduce_prod,
        "ReduceL1": opset13.reduce_l1,
        "ReduceL2": opset13.reduce_l2,
    }
    changed = 0
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in make or op.get_input_partial_shape(0).rank.is_dynamic or _of_a_norm(op):
            continue
        axes, rank = op.input_value(1).get_node(), op.get_input_partial_shape(0).rank.get_length()
        if axes.get_type_name() != "Constant":
            continue
        places = sorted(int(axis) % rank for axis in np.ravel(axes.data))
        transposed = op.input_value(0).get_node().get_type_name() == "Transpose"
        kept = op.get_attributes()["keep_dims"]
        by_channel = not kept and rank - 1 not in places and _is_quantized_by_channel(op)
        if not by_channel and not is_merged_wrongly(kind, rank, places, transposed=transposed):
            continue
        added = places[-1] + 1
        removed = [added] if kept else [*places, added]
        wide = opset13.unsqueeze(op.input_value(0), opset13.constant(np.int64(added)))
        reduced = make[kind](wide, opset13.constant(np.array([*places, added], np.int64)), True)
        _replace(op.output(0), opset13.squeeze(reduced, opset13.constant(np.array(removed, np.int64))).output(0))
        changed += 1
    return changed


def is_merged_wrongly(kind: str, rank: int, places: Sequence[int], *, transposed: bool) -> bool:
    """Whether the CPU plugin may compute wrong values from what stands after a reduction.

    Args:
        kind: of the reduction, such as `"ReduceMean"`.
        rank: how many axes it reads.
        places: the axes that it reduces.
        transposed: whether a transposition stands before it.
    """
    if kind in ("ReduceMax", "ReduceMin"):
        return bool(places)
    return rank == 3 and (list(places) == [2] or (list(places) == [1] and transposed))


def _readers(op: Any) -> Sequence[Any]:
    return [target.get_node() for target in op.output(0).get_target_inputs()]


def _in_integers(model: Any, kinds: Collection[str]) -> Iterator[Any]:
    """Yield the operations of these types that compute in integers; a caller may replace each."""
    for op in model.get_ordered_ops():
        if op.get_type_name() in kinds and _computes_in_integers(op):
            yield op


def _computes_in_integers(op: Any) -> bool:
    """Whether an operation is a convolution with integers, or a product of two quantized tensors."""
    if op.get_type_name() in CONVOLUTIONS:
        return bool(integer_constants(op.input_value(1).get_node()))
    return op.get_type_name() == "MatMul" and all(_is_quantized(v.get_node()) for v in op.input_values())


def _is_quantized(node: Any) -> bool:
    while node.get_type_name() in MOVES:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _zeros(readers: Sequence[Any]) -> Any | None:
    """Return the addition of a bias that is 0 everywhere, which is as good as none."""
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    constants = [v.get_node() for v in readers[0].input_values() if v.get_node().get_type_name() == "Constant"]
    return readers[0] if constants and not np.any(constants[0].data) else None


def _is_quantized_by_channel(op: Any) -> bool:
    """Whether a quantizer reads the result of an operation after one with a number for each channel."""
    numbers, readers = False, _readers(op)
    while len(readers) == 1 and readers[0].get_type_name() != "FakeQuantize":
        (reader,) = readers
        constants = [v.get_node() for v in reader.input_values() if v.get_node().get_type_name() == "Constant"]
        numbers = numbers or any(np.size(constant.data) > 1 for constant in constants)
        readers = _readers(reader)
    return numbers and len(readers) == 1


def _of_a_norm(op: Any) -> bool:
    """Whether a reduction is the mean that a norm subtracts, or the mean of squares."""
    before = op.input_value(0).get_node()
    squared = before.get_type_name() == "Multiply" and before.input_value(0) == before.input_value(1)
    return squared or before.get_type_name() == "Power" or any(r.get_type_name() == "Subtract" for r in _readers(op))


def _replace(old: Any, new: Any) -> None:
    """Let everything that reads one tensor read another, which takes its names: those of the model's outputs too."""
    for target in list(old.get_target_inputs()):
        if target.get_node().get_friendly_name() != new.get_node().get_friendly_name():
            target.replace_source_output(new)
    names = old.get_names()
    old.set_names(set())
    new.set_names(names)
