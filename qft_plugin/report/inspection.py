"""What a dry run found: plain data, with a table, JSON and a page made of it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qft_plugin.files import write_whole
from qft_plugin.report.inspection_page import Rows, page
from qft_plugin.report.page.write import page_path
from qft_plugin.report.record import Layer


@dataclass(frozen=True, kw_only=True)
class PlannedLayer(Layer):
    """One layer as a job would quantize it: what a report says of it, and more.

    Attributes:
        granularity: of the weight's scale, `"per tensor"`, `"per channel"`, `"doubly per channel"`; empty in float.
        not_int8: why it is not expected to run in int8 in the file; empty where it is.
    """

    granularity: str
    not_int8: str


@dataclass(frozen=True, kw_only=True)
class PlannedActivation:
    """One activation that is quantized, or that a layer reads in floating point.

    Attributes:
        name: of the tensor, the host's own; of its quantizer where that is a module.
        made_by: the function that makes it, or what the quantizer reads; `"input"` for an input of the network.
        bits: of its integers; `None` where it stays in floating point.
        channels: how many scales it could have.
        free: in how many of them the scale may be chosen, by a factor that the layers around it share.
        pinned_by: why it may not in the others; empty where all are free.
        layers: weights of the layers that read its values.
    """

    name: str
    made_by: str
    bits: int | None
    channels: int
    free: int
    pinned_by: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job would take in seconds, on this machine as busy as it is now.

    Attributes:
        images: how many images the job would read.
        images_known: whether the dataset has a length; else `images` is the most that would be read.
        images_seen: how many the dry run has looked at.
        steps: of the finetune; 0 without one.
        teacher_batch_images: images of a batch of the teacher; 0 without a finetune.
        teacher_batch_seconds: measured, of one such batch.
        step_seconds: measured, of one step.
        start_seconds: reading and start but for compensation: measured on the images seen, and what is left added.
        compensation_seconds: a simple model, see docs/inspect.md; 0 where it is off.
        teacher_seconds: of the teacher over all images.
        finetune_seconds: of all steps, and of the looks at the images that are held out.
    """

    images: int
    images_known: bool
    images_seen: int
    steps: int
    teacher_batch_images: int
    teacher_batch_seconds: float
    step_seconds: float
    start_seconds: float
    compensation_seconds: float
    teacher_seconds: float
    finetune_seconds: float

    @property
    def total_seconds(self) -> float:
        """Of the whole job."""
        return self.start_seconds + self.compensation_seconds + self.teacher_seconds + self.finetune_seconds


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a job would hold beside the model and what the process holds already, bytes.

    Attributes:
        images: all images.
        teacher: the teacher's outputs for them.
        step: what one step keeps for its gradients, with gradients, optimizer and the best state.
        compensation: activations that compensation holds at once; 0 where it is off.
        images_on_disk: whether the images go into memory-mapped files (`FinetuneConfig.memory_limit`).
        teacher_on_disk: likewise the teacher's outputs.
    """

    images: int
    teacher: int
    step: int
    compensation: int
    images_on_disk: bool
    teacher_on_disk: bool

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        held = 0 if self.images_on_disk else self.images
        kept = 0 if self.teacher_on_disk else self.teacher
        return held + kept + max(self.step, self.compensation)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `quantize` would decide, and what it would cost.

    Attributes:
        host: `"nncf"` or `"brevitas"`.
        model: class of the user's model.
        compared_at: names of the activations that the loss compares.
        layers: those that the report of the job will list.
        activations: those that are quantized or that such a layer reads, in the order of execution.
        degrees: how many numbers train, by kind.
        float_bytes: of the parameters of the user's model.
        file_bytes: expected, of the file that the host saves (OpenVINO IR, QCDQ).
        cost: in seconds.
        memory: in bytes.
        warnings: what reading, understanding and start warn of, and what they log as a warning, in order.
        refusals: what a save would refuse, as far as it is known before.
    """

    host: str
    model: str
    compared_at: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    activations: tuple[PlannedActivation, ...]
    degrees: Mapping[str, int]
    float_bytes: int
    file_bytes: int
    cost: Cost
    memory: Memory
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]

    @property
    def int8_layers(self) -> tuple[PlannedLayer, ...]:
        """The layers that are expected to run in int8 in the file; the report of a save says which do."""
        return tuple(layer for layer in self.layers if not layer.not_int8)

    def to_json(self) -> str:
        """Write everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page that needs no other file, no network and no script; it is written whole or not at all.

        Args:
            path: of the file, `*.html`; one that is there is replaced.

        Returns:
            The path of the file.

        Raises:
            ConfigError: the path cannot be written.
        """
        target = page_path(path)
        write_whole(target, page(self.model, headline(self), lists=lists(self), tables=tables(self)))
        return target

    def __str__(self) -> str:
        """Write everything as plain tables."""
        parts = [headline(self), *(f"{title}\n{_table(rows)}" for title, rows in tables(self))]
        for title, lines in lists(self):
            parts.append("\n".join([title, *(f"- {line}" for line in lines)]))
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        """Say the most important of it in one line."""
        return (
            f"<Inspection of {self.model} under {self.host}: {len(self.int8_layers)} of {len(self.layers)} layers "
            f"expected in int8, about {duration(self.cost.total_seconds)}, {size(self.file_bytes)}, "
            f"{len(self.warnings)} warnings>"
        )


