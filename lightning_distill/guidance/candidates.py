"""The layers of a network that may be paired: blocks, and layers outside of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def candidates(network: nn.Module) -> dict[str, bool]:
    """The names of the layers, and whether each is a block of a stack.

    A stack is a ``Sequential``, ``ModuleList`` or ``ModuleDict`` with at least two blocks of one class, a block a
    module with at least two layers that have matrices or kernels. The search goes into containers, into
    modules that hold a stack, and into a network that is the only child with parameters. The inside of all other
    modules is left out, such as the branches of a residual block.

    Args:
        network: The network.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        >>> candidates(nn.Sequential(nn.Linear(4, 8), nn.Sequential(block(), block())))
        {'0': False, '1': False, '1.0': True, '1.1': True}
    """
    blocks = {id(block) for stack in network.modules() for block in _blocks(stack)}
    wrapped = _wrapped(network)
    holders = {id(module) for module in network.modules() if any(map(_blocks, module.modules()))}
    seen: set[int] = set()

    def search(parent: nn.Module, prefix: str) -> Iterator[tuple[str, bool]]:
        for name, child in parent.named_children():
            if id(child) in seen:  # a shared module has the first of its names
                continue
            seen.add(id(child))
            yield f"{prefix}{name}", id(child) in blocks
            if isinstance(child, _CONTAINERS) or id(child) in holders or child in wrapped:
                yield from search(child, f"{prefix}{name}.")

    return dict(search(network, ""))


def _wrapped(network: nn.Module) -> list[nn.Module]:
    """The networks inside a module that only wraps one, such as a LightningModule."""
    inner = [child for child in network.children() if any(True for _ in child.parameters())]
    if len(inner) != 1 or isinstance(network, _CONTAINERS):
        return []
    return [*inner, *_wrapped(inner[0])]


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that a module is a stack of."""
    if not isinstance(module, _CONTAINERS):
        return []
    large = [child for child in module.children() if _weighted(child) > 1 and not isinstance(child, _CONTAINERS[1:])]
    kinds = Counter(map(type, large))
    return [child for child in large if kinds[type(child)] > 1]


def _weighted(module: nn.Module) -> int:
    """The number of layers with matrices or kernels."""
    return sum(any(parameter.ndim > 1 for parameter in inner.parameters(recurse=False)) for inner in module.modules())
