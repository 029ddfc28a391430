"""From what a file computes to the text of a forward, and the modules that it calls."""

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from qft_plugin.errors import ModelError
from qft_plugin.onnx_import.file import Traced, inputs_of, readers_of
from qft_plugin.onnx_import.functions import BINARY, FUNCTIONS
from qft_plugin.onnx_import.layers import LAYERS, linear
from qft_plugin.onnx_import.module import ONNXModel, made
from qft_plugin.onnx_import.node import Made, Node, Unsupported

OWN_DOMAINS: Final = ("", "ai.onnx")
GATED: Final = {"Sigmoid": nn.SiLU, "HardSigmoid": nn.Hardswish}
"""What x * f(x) is in torch; exporters write both operations."""


RESERVED: Final = frozenset(dir(ONNXModel("", (), ())))
"""Attributes that a module has itself."""

WORDS: Final = frozenset([*keyword.kwlist, "self", "torch", "functional", "operator"])
"""What a variable of the text cannot be called."""


@dataclass
class Built:
    """The text that is being written.

    Attributes:
        lines: of the forward.
        modules: layers by dotted path.
        constants: tensors by the name of an attribute.
        variables: of each value of the file, by its name.
        reused: path of a layer by the file's names of what it is made from: a layer may be called twice.
    """

    lines: list[str] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    reused: dict[tuple[Any, ...], str] = field(default_factory=dict)


def build(traced: Traced, *, everything: bool = False) -> ONNXModel:
    """Make a module of a file.

    Args:
        traced: the file and what it computes.
        everything: the module returns every value that it computes, not the outputs: to find one that differs.

    Raises:
        ModelError: operations have no counterpart in torch; all of them are named.
    """
    graph = traced.model.graph
    built, problems = Built(), dict[str, list[str]]()
    inputs = inputs_of(traced.model)
    for value in inputs:
        built.variables[value.name] = _free(re.sub(r"\W", "_", value.name).lstrip("0123456789"), built.variables)
    arguments = list(built.variables.values())
    reader = _Reader(traced)
    for node in reader.nodes:
        if node.output[0] in built.variables:  # it is part of one before
            continue
        try:
            _add(reader, node, built)
        except Unsupported as error:
            problems.setdefault(node.op_type, []).append(f"{node.name or node.output[0]}: {error}")
            built.variables.update(dict.fromkeys(node.output, "None"))
    _refuse(problems)
    outputs = [value.name for value in graph.output]
    constant = [name for name in outputs if name not in traced.moving or name in {i.name for i in inputs}]
    if constant:
        raise ModelError(
            f"The outputs should be computed from the images. Found {', '.join(constant)}, which are not. "
            "Export the model without them."
        )
    shown = [n for n in built.variables if n not in {i.name for i in inputs}] if everything else outputs
    returned = ", ".join(built.variables[name] for name in shown)
    returned = f"({returned},)" if len(shown) > 1 or everything else returned
    text = "\n    ".join([f"def forward(self, {', '.join(arguments)}):", *built.lines, f"return {returned}"])
    return made(f"{text}\n", built.modules, built.constants, input_names=[i.name for i in inputs], output_names=shown)


def refuse_unknown(model: Any, moving: frozenset[str]) -> None:
    """Refuse operations of other makers before ONNX Runtime does, with all that have no counterpart.

    Raises:
        ModelError: it names the operations and their nodes.
    """
    if all(node.domain in OWN_DOMAINS for node in model.graph.node):
        return  # all others are found together, when the module is built
    problems: dict[str, list[str]] = {}
    for node in model.graph.node:
        foreign = node.domain not in OWN_DOMAINS
        if foreign or (moving.intersection(node.output) and node.op_type not in {**LAYERS, **FUNCTIONS}):
            kind = f"{node.domain}.{node.op_type}" if foreign else node.op_type
            problems.setdefault(kind, []).append(node.name or node.output[0])
    _refuse(problems)


