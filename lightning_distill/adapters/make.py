"""From the shapes of two features to the module that maps one to the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

AdapterFactory = Callable[[torch.Size, torch.Size], nn.Module]

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def make_adapter(
    adapter: str | nn.Module | AdapterFactory | None, student: torch.Size, teacher: torch.Size, layer: str
) -> nn.Module:
    """The module that maps a student feature to the teacher's shape.

    Args:
        adapter: ``"auto"`` and ``"pool"`` (identity where the shapes agree, else a 1x1 convolution for maps and a
            linear map for vectors and token sequences), ``"linear"`` (over the last dimension), ``"conv1x1"`` (over
            dimension 1), ``None`` (identity), a module to copy, or a factory called with the two shapes.
        student: Shape of the student's feature, ``(N, D)``, ``(N, L, D)`` or ``(N, C, H, W)``.
        teacher: Shape of the teacher's feature.
        layer: The student layer's name, for messages.

    Returns:
        A new module, in float32 on the CPU.

    Raises:
        ValueError: If no adapter of that kind fits the shapes.
        TypeError: If ``adapter`` is none of these.

    Example:
        >>> make_adapter("auto", torch.Size((8, 16, 7, 7)), torch.Size((8, 64, 7, 7)), "layer3")
        Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
    """
    if adapter in ("auto", "pool"):
        maps = len(student) > 3
        if len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                f"Expected the features of student layer {layer!r} and its teacher layer to have the same number of"
                f" dimensions, 2 or more, but got {tuple(student)} and {tuple(teacher)}. {_remedy(student, teacher)}"
            )
        dim = 1 if maps else -1
        adapter = None if student[dim] == teacher[dim] else "conv1x1" if maps else "linear"
    if adapter is None:
        return nn.Identity()
    if adapter == "linear":
        return nn.Linear(student[-1], teacher[-1])
    if adapter == "conv1x1":
        if len(student) not in _CONVOLUTIONS:
            raise ValueError(
                f"Expected the feature of student layer {layer!r} to have 3 to 5 dimensions for adapter='conv1x1',"
                f" but got {tuple(student)}. Pass adapter='linear'."
            )
        return _CONVOLUTIONS[len(student)](student[1], teacher[1], kernel_size=1)
    if isinstance(adapter, nn.Module):
        return copy.deepcopy(
            adapter
        )  # a second training starts from the module that was passed, not from learned weights
    if callable(adapter):
        made = adapter(student, teacher)
        if isinstance(made, nn.Module):
            return made
        raise TypeError(f"Expected `adapter` to make a module, but got {type(made).__name__}. Return an nn.Module.")
    raise TypeError(
        "Expected `adapter` to be 'auto', 'pool', 'linear', 'conv1x1', None, a module or a factory, but got"
        f" adapter={adapter!r}."
    )


def _remedy(student: torch.Size, teacher: torch.Size) -> str:
    if 2 in (len(student), len(teacher)) and max(len(student), len(teacher)) in (3, 4):
        return (
            'Pass adapter="pool", which compares the means over the positions, or name the pooling layer that follows,'
            " or a layer of the other network that returns positions."
        )
    return "Pass adapter=<a module, or a factory of the two shapes>."
