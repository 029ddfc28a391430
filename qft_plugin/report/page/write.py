"""The page: what is in it, and how it becomes a file."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qft_plugin.errors import ConfigError
from qft_plugin.files import write_whole
from qft_plugin.packages import missing
from qft_plugin.report.page import charts, numbers, table, words
from qft_plugin.report.page.layer_charts import charts_of
from qft_plugin.report.page.network import network
from qft_plugin.report.page.saved import SavedFile, described, saved_files
from qft_plugin.report.record import Record

FOLDER: Final = Path(__file__).parent


def save_page(
    report: Record,
    path: str | os.PathLike[str],
    *,
    file: SavedFile | Sequence[SavedFile] | None = None,
    latency: Mapping[str, float] | None = None,
) -> Path:
    """Write a report as one HTML file; it appears whole or not at all.

    Args:
        report: what is shown.
        path: of the file, `*.html`.
        file: the report of a saved file, or a list of them.
        latency: milliseconds for one image by what was timed.

    Raises:
        ConfigError: the path cannot be written, a file is something else, or a latency is no time.
        HostError: jinja2 is not installed.
    """
    target = page_path(path)
    write_whole(target, page(report, file=file, latency=latency))
    return target


def page_path(path: str | os.PathLike[str]) -> Path:
    """Check where a page is to be written, before any work.

    Raises:
        ConfigError: the folder does not exist, or the file has another suffix.
    """
    target = Path(path)
    if target.suffix != ".html" or not target.parent.is_dir():
        raise ConfigError(
            f"save_html: path should be a .html file in an existing folder. Found {os.fspath(path)!r}. "
            "Make the folder, or change the name."
        )
    return target


def page(
    report: Record,
    *,
    file: SavedFile | Sequence[SavedFile] | None = None,
    latency: Mapping[str, float] | None = None,
) -> str:
    """Make the page; see `save_page`."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise missing("For a page, jinja2", extra="report") from None

    for name, ms in (latency or {}).items():
        if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not 0 <= ms < math.inf:
            raise ConfigError(
                f"save_html: latency[{name!r}] should be milliseconds, at least 0. Found {ms!r}. "
                "Give what measure_latency returns as median_ms."
            )
    files = saved_files(file)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        number=numbers.number,
        percent=numbers.percent,
        count=numbers.count,
        size=numbers.size,
        duration=numbers.duration,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        **_content(report, files, latency or {}),
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(FOLDER / "report.js").read_text(encoding="utf-8"),
    )


def _content(report: Record, files: Sequence[SavedFile], latency: Mapping[str, float]) -> dict[str, Any]:
    worst = charts.worst_layers(report.layers)
    overview = [charts.granularities(report.layers), charts.scale_moves(report.layers)]
    return {
        "report": report,
        "grade": words.grade(report)[0],
        "verdict": words.verdict(report),
        "tiles": _tiles(report, files),
        "bits": words.bits_in_words(report),
        "loss": charts.loss_curve(report.losses, report.start_loss, report.final_loss),
        "phases": charts.phases(report.seconds),
        "lost": charts.where_accuracy_is_lost(report.layers),
        "measured": any(layer.errors is not None for layer in report.layers),
        "columns": table.COLUMNS,
        "measured_columns": table.MEASURED,
        "rows": [
            {
                "layer": layer,
                "number": n + 1,
                "bits": table.bits_of(layer),
                "worst": n in worst,
                "cells": table.cells(layer),
                "errors": table.error_cells(layer),
                "charts": charts_of(layer),
            }
            for n, layer in enumerate(report.layers)
        ],
        "overview": [figure for figure in overview if figure is not None],
        "integers": charts.all_integers(report.layers),
        "network": network(report.nodes, report.layers),
        "files": [described(saved, report.layers) for saved in files],
        "latency": charts.latencies(latency),
    }


def _tiles(report: Record, files: Sequence[SavedFile]) -> list[tuple[str, str, str]]:
    """List the headline numbers: a title, the number, and what is below it."""

    def change(before: float | None, after: float | None, words_of: Any) -> tuple[str, str]:
        return words_of(after), f"from {words_of(before)} at the start" if numbers.known(before) else ""

    tiles = [
        ("Agreement", *change(report.start_agreement, report.agreement, numbers.percent)),
        ("Loss", *change(report.start_loss, report.final_loss, numbers.number)),
    ]
    total = sum(layer.weights for layer in report.layers)
    ranked = words.bits_in_words(report)
    if ranked and total:
        name, _, weights = ranked[0]
        spread = ", ".join(f"{n} {numbers.TIMES} {bits}" for bits, n, _ in ranked)
        tiles.append((f"Weights in {name}", numbers.percent(weights / total), f"layers: {spread}"))
    if files:
        tiles.append(("File", numbers.size(files[0].bytes), f"float weights {numbers.size(4 * total)}"))
    spent = [s for s in report.seconds.values() if math.isfinite(s)]
    if spent:
        tiles.append(("Time", numbers.duration(sum(spent)), numbers.counted(len(report.losses), "step")))
    if report.peak_memory:
        tiles.append(("Peak memory", numbers.size(report.peak_memory), "of the whole process"))
    return tiles
