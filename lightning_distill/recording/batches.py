"""The inputs and labels in a batch, and the call of a network with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from lightning_distill.recording.labels import LABEL_NAMES, find_labels


def split_batch(batch: Any, labels: str | int | Callable[[Any], Tensor] | None = None) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch.

    Args:
        batch: ``(inputs, labels)``, or a dict with the labels under one of their usual names.
        labels: Where the labels are, as in :func:`find_labels`.

    Returns:
        Inputs and labels.

    Raises:
        ValueError: If the batch has no labels.

    Example:
        >>> import torch
        >>> split_batch({"x": torch.ones(2), "labels": torch.tensor([1, 0])})
        ({'x': tensor([1., 1.])}, tensor([1, 0]))
    """
    return inputs_in(batch, labels), find_labels(batch, labels)


def has_labels(batch: Any, labels: str | int | Callable[[Any], Tensor] | None = None) -> bool:
    """Whether a batch has an entry for labels: not a tensor, a list with one entry, or a dict without their names.

    Args:
        batch: The batch.
        labels: Where the labels are; if it says so, the batch must have them.

    Example:
        >>> import torch
        >>> has_labels([torch.ones(2, 3)]), has_labels({"pixel_values": torch.ones(2, 3), "label": torch.ones(2)})
        (False, True)
    """
    if labels is not None:
        return True
    if isinstance(batch, Mapping):
        return any(name in batch for name in LABEL_NAMES)
    if isinstance(batch, (tuple, list)):
        return len(batch) > 1
    return not isinstance(batch, Tensor)


def inputs_in(batch: Any, labels: str | int | Callable[[Any], Tensor] | None = None) -> Any:
    """The inputs in a batch: a dict without its labels, the first of several entries, or all of it."""
    if isinstance(batch, Mapping):
        names = (*LABEL_NAMES, labels) if isinstance(labels, str) else LABEL_NAMES
        return {key: value for key, value in batch.items() if key not in names}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that inputs mean: a dict is keywords, a tuple or list several, all else one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def call_with(model: Any, inputs: Any) -> Any:
    """The output of a model for the inputs of a batch."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def kept(batch: Any) -> Any:
    """The batch with shallow copies of its mappings, since a step may remove its labels: ``batch.pop("labels")``."""
    if type(batch) in (tuple, list):
        return type(batch)(map(kept, batch))
    return copy.copy(batch) if isinstance(batch, MutableMapping) else batch


def find_entry(name: str, batch: Any, arguments: Mapping[str, Any], ndim: int | None = None) -> Any:
    """An entry of the call's arguments, of the batch, or of a dict inside the batch.

    Args:
        name: Its name.
        batch: The batch.
        arguments: The call's arguments.
        ndim: Number of dimensions of a tensor, which leaves out other entries of that name: a call may get the mask of
            pairs of tokens that was made of the batch's mask of tokens.
    """
    places = [arguments, batch, *(batch if isinstance(batch, (tuple, list)) else [])]
    entries = (place[name] for place in places if isinstance(place, Mapping) and place.get(name) is not None)
    return next((entry for entry in entries if ndim is None or getattr(entry, "ndim", None) == ndim), None)
