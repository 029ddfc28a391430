"""What a job works on: the images, the degrees of freedom of a network, and where it is compared."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qft_plugin.config import FinetuneConfig, QFTConfig
from qft_plugin.errors import ConfigError, warn
from qft_plugin.graph.comparison import Comparison, comparison
from qft_plugin.graph.copies import copy_of
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import DofMap, LayerGraph
from qft_plugin.graph.torch_model import (
    SAME,
    Call,
    Functional,
    accepts,
    largest_change,
    repeatable,
    tensors_in,
)
from qft_plugin.job.host import Problem, SourceT
from qft_plugin.training.blocks import check_blocks
from qft_plugin.training.data import Inputs, read_inputs
from qft_plugin.training.distributed import agreed, check_alike, world_of
from qft_plugin.training.order import strata_of

logger = logging.getLogger("qft_plugin")


def images(model: nn.Module, items: Iterable[Any], config: QFTConfig, *, head_items: int = 0) -> Inputs:
    """Read and check the user's images; several processes agree that they are the same for all.

    Args:
        model: a model that was checked.
        items: the dataset.
        config: the settings.
        head_items: how many of the first items every process keeps.
    """
    settings = config.finetune or FinetuneConfig()
    like = next(p for p in model.parameters() if p.is_floating_point())
    if settings.precision != "float32" and like.dtype != torch.float32:
        raise ConfigError(
            f'FinetuneConfig.precision should be "float32" for a model whose parameters are not in float32, which then '
            f"trains in its own precision. Found {settings.precision!r} with parameters in {like.dtype}."
        )
    world = world_of(like.device)
    with agreed(world):
        inputs = read_inputs(
            items,
            accepts=accepts(model),
            like=like,
            settings=settings,
            world=world,
            head_items=head_items,
        )
    if max(inputs.sizes) == 1 and len(inputs) > 1:
        with agreed(world):
            tried = copy_of(model).eval()  # a forward may change buffers
            if not _runs(tried, inputs.first()) and _runs(tried, inputs.first(1)):
                logger.info("the model takes a single image only: it is called for each by itself")
                inputs = inputs.one_by_one()
    check_alike(world, marks=inputs.marks, settings=repr(config), model=model)
    if config.finetune is not None:
        strata_of(min(settings.batch_size, inputs.trained_on), world.size)
    return inputs


@torch.no_grad()
def _runs(model: nn.Module, call: Call) -> bool:
    """Whether a model takes a batch, of which it may use the size."""
    args, kwargs = call
    try:
        model.forward(*args, **kwargs)  # a call of an fx module prints where it failed
    except Exception:  # a model may fail in any way on an input that it was not made for
        return False
    return True


def understand(source: SourceT, inputs: Inputs, config: QFTConfig) -> Problem[SourceT]:
    """Find where a network is compared with its teacher, and the fastest layout of its images.

    Args:
        source: the network as its host read it.
        inputs: the images.
        config: the settings.

    Raises:
        ConfigError: a setting does not fit the network.
    """
    settings = config.finetune or FinetuneConfig()
    part = settings.trains_part
    if source.kept and part is not None and part.ratio > 0:
        raise ConfigError(
            "FinetuneConfig.train should be None, or EfQAT(ratio=0), for a pruned model: which weights train is chosen "
            f"among all of a layer. Found a ratio of {part.ratio} and {len(source.kept)} pruned weights."
        )
    at = _comparable(comparison(source.graph, settings.loss_at, settings.blocks), source.dof_map)
    if settings.cross_entropy == 1:
        at = Comparison(at.inputs[: at.blocks], outputs=False, blocks=at.blocks)  # the logits are enough
    check_blocks(source.graph, source.dof_map, at, classes=settings.cross_entropy > 0)
    return Problem(source, _fastest_layout(source.model, source.graph, inputs), at)


@torch.no_grad()
def proven_map(model: nn.Module, graph: LayerGraph, tensors: Mapping[str, Tensor], call: Call) -> DofMap:
    """Map the degrees of freedom, and try the map before it is used.

    Random factors are folded into the float network and its outputs compared; where they change, every scale is
    pinned. The rules of the operations were written for functions as torch defines them; a model may still do
    something that a trace does not show, and a wrong map would be a wrong network.

    Args:
        model: the float network.
        graph: what it computes.
        tensors: its parameters and buffers by name.
        call: its arguments.
    """
    dof_map = map_dof(graph)
    if dof_map.size == 0:
        return dof_map
    generator = torch.Generator().manual_seed(0)
    log_c = 0.5 * torch.randn(dof_map.size, generator=generator)
    folded = fold_network(dof_map, log_c, {name: tensors[name] for name in names_of(dof_map.layers)})
    args, kwargs = call
    with repeatable():
        expected = list(tensors_in(model(*args, **kwargs)))
    with repeatable():
        found = list(tensors_in(Functional(model)(folded, args, kwargs)))
    if largest_change(expected, found) <= SAME:
        return dof_map
    warn(
        "The model computes something else when the scales of its channels change, so no cross-layer factor is "
        "used. This costs accuracy, but the result is valid. Please report the model.",
        stacklevel=2,
    )
    return dof_map.all_pinned("the model is not invariant to rescaled channels")


def _fastest_layout(model: nn.Module, graph: LayerGraph, inputs: Inputs) -> Inputs:
    """Choose channels-last for images on a CPU, unless the model has views that need the ordinary layout.

    Nor where there is a GroupNorm: the gradient of one in front of which nothing trains, in that layout, ends the
    process (torch 2.13).

    The weights of the student are laid out as the images are: of one channel, these alone look the same in both.
    """
    images = any(t.dim() == 4 and t.is_floating_point() for t in (*inputs.args, *inputs.kwargs.values()))
    if inputs.device.type != "cpu" or not images or any(op.function == "group_norm" for op in graph.ops):
        return inputs
    candidate = inputs.laid_out(channels_last=True)
    args, kwargs = candidate.first()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = {name: laid_out(t.detach(), candidate) for name, t in named}
    try:
        with torch.no_grad():
            Functional(_Forward(model))({f"model.{name}": t for name, t in tensors.items()}, args, kwargs)
    except RuntimeError:
        return inputs
    return candidate


class _Forward(nn.Module):
    """Calls a model's forward alone: a call of an fx module prints where it failed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def laid_out(t: Tensor, inputs: Inputs) -> Tensor:
    """Return a weight in the memory layout of the images."""
    return t.contiguous(memory_format=torch.channels_last) if inputs.channels_last and t.dim() == 4 else t


def _comparable(at: Comparison, dof_map: DofMap) -> Comparison:
    """Leave out what cannot be brought back to the teacher's units.

    Raises:
        ConfigError: the user asked for it.
    """
    for place in at.inputs:
        if place.tensor in dof_map.channel_index:
            continue
        if place.asked is not None:
            raise ConfigError(
                f"FinetuneConfig.{place.field} should name what reads an activation with one scale in each channel. "
                f"Found {place.asked!r}, whose input {place.tensor} has several. Name a module before or after it."
            )
        logger.info("the scales of %s differ inside a channel: the network's outputs are compared", place.tensor)
        return Comparison(at.inputs[: at.blocks], outputs=True, blocks=at.blocks)
    return at
