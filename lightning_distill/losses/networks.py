"""The small networks that losses learn: one layer for every number of dimensions, and channels at any place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.vectors import channels_at

T = TypeVar("T")
# Layers by the number of dimensions of a feature.
LAYERS: Final[dict[int, Any]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def channel_dim(shape: torch.Size) -> int:
    """Dimension of the channels of a feature of this shape."""
    return 1 if len(shape) >= 4 else -1


def check_ranks(student: torch.Size, teacher: torch.Size) -> None:
    """Raise if no layer fits the two features.

    Raises:
        ValueError: If their numbers of dimensions differ, or are not 2 to 5.
    """
    if len(student) != len(teacher) or len(student) not in LAYERS:
        expected = "`student` and `teacher` to have the same number of dimensions, 2 to 5"
        raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}", "Pass adapter=<a module>."))


def wide_layer(rank: int, narrow: int, wide: int) -> nn.Module:
    """A convolution of width 3; for vectors, which have no positions, a linear map.

    Args:
        rank: Number of dimensions of the feature, 2 to 5.
        narrow: Channels of its input.
        wide: Channels of its output.
    """
    size = {} if rank == 2 else {"kernel_size": 3, "padding": 1}
    layer: nn.Module = LAYERS[rank](narrow, wide, **size)
    return layer


def built(part: T | None) -> T:
    """The part of a loss that its ``build`` has made.

    Raises:
        ValueError: If it has not been made.
    """
    if part is None:
        remedy = "Call loss.build(student.shape, teacher.shape) once, or use the loss in a FeatureDistillation."
        raise ValueError(checks.message("the loss to be built before it is called", "no parameters", remedy))
    return part


def channels_first(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network for features with their channels anywhere."""

    def apply(feature: Tensor) -> Tensor:
        dim = channels_at(feature)
        mapped: Tensor = network(feature.movedim(dim, 1)).movedim(1, dim)
        return mapped

    return apply


def linear_classifier(layer_of: Callable[[str | None], nn.Module], name: str | None, channels: int) -> nn.Linear:
    """The linear classifier of a teacher that takes features with so many channels.

    Args:
        layer_of: Returns the teacher's layer of a name; ``""`` is the whole network.
        name: Name of the classifier; ``None`` takes the only linear layer that fits.
        channels: Channels of the feature.

    Raises:
        ValueError: If no layer fits, or several do.
    """
    layer = layer_of("" if name is None else name)
    if name is not None or isinstance(layer, nn.Linear):
        if isinstance(layer, nn.Linear) and layer.in_features == channels:
            return layer
        expected = f"the teacher's classifier to be a linear layer of {channels} inputs, the channels of its feature"
        got = f"classifier={name!r}, {layer}" if isinstance(layer, nn.Linear) else type(layer).__name__
        raise ValueError(checks.message(expected, got, "Name the linear layer, and the feature that goes into it."))
    fitting = {
        path: module
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == channels
    }
    if len(fitting) != 1:
        expected = f"the teacher to have one linear layer of {channels} inputs, the channels of its feature"
        remedy = "Pass classifier=<the name of the layer behind the feature>."
        raise ValueError(checks.message(expected, f"{len(fitting)}: {', '.join(fitting) or 'none'}", remedy))
    return next(iter(fitting.values()))
