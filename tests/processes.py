"""What several processes do in the tests of `distributed`; run as a program, one of them.

python tests/processes.py RANK SIZE FOLDER
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from qft_plugin.config import FinetuneConfig, QFTConfig
from qft_plugin.errors import ModelError, QFTError, QFTWarning
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.understand import images
from qft_plugin.training.data import Inputs, read_inputs
from qft_plugin.training.distributed import agreed, joined, once, world_of
from qft_plugin.training.finetune import FinetuneResult, Goal, finetune
from qft_plugin.training.loss import Loss, Prediction
from qft_plugin.training.phases import Options, Phase
from qft_plugin.training.teacher import teacher_predictions

CPU = torch.device("cpu")


class Layers(nn.Module):
    """A network with a hidden activation and logits, and a layer that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)
        self.loose = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def __call__(self, call: Call) -> Any:
        hidden = self.first(call[0][0]).relu() + self.loose
        logits = self.second(hidden)
        return Prediction((hidden, logits), logits)


def items(count: int = 70) -> list[Tensor]:
    """Return images of one size in batches of several, the same in every process."""
    images = torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(images.split(9))


def read(batches: Any) -> Inputs:
    """Read images as one of the processes that there are."""
    like = torch.zeros(1, dtype=torch.float64)
    settings = FinetuneConfig(max_images=1000, memory_limit=2**20)
    return read_inputs(batches, accepts=lambda *_: True, like=like, settings=settings, world=world_of(CPU))


def trained(
    *, callback: Any = None, factor: float = 1.0, count: int = 70, make: type[Layers] = Layers, **changes: Any
) -> dict[str, Any]:
    """Train in three phases, the second of which trains nothing that counts, with a mask and all parts of the loss."""
    torch.manual_seed(0)
    teacher, student = Layers().double(), make().double()
    inputs = read(items(count))
    targets = teacher_predictions(teacher, inputs.share, batch_size=16, memory_limit=2**20)
    loss = Loss((1.0, 2.0), 0.3)
    rate = 0.02 * factor
    first = [{"params": list(student.first.parameters()), "lr": rate}]
    loose = {"params": [student.loose], "lr": rate}
    both = [{"params": list(student.parameters()), "lr": rate}, {"params": [], "lr": rate}, loose]
    mask = torch.arange(20).view(4, 5) % 3 > 0
    unused = [{"params": list(student.unused.parameters()), "lr": rate}]
    alone = Loss((1.0, 0.0), 0.0)
    phases = [Phase(alone, first, [(student.first.weight, mask)]), Phase(alone, unused), Phase(loss, both)]
    config = FinetuneConfig(
        **{"images_fed": 640, "batch_size": 16, "restarts": 2, "rounding_weight": 0.01, "seed": 5, **changes}
    )
    result = finetune(
        student,
        student,
        phases,
        goal=Goal(inputs, targets, loss),
        config=config,
        options=Options(callback=callback, penalty=lambda: student.second.weight.square().sum()),
    )
    return told(result) | {k: v.detach() for k, v in (*student.state_dict().items(), ("loose", student.loose))}


def told(result: FinetuneResult) -> dict[str, Any]:
    """Return the numbers of a result."""
    agreements = torch.tensor([math.nan if a is None else a for a in (result.start_agreement, result.agreement)])
    losses = torch.tensor(result.losses)
    return {"start": result.start_loss, "final": result.final_loss, "losses": losses, "agreements": agreements}


