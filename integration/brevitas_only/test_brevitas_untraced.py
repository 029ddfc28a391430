"""Models that torch.fx cannot trace, or of which it makes another one, and subclasses of torch's own layers."""

import logging
from dataclasses import dataclass

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.nn as qnn
import brevitas_models
import nets
import torch
from brevitas_models import relative
from conftest import four_bits
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin import FinetuneConfig, HardwareSpec, ModelError, QFTWarning
from qft_plugin.brevitas import fold, link, quantize, save_qcdq, save_qonnx
from qft_plugin.brevitas._swap import swap
from qft_plugin.graph.torch_model import accepts, tensors_in
from qft_plugin.training.data import as_call, read_inputs

EXACT = 1e-5
"""Relative L2: float32 sums in another order."""

FOLDED = 1e-3
"""Likewise, where some activations round the other way."""

CLOSE = 0.1
"""Relative L2 of 8 bits for weights and activations against the float network."""

CHANNELS = 8


class Norm(nn.BatchNorm2d):
    """A BatchNorm that holds the activation function after it, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Padded(nn.Conv2d):
    """A convolution that pads as much as its input needs."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        pad = [max((-(-size // step) - 1) * step + kernel - size, 0) for size, step, kernel in sizes]
        x = functional.pad(x, [pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2])
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """A convolution whose kernel is computed in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        W = W / W.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, W, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch's own modules give it)
        return functional.linear(input, self.weight, self.bias)


class Attention(nn.Module):
    """Three layers read one activation; how often its sizes are asked for, torch.fx cannot follow."""

    def __init__(self, width: int, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (kind(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = (int(size) for size in x.shape)
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).view(batch, length, 2, width // 2).transpose(1, 2) for layer in layers)
        x = functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


@dataclass
class Answer:
    """What models of transformers return."""

    logits: Tensor
    hidden: Tensor | None = None


class Encoder(nn.Module):
    """A small BERT: embeddings, a mask by keyword, attention, and a dataclass as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.attention = Attention(16)
        self.grow, self.shrink, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Answer:
        assert labels is None
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        x = self.norm(self.embed(input_ids))
        x = x + self.attention(x, mask)
        x = x + self.shrink(functional.gelu(self.grow(x)))
        return Answer(self.head(x[:, 0]))


class Blocks(nn.Module):
    """Convolutions and BatchNorms, plain or of a subclass, in a forward that torch.fx cannot follow or can."""

    def __init__(self, traced: bool, conv: type[nn.Conv2d] = nn.Conv2d, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.traced = traced
        settings = {} if conv is Padded else {"padding": 1}
        self.stem, self.norm1 = conv(3, CHANNELS, 3, stride=2, **settings), norm(CHANNELS)
        self.conv, self.norm2 = conv(CHANNELS, CHANNELS, 3, **settings), norm(CHANNELS)
        self.head = OwnLinear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traced and int(x.shape[2]) % 2:
            x = functional.pad(x, (0, 1, 0, 1))
        x = self.norm1(self.stem(x)).relu()
        x = self.norm2(self.conv(x)).relu() + x
        return self.head(x.mean((2, 3)))


class Asks(nn.Module):
    """Asks for the type of an activation, which is another one while torch.fx traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.Tensor):
            x = self.conv(x).relu()
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """A linear layer with the weight of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(x)).relu())


def pixels(count=16):
    """Make images."""
    return torch.randn(count, 3, 8, 8)


def words(count=16):
    """Make sentences, the last words of which are masked."""
    mask = torch.ones(count, 6, dtype=torch.int64)
    mask[:, 5] = 0
    return {"input_ids": torch.randint(20, (count, 6)), "attention_mask": mask}


CASES = {
    "encoder": (Encoder, words, 7, 7),
    "blocks": (lambda: Blocks(traced=False), pixels, 3, 3),
    "norm": (lambda: Blocks(traced=False, norm=Norm), pixels, 3, 3),
    "norm_traced": (lambda: Blocks(traced=True, norm=Norm), pixels, 3, 3),
    "padded": (lambda: Blocks(traced=False, conv=Padded), pixels, 3, 3),
    "standardised": (lambda: Blocks(traced=False, conv=Standardised), pixels, 3, 3),
    "standardised_traced": (lambda: Blocks(traced=True, conv=Standardised), pixels, 3, 3),
    "both": (lambda: Blocks(traced=False, conv=Padded, norm=Norm), pixels, 3, 3),
    "asks": (Asks, pixels, 2, 2),
}
"""What makes a network, its items, how many layers it has, and how many of them are quantized."""


