"""Jobs that are kept in a folder: the same result after any interruption, and only for the same job."""

import contextlib
import errno
import itertools
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import SmallHost
from torch import Tensor, nn

from qft_plugin import ConfigError, EfQAT, FinetuneConfig, QFTConfig
from qft_plugin.errors import HostError
from qft_plugin.job import checkpoint
from qft_plugin.job.checkpoint import kept_in
from qft_plugin.job.run import Callback, Job, run
from qft_plugin.job.target import run_to_target
from qft_plugin.training.phases import Step

BATCHES = tuple(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(10))
STEPS = 24
TUNED = FinetuneConfig(images_fed=16 * STEPS, batch_size=16, restarts=3)
SETTINGS = {
    "all": QFTConfig(finetune=TUNED),
    "a part": QFTConfig(finetune=replace(TUNED, train=EfQAT(ratio=0.3, refresh_images=64))),
    "single layers": QFTConfig(finetune=replace(TUNED, train=EfQAT(mode="lwpn", ratio=0.6, refresh_images=96))),
    "blocks": QFTConfig(finetune=replace(TUNED, blocks=("middle",))),
    "soft rounding": QFTConfig(rounding="soft", finetune=TUNED),
}


class CrashError(Exception):
    """Raised by a test in the place of a crash."""


class Net(nn.Module):
    """Three layers, one of them beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.middle = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        found: Tensor = self.last((x + self.second(x)).relu().mean((2, 3)))
        return found


def net() -> Net:
    """Return the same network each time."""
    torch.manual_seed(0)
    return Net().eval()


@dataclass(frozen=True)
class AskedHost(SmallHost):
    """A host of which the user asked something."""

    preset: str = "mixed"

    def asked(self) -> dict[str, str]:
        return {"preset": self.preset}


def job(
    folder: Path | None,
    config: QFTConfig = SETTINGS["all"],
    *,
    model: nn.Module | None = None,
    batches: tuple[Tensor, ...] = BATCHES,
    preset: str = "mixed",
    callback: Callback | None = None,
) -> Job:
    """Run a job that is kept."""
    with kept_in(folder) as keeper:
        host = AskedHost(model or net(), batches, preset=preset)
        return run(host, config, callback=callback, keeper=keeper)


def at(number: int, do: Callable[[], Any]) -> Callback:
    """Return a callback that does something after one step."""

    def callback(step: Step) -> None:
        if step.number == number:
            do()

    return callback


def crash() -> None:
    raise CrashError


def same(one: Job, other: Job) -> None:
    """Check that two jobs have one result, bit for bit."""
    states = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert one.result == other.result
    assert one.report.agreement == other.report.agreement


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the work at every step."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_job_goes_on_to_the_same_result(name: str, tmp_path: Path) -> None:
    """Crashed in the first step, at the end of a cycle and of a phase, between them, and in the last step."""
    whole = job(None, SETTINGS[name])
    numbers: list[int] = []
    for number in (1, 5, 8, 9, 12, 17, STEPS):

        def crash_at(step: Step, number: int = number) -> None:
            numbers.append(step.number)
            if step.number == number:
                raise CrashError

        with pytest.raises(CrashError):
            job(tmp_path, SETTINGS[name], callback=crash_at)
    same(whole, job(tmp_path, SETTINGS[name], callback=lambda step: numbers.append(step.number)))
    # What a callback saw before it raised is seen again: the step was not kept yet.
    assert numbers == [1, *range(1, 6), *range(5, 9), 8, 9, *range(9, 13), *range(12, 18), *range(17, 25), 24]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "compensation.safetensors",
        "finetune.safetensors",
        "job.json",
    ]


@pytest.mark.usefixtures("always")
def test_a_job_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    """The result may have been lost after the last step: the same call returns it without a step."""
    first = job(tmp_path)
    same(first, job(tmp_path, callback=lambda _: crash()))


@pytest.mark.usefixtures("always")
def test_layers_are_compensated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash between two layers only those that are left are chosen, with the same weights."""
    from qft_plugin.job import compensation

    whole, chosen, choose = job(None), list[str](), compensation._choose

    def counted(kernel: Any, *args: Any) -> None:
        if len(chosen) == 2:
            chosen.append("crash")
            raise CrashError
        chosen.append(kernel.layer.weight)
        choose(kernel, *args)

    monkeypatch.setattr(compensation, "_choose", counted)
    with pytest.raises(CrashError):
        job(tmp_path)
    same(whole, job(tmp_path))
    assert chosen == ["first.weight", "second.weight", "crash", "last.weight"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_end_of_the_step(number: signal.Signals, tmp_path: Path, caplog: Any) -> None:
    """It is kept then, although it was not yet time for it, and what happens is what would have happened at once."""
    whole, handler = job(None), signal.getsignal(number)

    def stop(*_: Any) -> None:
        raise CrashError

    signal.signal(number, stop)
    try:
        with pytest.raises(CrashError), caplog.at_level(logging.WARNING):
            job(tmp_path, callback=at(6, lambda: signal.raise_signal(number)))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, handler)
    assert str(tmp_path) in caplog.text
    numbers: list[int] = []
    same(whole, job(tmp_path, callback=lambda step: numbers.append(step.number)))
    assert numbers == list(range(7, STEPS + 1))


