"""A user's program: it quantizes a network under a host and saves it. `torchrun` runs it in several processes.

torchrun --nproc-per-node=2 integration/quantize_and_save.py HOST FOLDER all|half
"""

import logging
import os
import sys
from pathlib import Path

import nets
import torch
from conftest import few_steps, four_bits
from hosts import host_of

from qft_plugin import EfQAT

STEPS = 24


TRAIN = {"all": None, "half": EfQAT(ratio=0.5, refresh_images=256)}


def quantized(host, folder, train):
    """Quantize a network on more images than every process keeps, save it, and return what came of it."""
    torch.manual_seed(0)
    model, items = nets.build("residual"), nets.items("residual", batches=40, size=10)
    finetune = few_steps(images_fed=STEPS * 32, batch_size=32, restarts=2, cross_entropy=0.2, train=TRAIN[train])
    config = four_bits(compensate=False, finetune=finetune)  # so that there is something to learn
    result, student = host_of(host).finetuned(model, items, config)
    outputs = host_of(host).outputs(student, items[0])
    integers = host_of(host).integers(student, items[0])
    return {
        "losses": result.losses,
        "ends": (result.start_loss, result.final_loss),
        "integers": integers,
        "outputs": outputs,
        "files": [(str(report.path), report.weights) for report in saved(host, student, items[0], folder)],
        "state": {name: t for name, t in student.state_dict().items() if isinstance(t, torch.Tensor)},
    }


def saved(host, student, item, folder):
    """Save a network in every format of its host."""
    if host == "nncf":
        from qft_plugin.nncf import save_openvino

        return [save_openvino(student, folder / "net.xml", item)]
    from qft_plugin.brevitas import fold, save_qcdq, save_qonnx

    folded = fold(student)
    return [save_qonnx(folded, folder / "qonnx.onnx", item), save_qcdq(folded, folder / "qcdq.onnx", item)]


def save_alone(host, folder):
    """Quantize a network whose images do not fit into memory, and save it; for a program that watches."""
    torch.manual_seed(0)
    model, items = nets.build("residual"), nets.items("residual")
    _, student = host_of(host).finetuned(model, items, four_bits(finetune=few_steps(images_fed=32, memory_limit=0)))
    saved(host, student, items[0], Path(folder))


def main(host, folder, train):
    """Do it, and note every file that this process puts into its place."""
    placed, replace = [], os.replace

    def noted(source, target):
        placed.append(Path(target).name)
        replace(source, target)

    os.replace = noted
    logging.basicConfig(level=logging.INFO)
    found = quantized(host, folder, train)
    assert not torch.distributed.is_initialized()
    torch.save({**found, "placed": placed}, folder / f"rank{os.environ.get('RANK', 'alone')}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