def build(name):
    """Make a network with BatchNorms that have seen something, and items."""
    make, item, *_ = CASES[name]
    model = make()
    with torch.no_grad():
        for _ in range(3):
            nets.call(model.train(), item())
    return model.eval(), [item() for _ in range(2)]


def outputs(model, item):
    """Run a network."""
    with torch.no_grad():
        return next(tensors_in(nets.call(model, item)))


# torch.onnx writes the number of images into the reshapes of torch's own attention.
@pytest.mark.filterwarnings("ignore:The file should run for any number of images")
@pytest.mark.parametrize("name", CASES)
def test_quantized_folded_saved(name, tmp_path):
    """Every layer is quantized with a quantizer of its input, all BatchNorms after layers fold, and the model can be
    finetuned, folded and saved as QCDQ and QONNX.
    """
    model, items = build(name)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    linked = quantize(model, items, config=four_bits(weight_bits=7))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    layers = [m for m in linked.modules() if isinstance(m, (qnn.QuantConv2d, qnn.QuantLinear))]
    assert len(layers) == CASES[name][3]
    assert not any(type(m) in (nn.BatchNorm2d, nn.Conv2d, nn.Linear) for m in linked.modules())
    expected = outputs(model, items[0])
    assert relative(outputs(linked, items[0]), expected) < CLOSE
    folded = fold(linked)
    assert relative(outputs(folded, items[0]), outputs(linked, items[0])) < FOLDED
    qcdq = save_qcdq(folded, tmp_path / "qcdq.onnx", items[0])
    assert qcdq.relative_error < FOLDED
    assert qcdq.weights == len(layers)
    assert save_qonnx(folded, tmp_path / "qonnx.onnx", items[0]).relative_error < FOLDED


def test_layers_that_read_one_activation_share_its_quantizer():
    """Query, key and value have one quantizer, which is one operation of the hardware and has one scale."""
    model, items = build("encoder")
    linked = quantize(model, items, config=four_bits(finetune=None))
    attention = linked.attention
    assert attention.query.input_quant is attention.key.input_quant is attention.value.input_quant
    assert attention.out.input_quant is not attention.query.input_quant
    copied = fold(linked).attention
    assert copied.query.input_quant is copied.key.input_quant is not attention.query.input_quant


@pytest.mark.parametrize("name", ["norm", "norm_traced", "padded", "standardised", "both"])
def test_subclasses_compute_what_they_have_computed(name):
    """Without rounding, the swapped network computes what the float network computes, on other images too."""
    from qft_plugin.brevitas._twin import make_twin

    model, items = build(name)
    call = as_call(items[0], accepts=accepts(model))
    like, settings = next(model.parameters()), FinetuneConfig(max_images=32)
    inputs = read_inputs(items, accepts=accepts(model), like=like, settings=settings)
    swapped = make_twin(swap(model, call, inputs, four_bits())[0])
    for item in (*items, pixels(2), 100 * pixels(3)):
        assert relative(outputs(swapped, item), outputs(model, item)) < EXACT


def test_a_weight_that_something_else_reads_stays_in_float(caplog):
    """A linear layer with an embedding's weight is left alone, and a message names it and says why."""
    model, items = Tied().eval(), [torch.randint(20, (16, 6))]
    with caplog.at_level(logging.WARNING, logger="qft_plugin"):
        linked = quantize(model, items, config=four_bits(finetune=None))
    assert "left in floating point: head (its weight, embed.weight, is used elsewhere too, by " in caplog.text
    assert type(linked.head) is nn.Linear
    assert isinstance(linked.hidden, qnn.QuantLinear)
    assert linked.head.weight is linked.embed.weight


