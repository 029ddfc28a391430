"""The first part of a proof: the stretches of a file between its quantizers, with random integers in their place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.channels import CLOSE, QUIET, channel_axis, channel_errors
from qft_plugin.deploy.file_view import File, FileQuantizer
from qft_plugin.deploy.findings import Findings, Place
from qft_plugin.deploy.products import compare_product
from qft_plugin.deploy.quantizers import find_quantizer, in_torch
from qft_plugin.deploy.watched import Product, Run, Seen, Watched, positional
from qft_plugin.graph.torch_model import Call

SPARSE: Final = 0.1
"""Share of values that are not zero where few are: channels that only ever see large sums show themselves."""

Values = Literal["dense", "sparse", "extreme", "own"]


def compare_stretches(
    watched: Watched, file: File, call: Call, kind: Values, known: Sequence[Place | None] = ()
) -> Findings:
    """Compare what file and torch compute between quantizers.

    Args:
        watched: the torch model.
        file: the file.
        call: the arguments of a call.
        kind: what stands in the place of each quantizer: integers of the whole grid, mostly zeros, the ends of the grid
            in whole channels, so that bounds such as that of a ReLU6 are reached, or what the file's own quantizers
            give.
        known: for each call of an activation quantizer of torch which one of the file's it was with other values.
    """
    findings, inputs = Findings(), positional(call)
    values = _values(file, file.run(inputs).quantized, kind)
    computed = file.stretches(inputs, values)

    def activation(seen: Seen) -> Tensor | None:
        before = known[seen.number] if seen.number < len(known) else None
        place = find_quantizer(file, computed, seen, findings, known=before)
        findings.places.append(place)
        return None if place is None else in_torch(file, place, values[place[0]], seen)

    def product(p: Product) -> None:
        compare_product(file, computed, p, findings)

    run = watched.run(call, activation=activation, product=product)
    findings.path = run.path
    _compare_outputs(run, computed.outputs, findings)
    for name, integers in run.weights.items():
        flat = integers.flatten().to(torch.int64).cpu().numpy()
        if name not in findings.weights and any(np.array_equal(flat, c) for c in file.constants):
            findings.weights.add(name)
    return findings


def _values(file: File, ran: Sequence[Tensor | None], kind: Values) -> list[Tensor]:
    """Choose what stands in the place of each quantizer.

    Those that may not be told apart get equal values, so that each may be taken for the other: equal quantizers of one
    tensor, and those of dead parts of a network, which read equal zeros.
    """
    values: list[Tensor] = []
    for number, (quantizer, own) in enumerate(zip(file.quantizers, ran, strict=True)):
        assert own is not None
        twin = next((k for k in range(number) if _alike(file.quantizers, ran, k, number)), None)
        if twin is not None or kind == "own":
            values.append(own if twin is None else values[twin])
            continue
        generator = torch.Generator().manual_seed(number)
        low, high = torch.from_numpy(quantizer.low), torch.from_numpy(quantizer.high)
        step = (high - low) / (quantizer.levels - 1)
        steps = torch.randint(quantizer.levels, tuple(own.shape), generator=generator)
        if kind == "extreme":
            axis = channel_axis(own)
            shape = [size if k in (0, axis) else 1 for k, size in enumerate(own.shape)]
            ends = (quantizer.levels - 1) * torch.randint(2, shape, generator=generator).expand(own.shape)
            # Some others among them: a normalisation of a constant would divide by next to nothing.
            steps = torch.where(torch.rand(tuple(own.shape), generator=generator) < SPARSE, steps, ends)
        x = low + step * steps
        if kind == "sparse":
            x = torch.where(torch.rand(tuple(own.shape), generator=generator) < SPARSE, x, torch.zeros_like(x))
        values.append(x.to(torch.float32))
    return values


def _alike(quantizers: Sequence[FileQuantizer], ran: Sequence[Tensor | None], first: int, second: int) -> bool:
    """Whether two quantizers are equal, or have equal grids and made the same."""
    q, made, other = quantizers[first], ran[first], ran[second]
    if q.equals(quantizers[second]):
        return True
    equal = replace(q, source="").equals(replace(quantizers[second], source=""))
    return equal and made is not None and other is not None and torch.equal(made, other)


def _compare_outputs(run: Run, found: Sequence[Tensor], findings: Findings) -> None:
    if len(run.outputs) != len(found):
        findings.tell(f"The file should have {len(run.outputs)} outputs. Found {len(found)}.")
        return
    for number, (e, f, layer) in enumerate(zip(run.outputs, found, run.layers, strict=True)):
        e = e.detach().cpu()
        place = f"Output {number}" + (f", after layer {layer}" if layer else "")
        if e.numel() != f.numel():
            findings.tell(f"{place}: should have shape {list(e.shape)}. Found {list(f.shape)}.")
            continue
        f = f.reshape(e.shape)
        if not e.is_floating_point():
            share = float((e.to(torch.int64) != f.to(torch.int64)).double().mean()) if e.numel() else 0.0
            error = 0.0 if share <= QUIET else share
        else:
            error = float(channel_errors(e.double(), f.double()).max()) if e.numel() else 0.0
        if error <= CLOSE:
            findings.error = max(findings.error, error)
        else:
            findings.tell(
                f"{place}: should be the model's, from what the last quantizers give. Found a difference of "
                f"{error:.2g} of the largest value."
            )
