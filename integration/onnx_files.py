"""ONNX files: of a few operations each, and of a small network as torch exports it."""

import warnings

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn


def value(*shape, seed=0, low=-1.0, high=1.0):
    """Make a random constant of float32."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def whole(*numbers):
    """Make a constant of whole numbers."""
    return np.array(numbers, dtype=np.int64)


def node(kind, *inputs, outputs=("y",), **attributes):
    """Make a node that is named after its operation and its first output."""
    return helper.make_node(kind, inputs, list(outputs), name=f"{kind}_{outputs[0]}", **attributes)


def model_of(nodes, *, inputs=None, outputs=("y",), constants=None, opset=17, extra=()):
    """Make a model.

    Args:
        nodes: made by `node`.
        inputs: shapes by name; a text in one is an axis of any size.
        outputs: names.
        constants: arrays by name.
        opset: version of the operators.
        extra: other domains of operators.
    """
    float32 = onnx.TensorProto.FLOAT
    shapes = inputs or {"x": ("images", 3, 8, 8)}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    for output in graph.output:
        output.type.tensor_type.elem_type = float32
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in extra)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def written(folder, model, name="net.onnx"):
    """Write a model."""
    path = folder / name
    onnx.save(model, path)
    return path


class Small(nn.Module):
    """BatchNorms, ReLU6, a depthwise convolution, a residual addition, a global pool, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.thin = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU())
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        """Compute logits."""
        x = self.stem(x)
        x = x + self.thin(self.deep(self.wide(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


def small_network():
    """Make the network with the statistics of random images, and random images."""
    torch.manual_seed(0)
    model, images = Small(), torch.randn(64, 3, 16, 16)
    for _ in range(20):
        model(images)
    return model.eval(), images


def exported(folder, model, example, *, free=True, training=False):
    """Export a network with torch's older exporter, which needs no package of its own.

    Args:
        folder: where the file is written.
        model: in eval mode.
        example: one input.
        free: the first axis may have any size.
        training: keep BatchNorms, which the exporter folds else.
    """
    path = folder / "exported.onnx"
    mode = torch.onnx.TrainingMode.PRESERVE if training else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and files of it are everywhere
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}} if free else None,
            opset_version=17,
            training=mode,
            do_constant_folding=not training,
        )
    return path
