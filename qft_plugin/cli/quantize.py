"""`qft quantize`: from a network and images to a file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qft_plugin.cli.hosts import Format, Host, Storage, described, function_of, quantized, saved
from qft_plugin.cli.saying import write_whole
from qft_plugin.cli.sources import model_of
from qft_plugin.config import QFTConfig
from qft_plugin.report.display import shown
from qft_plugin.report.progress import phase


@dataclass(frozen=True)
class Order:
    """What a command asks for.

    Attributes:
        host: which host does it.
        form: of a file of Brevitas'.
        storage: of the weights of an IR.
        config: the settings.
        out: the file.
        page: where the report is written as a page; `None` for nowhere.
        data: likewise as JSON.
    """

    host: Host
    form: Format
    storage: Storage
    config: QFTConfig
    out: Path
    page: Path | None
    data: Path | None


def quantize_to_file(order: Order, name: str, batches: Iterable[Any], first: Any, *, quiet: bool) -> str:
    """Quantize a network and write what was asked for.

    Args:
        order: what is asked for.
        name: of the network.
        batches: of its inputs.
        first: the first of them.
        quiet: show no progress.

    Returns:
        What to say about it.
    """
    with shown(not quiet), phase("loading the network"):
        model, call = model_of(name, first)
    torch.manual_seed(0 if order.config.finetune is None else order.config.finetune.seed)
    made = quantized(order.host, model, batches, order.config, quiet=quiet)
    example: Any = call[1] or (call[0][0] if len(call[0]) == 1 else call[0])
    report = saved(order.host, made, order.out, example, form=order.form, storage=order.storage)
    if order.page is not None or order.data is not None:
        of_job = function_of(order.host, "report_of")(made)
        if order.data is not None:
            write_whole(order.data, of_job.to_json() + "\n")
        if order.page is not None:
            of_job.save_html(order.page, file=report)  # which shows what is in the file, too
    return described(order.host, made, report)
