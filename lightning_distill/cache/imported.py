"""A cache of outputs that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distill_core.arrays import checked_keys, manifest_of_outputs, named_arrays, teacher_of_arrays, write_arrays
from distill_core.storage import Storage
from distill_core.store import CacheError
from lightning_distill.cache.calling import as_array, described_teacher
from lightning_distill.cache.data import data_fingerprint
from lightning_distill.cache.keyed import Key, SampleKeys
from lightning_distill.cache.positions import Mask, noted_place
from lightning_distill.recording import map_tensors


class Imported:
    """Arrays of outputs, and the data that they belong to.

    Args:
        arrays: As in :meth:`TeacherCache.from_arrays`.
        dataset: The data, or None.
        teacher: The teacher, or None.
        key: Where a sample has its key, or None.
        keys: The key of each row, or None.

    Raises:
        CacheError: If they do not fit each other.
    """

    def __init__(
        self, arrays: Any, dataset: Any, teacher: nn.Module | None, key: Key | None, keys: Sequence[Any] | None
    ) -> None:
        self.named, layers = named_arrays(map_tensors(arrays, as_array))
        length = len(next(iter(self.named.values())))
        self.digests = None
        if key is None and keys is not None:
            raise CacheError(
                "Expected `key` to say where a sample has its key, but got None with `keys`. Pass key=<a column, an"
                " index, or a function of the sample>."
            )
        if key is not None:
            place = SampleKeys(key)
            if keys is None and dataset is None:
                raise CacheError("Expected `keys` or `dataset` to be given with `key`, but got None. Pass one of them.")
            values = place.values(list(dataset)) if keys is None else keys
            self.digests = place.digests(checked_keys(values, length))
        elif dataset is not None and len(dataset) != length:
            raise CacheError(f"Expected `dataset` to have {length} items, one for each row, but got {len(dataset)}.")
        known = teacher and described_teacher(teacher)
        self.manifest = manifest_of_outputs(
            length,
            layers,
            kind="torch",
            data=None if dataset is None or key is not None else data_fingerprint(dataset, None, False),
            teacher=known or teacher_of_arrays(self.named),
            key=None if key is None else SampleKeys(key).described,
        )

    def write(self, folder: Path, storage: Storage, mask: Mask | None, shard_bytes: int, resume: bool) -> None:
        """Write the cache.

        Args:
            folder: The folder.
            storage: How the numbers are stored.
            mask: Where a batch keeps the mask of its tokens; None is ``"attention_mask"``.
            shard_bytes: Approximate size of a shard.
            resume: Whether a build that was begun is continued.
        """
        write_arrays(
            folder,
            self.named,
            self.manifest,
            storage,
            keys=self.digests,
            mask=noted_place(mask),
            shard_bytes=shard_bytes,
            resume=resume,
        )