def _refuse(problems: Mapping[str, Sequence[str]]) -> None:
    if problems:
        listed = "; ".join(f"{kind} ({', '.join(nodes)})" for kind, nodes in sorted(problems.items()))
        raise ModelError(
            f"Every operation of the file should have a counterpart in torch. Found {len(problems)} without: {listed}. "
            "Quantize the torch model that the file was exported from, or export it without these."
        )


class _Reader:
    """Reads nodes with what the runs say of their values."""

    def __init__(self, traced: Traced) -> None:
        from onnx import numpy_helper

        self.traced = traced
        graph = traced.model.graph
        self.weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
        self.version = next(o.version for o in traced.model.opset_import if o.domain in OWN_DOMAINS)
        self.outputs = {value.name for value in graph.output}
        needed = set(self.outputs)
        self.nodes: list[Any] = []
        for node in reversed(graph.node):
            if needed.intersection(node.output) and traced.moving.intersection(node.output):
                self.nodes.insert(0, node)
                needed.update(node.input)
        self.readers = readers_of(self.nodes)

    def value(self, name: str) -> Tensor | None:
        """Return a value that depends neither on the images nor on their number; `None` for all others."""
        if name in self.weights:
            return self.weights[name]
        if name in self.traced.moving or name not in self.traced.fewer:
            return None
        fewer, more = self.traced.fewer[name], self.traced.more[name]
        same = fewer.shape == more.shape and bool((fewer == more).all())
        return torch.from_numpy(fewer.copy()) if same else None

    def row(self, name: str) -> Tensor | None:
        """Return the row `[1, ...]` of a value that is the same for each image; `None` for all others."""
        if name in self.traced.moving or name not in self.traced.fewer:
            return None
        fewer, more = self.traced.fewer[name], self.traced.more[name]
        if not fewer.ndim or (fewer.shape[0], more.shape[0]) != self.traced.images:
            return None
        row = fewer[:1]
        same = fewer.shape[1:] == more.shape[1:] and (fewer == row).all() and (more == row).all()
        return torch.from_numpy(row.copy()) if same else None

    def node(self, node: Any) -> Node:
        """Describe a node."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        known = {place: value for place, n in enumerate(node.input) if n and (value := self.value(n)) is not None}
        fewer, more = self.traced.fewer, self.traced.more
        return Node(
            kind=node.op_type,
            name=node.name,
            version=self.version,
            attributes=values,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            constants=known,
            shapes={
                place: tuple(self.weights[n].shape if n in self.weights else fewer[n].shape)
                for place, n in enumerate(node.input)
                if n
            },
            results=tuple((fewer[n].shape, more[n].shape) for n in node.output if n),
        )

    def only_reader(self, name: str) -> Any:
        """Return the node that alone reads a value, `None` where there is none or several."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def _add(reader: _Reader, raw: Any, built: Built) -> None:
    """Write the line of a node, or of two that torch has one module for.

    Raises:
        Unsupported: torch has no counterpart.
    """
    make = LAYERS.get(raw.op_type) or FUNCTIONS.get(raw.op_type)
    if make is None or raw.domain not in OWN_DOMAINS:
        raise Unsupported("torch has no counterpart here")
    node = reader.node(raw)
    others = [] if node.kind == "Split" else node.outputs[1:]
    if any(reader.readers[name] or name in reader.outputs for name in others):
        raise Unsupported("more than its first output is read")
    result, ends = make(node), list(node.outputs[: len(node.outputs) - len(others)])
    after = reader.only_reader(ends[0])
    if after is not None and (joined := _joined(reader, node, result, after)) is not None:
        result, ends = joined, list(after.output)
    text = result.text
    if result.module is not None:
        path = _path(raw, result.module, built)
        text = text.replace("{m}", f"self.get_submodule({path!r})")
    operands = [
        _operand(reader, node, place, built) if f"{{{place}}}" in text else "" for place in range(len(node.inputs))
    ]
    for end in ends:
        built.variables[end] = _free(f"v{len(built.variables)}", built.variables)
    names = [built.variables[end] for end in ends]
    built.lines.append(f"{', '.join(names)}{',' if len(names) > 1 else ''} = {text.format(*operands)}")


