"""Take a whole job apart: CPU seconds and peak memory of each phase, and what that is in forward passes.

    python benchmarks/job.py --net resnet18 --size 64 --images 512
    python benchmarks/job.py --real DIR --net mobilenetv2 --images 512 [--host brevitas] [--save]
    python benchmarks/job.py --net vgg11_head --images 1000

One forward pass is that of the float network over all images of the job, in batches of 64 and in the faster of both
memory layouts, measured in the same process before the job. The last line is one JSON object. `before_training` is all
that ends before the first step: in CPU seconds, and in forward passes. Memory is the largest resident set of a phase
in MB, beside what the process held before the job (Linux tells it; elsewhere it is left out).
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import real_networks
import torch
from torch import Tensor, nn

from qft_plugin import FinetuneConfig, QFTConfig
from qft_plugin.report import display
from qft_plugin.report.progress import Running

BATCH = 64
TRAINING = "finetune"
BETWEEN = "between phases"


def resident_mb(name: str) -> float | None:
    """Return a line of the kernel's account of this process, `VmRSS` or `VmHWM`, in MB; `None` where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def forget_peak() -> None:
    """Let the kernel count the largest resident set anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


class Account:
    """Notes CPU seconds and the peak of memory of each phase; a display of `Progress`."""

    def __init__(self) -> None:
        """Start now."""
        self.phases: dict[str, dict[str, float]] = {}
        self.before_training = 0.0
        self._base = resident_mb("VmRSS")
        self._last = time.process_time()
        forget_peak()

    def note(self, name: str) -> None:
        """Count what was done since the last note under a name."""
        now = time.process_time()
        entry = self.phases.setdefault(name, {"cpu_s": 0.0})
        entry["cpu_s"] += now - self._last
        peak = resident_mb("VmHWM")
        if peak is not None and self._base is not None:
            entry["peak_mb"] = max(entry.get("peak_mb", 0.0), peak - self._base)
        self._last = now
        forget_peak()

    def begin(self, phase: Running, /) -> None:
        """Count what came since the last phase."""
        self.note(BETWEEN)
        if phase.name == TRAINING:
            self.before_training = sum(entry["cpu_s"] for entry in self.phases.values())

    def advance(self, _phase: Running, /) -> None:
        """Do nothing: only whole phases are counted."""

    def end(self, phase: Running, _seconds: float, /, *, failed: bool) -> None:  # noqa: ARG002  (a Display's)
        """Count the phase."""
        self.note(phase.name)

    def say(self, text: str, /) -> None:
        """Show lines that stay."""
        print(text, file=sys.stderr)


class VggHead(nn.Module):
    """The first Linear of VGG-11 as a network: 25,088 inputs."""

    def __init__(self, outputs: int = 4096, classes: int = 10) -> None:
        """Build it.

        Args:
            outputs: of the wide layer.
            classes: of the one after it.
        """
        super().__init__()
        self.fc = nn.Linear(512 * 7 * 7, outputs)
        self.relu = nn.ReLU()
        self.out = nn.Linear(outputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify features, `[images, 25088]`."""
        return self.out(self.relu(self.fc(x)))


def wide(images: int) -> tuple[nn.Module, Tensor]:
    """Build the wide layer with random weights, and features as a ReLU leaves them, correlated by 64 causes."""
    torch.manual_seed(0)
    net = VggHead().eval()
    causes, noise = torch.randn(images, 64), torch.randn(images, 512 * 7 * 7)
    return net, torch.relu(causes @ torch.randn(64, 512 * 7 * 7) / 8 + noise)


def load(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return the network and its images."""
    if args.net == "vgg11_head":
        return wide(args.images)
    if args.real is not None:
        real = real_networks.load(args.real, args.net, args.images)
        return real.net, real.calibration.tensor()
    net, _ = architectures.build(args.net, 1)
    return net, torch.randn(args.images, 3, args.size, args.size)


@torch.no_grad()
def forward_seconds(net: nn.Module, images: Tensor) -> float:
    """Return the CPU seconds of one pass over the images in the faster of both memory layouts."""
    parts = images.split(BATCH)
    layouts = [torch.contiguous_format, *([torch.channels_last] if images.dim() == 4 else [])]
    found = []
    for layout in layouts:
        net.to(memory_format=layout)
        laid_out = [part.contiguous(memory_format=layout) for part in parts]
        net(laid_out[0])
        times = []
        for _ in range(2):
            start = time.process_time()
            for part in laid_out:
                net(part)
            times.append(time.process_time() - start)
        found.append(min(times))
    net.to(memory_format=torch.contiguous_format)
    return min(found)


def batches(images: Tensor) -> Iterator[Tensor]:
    """Cut images into batches."""
    yield from images.split(BATCH)


def run(args: argparse.Namespace, net: nn.Module, images: Tensor, config: QFTConfig, example: Tensor) -> None:
    """Run the job, and save its result where that is asked for."""
    data: Any = list(batches(images))
    if args.host == "brevitas":
        from qft_plugin.brevitas import quantize

        quantize(net, data, config=config)
        return
    import nncf

    from qft_plugin.nncf import save_openvino

    model = nncf.quantize(net, nncf.Dataset(data), algorithm=config)
    if args.save:
        with tempfile.TemporaryDirectory() as folder:
            save_openvino(model, Path(folder) / "model.xml", example)


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="folder of real networks")
    parser.add_argument("--host", choices=["nncf", "brevitas"], default="nncf")
    names = ", ".join(architectures.ARCHITECTURES)
    parser.add_argument("--net", default="resnet18", help=f"{names}, vgg11_head, or the name of a real network")
    parser.add_argument("--size", type=int, default=64, help="height and width of random images")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--fed", type=int, default=0, help="images that the finetune sees; 0 for one step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="save and prove the IR too (NNCF)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, images = load(args)
    with torch.no_grad():
        forward = forward_seconds(net, images)
    finetune = FinetuneConfig()
    fed = args.fed or finetune.batch_size
    config = QFTConfig(finetune=FinetuneConfig(images_fed=fed))
    # The libraries of the host are loaded before anything is measured.
    __import__("nncf.torch" if args.host == "nncf" else "qft_plugin.brevitas")
    if args.host == "nncf":
        __import__("openvino")
    account = Account()
    display.Plain, display._live = (lambda: account), (lambda: None)  # the hosts show phases on a display of their own
    run(args, net, images, config, images[:1])
    account.note(BETWEEN)
    phases = account.phases
    for name, entry in phases.items():
        entry["forwards"] = round(entry["cpu_s"] / forward, 2)
        entry["cpu_s"] = round(entry["cpu_s"], 2)
        if "peak_mb" in entry:
            entry["peak_mb"] = round(entry["peak_mb"])
        print(f"{name:28} {entry['cpu_s']:9.2f} s {entry['forwards']:8.2f}  {entry.get('peak_mb', 0):6.0f} MB")
    line = {
        "net": args.net,
        "images": args.images,
        "size": list(images.shape[1:]),
        "host": args.host,
        "threads": args.threads,
        "jemalloc": "jemalloc" in os.environ.get("LD_PRELOAD", ""),
        "forward_s": round(forward, 3),
        "before_training": {
            "cpu_s": round(account.before_training, 2),
            "forwards": round(account.before_training / forward, 1),
        },
        "phases": phases,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
