"""What it costs to keep a job in a folder, and whether a real network that is killed goes on to the same tensors.

python benchmarks/checkpoint.py --real DIR --net resnet20 --host nncf [--kills 4] [--images-fed N]
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qft_plugin import FinetuneConfig, QFTConfig


def job(args: argparse.Namespace, folder: Path | None, told: Any) -> None:
    """Quantize in a process of its own; tells the CPU seconds and digests of all tensors."""
    import real_networks

    from qft_plugin.job.checkpoint import Checkpoint, digests

    torch.set_num_threads(1)
    real = real_networks.load(args.real, args.net, args.images)
    batches = [part.tensor() for part in real.calibration[: args.images].split(64)]
    config = QFTConfig(finetune=FinetuneConfig(images_fed=args.images_fed))
    writing = [0.0, 0.0]
    save = Checkpoint.save

    def timed(self: Checkpoint, *parts: Any) -> None:
        began = time.process_time()
        save(self, *parts)
        writing[0] += 1
        writing[1] += time.process_time() - began

    Checkpoint.save = timed  # type: ignore[method-assign]
    began = time.process_time()
    if args.host == "nncf":
        import nncf

        import qft_plugin.nncf as host

        model = host.quantize(real.net, nncf.Dataset(batches), config, verbose=False, checkpoint=folder).model
    else:
        from qft_plugin import brevitas

        model = brevitas.quantize(real.net, batches, config=config, verbose=False, checkpoint=folder)
    told.send((time.process_time() - began, writing, digests(model)))


def run(args: argparse.Namespace, folder: Path | None, kill_after: float | None = None) -> Any:
    """Run a job in another process; `None` where it was killed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=job, args=(args, folder, there))
    process.start()
    there.close()
    if kill_after is not None and not here.poll(kill_after):
        process.kill()
        process.join()
        return None
    result = here.recv()
    process.join()
    return result


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real networks")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--host", choices=["brevitas", "nncf"], default="nncf")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig().images_fed)
    parser.add_argument("--kills", type=int, default=4)
    args = parser.parse_args()
    began = time.monotonic()
    plain, _, expected = run(args, None)
    whole = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        kept, writing, found = run(args, Path(folder) / "kept")
        size = sum(p.stat().st_size for p in (Path(folder) / "kept").iterdir())
        assert found == expected
        moments = random.Random(0)
        kills = []
        for number in range(args.kills):
            path, after = Path(folder) / f"killed_{number}", moments.uniform(0.1, 0.9) * whole
            killed = run(args, path, after) is None
            seconds, _, found = run(args, path)
            kills.append(
                {
                    "after_seconds": round(after, 1),
                    "killed": killed,
                    "cpu_seconds_to_go_on": round(seconds, 1),
                    "same_tensors": found == expected,
                    "files": len(list(path.iterdir())),
                }
            )
    print(
        json.dumps(
            {
                "net": args.net,
                "host": args.host,
                "cpu_seconds": round(plain, 1),
                "ratio_when_kept": round(kept / plain, 3),
                "writes": int(writing[0]),
                "cpu_seconds_a_write": round(writing[1] / writing[0], 3),
                "megabytes": round(size / 1e6, 2),
                "seconds": round(whole, 1),
                "kills": kills,
            }
        )
    )


if __name__ == "__main__":
    main()
