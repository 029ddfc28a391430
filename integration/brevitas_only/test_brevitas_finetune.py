"""Initialize and finetune on the real Brevitas."""

import copy
import warnings

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import brevitas.nn as qnn
import nets
import torch
from brevitas_models import (
    CLOSE,
    MODELS,
    Residual,
    assert_same_state,
    build,
    few,
    few_steps,
    images,
    relative,
    run,
    state_of,
    weight_scalings,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qft_plugin import ConfigError, DataError, HardwareSpec, ModelError, QFTConfig, QFTWarning
from qft_plugin.brevitas import (
    QFTInt4WeightDoublyPerChannelFloat,
    QFTInt4WeightPerTensorFloat,
    QFTUint8ActPerTensorFloat,
    finetune,
    fold,
    initialize,
    link,
    quantize,
)
from qft_plugin.training.loss import normalised_l2

LOSS_AGAIN = 0.01
"""Relative difference of a loss computed by Brevitas' quantizers: a few activations round the other way."""


class Teacher(nn.Module):
    """The float network of `brevitas_models.Residual`, another class with other names."""

    def __init__(self, student):
        super().__init__()
        self.stem, self.a, self.b, self.c = (
            nn.Conv2d(c.in_channels, c.out_channels, 3, padding=1)
            for c in (student.c1, student.c2, student.c3, student.c4)
        )
        self.head = nn.Linear(12, 4)
        pairs = [(self.stem, student.c1), (self.a, student.c2), (self.b, student.c3), (self.c, student.c4),
                 (self.head, student.fc)]  # fmt: skip
        for mine, its in pairs:
            mine.load_state_dict({"weight": its.weight.detach().clone(), "bias": its.bias.detach().clone()})

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        return self.head(self.c(x).relu().mean((2, 3)))


def problem(**settings):
    """Make a student, its teacher, and 64 images in 4 batches."""
    model = build("residual", **settings)
    return model, Teacher(model).eval(), [images("residual", 16) for _ in range(4)]


@pytest.mark.parametrize("weight", [None, QFTInt4WeightDoublyPerChannelFloat], ids=["channel", "doubly"])
def test_initialize_and_finetune(weight):
    """A linked model comes closer to a teacher of another class, and its own quantizers compute the loss reported."""
    model, teacher, data = problem(**({} if weight is None else {"weight": weight}))
    link(model, data[0])
    exact = run(teacher, torch.cat(data))
    fresh = relative(run(model, torch.cat(data)), exact)
    initialize(model, data, few())
    assert relative(run(model, torch.cat(data)), exact) < 1.2 * fresh
    initialize(model, data, few(compensate=False))  # further from the best state
    started = relative(run(model, torch.cat(data)), exact)
    settings = few_steps(images_fed=640)
    result = finetune(model, teacher, data, few(finetune=settings))
    assert result.steps == len(result.losses) == 40
    # Scales of both sides leave a network of eight channels little to gain; the start is kept where nothing is.
    assert result.final_loss <= (0.99 if weight is None else 1) * result.start_loss
    assert relative(run(model, torch.cat(data)), exact) < 1.1 * started


def test_the_reported_loss_is_that_of_the_model():
    """Compared at the same place, Brevitas' own quantizers give the loss that the finetune reports."""
    model, teacher, data = problem()
    initialize(model, data, few())
    at = few_steps(images_fed=320, loss_at=None)
    result = finetune(model, teacher, data, few(finetune=at))
    # The compared place is the input of the global pool; its mean is compared here, which is smaller.
    seen = {}
    hooks = [model.r4.register_forward_hook(lambda _, __, y: seen.update(student=y)),
             teacher.c.register_forward_hook(lambda _, __, y: seen.update(teacher=y.relu()))]  # fmt: skip
    x = torch.cat(data)
    run(model, x), run(teacher, x)
    for hook in hooks:
        hook.remove()
    found = normalised_l2(seen["student"], seen["teacher"]).item()
    assert found == pytest.approx(result.final_loss, rel=LOSS_AGAIN)
    assert result.final_loss <= result.start_loss


@pytest.mark.filterwarnings("ignore:Finetune. the loss should end below")  # nothing trains long enough here
def test_an_unlinked_model_is_linked_first():
    """Both entry points link a model that is not; without an initialization training starts from what it has."""
    model, teacher, data = problem()
    initialize(model, data, few())
    assert all(s.linked for s in weight_scalings(model).values())
    other = build("residual")
    with pytest.warns(QFTWarning, match="have seen one example, or nothing: inp.act_quant, .*Call .*initialize"):
        result = finetune(other, teacher, data, few())
    assert all(s.linked for s in weight_scalings(other).values())
    assert result.final_loss <= result.start_loss


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_changes_nothing(error):
    """What the callback raises comes through and leaves every bit of the model; so does the training before it."""
    model, teacher, data = problem()
    initialize(model, data, few(compensate=False))
    before, modes = state_of(model), [m.training for m in model.modules()]
    taught = state_of(teacher)
    seen = []

    def stop(step):
        assert_same_state(model, before)
        seen.append(step.number)
        if step.number == 3:
            raise error

    with pytest.raises(error):
        finetune(model, teacher, data, few(), callback=stop)
    assert seen == [1, 2, 3]
    assert_same_state(model, before)
    assert_same_state(teacher, taught)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    finetune(model, teacher, data, few(finetune=few_steps(images_fed=320)))
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert any(n.endswith("log_c") for n in changed)
    assert any(n.endswith("log_F") for n in changed)
    assert any(n.endswith("log_s") for n in changed)
    assert "c1.weight" in changed
    assert_same_state(teacher, taught)


def test_the_result_is_reproducible():
    """Two runs give the same bits whatever the global random state is; another seed gives others."""
    start, teacher, data = problem()
    initialize(start, data, few(compensate=False))

    def once(seed, number):
        model = copy.deepcopy(start)
        torch.manual_seed(number)
        finetune(model, teacher, data, few(finetune=few_steps(seed=seed, images_fed=320)))
        return model.state_dict()

    first, second, other = once(0, 1), once(0, 2), once(1, 1)
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert any(not torch.equal(t, other[n]) for n, t in first.items())


def test_the_global_random_state_stays():
    """Neither entry point moves torch's global random state."""
    model, teacher, data = problem()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialize(model, data, few())
    finetune(model, teacher, data, few())
    assert torch.equal(torch.rand(3), expected)


FORMS = {
    "list": lambda data: data,
    "tuples": lambda data: [(x,) for x in data],
    "dicts": lambda data: [{"x": x} for x in data],
    "generator": lambda data: (x for x in data),
    "loader": lambda data: DataLoader(torch.cat(data), batch_size=20),
    "picked": lambda data: DataLoader(
        TensorDataset(torch.cat(data), torch.zeros(64)),
        batch_size=16,
        collate_fn=lambda rows: torch.stack([r[0] for r in rows]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form):
    """The same images in another form give the same bits."""
    start, teacher, data = problem()
    initialize(start, data, few(compensate=False))
    reference = copy.deepcopy(start)
    finetune(reference, teacher, data, few())
    finetune(start, teacher, FORMS[form](data), few())
    assert_same_state(start, state_of(reference))


@pytest.mark.parametrize("call", ["finetune", "quantize"])
@pytest.mark.parametrize(("spoil", "words"), [
    (lambda data: [(x, torch.zeros(16, dtype=torch.int64)) for x in data], "labels are not needed"),
    (lambda data: DataLoader(TensorDataset(torch.cat(data), torch.zeros(64)), batch_size=8), "labels are not needed"),
    (lambda _: [], "at least one batch"),
    (lambda data: [data[0][:, :, 0, 0] * torch.nan], "should be finite"),
    (lambda data: [x.double() for x in data], "dtype torch.float32"),
    (lambda _: ["image"], "Found str"),
], ids=["labels", "loader", "empty", "nan", "double", "text"])  # fmt: skip
def test_wrong_data(call, spoil, words):
    """Data that cannot be used is refused before the first step, and the model stays."""
    model, teacher, data = problem()
    link(model, data[0])
    before, wrong, steps = state_of(model), spoil(data), []
    run_it = {
        "finetune": lambda: finetune(model, teacher, wrong, few(), callback=steps.append),
        "quantize": lambda: quantize(teacher, wrong, config=few(), callback=steps.append),
    }[call]
    with pytest.raises(DataError, match=words) as caught:
        run_it()
    assert steps == []
    assert "nncf" not in str(caught.value).lower()
    assert_same_state(model, before)


@pytest.mark.parametrize(("name", "value"), [
    ("weight_bits", 8), ("small_layer_bits", 4), ("small_layer_share", 0.5), ("layer_bits", {"c1.weight": 8}),
    ("hardware", HardwareSpec(rescale="layerwise")), ("hardware", HardwareSpec(activation_bits=4)),
    ("layer_activation_bits", {"c1.weight": 4}), ("bounded", "relu"),
])  # fmt: skip
@pytest.mark.parametrize("call", ["initialize", "finetune"])
def test_settings_that_quantizers_decide(call, name, value):
    """Bit widths and granularity are those of the model's quantizers: the settings for them are refused by name."""
    model, teacher, data = problem()
    setting = r"HardwareSpec\.\w+" if name == "hardware" else rf"QFTConfig\.{name}"
    with pytest.raises(ConfigError, match=f"{setting} should be left at its default"):
        initialize(model, data, few(**{name: value})) if call == "initialize" else finetune(
            model, teacher, data, few(**{name: value})
        )
    assert not any(s.ready or s.linked for s in weight_scalings(model).values())


def test_factors_in_front_of_additions_must_be_there():
    """A model of the user's own has them or not: the setting alone would change nothing, and that is said."""
    model, teacher, data = problem()
    config = few(hardware=HardwareSpec(elementwise_rescale="channel"))
    with pytest.raises(ConfigError, match="should have a factor in front of each addition"):
        finetune(model, teacher, data, config)


def test_a_finetune_without_settings():
    """Without a finetune in the settings there is nothing to do, which is said."""
    model, teacher, data = problem()
    with pytest.raises(ConfigError, match=r"QFTConfig\.finetune.*Found None"):
        finetune(model, teacher, data, few(finetune=None))


def test_a_teacher_that_does_not_fit():
    """A teacher whose compared activation has another shape is refused with both shapes."""
    model, _, data = problem()
    with pytest.raises(ConfigError, match=r"one shape where they are compared.*in the teacher.*in the student"):
        finetune(model, nets.build("residual"), data, few())
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        finetune(model, lambda x: x, data, few())


@pytest.mark.parametrize("name", [n for n in MODELS if n != "residual"])
def test_every_model_finetunes(name):
    """Each network of layers finetunes against itself in float, to a loss that is no larger, and folds."""
    model, data = build(name), [images(name) for _ in range(4)]
    float_model = copy.deepcopy(model)
    for module in float_model.modules():
        for proxy in ("weight_quant", "input_quant", "output_quant", "act_quant"):
            if hasattr(module, proxy):
                getattr(module, proxy).disable_quant = True
    initialize(model, data, few())
    start = relative(run(model, torch.cat(data)), run(float_model, torch.cat(data)))
    result = finetune(model, float_model, data, few())
    assert 0 < result.final_loss <= result.start_loss < 1
    assert start < 1
    assert relative(run(fold(model), data[0]), run(model, data[0])) < 0.05


def test_what_a_finetune_starts_from_is_said(caplog):
    """A log line says that a model is linked first, and one that a start is not that of `initialize`; else none."""
    model, teacher, data = problem()
    loaded = build("residual")

    def restore():
        link(loaded, data[0])
        loaded.load_state_dict(model.state_dict())  # its scales are someone's choice

    calls = {
        "initialize": lambda: initialize(model, data, few(compensate=False)),
        "finetune": lambda: finetune(model, teacher, data, few()),
        "restored": restore,
        "finetune again": lambda: finetune(loaded, teacher, data, few()),
    }
    told = {}
    for step, call in calls.items():
        caplog.clear()
        with caplog.at_level("INFO", logger="qft_plugin"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Finetune: the loss should end below")
            call()
        lines = [r.getMessage() for r in caplog.records]
        told[step] = [any(words in line for line in lines) for words in ("not linked yet", "initialize was not called")]
    never = [False, False]
    assert told.pop("initialize") == [True, False]
    assert told.pop("finetune again") == [False, True]
    assert told == {"finetune": never, "restored": never}


def test_a_model_without_quantizers():
    """A float model is refused where a quantized one is asked for, with `quantize` as the way."""
    model = nets.build("residual")
    with pytest.raises(ModelError, match="or use quantize"):
        initialize(model, nets.items("residual"), few())


def test_inside_inference_mode():
    """Called inside `torch.inference_mode` the finetune still trains."""
    model, teacher, data = problem()
    initialize(model, data, few(compensate=False))
    with torch.inference_mode():
        result = finetune(model, teacher, data, few())
    assert result.steps == 4
    assert torch.isfinite(run(model, data[0])).all()


def test_double_precision():
    """A float64 model is initialized and finetuned in float64."""
    model, teacher, data = Residual().eval().double(), None, [images("residual").double() for _ in range(4)]
    teacher = Teacher(model).double().eval()
    initialize(model, data, few())
    result = finetune(model, teacher, data, few())
    assert result.final_loss <= result.start_loss < 1
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class _OldName(nn.Module):
    """Changes an activation in place and goes on with the name from before, which a quantized ReLU would not change."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv1(x)
        y = torch.relu_(x)
        return self.fc(self.conv2(y).relu().mean((2, 3)) + x.mean((2, 3)))


def test_a_model_that_a_graph_would_change():
    """A model that would compute something else with quantizers in its graph keeps its own forward."""
    torch.manual_seed(0)
    model, data = _OldName().eval(), [torch.randn(16, 3, 8, 8)]
    result = quantize(model, data, config=few(weight_bits=8))
    assert isinstance(result, _OldName)
    assert relative(run(result, data[0]), run(model, data[0])) < CLOSE


@pytest.mark.parametrize(("name", "relus"), [("residual", 3), ("in_place", 3), ("inverted", 3), ("one_d", 1)])
def test_relus_left_to_the_quantizers_behind_them(name, relus, monkeypatch):
    """ReLUs, bounded or in place, that only a quantizer reads are left to it, and the losses of the steps stay: all but
    those in front of a pool.
    """
    from qft_plugin.brevitas import _attach

    model, batches = nets.build(name), nets.items(name)
    found, losses = [], []
    original = _attach.Student._relus

    def counted(self, source):
        found.append(original(self, source))
        return found[-1]

    for function in (counted, lambda *_: {}):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(_attach.Student, "_relus", function)
            config = QFTConfig(small_layer_share=0, finetune=few_steps())
            quantize(model, batches, config=config, callback=lambda step, seen=seen: seen.append(step.loss))
        losses.append(torch.tensor(seen))
    assert len(found[-1]) == relus
    assert len(losses[0]) == 4
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


class ReadTwice(nn.Module):
    """What its ReLU reads is read by something else too: changed in place later, or as a view from before."""

    def __init__(self, how):
        super().__init__()
        settings = {"weight_quant": QFTInt4WeightPerTensorFloat, "weight_bit_width": 4}
        self.first, self.second = (qnn.QuantConv2d(4, 4, 3, padding=1, **settings) for _ in range(2))
        self.relu = qnn.QuantReLU(act_quant=QFTUint8ActPerTensorFloat)
        self.quantizer = qnn.QuantIdentity(act_quant=QFTUint8ActPerTensorFloat)
        self.how = how

    def forward(self, x):
        x = self.first(x)
        if self.how == "changed later":
            x += self.second(self.relu(x))
            return x.mean((2, 3))
        before = x[:, :2]
        y = self.second(self.quantizer(nn.functional.relu(x, inplace=True)))
        return y.mean((2, 3)) + before.mean((1, 2, 3))[:, None]


@pytest.mark.filterwarnings("ignore:Finetune. the loss should end below")  # nothing trains long enough here
@pytest.mark.parametrize("how", ["changed later", "a view from before"])
def test_a_relu_whose_input_is_read_elsewhere_is_run(how, monkeypatch):
    """It is not left to the quantizer: the student computes what it computes when all ReLUs are run, and trains."""
    from qft_plugin.brevitas import _attach

    torch.manual_seed(0)
    model, batches = ReadTwice(how).eval(), list(torch.randn(4, 16, 4, 6, 6))
    teacher = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    initialize(model, batches, few(compensate=False))
    losses = []
    for relus in (_attach.Student._relus, lambda *_: {}):
        with monkeypatch.context() as patch:
            patch.setattr(_attach.Student, "_relus", relus)
            losses.append(
                finetune(copy.deepcopy(model), teacher, batches, few(finetune=few_steps(loss_at=None))).losses
            )
    assert losses[0] == losses[1]
