"""The layers of a file by the names of the user's modules: how they are stored, and how OpenVINO runs them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qft_plugin.deploy.ir_view import F32, PRODUCTS

CONVOLUTIONS: Final = frozenset(["Convolution", "GroupConvolution", "Deconvolution"])
LINEAR: Final = frozenset(["FullyConnected", "MatMul"])


@dataclass(frozen=True)
class FileLayer:
    """A convolution or linear layer of a file.

    Attributes:
        name: of the user's module; of the operation in the file where the proof has not found which module it is.
        bits: that each of its weights has in the file.
        bytes: size of its weight in the file, without its scales.
        precision: that it runs in on this CPU (`"i8"`, `"u8"`, `"f32"`, ...); empty where the runtime does not show it.
        operation: its name in the file.
    """

    name: str
    bits: int
    bytes: int
    precision: str
    operation: str


@dataclass(frozen=True)
class RuntimeOp:
    """A convolution or linear layer as the runtime runs it.

    Attributes:
        name: the runtime's.
        kind: of the runtime's layer.
        precision: that it runs in.
        made_of: names of the operations of the file that it is made of.
    """

    name: str
    kind: str
    precision: str
    made_of: tuple[str, ...]

    def runs(self, operation: str) -> bool:
        """Whether it runs an operation of the file; a part of one has its name and more, behind a slash."""
        return any(name == operation or name.startswith(f"{operation}/") for name in (self.name, *self.made_of))


def runtime_ops(model: Any) -> list[RuntimeOp]:
    """Compile an `openvino.Model` for the CPU, and list its convolutions and linear layers as it runs them.

    Args:
        model: an `openvino.Model`.
    """
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", dict(F32))
    found = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind = _text(info, "layerType")
        if kind in CONVOLUTIONS | LINEAR:
            made_of = tuple(name for name in _text(info, "originalLayersNames").split(",") if name)
            found.append(RuntimeOp(op.get_friendly_name(), kind, _text(info, "runtimePrecision"), made_of))
    return found


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def precisions(ops: Sequence[RuntimeOp], weights: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the precision of every convolution, and of every linear layer or product of activations.

    Args:
        ops: as the runtime runs them.
        weights: name of the torch weight of each operation of the file; see `Proof.layers`.

    Returns:
        By name of the user's module, or where that is not known, by the runtime's name. Of a module that is called
        several times, the later calls have their number behind it: `"conv (2)"`.
    """
    convolutions: dict[str, str] = {}
    linear: dict[str, str] = {}
    for op in ops:
        named = next((module_name(w) for operation, w in weights.items() if op.runs(operation)), op.name)
        found = convolutions if op.kind in CONVOLUTIONS else linear
        found[_unused(named, found)] = op.precision
    return convolutions, linear


def _unused(name: str, names: Mapping[str, Any]) -> str:
    number, found = 1, name
    while found in names:
        number += 1
        found = f"{name} ({number})"
    return found


def file_layers(model: Any, ops: Sequence[RuntimeOp], weights: Mapping[str, str]) -> tuple[FileLayer, ...]:
    """List the convolutions and linear layers of a file that multiply by a constant, in its order.

    Args:
        model: the `openvino.Model` that was read from the file.
        ops: as the runtime runs them.
        weights: name of the torch weight of each operation of the file.
    """
    found = []
    for op in model.get_ordered_ops():
        constant = _weight(op) if op.get_type_name() in PRODUCTS else None
        if constant is None:
            continue
        name = op.get_friendly_name()
        # Of an operation of an ONNX file, OpenVINO's reader makes several, whose names begin with its own.
        weight = next((w for known, w in weights.items() if name == known or name.startswith(f"{known}/")), None)
        bits = int(constant.get_element_type().get_bitwidth())
        precision = next((r.precision for r in ops if r.runs(name)), "")
        found.append(
            FileLayer(
                name=name if weight is None else module_name(weight),
                bits=bits,
                bytes=-(-math.prod(constant.get_output_shape(0)) * bits // 8),
                precision=precision,
                operation=name,
            )
        )
    return tuple(found)


def _weight(op: Any) -> Any:
    """Return the largest constant in an input of a product that is a constant expression; `None` where none is."""
    for value in op.inputs()[:2]:
        constants = constants_of(value.get_source_output().get_node())
        if constants:
            return max(constants, key=lambda constant: math.prod(constant.get_output_shape(0)))
    return None


def constants_of(node: Any) -> list[Any]:
    """List the constants of a constant expression; none where something else is in it."""
    # Each node once: an activation after many additions is reached on more ways than can be walked.
    found, seen, left = list[Any](), set[str](), [node]
    while left:
        node = left.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Constant":
            found.append(node)
        elif not node.inputs() or node.get_type_name() in PRODUCTS:
            return []
        else:
            left += [i.get_source_output().get_node() for i in node.inputs()]
    return found


def module_name(weight: str) -> str:
    """Name the module of a weight."""
    return weight.removesuffix(".weight")