def headline(found: Inspection) -> str:
    """Say in a sentence what would come out."""
    return (
        f"{found.model} under {found.host}: {len(found.int8_layers)} of {len(found.layers)} layers expected in int8, "
        f"{size(found.float_bytes)} of floats to a file of about {size(found.file_bytes)}, in about "
        f"{duration(found.cost.total_seconds)}."
    )


def tables(found: Inspection) -> list[tuple[str, Rows]]:
    """Return the tables, each with its title; the first row of a table is its head."""
    layers = [("layer", "kind", "shape", "weight", "input", "scales", "int8", "why")]
    layers += [
        (
            la.name or la.weight,
            la.kind,
            "x".join(map(str, la.shape)),
            _bits(la.bits),
            _bits(la.activation_bits),
            la.granularity,
            "no" if la.not_int8 else "expected",
            "; ".join(dict.fromkeys(why for why in (la.reason, la.not_int8) if why)),
        )
        for la in found.layers
    ]
    edges = [("activation", "made by", "bits", "channels", "free", "pinned by", "read by")]
    edges += [
        (e.name, e.made_by, _bits(e.bits), str(e.channels), str(e.free), e.pinned_by, ", ".join(e.layers))
        for e in found.activations
    ]
    degrees = [("what trains", "numbers"), *((kind, f"{count:,}") for kind, count in found.degrees.items())]
    return [
        ("Layers", layers),
        ("Activations", edges),
        ("Degrees of freedom", degrees),
        ("Time, about", _times(found.cost)),
        ("Memory, about, beside what the process holds now", _memory(found.memory)),
    ]


def lists(found: Inspection) -> list[tuple[str, tuple[str, ...]]]:
    """Return what is listed below the tables, each with its title."""
    return [
        (title, lines)
        for title, lines in (("Warnings", found.warnings), ("Refused at the save", found.refusals))
        if lines
    ]


def _times(cost: Cost) -> Rows:
    images = f"{cost.images:,} images" if cost.images_known else f"at most {cost.images:,} images"
    rows = [("part", "seconds", "of what"), ("reading and start", f"{cost.start_seconds:.2g}", images)]
    if cost.compensation_seconds:
        rows.append(("compensation", f"{cost.compensation_seconds:.2g}", "a simple model, right within a factor of 3"))
    if cost.steps:
        batch = f"{1e3 * cost.teacher_batch_seconds:.3g} ms for a batch of {cost.teacher_batch_images}"
        rows.append(("teacher", f"{cost.teacher_seconds:.2g}", batch))
        steps = f"{cost.steps:,} steps of {1e3 * cost.step_seconds:.3g} ms"
        rows.append(("finetune", f"{cost.finetune_seconds:.2g}", steps))
    return [*rows, ("all", f"{cost.total_seconds:.2g}", duration(cost.total_seconds))]


def _memory(memory: Memory) -> Rows:
    def place(on_disk: bool) -> str:
        return "in a file on disk" if on_disk else "in memory"

    return [
        ("part", "size", "where"),
        ("images", size(memory.images), place(memory.images_on_disk)),
        ("teacher's outputs", size(memory.teacher), place(memory.teacher_on_disk)),
        ("one step", size(memory.step), place(False)),
        ("compensation", size(memory.compensation), "in memory, before the first step"),
        ("at the peak", size(memory.peak), place(False)),
    ]


def _table(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def size(count: int) -> str:
    """Write a number of bytes with a unit."""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Write a time with a unit that fits."""
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.2g} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"