def test_a_second_interruption_acts_at_once(tmp_path: Path) -> None:
    """The step is not finished, and nothing of it is kept."""

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A process that was started in the background may ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            job(tmp_path, callback=at(6, twice))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "finetune.safetensors").exists()


def test_a_handler_that_goes_on_is_asked_again(tmp_path: Path) -> None:
    """A handler of the user's may only take a note; the job then runs to its end, and each signal is passed on."""
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        job(
            tmp_path,
            callback=lambda step: signal.raise_signal(signal.SIGTERM) if step.number in (3, 9) else None,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM] * 2


def test_other_threads_have_no_handlers(tmp_path: Path) -> None:
    """Python lets the main thread alone handle signals; a job in another one is kept all the same."""
    found: list[Job] = []
    thread = threading.Thread(target=lambda: found.append(job(tmp_path)))
    thread.start()
    thread.join()
    same(job(None), found[0])


def changed_weight() -> Net:
    model = net()
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] += 1
    return model


class OtherNet(Net):
    """Another class."""


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "settings": ({"config": replace(SETTINGS["all"], weight_bits=3)}, "weight_bits is at its default there, 3 here"),
    "finetune": (
        {"config": QFTConfig(finetune=replace(TUNED, seed=1))},
        "settings: finetune.seed is at its default there, 1 here",
    ),
    "images": ({"batches": BATCHES[::-1]}, "images: 0 differs. A loader that shuffles"),
    "fewer images": ({"batches": BATCHES[:-1]}, "images: count is 160 there, 144 here"),
    "weights": ({"model": changed_weight()}, "weights: second.weight differs"),
    "class": ({"model": OtherNet().eval()}, "model: class is Net there, OtherNet here"),
    "host": ({"preset": "performance"}, "host: preset is mixed there, performance here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_job_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Whatever makes the job another one, and the files stay as they are."""
    job(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    settings, words = OTHERS[name]
    with pytest.raises(ConfigError, match=r"should be of the same job\. Found another one") as caught:
        job(tmp_path, **settings)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_version_is_refused(tmp_path: Path) -> None:
    """Another torch may add numbers in another order."""
    job(tmp_path)
    file = tmp_path / "job.json"
    identity = json.loads(file.read_text())
    identity["versions"]["torch"] = "2.0.0"
    file.write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match=r"versions: torch is 2\.0\.0 there"):
        job(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Whoever deletes it loses that part alone."""
    whole = job(tmp_path)
    file = tmp_path / "finetune.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"finetune\.safetensors should be a file of this checkpoint.*Delete it"):
        job(tmp_path)
    file.unlink()
    same(whole, job(tmp_path))


def test_a_file_of_another_job_is_refused(tmp_path: Path) -> None:
    """It may have been copied there."""
    job(tmp_path / "one")
    job(tmp_path / "other", replace(SETTINGS["all"], weight_bits=3))
    (tmp_path / "one" / "finetune.safetensors").replace(tmp_path / "other" / "finetune.safetensors")
    with pytest.raises(ConfigError, match=r"Found another job's"):
        job(tmp_path / "other", replace(SETTINGS["all"], weight_bits=3))


@contextlib.contextmanager
def another_process_in(folder: Path) -> Iterator[None]:
    """Let another process use the folder."""
    code = (
        "import sys; from pathlib import Path; from qft_plugin.files import used_alone\n"
        "with used_alone(Path(sys.argv[1])) as alone: print(alone, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        try:
            yield
        finally:
            other.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused while the first one runs, and not after that was killed."""
    with another_process_in(tmp_path), pytest.raises(ConfigError, match="another process uses it"):
        job(tmp_path)
    job(tmp_path)


def test_a_folder_that_cannot_be_used_is_refused_before_the_images_are_read(tmp_path: Path) -> None:
    """A file in its place, another program's `job.json`, what is no path, and several processes."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="should be a folder that can be written to"), kept_in(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="should be the path of a folder"), kept_in(3):  # type: ignore[arg-type]
        pass
    several = pytest.raises(ConfigError, match="should be None where several processes train")
    with several, kept_in(tmp_path, processes=2):
        pass
    (tmp_path / "job.json").write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="Found something else"):
        job(tmp_path)
    assert (tmp_path / "job.json").read_text() == '{"mine": 1}'


@pytest.mark.usefixtures("always")
def test_a_full_disk_costs_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on and says so; what was kept before stays, and no draft."""
    import safetensors.torch

    write, count = safetensors.torch.save_file, [0]

    def full(*args: Any) -> None:
        count[0] += 1
        if count[0] > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(match=r"finetune\.safetensors should be written.*No space left.*The job goes on"):
        found = job(tmp_path)
    monkeypatch.undo()
    same(job(None), found)
    assert {p.name for p in tmp_path.iterdir()} == {"compensation.safetensors", "finetune.safetensors", "job.json"}
    same(found, job(tmp_path))


def test_safetensors_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(HostError, match="safetensors should be installed"), kept_in(tmp_path):
        pass


@pytest.mark.usefixtures("always")
def test_each_job_towards_a_target_is_kept(tmp_path: Path) -> None:
    """An agreement that takes several jobs: interrupted in the second, the first is not trained again."""
    steps: list[int] = []

    def stopped(step: Step) -> None:
        steps.append(step.number)
        if len(steps) == STEPS + 5:
            raise CrashError

    def towards(folder: Path | None, callback: Callback | None) -> Job:
        scores = iter([1.0, 0.0, *[1.0] * 9])  # the float network, the first job, all others
        config = replace(SETTINGS["all"], evaluate=lambda _: next(scores), max_drop=0.5)
        with kept_in(folder) as keeper:
            return run_to_target(AskedHost(net(), BATCHES), config, callback=callback, keeper=keeper)

    whole = towards(None, None)
    with pytest.raises(CrashError):
        towards(tmp_path, stopped)
    later: list[int] = []
    same(whole, towards(tmp_path, lambda step: later.append(step.number)))
    assert later[0] == 5
    assert {p.name for p in tmp_path.iterdir()} >= {"job_1", "job_2"}


def test_little_time_goes_into_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes two seconds to write is kept each hundred seconds, and nothing more often than each minute."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    written: list[float] = []

    def slow(*args: Any) -> None:
        written.append(now[0])
        now[0] += args[0]["seconds"].item()

    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, draft, _: (draft.touch(), slow(tensors)))
    with kept_in(tmp_path) as keeper:
        for _ in range(1000):
            keeper.tick("part", lambda: checkpoint.Saved({}, {"seconds": torch.tensor(2.0)}))
            now[0] += 1.0
    assert written[0] == pytest.approx(60, abs=1)
    apart = {b - a for a, b in itertools.pairwise(written)}
    assert all(102 <= seconds <= 103 for seconds in apart)
    assert [p.name for p in tmp_path.iterdir()] == ["part.safetensors"]
