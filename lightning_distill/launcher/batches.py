"""What a batch holds, and how a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.recording import LABEL_NAMES, find_labels


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch.

    Args:
        batch: ``(inputs, labels)``, or a dict with the labels under one of their usual names.

    Returns:
        Inputs and labels.

    Raises:
        ValueError: If there are no labels.

    Example:
        >>> import torch
        >>> split_batch({"x": torch.ones(2), "labels": torch.tensor([1, 0])})
        ({'x': tensor([1., 1.])}, tensor([1, 0]))
    """
    labels = find_labels(batch, None)
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_NAMES}, labels
    return batch[0], labels


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that inputs mean: a dict is keywords, a tuple or list several, all else one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def call_with(model: Any, inputs: Any) -> Any:
    """The output of a model for the inputs of a batch."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


class Batches(Dataset[Any]):
    """Batches in a list as a data set: Lightning takes a bare list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        """One of them."""
        return self.batches[index]


def as_loader(data: Any) -> Any:
    """The data as a Trainer takes them: a list or tuple is one of batches."""
    return DataLoader(Batches(data), batch_size=None) if isinstance(data, (list, tuple)) else data
