"""One node of an ONNX file, with what is known of what it reads and makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Unsupported(Exception):  # noqa: N818  (caught where all of them are collected into one error)
    """A node cannot be expressed in torch; the message says why."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        kind: of the operation, `"Conv"`.
        name: of the node.
        version: of the operators of the file.
        attributes: as Python values.
        inputs: names of the values that it reads, empty where one was left out.
        outputs: names of the values that it makes.
        constants: value of each input that does not depend on the images, by its place.
        shapes: of the inputs by place, and `results` of the outputs.
        results: likewise; each in a run with fewer, and in one with more images.
    """

    kind: str
    name: str
    version: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[int, Tensor]
    shapes: Mapping[int, Shape]
    results: tuple[tuple[Shape, Shape], ...]

    @property
    def rank(self) -> int:
        """How many axes its first input has."""
        return len(self.shapes[0])

    @property
    def shape(self) -> list[int]:
        """Its first output's shape for `reshape`: -1 where it depends on the number of images.

        Raises:
            Unsupported: several axes do.
        """
        fewer, more = self.results[0]
        shape = [a if a == b else -1 for a, b in zip(fewer, more, strict=True)]
        if shape.count(-1) > 1:
            raise Unsupported("several axes of its output depend on the number of images")
        return shape

    def has(self, place: int) -> bool:
        """Whether an input is there."""
        return place < len(self.inputs) and self.inputs[place] != ""

    def constant(self, place: int, what: str) -> Tensor:
        """Return an input that must not depend on the images.

        Raises:
            Unsupported: it does.
        """
        if place not in self.constants:
            raise Unsupported(f"its {what} is computed from the images")
        return self.constants[place]

    def ints(self, name: str, place: int | None = None) -> list[int] | None:
        """Return whole numbers that are an attribute in some versions, and an input in others."""
        if name in self.attributes:
            return list(self.attributes[name])
        if place is None or not self.has(place):
            return None
        return [int(v) for v in self.constant(place, name).flatten()]

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a number; float32 in files, so 0.1 is what the file means by 0.10000000149."""
        value = self.attributes.get(name, default)
        return float(f"{value:.7g}") if isinstance(value, float) else float(value)

    def axis(self, default: int) -> int:
        """Return the attribute `axis` from 0 on."""
        return int(self.attributes.get("axis", default)) % max(self.rank, 1)


@dataclass(frozen=True)
class Made:
    """What a node becomes.

    Attributes:
        text: an expression: `{0}` stands for its first input, `{m}` for its module.
        module: its module.
    """

    text: str
    module: nn.Module | None = None


def parameter(value: Tensor) -> nn.Parameter:
    """Make a parameter of a tensor from a file."""
    return nn.Parameter(value.detach().clone().to(torch.float32))