def exploding() -> dict[str, Any]:
    """Train at an absurd rate: the losses become infinite or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QFTWarning)
        return trained(factor=float("inf"))


def left_alone() -> None:
    """Let the second process end in the middle of a finetune, where nothing is agreed."""

    class Ending(Layers):
        def __call__(self, call: Call) -> Any:
            if torch.is_grad_enabled() and world_of(CPU).rank == 1:
                os._exit(3)
            return super().__call__(call)

    trained(make=Ending)


def stopped() -> None:
    """Let the callback of one process end the finetune of all."""

    def stop(step: Any) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    trained(callback=stop if world_of(CPU).rank == 1 else None)


def prepared(batches: Any = None, *, seed: int = 0, batch_size: int = 16, model_seed: int = 0) -> None:
    """Read images the way every host does."""
    torch.manual_seed(model_seed)
    config = QFTConfig(finetune=FinetuneConfig(batch_size=batch_size, seed=seed))
    images(nn.Linear(5, 3).double(), items() if batches is None else batches, config)


def wrong_item() -> None:
    """Read a dataset with a NaN that only the second process has."""
    batches = items()
    if world_of(CPU).rank == 1:
        batches[2][0, 0] = float("nan")
    prepared(batches)


def other_error() -> None:
    """Fail in a way that is not the library's in the first process only."""
    with agreed(world_of(CPU)):
        if world_of(CPU).rank == 0:
            raise IndexError("nothing there")


def other_order() -> None:
    """Read the same images in another order in the second process."""
    prepared(items() if world_of(CPU).rank == 0 else items()[::-1])


def fewer_images() -> None:
    """Read fewer images in the second process, as with a sampler."""
    prepared(items()[: 5 - world_of(CPU).rank])


def other_settings() -> None:
    """Ask for another order of the images in the second process."""
    prepared(seed=world_of(CPU).rank)


def other_model() -> None:
    """Start from another model in the second process."""
    prepared(model_seed=world_of(CPU).rank)


def uneven() -> None:
    """Ask for batches that cannot be divided."""
    prepared(batch_size=15)


@once
def _write(folder: Path, *, fails: bool = False) -> Path:
    if fails:
        raise ModelError("it cannot be written")
    (folder / f"written by {world_of(CPU).rank}").touch()
    return folder / "file"


def few_images() -> dict[str, Any]:
    """Train on fewer images than a batch has."""
    return trained(count=14, images_fed=140)


TRAINED: dict[str, Callable[[], dict[str, Any]]] = {
    "trained": trained,
    "one phase of features": lambda: trained(batch_size=48, restarts=1),
    "few images": few_images,
    "exploding": exploding,
}
"""What ends with numbers."""

FAILING: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (stopped, wrong_item, other_error, other_order, fewer_images, other_settings, other_model, uneven)
}
"""What ends with an error in every process."""


def failure(run: Callable[[], Any]) -> tuple[str, str]:
    """Run something that fails and return the class of the error and what it says."""
    try:
        run()
    except (QFTError, IndexError, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)
    return "", ""


def shared() -> dict[str, Tensor]:
    """Start from other weights in each process, and share those of the first one."""
    torch.manual_seed(world_of(CPU).rank)
    layer = nn.BatchNorm1d(3).double()
    for tensor in layer.state_dict().values():
        tensor.copy_(torch.randint(1, 2**31, tensor.shape))
    layer.register_buffer("turned", torch.randn(4, 3).T, persistent=True)  # not in the order of its memory
    world_of(CPU).share_state(layer)
    return dict(layer.state_dict())


def told_by(folder: Path) -> Iterator[tuple[str, Any]]:
    """Do everything, and say how it ended."""
    with joined(nn.Linear(1, 1)) as world:
        assert world.size == 2
        for name, train in TRAINED.items():
            yield name, train()
        for name, fail in FAILING.items():
            yield name, failure(fail)
        yield "shared", shared()
        yield "written", str(_write(folder))
        yield "not written", failure(lambda: _write(folder, fails=True))
        logging.getLogger("qft_plugin").warning("said by all")
        warnings.warn("warned of by all", QFTWarning, stacklevel=1)


if __name__ == "__main__":
    rank, size, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=size)
    torch.save(dict(told_by(place)), place / f"{rank}.pt")
    try:
        left_alone()
    except RuntimeError:
        (place / "noticed").touch()
        # Threads of the broken group may still run, and an ordinary end can abort because of them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
