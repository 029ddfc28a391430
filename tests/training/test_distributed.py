"""Several processes that train together do what one does alone: who owns what, and two real processes."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qft_plugin.config import FinetuneConfig
from qft_plugin.errors import ConfigError, DataError
from qft_plugin.job import activation_ranges, bias_correction, compensation
from qft_plugin.training import distributed as training
from qft_plugin.training.data import HEAD_IMAGES, Inputs, read_inputs
from qft_plugin.training.distributed import ALONE, World, agreed, check_alike, joined, once
from qft_plugin.training.loss import Loss, Prediction, Whole, distillation_loss

EXACT = 1e-12
"""A hundred steps in float64, with sums in another order."""

FLOAT32 = 1e-6
"""A few dozen float32 terms in another order."""

SECONDS = 120
"""The two processes need about five."""

HERE = Path(__file__).parent.parent


@given(size=st.integers(1, 7), count=st.integers(0, 60), start=st.integers(0, 60))
def test_every_image_belongs_to_one_process(size: int, count: int, start: int) -> None:
    """The rows that the processes hold are, put together, those that were asked for: by index and by range."""
    index = torch.randperm(200)[:count]
    asked = torch.arange(start, start + count)
    by_index, by_range = [], []
    for rank in range(size):
        world, own = World(rank, size), torch.arange(200)[rank::size]
        by_index.append(own[world.rows(index)])
        by_range.append(own[world.row_range(start, start + count)])
    assert torch.equal(torch.cat(by_index).sort().values, index.sort().values)
    assert torch.equal(torch.cat(by_range).sort().values, asked)


def test_a_process_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A variable that an earlier program left behind does not stop a job in silence."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training, "PATIENCE", 0.01)
    with caplog.at_level("WARNING", "qft_plugin"):
        with training._said_when_waiting():
            time.sleep(0.2)
        with training._said_when_waiting():
            pass
        time.sleep(0.05)
    assert [r.getMessage()[:53] for r in caplog.records] == ["Process 0 of 2 waits for the others at here:1, as RAN"]


def read(world: World, *, head_items: int = 0, count: int = 700, max_images: int = 650) -> Inputs:
    """Read images in items of 90, with a second input by keyword."""
    x = torch.arange(float(count)).unsqueeze(1)
    items = [{"x": part, "y": -part} for part in x.split(90)]
    return read_inputs(
        items,
        accepts=lambda **_: True,
        like=torch.zeros(1),
        settings=FinetuneConfig(max_images=max_images, memory_limit=1000),
        world=world,
        head_items=head_items,
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("head_items", "head"), [(0, 300), (4, 360), (99, 650)])
def test_a_process_keeps_the_first_images_and_its_own(
    size: int, head_items: int, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is, for all processes together, what one process reads, and the first images are the same."""
    monkeypatch.setattr("qft_plugin.training.data.HEAD_IMAGES", 300)
    whole = read(ALONE)
    assert whole.share is whole
    assert whole.own is None
    for rank in range(size):
        inputs = read(World(rank, size), head_items=head_items)
        assert inputs.total == whole.total == 650
        assert inputs.sizes == whole.sizes
        assert len(inputs) == head
        for key in ("x", "y"):
            assert torch.equal(inputs.kwargs[key], whole.kwargs[key][:head])
            assert torch.equal(inputs.share.kwargs[key], whole.kwargs[key][rank::size])
        assert inputs.laid_out(channels_last=True).share.channels_last


def test_all_that_the_start_looks_at_is_kept() -> None:
    """Every process has the images that ranges, compensation and biases start from."""
    assert (
        max(activation_ranges.RANGE_IMAGES, compensation.COMPENSATION_IMAGES, bias_correction.BIAS_IMAGES)
        <= HEAD_IMAGES
    )


def test_every_process_needs_an_image() -> None:
    """Fewer images than processes is an error that says what to do."""
    with pytest.raises(DataError, match=r"each of the 3 processes.*Found 2.*fewer processes"):
        read(World(2, 3), count=2)


