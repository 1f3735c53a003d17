"""Keyword arguments that terms add to the call of a network, such as ``output_hidden_states=True``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_distill import compat

_CAPTURING = ("transformers.utils.output_capturing", "_output_capturing_hooks_installed")


def parameters_of(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a network's forward, seen through wrappers of DDP and torch.compile."""
    return _signature(_inside(network))


def takes(network: nn.Module, name: str) -> bool:
    """Whether a network can be called with a keyword argument.

    It can if its forward has a parameter of that name. It also can if its forward passes on any keyword arguments and
    its ``config`` has a setting of that name, as models of Hugging Face do.
    """
    parameters = parameters_of(network)
    return name in parameters or (_passes_on(parameters) and hasattr(getattr(_inside(network), "config", None), name))


def with_arguments(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with others added or in the place of those of the same names.

    Args:
        network: The network that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        arguments: The arguments to add, which the network takes.
    """
    positions = {name: place for place, name in enumerate(parameters_of(network))}
    positional, added = list(args), dict(arguments)
    for name in arguments:
        if positions.get(name, len(args)) < len(args):
            positional[positions[name]] = added.pop(name)
    return tuple(positional), {**kwargs, **added}


def drop_capturing_hooks(network: nn.Module) -> None:
    """Remove the hooks with which transformers reads hidden states. It adds them again when they are needed.

    They stay on the layers after the first call with ``output_hidden_states``, and keep the model from being pickled.
    """
    file, flag = _CAPTURING
    for module in network.modules():
        vars(module).pop(flag, None)
        hooks = compat.forward_hooks(module)
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", None) == file]:
            del hooks[key]


def has_capturing_hooks(network: nn.Module) -> bool:
    """Whether transformers has put its hooks on the layers already."""
    return any(_CAPTURING[1] in vars(module) for module in network.modules())


def _inside(network: nn.Module) -> nn.Module:
    """The network inside wrappers that pass on all arguments."""
    inner = compat.unwrapped(network) if _passes_on(_signature(network)) else None
    return network if inner is None else _inside(inner)


def _signature(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(network.forward).parameters
    except (TypeError, ValueError):  # a TorchScript program
        return {}


def _passes_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
