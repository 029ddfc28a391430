"""Random networks, without any host: the map allows only what folds, and folding changes no integer."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from draws import examples, nets, note_seed
from graphs import FOLD_TOLERANCE
from hypothesis import assume, given
from hypothesis import strategies as st
from random_nets import Net
from torch import Tensor, nn

from qft_plugin.graph.batch_norms import merge_norms
from qft_plugin.graph.channel_affine import free_channels
from qft_plugin.graph.channel_clip import free_bounds
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold, fold_network, names_of
from qft_plugin.graph.layer_graph import DofMap, Layer
from qft_plugin.graph.record import record
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.training.dof import Dof, WeightGrid
from qft_plugin.training.integers import deployed_weights
from qft_plugin.training.solve import scales_of, weight_scales

TIE = 1e-9
"""Distance from a tie, in steps, below which float64 may round either way."""


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [t.clone() for t in tensors_in(model(x))]


def largest_change(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest change of a value, relative to the largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).abs().max() / e.abs().max().clamp(min=1e-30)) for f, e in pairs)


def prepared(net: Net) -> tuple[nn.Module, Tensor, DofMap]:
    """Return a network as a job makes it ready, in float64, with images and its map; its function must not change."""
    note_seed()
    model, x = net.build().double(), net.images(2).double()
    expected = outputs_of(model, x)
    merge_norms(model, model, record(model, ((x,), {})))
    free_bounds(model, ((x,), {}))
    free_channels(model, ((x,), {}), norms=True)
    assert largest_change(outputs_of(model, x), expected) < FOLD_TOLERANCE
    dof_map = map_dof(record(model, ((x,), {})))
    assume(dof_map.size > 0)
    return model, x, dof_map


def tensors_of(model: nn.Module, dof_map: DofMap) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: named[name].detach() for name in names_of(dof_map.layers)}


@examples(70)
@given(net=nets(unused=True), seed=st.integers(0, 99))
def test_factors_fold_into_random_networks(net: Net, seed: int) -> None:
    """What is prepared and what is folded computes what the network computes, whatever its structure is."""
    model, x, dof_map = prepared(net)
    log_c = torch.randn(dof_map.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = outputs_of(model, x)
    folded = fold_network(dof_map, log_c, tensors_of(model, dof_map))
    with torch.no_grad():
        found = list(tensors_in(torch.func.functional_call(model, folded, (x,))))
    assert largest_change(found, expected) < FOLD_TOLERANCE


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def powers_of_two(count: int, generator: torch.Generator) -> Tensor:
    """Return factors whose products and quotients with any number are exact."""
    return torch.randint(-3, 4, (count,), generator=generator).double().exp2()


def typical(layer: Layer, W: Tensor) -> Tensor:
    """Return a step for each output channel, `[out]`, by which the largest weights are clipped."""
    return 0.3 * layer.axes.out_slices(W).square().mean(1).sqrt()


def nearest_power(x: Tensor) -> Tensor:
    return x.clamp(min=2.0**-20).log2().round().exp2()


class Steps:
    """Eq. (2) of one kernel, with random scales that are powers of two.

    Attributes:
        unfolded: the step of each weight, of the shape of the weight: S_wR * S_wL.
        folded: the step that is left when the factors are in the weight, `[out]`.
        W: the weight with the factors in it.
    """

    def __init__(self, layer: Layer, W: Tensor, c: Tensor, generator: torch.Generator) -> None:
        c_in, c_out, axes = c[layer.in_index], c[layer.out_index], layer.axes
        self.W = fold(W, c_in, c_out, axes=axes)
        self.s_in, s_out = powers_of_two(2, generator)
        F = nearest_power(typical(layer, self.W)) * self.s_in / s_out
        kernel = torch.zeros(len(F), dtype=torch.long)
        self.folded = weight_scales(self.s_in[None], s_out[None], F, kernel=kernel)
        S_wL, S_wR = 1 / (self.s_in * c_in), s_out * c_out * F
        self.unfolded = axes.per_out(S_wR, W) * axes.per_in(S_wL, W)


def integers(W: Tensor, step: Tensor) -> Tensor:
    return (W / step).round().clamp(-7, 7)


@contextmanager
def quantized_inputs(model: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Fake-quantize to 8 signed bits what modules read, with a scale `[]` or `[channels]` by name of the module."""

    def hook(scale: Tensor) -> object:
        def quantize(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            S_a = scale.view(-1, *(1,) * (args[0].dim() - 2)) if scale.dim() else scale
            return ((args[0] / S_a).round().clamp(-128, 127) * S_a,)

        return quantize

    with ExitStack() as stack:
        for name, scale in scales.items():
            handle = model.get_submodule(name).register_forward_pre_hook(hook(scale))
            stack.callback(handle.remove)
        yield


def quantized_outputs(model: nn.Module, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor], x: Tensor) -> list:
    with torch.no_grad(), quantized_inputs(model, scales):
        return list(tensors_in(torch.func.functional_call(model, dict(tensors), (x,))))


