"""NNCF's SmoothQuant: multiplications by a constant in front of layers, whose weights are divided by it."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from torch import Tensor, nn

try:
    from nncf.torch.quantization.layers import SQMultiply as SQMultiply
except ImportError:  # NNCF 2.17
    from nncf.quantization.algorithms.smooth_quant.torch_backend import SQMultiply as SQMultiply

Port = tuple[str, int]
"""The name of an operation, and one of its inputs."""

INSIDE: Final = "pre_hook__"
"""What NNCF puts after the module of a call, in the names of the calls that a hook in front of it makes."""


def smoothing(model: nn.Module) -> dict[Port, Tensor]:
    """Return the factor that each input is multiplied by, which broadcasts against it.

    Args:
        model: wrapped by NNCF, before a result is written into it.
    """
    return {port: hook.scale.detach() for _, port, hook in _multiplications(model)}


def quantize_after_multiplying(model: nn.Module) -> None:
    """Put each quantizer that NNCF has placed inside a multiplication's hook right behind this hook.

    It sees the same values there. But there it belongs to what the layer reads, and not to an operation that the float
    network does not have; and the hooks of a training can be replayed without NNCF.

    Args:
        model: the result of `nncf.quantize`; it is changed.
    """
    storage = get_hook_storage(model)
    ports: dict[int, list[Port]] = defaultdict(list)
    groups: dict[str, int] = {}
    for key, port, hook in _multiplications(model):
        ports[id(hook)].append(port)
        groups[key] = id(hook)
    for name, hook in list(storage.named_hooks(remove_duplicate=False)):
        _, inside, _ = decode_hook_name(name)
        module, found, call = inside.partition(INSIDE)
        if not found or module[-1:] not in ("", "/") or not isinstance(hook, (SymmetricQuantizer, AsymmetricQuantizer)):
            continue
        # NNCF names one multiplication for several layers after the last of them, in the module of the one that runs.
        key, _, number = call.partition("/mul/")
        here = [port for port in ports[groups[key]] if _module_of(port[0]) == module.rstrip("/")]
        storage.delete_hook(name)
        storage.register_pre_function_hook(*here[int(number)], hook)


def _multiplications(model: nn.Module) -> Iterator[tuple[str, Port, Any]]:
    """Yield NNCF's own key of each multiplication in front of an input, that input, and the hook."""
    for name, hook in get_hook_storage(model).named_hooks(remove_duplicate=False):
        kind, op, port = decode_hook_name(name)
        if isinstance(hook, SQMultiply) and kind == "pre_hooks":
            yield f"{op.replace('/', '-')}__{port}[{name.rpartition('.')[2]}]", (op, port), hook


def _module_of(op: str) -> str:
    return op.rsplit("/", 2)[0]
