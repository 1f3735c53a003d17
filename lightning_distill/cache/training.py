"""Under a Trainer: training batches carry the teacher's outputs, hidden from the user's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from typing import Any

import torch.utils._pytree as pytree
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill_core.store import CacheError
from lightning_distill import compat
from lightning_distill.cache.attached import KeyedDataset, KeyedStream
from lightning_distill.cache.data import AttachedDataset, check_data, find_rows
from lightning_distill.cache.inputs import BatchInputs
from lightning_distill.cache.keyed import check_first_key, first_key_is_held
from lightning_distill.cache.loaders import CachedBatch, OpenCache, dispose, original, with_answers
from lightning_distill.patch import MethodPatch
from lightning_distill.recording import Call


class CachedLoaders:
    """The cache's part of one fit: twins in place of training loaders, and the teacher's outputs of the current batch.

    Only objects of the Trainer are patched. ``fit_loop.setup_data`` marks the time in which training loaders are made,
    because validation loaders may be made in the same state of the trainer. ``strategy.process_dataloader``, the last
    step before a loader's first ``iter()``, returns the twin. ``precision_plugin.convert_input``, the first step of
    every batch, removes the teacher's outputs before the user's code gets the batch.

    Args:
        trainer: The Trainer, before it has loaded its data.
        cache: The cache.
        epoch: Returns the epoch, for caches with several views; None uses the trainer's.

    Attributes:
        answers: The teacher's outputs for the current batch as CPU tensors, from :func:`read_answers`; None if the
            batch does not come from a twin.

    Raises:
        MisconfigurationException: If ``training_step`` takes ``dataloader_iter``.
    """

    def __init__(self, trainer: Trainer, cache: OpenCache, *, epoch: Callable[[], int] | None = None) -> None:
        module: Any = trainer.lightning_module
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise MisconfigurationException(
                "Expected `training_step` to take a batch with a cached teacher, but it takes `dataloader_iter`."
                " Take the batch."
            )
        self.answers: dict[str, Tensor] | None = None
        self._trainer, self._cache = trainer, cache
        self._epoch = epoch or (lambda: trainer.current_epoch)
        self._inputs = BatchInputs(cache.allow_changed_inputs)
        self._twins: dict[
            int, DataLoader[Any]
        ] = {}  # by the id of the loader, which stays valid because the twin holds the loader
        self._fresh: dict[int, DataLoader[Any]] | None = None  # only while the fit loop makes its loaders
        self._others: list[Any] = []
        self._patches = [
            MethodPatch(trainer.fit_loop, "setup_data", self._setup_data),
            MethodPatch(trainer.strategy, "process_dataloader", self._process),
            MethodPatch(trainer.precision_plugin, "convert_input", self._split),
            MethodPatch(trainer.strategy, "batch_to_device", self._transfer),
        ]

    def check_unchanged(self, call: Call) -> None:
        """Check that a call of the student got its inputs as the data loader returned them.

        Args:
            call: The student's call.

        Raises:
            CacheError: If the training step or a batch-transfer hook has changed them, or several calls differ.
        """
        if self.answers is not None:
            self._inputs.check(call.args, call.kwargs)

    def close(self) -> None:
        """Remove the patches, and put the user's loaders back into the trainer."""
        for patch in self._patches:
            patch.undo()
        combined = compat.training_loaders(self._trainer)
        if isinstance(combined, CombinedLoader):  # may be the user's own object
            loaders = [original(loader) for loader in combined.flattened]
            if any(loader is not used for loader, used in zip(loaders, combined.flattened, strict=True)):
                combined.flattened = loaders
        for twin in self._twins.values():
            dispose(twin)
        self._twins, self.answers = {}, None
        self._inputs.clear()

    # Patches ---------------------------------------------------------------------------------------------------------

    def _setup_data(self, setup_data: Callable[[], None]) -> None:
        self._fresh, self._others = {}, []
        try:
            setup_data()
            if self._fresh:
                for key, twin in self._twins.items():
                    if key not in self._fresh:  # the twin of a loader from before a reload
                        dispose(twin)
                self._twins = self._fresh
            elif self._others:
                raise self._fits_none()
        finally:
            for key, twin in self._fresh.items():
                if self._twins.get(key) is not twin:  # the set-up has failed
                    dispose(twin)
            self._fresh = None

    def _process(self, process: Callable[[Any], Any], loader: Any) -> Any:
        if self._fresh is None:
            return process(loader)
        loader = original(loader)  # the user's own CombinedLoader keeps the twin until a reload
        if not isinstance(loader, DataLoader):
            self._others.append(loader)
            return process(loader)
        twin = self._twins.get(id(loader))  # the same loader after a reload keeps its workers
        if twin is None:
            data, keys = loader.dataset, self._cache.keys
            dataset = data.dataset if isinstance(data, (AttachedDataset, KeyedDataset, KeyedStream)) else data
            rows = find_rows(dataset, self._cache.manifest) if keys is None else None
            fits = rows is not None if keys is None else first_key_is_held(dataset, keys, self._cache.reader)
            if not fits:
                self._others.append(loader)
                return process(loader)
            twin = with_answers(loader, dataset, rows, self._cache, self._epoch)
        if self._fresh:
            raise CacheError(
                "Expected one training DataLoader over the data that the cache was built from, but got several. Pass"
                " one of them, or a ConcatDataset."
            )
        self._fresh[id(loader)] = twin
        return process(twin)

    def _split(self, convert: Callable[[Any], Any], batch: Any) -> Any:
        if not self._trainer.training:
            return convert(batch)
        # here and not after a step: LBFGS takes several steps on one batch
        self._inputs.clear()
        batch, self.answers = self.separated(batch)
        converted = convert(batch)
        if self.answers is not None:
            self._inputs.remember(batch)
            self._inputs.remember(converted)
        return converted

    def separated(self, batch: Any) -> tuple[Any, dict[str, Tensor] | None]:
        """A batch as the user's code gets it, and the teacher's outputs for it."""
        if isinstance(batch, CachedBatch):
            return batch.batch, batch.answers
        loaders = getattr(compat.training_loaders(self._trainer), "iterables", None)
        if isinstance(loaders, (dict, list, tuple)) and isinstance(batch, (dict, list, tuple)):
            spec = pytree.tree_flatten(loaders)[1]  # the batch holds each loader's batch at the place of the loader
            parts = spec.flatten_up_to(batch)
            cached = [part for part in parts if isinstance(part, CachedBatch)]  # one at most
            if cached:
                plain = [part.batch if isinstance(part, CachedBatch) else part for part in parts]
                return pytree.tree_unflatten(plain, spec), cached[0].answers
        return batch, None

    def _transfer(self, transfer: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        moved = transfer(batch, *args, **kwargs)
        if self._trainer.training and self.answers is not None:
            self._inputs.follow(batch, moved, self._trainer)
        return moved

    def _fits_none(self) -> CacheError:
        """The error if none of the training loaders reads the cached data."""
        loaders = [loader for loader in self._others if isinstance(loader, DataLoader)]
        if len(self._others) == 1 and loaders:
            try:
                if self._cache.keys is None:
                    check_data(loaders[0].dataset, self._cache.manifest)
                else:
                    check_first_key(loaders[0].dataset, self._cache.keys, self._cache.reader)
            except CacheError as error:
                return error
        described = ", ".join(
            _described(loader.dataset) if isinstance(loader, DataLoader) else type(loader).__name__
            for loader in self._others
        )
        return CacheError(
            f"Expected the training data to be a torch DataLoader over the {self._cache.manifest.length} items that the"
            f" cache was built from, but got {described}. Return a DataLoader over that map-style data set."
        )


def _described(dataset: Any) -> str:
    sized = not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized)
    return f"{type(dataset).__name__} ({f'{len(dataset)} items' if sized else 'a stream'})"
