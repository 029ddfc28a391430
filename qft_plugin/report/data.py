"""The report of a job: what it records, as JSON and as a page."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qft_plugin.report.page.saved import SavedFile
from qft_plugin.report.page.write import save_page
from qft_plugin.report.record import Layer, LayerErrors, LayerFigures, Node, Record
from qft_plugin.report.table import one_line, summary

__all__ = ["Layer", "LayerErrors", "LayerFigures", "Node", "Report"]


class Report(Record):
    """What a job did, and how good its result is; its attributes are those of `Record`."""

    def __str__(self) -> str:
        """Say what the job did and how good its result is, in about ten lines."""
        return summary(self)

    def __repr__(self) -> str:
        """Say the same in one short line."""
        return one_line(self)

    def to_json(self) -> str:
        """Write everything as JSON; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote."""
        data = json.loads(text)
        data["layers"] = tuple(_layer(layer) for layer in data["layers"])
        data["nodes"] = tuple(Node(**{**node, "inputs": tuple(node["inputs"])}) for node in data["nodes"])
        for name in ("compared_at", "losses", "warnings", "decisions"):
            data[name] = tuple(data[name])
        return cls(**data)

    def save_html(
        self,
        path: str | os.PathLike[str],
        *,
        file: SavedFile | Sequence[SavedFile] | None = None,
        latency: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the report as one HTML file, which opens offline; it is written whole or not at all.

        Args:
            path: of the file, `*.html`; one that is there is replaced.
            file: what `save_openvino`, `save_qcdq` or `save_qonnx` returned, or a list of these.
            latency: milliseconds for one image, by what was timed, `{"QFT 4-bit": 1.2, "float": 3.0}`;
                `deploy.latency.measure_latency` times a file.

        Returns:
            The path of the file.

        Raises:
            ConfigError: the path cannot be written, a file is something else, or a latency is no time.
            HostError: jinja2 is not installed.
        """
        return save_page(self, path, file=file, latency=latency)


def _layer(data: Mapping[str, Any]) -> Layer:
    errors, figures = data["errors"], data["figures"]
    return Layer(
        **{
            **data,
            "shape": tuple(data["shape"]),
            "errors": None if errors is None else LayerErrors(**errors),
            "figures": None if figures is None else LayerFigures(**{k: _tuples(v) for k, v in figures.items()}),
        }
    )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
