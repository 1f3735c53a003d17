"""A cache under a Trainer: batches bring their rows, and nobody but the callback sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from distill_core.store import CacheError
from lightning_distill.cache.data import AttachedDataset, IndexedBatch, check_data, index_loader
from lightning_distill.cache.teacher import CachedTeacher
from lightning_distill.patch import MethodPatch


class LoaderPatch:
    """The data loaders of a run that give rows too, until it is undone."""

    def __init__(self) -> None:
        self.undone: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Make the loaders what they were."""
        while self.undone:
            self.undone.pop()()


def watch_batches(trainer: Trainer, teacher: CachedTeacher) -> list[MethodPatch | LoaderPatch]:
    """Let the training batches bring their rows, and take those off before any code of the user sees them.

    Args:
        trainer: The Trainer, before it has loaded its data.
        teacher: What is told the rows of each batch.

    Returns:
        What undoes it.
    """
    loaders = LoaderPatch()

    def process(original: Callable[[Any], Any], dataloader: Any) -> Any:
        if not (trainer.sanity_checking or trainer.validating):
            _index(dataloader, teacher, trainer, loaders)
        return original(dataloader)

    def to_device(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(batch, IndexedBatch):
            teacher.rows, batch = batch.rows, batch.batch
        return original(batch, *args, **kwargs)

    strategy = trainer.strategy
    return [
        loaders,
        MethodPatch(strategy, "process_dataloader", process),
        MethodPatch(strategy, "batch_to_device", to_device),
    ]


def _index(loader: Any, teacher: CachedTeacher, trainer: Trainer, loaders: LoaderPatch) -> None:
    if not isinstance(loader, DataLoader):
        raise CacheError(
            f"Expected the training data to be one torch DataLoader where the teacher is a cache, but got"
            f" {type(loader).__name__}. Return a DataLoader over a map-style data set."
        )
    manifest, data = teacher.reader.manifest, loader.dataset
    if loaders.undone:
        raise CacheError("Expected one training DataLoader where the teacher is a cache, but got several.")
    if not isinstance(data, AttachedDataset):
        check_data(data, manifest)
        data = AttachedDataset(data, manifest.length, manifest.data["transform_seed"])
    loaders.undone.append(index_loader(loader, data, manifest.views, lambda: trainer.current_epoch))
