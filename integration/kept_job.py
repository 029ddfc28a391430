"""A job in a process of its own that is kept in a folder at each step, and says which of its phases begins."""

import importlib.util

import nets
import torch
from conftest import few_steps, four_bits
from hosts import HOSTS

from qft_plugin.job import checkpoint
from qft_plugin.report.progress import Progress

# The server that the processes are forked from has imported all this once.
MADE = {name: host() for name, host in HOSTS.items() if importlib.util.find_spec(name) is not None}


def run(name, folder, out, told):
    """Quantize a network and save it.

    Args:
        name: of the host.
        folder: where the job is kept.
        out: where the result is saved.
        told: takes the name of each phase, and at the end digests of all tensors of the model.
    """
    torch.set_num_threads(1)
    checkpoint.SECONDS, checkpoint.SHARE = 0.0, float("inf")
    original = Progress.phase

    def phase(self, phase_name, *, total=None):
        told.send(phase_name)
        return original(self, phase_name, total=total)

    Progress.phase = phase
    torch.manual_seed(0)
    model, items = nets.build("residual"), nets.items("residual")
    host, config = MADE[name], four_bits(finetune=few_steps(images_fed=480))
    quantized = host.kept(model, items, config, folder)
    host.save(quantized, out, items[0])
    told.send(checkpoint.digests(quantized))