def test_one_process_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, or with one process of it, no group is made, and nothing is asked of others."""
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        monkeypatch.setattr(os, "environ", environment)
        with joined(nn.Linear(1, 1)) as world, agreed(world):
            assert world is ALONE
            check_alike(world, marks=[], settings="", model=nn.Linear(1, 1))
            assert once(lambda: 3)() == 3
            processes.trained()


def test_a_group_that_cannot_serve_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group for GPUs alone and a model on the CPU: an error before anything is exchanged."""
    answers = {"is_initialized": True, "get_world_size": 2, "get_rank": 1, "get_backend_config": "cuda:nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    with pytest.raises(ConfigError, match=r"model's device cpu.*Found the backends 'cuda:nccl'.*gloo"):
        joined(nn.Linear(1, 1)).__enter__()
    with joined() as world:
        assert (world.rank, world.size, world.is_first) == (1, 2, False)


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    """The shares of both parts of a batch, cut unevenly, are together the loss of the batch."""
    student, teacher = (Prediction((torch.randn(9, 3), torch.randn(9, 4, 2)), torch.randn(9, 5)) for _ in range(2))
    loss = Loss((1.0, 3.0), 0.25)
    whole = Whole(torch.stack([t.square().sum() for t in teacher.features]), 9)
    shares = [
        float(distillation_loss(*(_cut(p, part) for p in (student, teacher)), loss, whole=whole))
        for part in (slice(0, 2), slice(2, 9))
    ]
    assert sum(shares) == pytest.approx(float(distillation_loss(student, teacher, loss)), rel=FLOAT32)


def _cut(p: Prediction, part: slice) -> Prediction:
    assert p.logits is not None
    return Prediction(tuple(f[part] for f in p.features), p.logits[part])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """Run two processes, and return their folder, what each of them says, and what each of them printed."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "processes.py"), str(rank), "2", str(folder)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 3], printed
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)], printed


@pytest.mark.parametrize("name", processes.TRAINED)
def test_two_processes_train_what_one_trains(told: Any, name: str) -> None:
    """Losses, kept state and the step at which a loss was not finite are those of one process; both have the same."""
    _, (first, second), _ = told
    if name == "exploding":
        assert not math.isfinite(first[name]["losses"][-1])
    else:
        assert first[name]["final"] < 0.9 * first[name]["start"]
    one = processes.TRAINED[name]()
    for key, expected in one.items():
        torch.testing.assert_close(first[name][key], second[name][key], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(first[name][key], expected, rtol=EXACT, atol=EXACT, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("stopped", ("QFTError", "KeyboardInterrupt"), r"Process 1 of 2: KeyboardInterrupt"),
        ("wrong_item", ("DataError", "DataError"), r"Process 1 of 2: Dataset item 2.*finite"),
        ("other_error", ("IndexError", "QFTError"), "nothing there"),
        ("other_order", ("DataError", "DataError"), r"same images in the same order.*item 0 of process 1.*same seed"),
        ("fewer_images", ("DataError", "DataError"), r"item 4 of process 1.*no DistributedSampler"),
        ("other_settings", ("ConfigError", "ConfigError"), r"seed=1.* in process 1 and .*seed=0.* in process 0"),
        ("other_model", ("ConfigError", "ConfigError"), r"other weights in process 1"),
        ("uneven", ("ConfigError", "ConfigError"), r"multiple of the number of processes, 2.*Found batches of 15"),
        ("not written", ("ModelError", "ModelError"), "it cannot be written"),
    ],
)
def test_an_error_of_one_process_is_one_of_both(told: Any, name: str, kinds: tuple[str, str], message: str) -> None:
    """No process waits for one that has failed, and the others say why: in the same class where it is one of ours."""
    _, found, _ = told
    assert tuple(answer[name][0] for answer in found) == kinds
    assert re.search(message, found[0][name][1], re.DOTALL)


def test_the_state_of_the_first_process_is_shared(told: Any) -> None:
    """Parameters and buffers of any dtype and layout are those of the first process afterwards, bit for bit."""
    _, (first, second), _ = told
    expected = processes.shared()  # one process is the first one, and shares nothing
    for found in (first["shared"], second["shared"]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_files_are_written_by_the_first_process(told: Any) -> None:
    """It writes once; both return what it returned."""
    folder, found, _ = told
    assert [p.name for p in folder.glob("written*")] == ["written by 0"]
    assert [answer["written"] for answer in found] == [str(folder / "file")] * 2


def test_the_first_process_speaks_for_all(told: Any) -> None:
    """Warnings and messages of the library come once, and torch has nothing to complain of."""
    _, _, printed = told
    assert "said by all" in printed[0]
    assert "warned of by all" in printed[0]
    assert not printed[1]
    assert "find_unused_parameters" not in printed[0]


def test_a_process_that_dies_does_not_leave_the_other_waiting(told: Any) -> None:
    """Where one ends in the middle of a step, the other raises."""
    folder, _, _ = told
    assert (folder / "noticed").exists()