class Computed(nn.Module):
    """A layer whose kernel depends on the image, and one that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.head = nn.Linear(3, 27), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        W = self.kernel(x.mean((0, 2, 3))).view(3, 1, 3, 3)
        return self.head(functional.conv2d(x, W, padding=1, groups=3).mean((2, 3)))


def test_a_kernel_that_depends_on_the_image_is_named(caplog):
    """What stays in float because its kernel is computed from activations is named, with the reason."""
    told = pytest.warns(QFTWarning, match=r"1 of 3 layers whose weights the forward computes.*conv2d/0")
    with caplog.at_level(logging.WARNING, logger="qft_plugin"), told:
        quantize(Computed().eval(), [pixels()], config=four_bits(finetune=None))
    assert "(conv2d with a weight that is computed in the forward)" in caplog.text


@pytest.mark.parametrize(
    "hardware", [HardwareSpec.finn(), HardwareSpec.integer_only(), HardwareSpec(elementwise_rescale="channel")]
)
def test_hardware_that_needs_more_than_layers(hardware):
    """Quantizers in front of additions need a graph: without one, the setting and the addition are named."""
    model, items = build("blocks")
    with pytest.raises(ModelError, match=r"adds in floating point.*add"):
        quantize(model, items, config=four_bits(hardware=hardware))


class Random(nn.Module):
    """Drops something in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.conv(x).relu().mean((2, 3)), 0.1, training=True)
        return self.head(x)


def test_a_model_that_is_random_in_eval_mode():
    """A model that draws random numbers in eval mode is trained, with a warning."""
    with pytest.warns(QFTWarning, match=r"something random is still active"):
        quantize(Random().eval(), [pixels()], config=four_bits())


def test_a_model_made_in_inference_mode():
    """A float model made in inference mode is quantized like any other; one to be trained in place is refused."""
    torch.manual_seed(0)
    with torch.inference_mode():
        model = Blocks(traced=True).eval()
    linked = quantize(model, [pixels()], config=four_bits())
    assert not any(t.is_inference() for t in linked.state_dict().values())
    with torch.inference_mode():
        mine = brevitas_models.build("linear_only")
    with pytest.raises(ModelError, match=r"made outside torch\.inference_mode"):
        link(mine, brevitas_models.images("linear_only"))


class ByKeyword(Blocks):
    """Takes its input by keyword only, beside others that have defaults, and returns it in a dictionary."""

    def forward(self, *, image: Tensor, scale: Tensor | None = None, **others: Tensor) -> dict[str, Tensor | None]:
        x = image if scale is None else image * scale
        x = super().forward(x)
        return {"scores": x + others["shift"] if "shift" in others else x, "none": None}


def test_inputs_by_keyword(tmp_path):
    """Inputs that have a name only, and some that the signature does not name, come into both files."""
    model = ByKeyword(traced=True).eval()
    items = [{"image": pixels(), "shift": torch.randn(16, 4)}]
    folded = fold(quantize(model, items, config=four_bits()))
    assert save_qcdq(folded, tmp_path / "qcdq.onnx", items[0]).relative_error < FOLDED
    assert save_qonnx(folded, tmp_path / "qonnx.onnx", items[0]).relative_error < FOLDED


def test_a_float64_model_is_saved_in_float32(tmp_path):
    """A model in float64 is quantized in float64, and its file computes in float32, which runtimes can."""
    model = Blocks(traced=True).double().eval()
    items = [pixels().double()]
    folded = fold(quantize(model, items, config=four_bits()))
    assert {p.dtype for p in folded.parameters()} >= {torch.float64}
    report = save_qcdq(folded, tmp_path / "model.onnx", items[0])
    assert report.relative_error < CLOSE
    assert report.int8_convolutions == 2


class NormWithActivation(nn.BatchNorm2d):
    """A BatchNorm with an activation in its forward, as timm's, which a tracer looks into."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "four axes")
        x = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(self.drop(x))


def test_a_norm_with_an_activation_keeps_it(tmp_path):
    """A BatchNorm whose tensors a traced graph reads is folded and kept, and its activation is computed."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), NormWithActivation(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    nn.init.normal_(model[1].running_mean)
    images = pixels()
    linked = quantize(model, [images], config=four_bits(weight_bits=7, finetune=None))
    assert relative(outputs(linked, images), outputs(model, images)) < CLOSE
    assert save_qcdq(fold(linked), tmp_path / "net.onnx", images).weights == 2