def _joined(reader: _Reader, node: Node, result: Made, after: Any) -> Made | None:
    """Return the module that a node and its only reader are together, `None` where there is none."""
    if (
        node.kind in GATED
        and after.op_type == "Mul"
        and sorted(after.input) == sorted([node.inputs[0], node.outputs[0]])
    ):
        exact = node.kind == "Sigmoid" or isinstance(result.module, nn.Hardsigmoid)
        return Made("{m}({0})", GATED[node.kind]()) if exact else None
    if node.kind == "MatMul" and after.op_type == "Add" and isinstance(result.module, nn.Linear):
        other = after.input[1] if after.input[0] == node.outputs[0] else after.input[0]
        bias = reader.value(other)
        if bias is not None and tuple(bias.shape) == (result.module.out_features,):
            return Made("{m}({0})", linear(result.module.weight, bias))
    return None


def _operand(reader: _Reader, node: Node, place: int, built: Built) -> str:
    name = node.inputs[place]
    if name in built.variables:
        return built.variables[name]
    value = node.constants.get(place)
    suffix = ""
    if value is None:
        value = reader.row(name)
        images = next((built.variables[n] for n in node.inputs if n in built.variables), None)
        if value is None or images is None:
            raise Unsupported(f"its input {name!r} is computed from the number of images")
        suffix = f".expand({', '.join([f'{images}.shape[0]', *['-1'] * (value.dim() - 1)])})"
    elif node.kind in BINARY and value.numel() == 1 and value.is_floating_point():
        others = [len(shape) for other, shape in node.shapes.items() if other != place]
        if value.dim() <= max(others):  # else it adds an axis
            return f"({float(value)!r})"
    known = next((k for k, v in built.constants.items() if v.dtype == value.dtype and torch.equal(v, value)), None)
    key = known or f"constant_{len(built.constants)}"
    built.constants[key] = value
    return f"self.{key}{suffix}"


def _path(raw: Any, module: nn.Module, built: Built) -> str:
    """Choose where a module stands: as torch named it where the file says so, else by its node."""
    weights = tuple(n for n in raw.input if n and n not in built.variables)
    key = (raw.op_type, weights, tuple(a.SerializeToString() for a in raw.attribute))
    layer = next(module.parameters(), None) is not None  # one ReLU6 for all activations would tie their scales
    if layer and key in built.reused:
        return built.reused[key]
    named = next((n.removesuffix(".weight") for n in weights if re.fullmatch(r"[\w-]+(\.[\w-]+)*\.weight", n)), "")
    taken = {*built.modules, *(folder for path in built.modules for folder in _folders(path))}
    for path in (named, _scope(raw.name) if layer else ""):
        clear = path and path not in taken and not {*_folders(path)} & {*built.modules}
        if clear and not RESERVED & {*path.split(".")}:
            break
    else:
        path = re.sub(r"\W+", "_", raw.name).strip("_") or f"{raw.op_type.lower()}_{len(built.modules)}"
        path = _unused(f"{path}_" if path in RESERVED else path, taken)
    built.modules[path] = module
    built.reused[key] = path
    return path


def _scope(name: str) -> str:
    """Return the path of a module from the name that torch's older exporter gives its node: /b/b.0/conv/Conv."""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    found = ".".join(path)
    return found if re.fullmatch(r"[\w-]+(\.[\w-]+)*", found) else ""


def _folders(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _unused(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number, found = number + 1, f"{name}_{number}"
    return found


def _free(name: str, variables: Mapping[str, str]) -> str:
    name = name or "x"
    return _unused(f"{name}_" if name in WORDS else name, set(variables.values()))
