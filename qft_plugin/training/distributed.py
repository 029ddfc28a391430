"""Several processes that train together: who they are, what they agree on, and who writes files.

Every process runs the same program, reads the whole dataset, and chooses the same starting point. From then on image i
belongs to process i % size: only that one keeps it, runs the teacher on it, and trains on it. `torchrun` starts the
processes, and torch's DistributedDataParallel averages their gradients.
"""

import contextlib
import functools
import itertools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from qft_plugin.errors import ConfigError, DataError, QFTError, QFTWarning

logger = logging.getLogger("qft_plugin")

P = ParamSpec("P")
T = TypeVar("T")

STARTED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that `torchrun` gives each of its processes."""

PATIENCE: Final = 10.0
"""Seconds after which a process says that it waits for others."""

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: which of them this one is, from 0.
        size: how many there are.
        device: of the model, on which tensors are exchanged.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and messages."""
        return self.rank == 0

    def rows(self, index: Tensor) -> Tensor:
        """Return where this process holds those of the images that are its own.

        Args:
            index: of images, `[n]`.
        """
        if self.size == 1:
            return index
        return index[index % self.size == self.rank] // self.size

    def row_range(self, start: int, stop: int) -> slice:
        """Return where this process holds those of a range of images that are its own."""
        first, end = ((i - self.rank + self.size - 1) // self.size for i in (start, stop))
        return slice(first, end)

    def total(self, values: Tensor) -> Tensor:
        """Add the values of all processes; every process gets the same bits."""
        if self.size == 1:
            return values
        summed = values.detach().clone()
        distributed.all_reduce(summed)
        return summed

    def total_of(self, value: float) -> float:
        """Add a number of all processes, in double precision."""
        if self.size == 1:
            return value
        return float(self.total(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def replicated(self, module: nn.Module) -> nn.Module:
        """Let the gradients of a module's parameters be the means over all processes, after each backward pass.

        The module should hold no buffers, which would be sent around in every step.
        """
        if self.size == 1:
            return module
        # The loss need not depend on everything that trains. Where torch looks for such parameters and finds
        # none, it warns.
        module.register_parameter("unused", nn.Parameter(torch.zeros((), device=self.device)))
        return DistributedDataParallel(module, find_unused_parameters=True)

    @torch.no_grad()
    def average_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Do the same for tensors that train and are no parameters of a module, such as a few rows of a weight.

        Args:
            tensors: those that train; parameters are left to `replicated`.
        """
        if self.size == 1:
            return
        gradients = [t.grad for t in tensors if not isinstance(t, nn.Parameter) and t.grad is not None]
        if gradients:
            means = self.total(torch.cat([g.flatten() for g in gradients])) / self.size
            parts = torch.split_with_sizes(means, [g.numel() for g in gradients])
            for gradient, mean in zip(gradients, parts, strict=True):
                gradient.copy_(mean.view(gradient.shape))

    @torch.no_grad()
    def share_state(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one, bit for bit."""
        if self.size == 1:
            return
        for tensor in module.state_dict().values():
            dense = tensor.contiguous()
            distributed.broadcast(dense, src=0)
            tensor.copy_(dense)


ALONE: Final = World()


def world_of(device: torch.device) -> World:
    """Return the processes of torch's default group, or this one alone where there is no group.

    Args:
        device: of the model.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    size = distributed.get_world_size()
    return World(distributed.get_rank(), size, device) if size > 1 else ALONE


@contextlib.contextmanager
def joined(model: Any = None) -> Iterator[World]:
    """Join the other processes while the block runs.

    Where torch's default group exists, it is used and left as it is. Where `torchrun` started this process and there is
    no group yet, one is made (nccl between GPUs, gloo otherwise) and removed at the end. Otherwise nothing happens.
    Messages and warnings of this library come from the first process only.

    Args:
        model: the one that trains; `None` where only objects are exchanged.

    Raises:
        ConfigError: the group that exists cannot exchange tensors on the model's device.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    device = next((p.device for p in parameters), CPU)
    made = _make_group(device)
    try:
        world = world_of(device)
        if world.size > 1 and isinstance(model, nn.Module):
            _check_backend(device)
        with contextlib.ExitStack() as stack:
            if world.size > 1 and device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if not world.is_first:
                stack.enter_context(_silence())
            yield world
    finally:
        if made:
            distributed.destroy_process_group()


def _make_group(device: torch.device) -> bool:
    """Make torch's default group where `torchrun` asks for one; returns whether it was made."""
    if not all(name in os.environ for name in STARTED) or int(os.environ["WORLD_SIZE"]) < 2:
        return False
    if not distributed.is_available() or distributed.is_initialized():
        return False
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
    with _said_when_waiting():
        store, rank, size = _meeting()
    # Each group gets keys of its own in the store: those of an earlier one would be taken for answers.
    prefix = f"qft_plugin/{next(_numbers)}"
    own = distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    with _said_when_waiting():
        distributed.init_process_group(backend, store=own, rank=rank, world_size=size)
    return True


@contextlib.contextmanager
def _said_when_waiting() -> Iterator[None]:
    """Say for whom this process waits, where the others do not come soon."""
    rank, size, host, port = (os.environ[name] for name in STARTED)
    timer = threading.Timer(
        PATIENCE,
        logger.warning,
        (
            "Process %s of %s waits for the others at %s:%s, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say. "
            "Start all of them with torchrun, or unset WORLD_SIZE to run alone.",
            rank,
            size,
            host,
            port,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@functools.cache
def _meeting() -> tuple[Any, int, int]:
    """Connect to where the processes find each other, once: another process may still use the store."""
    store, rank, size = next(iter(distributed.rendezvous("env://")))  # type: ignore[attr-defined]
    return store, rank, size


_numbers: Final = itertools.count()


def _check_backend(device: torch.device) -> None:
    backends = distributed.get_backend_config()
    if f"{device.type}:" not in backends:
        raise ConfigError(
            f"torch.distributed should be able to exchange tensors on the model's device {device}. Found the backends "
            f"{backends!r}. Call init_process_group('gloo') for CPUs or 'nccl' for GPUs, or leave it to this library."
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Leave warnings and messages of this library to the first process."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QFTWarning)
            yield
    finally:
        logger.removeFilter(is_error)


@contextlib.contextmanager
def agreed(world: World) -> Iterator[None]:
    """Let an error in one process be an error in all, at the end of a block in which they exchange nothing.

    Raises:
        QFTError: another process failed: of the class of its error where that is one of this library.
    """
    if world.size == 1:
        yield
        return
    error = None
    try:
        yield
    except BaseException as found:
        error = found
    # One number first: the block may be as short as a callback.
    if not world.total_of(error is not None):
        return
    failures: list[Any] = [None] * world.size
    distributed.all_gather_object(failures, None if error is None else _told(error))
    if error is not None:
        raise error
    rank, (kind, message) = next((r, f) for r, f in enumerate(failures) if f is not None)
    raise kind(f"Process {rank} of {world.size}: {message}")


def _told(error: BaseException) -> tuple[type[QFTError], str]:
    """Say in another process what happened, in an error that it can raise."""
    if isinstance(error, QFTError):
        return type(error), str(error)
    return QFTError, f"{type(error).__name__}: {error}"


def once(write: Callable[P, T]) -> Callable[P, T]:
    """Make of a function that writes files one that every process calls, and only the first one runs.

    All wait for the first one, and return what it returned; where it fails, all raise.
    """

    @functools.wraps(write)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with joined() as world:
            if world.size == 1:
                return write(*args, **kwargs)
            answer: list[Any] = [None]
            error = None
            if world.is_first:
                try:
                    answer = [(write(*args, **kwargs), None)]
                except BaseException as found:
                    error = found
                    answer = [(None, _told(found))]
            distributed.broadcast_object_list(answer, src=0)
            if error is not None:
                raise error
            result, failure = answer[0]
            if failure is not None:
                kind, message = failure
                raise kind(f"Process 0 of {world.size}: {message}")
            return result  # type: ignore[no-any-return]

    return run


def check_alike(world: World, *, marks: Sequence[float], settings: str, model: nn.Module) -> None:
    """Check that all processes do the same: what each reads and starts from is never exchanged.

    Args:
        world: the processes.
        marks: a number for each item of the dataset that another item would not have.
        settings: the settings, in words.
        model: the float model.

    Raises:
        DataError: the images are not the same, or not in the same order.
        ConfigError: the settings or the models differ.
    """
    if world.size == 1:
        return
    total = float(sum(p.detach().abs().sum(dtype=torch.float64) for p in model.parameters()))
    found: list[Any] = [None] * world.size
    distributed.all_gather_object(found, (list(marks), settings, total))
    (marks, settings, total), others = found[0], found[1:]
    for rank, (their_marks, their_settings, their_total) in enumerate(others, start=1):
        different = [i for i, pair in enumerate(zip(marks, their_marks, strict=False)) if not _close(*pair)]
        if different or len(marks) != len(their_marks):
            item = different[0] if different else min(len(marks), len(their_marks))
            raise DataError(
                f"Dataset: every process should read the same images in the same order. Found that item {item} of "
                f"process {rank} is not that of process 0. Shuffle with the same seed in all of them or not at all, "
                "and use no DistributedSampler: the images are divided here."
            )
        if settings != their_settings:
            raise ConfigError(
                f"QFTConfig should be the same in every process. Found {their_settings} in process {rank} and "
                f"{settings} in process 0."
            )
        if not _close(total, their_total):
            raise ConfigError(
                f"The model should be the same in every process. Found other weights in process {rank} than in "
                "process 0. Load them in all of them, or build the model with the same seed."
            )


def _close(one: float, other: float) -> bool:
    # Processors of different kinds may prepare images that differ in the last bits.
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)
