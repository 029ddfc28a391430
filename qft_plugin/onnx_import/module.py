"""The torch module that an ONNX file becomes: its layers by name, and a forward that was written for it."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ONNXModel(nn.Module):
    """A network that was read from an ONNX file.

    Its layers are ordinary modules of torch. No `torch.fx.GraphModule`: NNCF takes those for another backend.

    Attributes:
        source: text of its forward, a line for each node of the file.
        input_names: names of the inputs in the file.
        output_names: likewise of the outputs; the module returns one tensor, or a tuple of tensors in this order.
    """

    def __init__(self, source: str, input_names: Sequence[str], output_names: Sequence[str]) -> None:
        """Keep the text; layers are added by `add_layers`."""
        super().__init__()
        self.source = source
        self.input_names, self.output_names = tuple(input_names), tuple(output_names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the text: the class of an instance is made from it."""
        return _empty, (self.source,), self.__dict__


def made(
    source: str,
    modules: Mapping[str, nn.Module],
    constants: Mapping[str, Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ONNXModel:
    """Make a module.

    Args:
        source: text of its forward.
        modules: its layers by dotted path.
        constants: tensors that the text reads, by the name of an attribute.
        input_names: names of the inputs in the file.
        output_names: likewise of the outputs.
    """
    model = _class_of(source)(source, input_names, output_names)
    for path, module in modules.items():
        *folders, last = path.split(".")
        place: nn.Module = model
        for folder in folders:
            if folder not in dict(place.named_children()):
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        place.add_module(last, module)
    for name, value in constants.items():
        model.register_buffer(name, value)
    return model.eval()


@functools.cache
def _class_of(source: str) -> type[ONNXModel]:
    known = {"torch": torch, "functional": nn.functional, "operator": operator, "__name__": __name__}
    found: dict[str, Callable[..., Any]] = {}
    exec(compile(source, "<onnx>", "exec"), known, found)
    return type("ONNXModel", (ONNXModel,), {"forward": found["forward"], "__module__": __name__})


def _empty(source: str) -> ONNXModel:
    kind = _class_of(source)
    return kind.__new__(kind)
