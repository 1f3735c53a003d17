"""Costs of a model: size, operations, time and memory for one example."""

from __future__ import annotations

import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_distill import checks
from lightning_distill.compat import Operators
from lightning_distill.modes import evaluating
from lightning_distill.recording import Call, map_tensors

_PRODUCT: Final = re.compile("conv|mm|mv|dot|linear|rnn|lstm|gru|attention|encoder|einsum|outer|cdist")
_WARM_UP: Final = 3
_REPEATS: Final = 50
_SECONDS: Final = 1.0  # at most, for all repeats together


def costs(module: nn.Module, example: Any) -> dict[str, int | float | None]:
    """Measure what a model costs for one example.

    The model runs in eval mode and without gradients, on the device of its parameters; modes are restored.

    Args:
        module: The model.
        example: Its input for one example, with a batch dimension of 1: a tensor, a tuple of positional arguments, a
            dict of keyword arguments, or a recorded :class:`Call`. Tensors are moved to the model's device.

    Returns:
        - ``parameters``: number of parameters, shared ones once.
        - ``multiply_adds``: multiply-add operations of matrix products, convolutions and attention, counted by
          ``torch.utils.flop_counter``; None if the model has products that it does not know.
        - ``bytes``: size of the ``state_dict``'s tensors, shared ones once.
        - ``latency_seconds``: median duration of a call.
        - ``memory_bytes``: greatest memory of a call on a CUDA device, the weights included; None elsewhere.

    Raises:
        TypeError: If ``module`` is not a module or ``example`` holds no tensor.
        ValueError: If the example has another batch dimension than 1, or the module has parameters without a shape.

    Example:
        >>> measured = costs(nn.Linear(3, 2), torch.zeros(1, 3))
        >>> measured["parameters"], measured["multiply_adds"], measured["bytes"], measured["memory_bytes"]
        (8, 6, 32, None)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(checks.message("`module` to be a torch.nn.Module", f"module={type(module).__name__}"))
    if any(is_lazy(parameter) for parameter in module.parameters()):
        remedy = "Run one batch through it first."
        raise ValueError(checks.message("`module` to have parameters of known shapes", "lazy parameters", remedy))
    args, kwargs = _arguments(example)
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(device))

    def call() -> None:
        module(*args, **kwargs)

    with evaluating(module):
        multiply_adds = _multiply_adds(call)
    with evaluating(module), torch.no_grad():
        latency = _latency(call, device)
        memory = _memory(call, device)
    return {
        **sizes(module),
        "multiply_adds": multiply_adds,
        "latency_seconds": latency,
        "memory_bytes": memory,
    }


def sizes(module: nn.Module) -> dict[str, int | float | None]:
    """The costs of a model that are known without running it; all others are None."""
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "multiply_adds": None,
        "bytes": _bytes(module),
        "latency_seconds": None,
        "memory_bytes": None,
    }


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the example, which is checked."""
    if isinstance(example, Call):
        args, kwargs = example.args, example.kwargs
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = example if isinstance(example, tuple) else (example,), {}
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors((args, kwargs), note)
    if not tensors:
        expected = "`example` to be a tensor, or a tuple or dict with tensors"
        raise TypeError(checks.message(expected, f"example={type(example).__name__}"))
    if tensors[0].ndim == 0 or tensors[0].shape[0] != 1:
        got = f"a tensor of shape {tuple(tensors[0].shape)}"
        remedy = "Pass a slice of a batch, such as x[:1]."
        raise ValueError(checks.message("`example` to hold one example", got, remedy))
    return args, kwargs


def _multiply_adds(call: Callable[[], None]) -> int | None:
    """Count a call in which operators hide no products.

    With gradients a transformer's layer is not a single operator, without MKL-DNN and cuDNN an LSTM is not either, and
    attention becomes matrix products.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch of MKL-DNN may warn of devices that are not used
        with (
            torch.enable_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            Operators() as operators,
            FlopCounterMode(display=False) as counter,
        ):
            call()
    hidden = [name for name in map(str, operators.seen - flop_registry.keys()) if _PRODUCT.search(name)]
    return None if hidden else counter.get_total_flops() // 2


def _bytes(module: nn.Module) -> int:
    """The size of the saved tensors; those that share their memory are saved once."""
    tensors = (value for value in module.state_dict().values() if isinstance(value, Tensor))
    sizes = {tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values())


def _latency(call: Callable[[], None], device: torch.device) -> float:
    def timed() -> float:
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - started

    for _ in range(_WARM_UP):
        timed()
    durations: list[float] = []
    while len(durations) < _REPEATS and sum(durations) < _SECONDS:
        durations.append(timed())
    return statistics.median(durations)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _memory(call: Callable[[], None], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device)
