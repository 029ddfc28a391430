"""`qft quantize`: from a network and images to a file."""

from collections.abc import Iterable
from typing import Any

import torch

from qft_plugin.cli.hosts import Order, described, quantized, saved
from qft_plugin.cli.sources import model_of
from qft_plugin.files import write_whole
from qft_plugin.report.display import shown
from qft_plugin.report.kept import report_of
from qft_plugin.report.progress import phase


def quantize_to_file(order: Order, name: str, batches: Iterable[Any], first: Any, *, quiet: bool) -> str:
    """Quantize a network and write what was asked for.

    Args:
        order: what is asked for.
        name: of the network.
        batches: of its inputs.
        first: the first of them.
        quiet: show no progress.

    Returns:
        What to say about the file; the job has said itself what it reached.
    """
    with shown(not quiet), phase("loading the network"):
        model, call = model_of(name, first)
    torch.manual_seed(0 if order.config.finetune is None else order.config.finetune.seed)
    made = quantized(order, model, batches, quiet=quiet)
    example: Any = call[1] or (call[0][0] if len(call[0]) == 1 else call[0])
    report = saved(order, made, example, quiet=quiet)
    if order.page is not None or order.data is not None:
        of_job = report_of(made)
        if order.data is not None:
            write_whole(order.data, of_job.to_json() + "\n")
        if order.page is not None:
            of_job.save_html(order.page, file=report)  # which shows what is in the file, too
    return described(report)
