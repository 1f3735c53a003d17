"""Build a cache: run a teacher once over arrays and store its outputs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from distill_core.arrays import as_numbers
from distill_core.columns import Array
from distill_core.locks import locked
from distill_core.normalization import identity_of
from distill_core.storage import Storage
from distill_core.store import CacheError, Manifest, Writer, begin, check_folder, fingerprint
from keras_distill import compat
from keras_distill.cache.views import Augmentation, data_fingerprint
from keras_distill.recording import Recorder, Tap, probed
from keras_distill.teachers import CallableTeacher


class Builder:
    """One build of a cache: its settings and its manifest.

    Args:
        teacher: The teacher.
        inputs: The teacher's inputs, arrays of all items.
        layers: Layers whose features are kept.
        outputs: Whether the outputs are kept.
        storage: How the numbers are stored.
        views: Number of augmented views of each item.
        augmentation: Augments the items; None leaves them unchanged.
        batch_size: Number of items in a batch.
        teacher_inputs: Makes the teacher's inputs of a batch; None takes the batch.
        shard_bytes: Approximate size of a shard.

    Raises:
        CacheError: If neither outputs nor layers are kept, the settings do not fit the teacher's output, or the
            transform returns different items for the same seed.
    """

    def __init__(
        self,
        teacher: keras.Model,
        inputs: Any,
        *,
        layers: Sequence[str | Tap],
        outputs: bool,
        storage: Storage,
        views: int,
        augmentation: Augmentation | None,
        batch_size: int,
        shard_bytes: int,
        teacher_inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        self.taps = [Tap.of(layer) for layer in layers]
        if not outputs and not self.taps:
            raise CacheError("Expected something to keep, but got outputs=False and no layers. Name layers.")
        self.inputs, self.outputs, self.batch_size, self.augmentation = inputs, outputs, batch_size, augmentation
        self.teacher_inputs = teacher_inputs
        self.recorder, self.length = Recorder(teacher, self.taps, "teacher"), len(keras.tree.flatten(inputs)[0])
        if augmentation is not None:
            augmentation.check(inputs)
        if outputs and (storage.top_k or storage.sampled):
            self._check_logits()
        arrays = {
            name: storage.describe(name, rows.shape[1:], channels_first=False)
            for name, rows in self._rows(self._inputs(0, min(batch_size, self.length))).items()
        }
        manifest = Manifest(
            length=self.length,
            views=views,
            shard_rows=batch_size,
            arrays=arrays,
            layers={f"feature{index}": f"{tap.name}|{tap.where}" for index, tap in enumerate(self.taps)},
            teacher=described_teacher(teacher, teacher_inputs),
            data={
                "fingerprint": data_fingerprint(inputs, augmentation),
                "transform_seed": None if augmentation is None else augmentation.seed,
                "stale": False,
                "kind": "keras",
            },
            versions={name: importlib.metadata.version(name) for name in ("keras", "numpy")},
        )
        row_bytes = max(sum(codec.bytes_per_item for codec in manifest.codecs.values()), 1)
        batches = max(1, shard_bytes // (row_bytes * batch_size))
        self.manifest = replace(manifest, shard_rows=batches * batch_size)

    def write(self, folder: Path, resume: bool, *, workers: int = 0, progress: bool = False) -> None:
        """Write the shards that are missing in the folder.

        Args:
            folder: The folder.
            resume: Whether a build that was begun is continued.
            workers: Number of threads that prepare batches while the teacher runs.
            progress: Whether to show a progress bar.

        Raises:
            CacheError: If another process builds in the folder, or the folder holds something else.
            OSError: If the disk is full.
            ValueError: If ``workers`` is not an int of 0 or more.
        """
        if type(workers) is not int or workers < 0:
            raise ValueError(f"Expected `workers` to be an int of 0 or more, but got workers={workers!r}.")
        check_folder(folder)
        with locked(folder):
            begin(folder, self.manifest, resume)
            writer, size = Writer(folder, self.manifest), self.batch_size
            batches = {
                shard: [(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
                for shard in writer.missing
                for rows in (self.manifest.shard_range(shard),)
            }
            prepared = self._prepared([batch for shard in batches.values() for batch in shard], workers)
            number = sum(map(len, batches.values()))
            bar = keras.utils.Progbar(number, verbose=int(progress and number > 0), unit_name="batch")

            def rows_of(shard: int) -> Iterator[dict[str, Array]]:
                for _ in batches[shard]:
                    yield self._rows(next(prepared))
                    bar.add(1)

            with contextlib.closing(prepared):
                for shard in batches:
                    writer.write(shard, rows_of(shard))
            writer.finish()

    def _prepared(self, batches: Sequence[tuple[int, int]], workers: int) -> Generator[Any]:
        """The teacher's inputs of each batch, in order; threads prepare a few of them ahead."""
        if not workers:
            yield from (self._inputs(*batch) for batch in batches)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[Any]] = deque()
            try:
                for batch in batches:
                    waiting.append(pool.submit(self._inputs, *batch))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _inputs(self, start: int, stop: int) -> Any:
        """The teacher's inputs for some rows."""
        inputs = self._batch(start, stop)
        return inputs if self.teacher_inputs is None else self.teacher_inputs(inputs)

    def _batch(self, start: int, stop: int) -> Any:
        """The items of some rows."""
        if self.augmentation is None:
            return keras.tree.map_structure(lambda array: keras.ops.convert_to_tensor(array[start:stop]), self.inputs)
        # a batch may begin in one view and end in the next
        views, indices = np.divmod(np.arange(start, stop), self.length)
        parts = [self.augmentation.batch(self.inputs, indices[views == view], int(view)) for view in np.unique(views)]
        return keras.tree.map_structure(lambda *same: keras.ops.convert_to_tensor(np.concatenate(same)), *parts)

    def _rows(self, inputs: Any) -> dict[str, Array]:
        """The teacher's outputs and features for a batch of its inputs."""
        with compat.untaped():
            call = self.recorder.forward(inputs, training=False)
        kept = {f"feature{index}": call.feature(tap) for index, tap in enumerate(self.taps)}
        if self.outputs and keras.tree.is_nested(call.output):
            raise CacheError("Expected the teacher to have one output, but got several. Wrap it to return one.")
        if self.outputs:
            kept["output"] = call.output
        return {name: as_numbers(name, keras.ops.convert_to_numpy(tensor)) for name, tensor in kept.items()}

    def _check_logits(self) -> None:
        """Check that the output does not hold probabilities, which would be stored as if they were logits.

        Raises:
            CacheError: If it holds probabilities.
        """
        call = probed(self.recorder, self._inputs(0, 1))
        if any(call.facts_of(tensor).probabilities for tensor in keras.tree.flatten(call.output)):
            raise CacheError(
                "Expected the teacher's outputs to be logits with top_k, but got probabilities of a softmax or sigmoid."
                " Leave out the last softmax or sigmoid."
            )


def described_teacher(teacher: keras.Model, teacher_inputs: Any = None) -> dict[str, Any]:
    """The entry of a teacher in the manifest.

    Args:
        teacher: The teacher.
        teacher_inputs: Makes its inputs; None for those of the data.

    Raises:
        CacheError: If ``teacher_inputs`` cannot be recognized in another process.
    """
    described = {"class": type(teacher).__qualname__, "fingerprint": teacher_fingerprint(teacher)}
    return described if teacher_inputs is None else {**described, "inputs": identity_of(teacher_inputs)}


def teacher_fingerprint(teacher: keras.Model) -> str:
    """A digest of a teacher's class and weights.

    Args:
        teacher: The teacher.

    Returns:
        32 hexadecimal digits.
    """
    if isinstance(teacher, CallableTeacher):
        raise CacheError(
            "Expected the teacher of a cache to be a Keras model, which its weights identify, but got a function."
            " Store the function's outputs with TeacherCache.from_arrays."
        )
    weights = [keras.ops.convert_to_numpy(weight) for weight in teacher.weights]
    return fingerprint([type(teacher).__qualname__, *weights])
