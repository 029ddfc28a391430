"""Which product of a file is which layer of torch: the one that computes the same numbers."""

import numpy as np
import torch
from torch import Tensor

from qft_plugin.deploy.channels import CLOSE, EQUAL, NEAR, channel_fit, listed, sampled
from qft_plugin.deploy.file_view import File, FileProduct, Stretches
from qft_plugin.deploy.findings import Findings, Missing
from qft_plugin.deploy.watched import Product


def compare_product(file: File, computed: Stretches, p: Product, findings: Findings) -> None:
    """Find the product of the file that computes what a layer computes, and compare integers and scales.

    Args:
        file: the file.
        computed: its stretches.
        p: the call of the layer.
        findings: gets the result.
    """
    expected = p.result.detach().float().cpu()
    integers = p.integers.flatten().to(torch.int64).cpu().numpy()
    candidates = [
        k
        for k, result in enumerate(computed.products)
        if result.numel() == expected.numel() and file.products[k].integers.size == integers.size
    ]
    if not bool(expected.any()):
        # Any product of zeros fits: one that has the same constants, if any.
        same = [k for k in candidates if _weight_problem(file.products[k], p, integers) is None]
        same = [k for k in same if k not in findings.products and not bool(computed.products[k].any())]
        if same:
            findings.products[same[0]] = p.weight
            findings.weights.add(p.weight)
        else:
            findings.silent.add(p.weight)
        return
    sample = sampled(expected)

    def fit_of(k: int, part: tuple[slice, ...] = ()) -> tuple[Tensor, Tensor]:
        return channel_fit(expected[part], computed.products[k].reshape(expected.shape)[part], p.axis)

    # Most are of another layer, and a few values tell.
    candidates = [k for k in candidates if fit_of(k, sample)[1].median() < NEAR] or candidates
    fits = {k: fit_of(k) for k in candidates}
    problems = {k: _weight_problem(file.products[k], p, integers) for k in candidates}

    def order(k: int) -> tuple[int, bool, float, bool]:
        # What reads the same in all places fits several products: the one with the same integers, if any.
        residual = fits[k][1]
        return int((residual > CLOSE).sum()), problems[k] is not None, float(residual.max()), k in findings.products

    number = min(candidates, key=order, default=None)
    loud = expected.movedim(p.axis, 0).flatten(1).any(1)  # zeros fit any product
    if number is None or float((fits[number][1] > CLOSE)[loud].double().mean()) > 0.5:
        problem = f"Layer {p.weight}: should be in the file as a product with its integers. Found none."
        findings.absent[p.number] = Missing(expected, problem, len(findings.problems))
        return
    difference = problems[number]
    findings.weights.add(p.weight)
    if difference is None:
        findings.products[number] = p.weight
    else:
        findings.products.setdefault(number, p.weight)
        problem = f"Weight {p.weight}: {difference}, in {file.products[number].name} of the file."
        findings.wrong[p.number] = Missing(expected, problem, len(findings.problems))


def _weight_problem(product: FileProduct, p: Product, integers: np.ndarray) -> str | None:
    """Say how two quantized weights differ, `None` where they are equal.

    An exporter may merge a factor of each channel into the scales, such as that of a BatchNorm; that it does so in
    every channel tells it from a scale that is wrong. What the factor is, the stretch has proved.
    """
    rows = _rows(p).numpy()
    wrong = (product.integers != integers)[rows].any(1)
    if wrong.any():
        return (
            f"its integers should be in the file. Found {int((product.integers != integers).sum())} of {integers.size} "
            f"that differ, in channels {listed(wrong.nonzero()[0].tolist())}"
        )
    values, expected = product.values[rows], p.W_fq.detach().double().flatten().cpu().numpy()[rows]
    largest = np.abs(values).argmax(1)[:, np.newaxis]
    its, mine = (np.take_along_axis(t, largest, 1)[:, 0] for t in (values, expected))
    known = its != 0
    ratios = np.divide(mine, its, out=np.ones_like(mine), where=known)
    # Of a channel that is multiplied by 0 no scale is left; the stretch has proved that it is 0.
    inside = known & (np.abs(expected - ratios[:, np.newaxis] * values).max(1) > EQUAL * np.abs(expected).max(1))
    if inside.any():
        return (
            f"its scales should be the model's. Found other ones inside channels {listed(inside.nonzero()[0].tolist())}"
        )
    off = (np.abs(ratios - 1) > EQUAL).nonzero()[0]
    if len(off) and 2 * len(off) < known.sum():
        return (
            f"its scale should be the model's. Found that it differs in channels {listed(off.tolist())}, by up to "
            f"{np.abs(ratios - 1).max():.2g}"
        )
    return None


def _rows(p: Product) -> Tensor:
    """Return the places of each output channel in the flat weight, `[out, per channel]`."""
    places = torch.arange(p.integers.numel()).reshape(p.integers.shape)
    if p.out_axis == 0:
        return places.flatten(1)
    groups = p.result.shape[p.axis] // places.shape[1]
    return (
        places.reshape(groups, places.shape[0] // groups, places.shape[1], -1).transpose(1, 2).flatten(0, 1).flatten(1)
    )
