"""EfQAT: train only the most important part of the weights (arXiv 2411.11038), and keep the integers of the rest."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qft_plugin.config import EfQAT
from qft_plugin.training.dof import Dof, LayerDof
from qft_plugin.training.held import Held, held_part, settled
from qft_plugin.training.solve import integers_of, scales_of

ROUNDING_SLACK: Final = 1e-9
"""A share of a number of weights may be a whole number in decimals and miss it by its last bit."""


def choose(magnitudes: Mapping[str, Tensor], sizes: Mapping[str, int], train: EfQAT) -> dict[str, Tensor]:
    """Choose the output channels that train.

    cwpl takes the most important channels of each layer, cwpn those of the whole network, lwpn the layers with the
    largest mean. Of equally important ones the first wins.

    Args:
        magnitudes: importance of each output channel by name of the weight, `[out]`.
        sizes: number of weights of each kernel.
        train: mode and ratio.

    Returns:
        A boolean tensor by name of the weight, `[out]`, true where the channel trains.
    """
    if not train.ratio or not magnitudes:
        return {name: torch.zeros_like(m, dtype=torch.bool) for name, m in magnitudes.items()}
    if train.mode == "cwpl":
        return {name: _largest(m, max(1, round(train.ratio * len(m)))) for name, m in magnitudes.items()}
    names = list(magnitudes)
    if train.mode == "lwpn":
        means = torch.stack([magnitudes[name].mean() for name in names])
        chosen = _within(means, torch.tensor([sizes[name] for name in names]), train.ratio)
        return {
            name: torch.full_like(magnitudes[name], float(found), dtype=torch.bool)
            for name, found in zip(names, chosen.tolist(), strict=True)
        }
    counts = [len(magnitudes[name]) for name in names]
    per_channel = torch.cat([torch.full((n,), sizes[name] // n) for name, n in zip(names, counts, strict=True)])
    chosen = _within(torch.cat([magnitudes[name] for name in names]), per_channel, train.ratio)
    return dict(zip(names, torch.split_with_sizes(chosen, counts), strict=True))


def _largest(importance: Tensor, count: int) -> Tensor:
    first = importance.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(importance, dtype=torch.bool).index_fill_(0, first, True)


def _within(importance: Tensor, sizes: Tensor, ratio: float) -> Tensor:
    """Choose the most important entries until no more fit into a share of all weights, at least one."""
    order = importance.argsort(descending=True, stable=True)
    held = sizes.to(order.device)[order].cumsum(0)
    count = int((held <= ratio * float(held[-1]) * (1 + ROUNDING_SLACK)).sum())
    return _largest(importance, max(1, count))


def _kernels(dof: Dof) -> list[LayerDof]:
    return [layer for layer in dof.quantized() if layer.layer.is_kernel]


@torch.no_grad()
def magnitudes(dof: Dof) -> dict[str, Tensor]:
    """Return the mean magnitude of each output channel of the quantized kernels by name, `[out]`, folded units."""
    scales = scales_of(dof)
    return {
        kernel.layer.weight: kernel.layer.axes.out_slices(W).abs().mean(1)
        for kernel in _kernels(dof)
        for step in [kernel.step(scales.weights[kernel.layer.weight])]
        for W in [kernel.folded_weight(kernel.channels(scales.factors), step)]
    }


def sizes(dof: Dof) -> dict[str, int]:
    """Return the number of weights of the quantized kernels by name."""
    return {kernel.layer.weight: kernel.W.numel() for kernel in _kernels(dof)}


def held_kernels(dof: Dof) -> dict[str, Held]:
    """Return the kernels of which a part trains, by name of the weight."""
    return {kernel.layer.weight: kernel.held for kernel in _kernels(dof) if kernel.held is not None}


@torch.no_grad()
def hold(dof: Dof, trained: Mapping[str, Tensor]) -> None:
    """Fix the integers of all channels but those that train; nothing that is solved changes.

    Args:
        dof: the degrees of freedom.
        trained: by name of the weight, `[out]`.
    """
    scales = scales_of(dof)
    for name, mask in trained.items():
        kernel = dof.trained_weight(name)
        kernel.held = held_part(kernel.W, integers_of(kernel, scales), mask, kernel.layer.axes)


@torch.no_grad()
def settle(dof: Dof) -> None:
    """Write the rows that train, and float weights that round to the integers of the rest, into the weights.

    The weights are then the whole state: `release` changes no solved and no deployed tensor.
    """
    scales = scales_of(dof)
    for name, held in held_kernels(dof).items():
        kernel = dof.trained_weight(name)
        step = kernel.step(scales.weights[name])
        units = kernel.units(kernel.channels(scales.factors), step)
        kernel.W.copy_(settled(held, kernel.W, units, step, kernel.layer.axes))


def release(dof: Dof) -> None:
    """Let all weights train again, from their stored values."""
    for layer in dof.quantized():
        layer.held = None


class PartialTraining:
    """Chooses the channels that train, at the start and again each time so many images have been fed."""

    def __init__(self, dof: Dof, train: EfQAT) -> None:
        """Choose for the first time."""
        self._dof, self._train, self._choices = dof, train, 0
        self._choose()

    def _choose(self) -> None:
        hold(self._dof, choose(magnitudes(self._dof), sizes(self._dof), self._train))

    @property
    def choices(self) -> int:
        """How often the channels were chosen anew."""
        return self._choices

    def held(self) -> dict[str, Held]:
        """Return the kernels of which a part trains, by name of the weight."""
        return held_kernels(self._dof)

    @torch.no_grad()
    def take(self, parts: Mapping[str, Mapping[str, Tensor]], choices: int) -> None:
        """Hold the kernels as an earlier run of the same job did.

        Args:
            parts: the tensors `integers`, `trained` and `rows` of each `Held`, by name of the weight.
            choices: how often that run had chosen anew.
        """
        self._choices = choices
        for name, part in parts.items():
            kernel = self._dof.trained_weight(name)
            W = kernel.W
            integers = torch.empty_like(W).copy_(part["integers"])
            kernel.held = held_part(W, integers, part["trained"].to(W.device), kernel.layer.axes)
            kernel.held.rows.copy_(part["rows"])

    def settle(self) -> None:
        """Write everything back into the stored weights, so that they are the whole state."""
        settle(self._dof)

    def refresh(self, images: int, optimizer: torch.optim.Optimizer) -> None:
        """Choose anew where it is time for it.

        Args:
            images: how many have been fed.
            optimizer: the rows that train are in its first group.
        """
        due = images // self._train.refresh_images
        if due <= self._choices:
            return
        self._choices = due
        settle(self._dof)
        before = held_kernels(self._dof)
        self._choose()
        exchange(optimizer, before, held_kernels(self._dof))


def exchange(optimizer: torch.optim.Optimizer, before: Mapping[str, Held], after: Mapping[str, Held]) -> None:
    """Give an Adam the rows that train now; those that trained before keep their moments.

    Args:
        optimizer: the rows are in its first group.
        before: the kernels as they were held, by name of the weight.
        after: as they are held now.
    """
    group = optimizer.param_groups[0]
    old = {id(held.rows) for held in before.values()}
    group["params"] = [p for p in group["params"] if id(p) not in old]
    for name, held in after.items():
        state = optimizer.state.pop(before[name].rows, None)
        if len(held.index):
            group["params"].append(held.rows)
            if state:
                optimizer.state[held.rows] = carried(state, before[name], held)


def carried(state: Mapping[str, Any], before: Held, after: Held) -> dict[str, Any]:
    """Return Adam's state of a kernel's rows after another choice.

    Adam divides by second moments as if all had seen as many gradients as it has counted steps. With 0 a new row would
    move by lr * (1 - beta1) / sqrt(1 - beta2) a step, three times too far. It starts from the mean of the rows that
    stay, or where none does of those that leave.

    Args:
        state: of the rows before.
        before: the kernel as it was held.
        after: as it is held now.
    """
    stays = before.trained[after.index]
    places = torch.searchsorted(before.index, after.index[stays])
    second = state["exp_avg_sq"]
    known = second[places] if len(places) else second
    # In the memory format of the rows: the fused Adam walks through memory.
    first, seconds = torch.zeros_like(after.rows), torch.empty_like(after.rows)
    first[stays] = state["exp_avg"][places]
    seconds.copy_(known.mean(0, keepdim=True))
    seconds[stays] = second[places]
    return {**state, "exp_avg": first, "exp_avg_sq": seconds}