@examples(70)
@given(net=nets(unused=True), seed=st.integers(0, 99))
def test_folding_changes_no_integer(net: Net, seed: int) -> None:
    """With factors in the weights all integers, of weights and activations, are those of the scales per channel.

    Factors, steps and rescale factors are powers of two: float64 multiplies by them exactly, and all is equal to the
    last bit.
    """
    model, x, dof_map = prepared(net)
    generator = generator_of(seed)
    c = torch.cat([torch.ones(1, dtype=torch.float64), powers_of_two(dof_map.size, generator)])
    before = tensors_of(model, dof_map)
    unfolded, folded = dict(before), {}
    S_a: dict[str, Tensor] = {}
    s_a: dict[str, Tensor] = {}
    for layer in dof_map.layers:
        W, c_in, c_out = before[layer.weight], c[layer.in_index], c[layer.out_index]
        folded[layer.weight] = fold(W, c_in, c_out, axes=layer.axes)
        if layer.bias is not None:
            folded[layer.bias] = before[layer.bias] / c_out
        if not layer.is_kernel:
            continue
        steps = Steps(layer, W, c, generator)
        step = layer.axes.on_weight(steps.folded, None, W)
        expected = integers(W, steps.unfolded)
        assert torch.equal(integers(steps.W, step), expected)
        unfolded[layer.weight], folded[layer.weight] = expected * steps.unfolded, expected * step
        module = layer.weight.removesuffix(".weight")
        s_a[module], S_a[module] = steps.s_in / 32, steps.s_in / 32 * c_in
    expected_outputs = quantized_outputs(model, unfolded, S_a, x)
    for found, expected in zip(quantized_outputs(model, folded, s_a, x), expected_outputs, strict=True):
        assert torch.equal(found, expected)


@examples(70)
@given(net=nets(unused=True), seed=st.integers(0, 99))
def test_solved_integers_are_those_of_the_unfolded_network(net: Net, seed: int) -> None:
    """Whatever the degrees of freedom are, what is written after folding are the integers of Eq. (2), but for ties."""
    model, _, dof_map = prepared(net)
    generator, before = generator_of(seed), tensors_of(model, dof_map)
    kernels = [layer for layer in dof_map.layers if layer.is_kernel]
    grids = {}
    for layer in kernels:
        spread = typical(layer, before[layer.weight]).clamp(min=1e-3)
        grids[layer.weight] = WeightGrid(4, spread, None, None)
    dof = Dof(dof_map, before, grids, {})
    with torch.no_grad():
        dof.log_c.copy_(0.5 * torch.randn(dof_map.size, generator=generator, dtype=torch.float64))
    scales, found = scales_of(dof), deployed_weights(dof)
    for layer in kernels:
        W, c = before[layer.weight], scales.factors.detach()
        S_wL, S_wR = 1 / c[layer.in_index], found[layer.weight].step * c[layer.out_index]
        exact = W / (layer.axes.per_out(S_wR, W) * layer.axes.per_in(S_wL, W))
        differ = found[layer.weight].integers != exact.round().clamp(-7, 7)
        distance = (exact - exact.floor() - 0.5).abs()
        assert not (differ & (distance > TIE)).any()
