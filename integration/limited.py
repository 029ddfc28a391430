"""What a program does where the system has no room for it; run as a program, it prints what it found.

python integration/limited.py HOST FOLDER
"""

import contextlib
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import torch
from conftest import few_steps, four_bits
from hosts import HOSTS
from untouched import untouched

NOBODY = 65534


@contextlib.contextmanager
def limit(kind: int, size: int) -> Iterator[None]:
    """Let the system refuse more than so many bytes."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def error_of(run: Callable[[], Any]) -> list[str]:
    """Return the kind of an error and what it says."""
    try:
        run()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def contents(folder: Path) -> dict[str, int]:
    """Return the files of a folder and what is in them."""
    return {path.name: hash(path.read_bytes()) for path in sorted(folder.iterdir())}


def main(name: str, folder: Path) -> dict[str, Any]:
    """Do with a host what fits, and what does not."""
    torch.manual_seed(0)
    host, model, items = HOSTS[name](), nets.build("residual"), nets.items("residual")
    many = [torch.randn(16, 3, 96, 96) for _ in range(4)] * 16
    config = four_bits(finetune=few_steps(images_fed=32))
    found: dict[str, Any] = {"two networks": two_saves(host, folder / "two")}
    _, quantized = host.finetuned(model, items, config)  # all that is imported late is there now
    (folder / "before").mkdir()
    host.save(quantized, folder / "before", items[0][:2])
    before = contents(folder / "before")
    with limit(resource.RLIMIT_FSIZE, 2000):  # what a full disk does, by another number
        found["full disk"] = error_of(lambda: host.save(quantized, folder / "before", items[0][:2]))
    found["kept"] = contents(folder / "before") == before
    with untouched(model):
        with limit(resource.RLIMIT_FSIZE, 2000):
            small = four_bits(finetune=few_steps(memory_limit=1000))
            found["full temporary folder"] = error_of(lambda: host.run(model, items, small, callback=None))
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        with limit(resource.RLIMIT_DATA, pages * resource.getpagesize() + 50 * 2**20):
            found["no memory"] = error_of(lambda: host.run(model, many, config, callback=None))
    found["read-only folder"] = ended(begun(lambda: as_reader(host.save, quantized, folder / "before", items[0][:2])))
    found["kept"] &= contents(folder / "before") == before

    def integers() -> dict[str, Any]:
        result = host.integers(host.quantize(model, items, config), items[0])
        return {weight: W.tolist() for weight, W in result.items()}

    found["fork"] = ended(begun(integers)) == integers()
    return found


def limited_images() -> Any:
    """Return the images that two networks are compared on."""
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def two_saves(host: Any, folder: Path) -> list[Any]:
    """Let two processes save a network each to one path, as nearly at once as can be; returns what these compute.

    The first thing of all: after a fork, OpenVINO has threads that are gone.
    """
    folder.mkdir()
    items = nets.items("residual")
    networks = [host.finetuned(nets.build("residual"), items, four_bits(finetune=None))[1] for _ in range(2)]
    saving = [begun(lambda n=network: host.save(n, folder, items[0][:2]).proof.weights) for network in networks]
    assert [ended(each) for each in saving] == [5, 5]
    return [host.outputs(network, limited_images())[0].tolist() for network in networks]


def begun(run: Callable[[], Any]) -> tuple[int, int]:
    """Run something in a forked process; returns its number, and where it writes what it found."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(run()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    return pid, reading


def ended(begun: tuple[int, int]) -> Any:
    """Wait for a forked process, and return what it found."""
    pid, reading = begun
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(said or "null")


def as_reader(save: Callable[..., Any], model: Any, folder: Path, item: Any) -> list[str]:
    """Save into a folder that this process, which gives up its rights, may only read."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(NOBODY)
    return error_of(lambda: save(model, folder, item))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
