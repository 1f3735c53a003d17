"""Run a teacher once over the data and store its outputs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from distill_core.arrays import as_numbers, mean_bytes
from distill_core.columns import Ragged
from distill_core.manifest import BY_KEY
from distill_core.storage import Storage
from distill_core.store import CacheError, Manifest, Writer
from lightning_distill import checks
from lightning_distill.cache.calling import as_array, call_teacher, described_teacher
from lightning_distill.cache.data import AttachedDataset, check_repeatable, data_fingerprint
from lightning_distill.cache.keyed import Key, SampleKeys, content_key, input_digests
from lightning_distill.cache.positions import Mask, needed_mask, place_of, tokens_in
from lightning_distill.cache.ranks import process_rank, together
from lightning_distill.cache.streams import BuildCollate, Loaded, Rows, Shards, Stream, check_stream
from lightning_distill.recording import Call, Recorder, Recording, Tap, map_tensors, select
from lightning_distill.recording.tokens import is_seq2seq
from lightning_distill.teachers.hold import Hold
from lightning_distill.teachers.inputs import Place

if TYPE_CHECKING:
    from rich.progress import Progress

Forward = Callable[[nn.Module, Any], Any]


class Builder:
    """One build of a cache: its settings, and the manifest that follows from them.

    Args:
        teacher: The teacher.
        dataset: The data, map-style; or a stream, if samples have keys.
        storage: How the numbers are stored.
        layers: Layers whose features are kept.
        outputs: Whether the outputs are kept.
        views: Number of augmented views of each sample.
        transform_seed: Seed of the views.
        batch_size: Number of samples in a batch.
        num_workers: Number of worker processes that load data.
        collate_fn: Makes a batch of samples; None is torch's own.
        key: Where a sample has its key; None numbers the samples.
        mask: Where a batch keeps the mask of its tokens; None looks in the usual places.
        forward: Calls the teacher with a batch; None calls it with the batch's inputs.
        teacher_inputs: Makes the teacher's inputs of the batch's, or their place in the batch.
        device: Where the teacher runs; None leaves it where it is.
        allow_stale_augmentation: Whether samples that change between reads are accepted.
        shard_bytes: Approximate size of a shard.

    Raises:
        CacheError: If a setting is wrong, or samples change between reads.
        ValueError: If a layer does not exist, or outputs do not fit the codec.
    """

    def __init__(
        self,
        teacher: nn.Module,
        dataset: Any,
        *,
        storage: Storage,
        layers: Sequence[str | Tap] = (),
        outputs: bool = True,
        views: int = 1,
        transform_seed: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        key: Key | None = None,
        mask: Mask | None = None,
        forward: Forward | None = None,
        teacher_inputs: Place = None,
        device: torch.device | str | None = None,
        allow_stale_augmentation: bool = False,
        shard_bytes: int = 64 * 2**20,
    ) -> None:
        self.keys = None if key is None else SampleKeys(key)
        self.is_stream = isinstance(dataset, IterableDataset)
        if self.is_stream and self.keys is None:
            raise CacheError(
                f"Expected `key` to be given for a stream, whose samples have no numbers, but got None with a"
                f" {type(dataset).__name__}. Pass key=<a column, or a function of the sample>, or key=content_key."
            )
        if not self.is_stream and not hasattr(dataset, "__len__"):
            raise CacheError(
                "Expected a map-style dataset with a length, or an IterableDataset with key=..., but got"
                f" {type(dataset).__name__}. Give it `__len__` and `__getitem__`."
            )
        if not self.is_stream and not len(dataset):
            raise CacheError("Expected a dataset of at least one sample, but it is empty.")
        if self.keys is not None and (views > 1 or transform_seed is not None):
            raise CacheError(
                "Expected `views` to be 1 and `transform_seed` None for rows with keys, but got"
                f" views={views} and transform_seed={transform_seed}. Leave out `key`."
            )
        if not isinstance(teacher, nn.Module):
            raise CacheError(
                f"Expected `teacher` to be a module, whose outputs stay the same, but got {type(teacher).__name__}."
            )
        self.teacher, self.dataset = teacher, dataset
        self.forward, self.teacher_inputs = forward, teacher_inputs
        # features are kept as the layers return them: the terms' own taps arrange them when they are read
        self.taps = [replace(Tap.of(layer), layout=None, prefix_tokens=None) for layer in layers]
        places = [(tap.layer, tap.where) for tap in self.taps]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise CacheError(
                f"Expected `layers` to name the {twice[1]} of each layer once, but got {twice[0]!r} twice. Build a"
                " cache for each, or name the layers that follow."
            )
        self.outputs, self.batch_size = outputs, batch_size
        self._num_workers, self._mask = num_workers, mask
        self.streamed = 0  # number of samples of a stream, once it has been read
        self._places: dict[str, Mask] = {}
        self._collate = BuildCollate(collate_fn or torch.utils.data.default_collate, self.keys)
        if forward is not None and teacher_inputs is not None:
            raise CacheError("Expected `forward` or `teacher_inputs`, but got both. Let `forward` change the inputs.")
        if views > 1 and transform_seed is None:
            raise CacheError(f"Expected `transform_seed` to be given with views={views}, but got None. Pass a number.")
        if not outputs and not self.taps:
            raise CacheError("Expected something to keep, but got outputs=False and no layers. Name layers.")
        self.frozen = Hold(teacher)
        self.recorder = Recorder(teacher, self.taps, "teacher")
        self.recorder.check((f"layers[{index}]", tap) for index, tap in enumerate(self.taps))
        try:
            with together():  # the data may change between reads in one process and not in another
                stale = self._check_data(transform_seed, allow_stale_augmentation)
                self.frozen.take(checks.device("device", device, present=True))
                self.manifest = self._described(views, transform_seed, storage, stale, shard_bytes)
        except BaseException:
            self.close()
            raise

    def _check_data(self, transform_seed: int | None, allow: bool) -> bool:
        """Check that samples stay the same between reads; whether they change."""
        if self.keys is None or (not self.is_stream and self.keys.key is not content_key):
            return check_repeatable(self.dataset, transform_seed, allow)
        if self.is_stream and process_rank()[1] > 1:
            raise CacheError(
                f"Expected one process for a stream, but got {process_rank()[1]}. Build the cache in one process, or"
                " give the dataset `__len__` and `__getitem__`."
            )
        # changed samples have another digest: training refuses them
        return self.keys.key is not content_key and check_stream(self.dataset, self.keys, allow)

    def close(self) -> None:
        """Restore the teacher."""
        self.recorder.clear()
        self.frozen.release()

    def shards(self, writer: Writer, numbers: Sequence[int], progress: Progress | None = None) -> Shards:
        """Run the teacher for some shards, one after the other, or for all that a stream still has.

        Args:
            writer: Writes the shards.
            numbers: Numbers of the shards; not used for a stream.
            progress: Progress bar, or None.

        Yields:
            The number and the batches of each shard; the batches must be consumed before the next shard.
        """
        numbers = [] if self.is_stream else numbers
        batches = [batch for shard in numbers for batch in self._batches(shard)]
        total = None if self.is_stream else sum(map(len, batches))
        task = None if progress is None else progress.add_task("teacher", total=total)

        def advance(samples: int) -> None:
            if progress is not None and task is not None:
                progress.advance(task, samples)

        if self.is_stream and not writer.manifest.length:  # otherwise the cache is complete
            stream = Stream(self._loader(None, self._num_workers), writer, self._rows, advance)
            yield from stream.shards()
            self.streamed = stream.length
        loaded: Iterator[Loaded] = iter(self._loader(batches, self._num_workers)) if batches else iter(())

        def rows(shard: int) -> Iterator[Rows]:
            for batch in self._batches(shard):
                yield self._rows(next(loaded))
                advance(len(batch))

        for shard in numbers:
            yield shard, rows(shard)

    def words(self, writer: Writer) -> str:
        """The size of the cache, for the user."""
        if self.is_stream:
            return f"a stream, about {self.row_bytes:,.0f} bytes a row"
        about = "about " if self._places else ""  # the lengths of a first batch
        rows, missing = self.manifest.rows, len(writer.missing)
        size = f"{rows:,} rows, {about}{rows * self.row_bytes / 2**20:,.1f} MiB"
        return f"{size} in {self.manifest.shards} shards; {missing} to build"

    def _batches(self, shard: int) -> list[list[int]]:
        # always the same batches for a shard: results depend on the batch by rounding
        rows = self.manifest.shard_range(shard)
        return [list(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]

    def _loader(self, batches: list[list[int]] | None, workers: int) -> DataLoader[Any]:
        if batches is None:
            return DataLoader(self.dataset, self.batch_size, num_workers=workers, collate_fn=self._collate)
        data = self.dataset if self.keys is not None else self._attached
        return DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=self._collate)

    def _described(self, views: int, seed: int | None, storage: Storage, stale: bool, shard_bytes: int) -> Manifest:
        """The manifest, with the shapes from a first batch."""
        length = 0 if self.is_stream else len(self.dataset)
        if not self.is_stream:
            self._attached = AttachedDataset(self.dataset, length, seed)
        codes = None if self.is_stream else [list(range(min(self.batch_size, length)))]
        loaded: Loaded | None = next(iter(self._loader(codes, 0)), None)
        if loaded is None:
            raise CacheError("Expected a stream of at least one sample, but it is empty.")
        first = self._rows(loaded, describe=True)
        storage.check_scores(first)
        self.first_keys = first.get("key")
        arrays: dict[str, dict[str, Any]] = {}
        for name, rows in first.items():
            if name == "key":
                continue
            shape = (rows.values if isinstance(rows, Ragged) else rows).shape[1:]
            arrays[name] = storage.describe(name, shape, channels_first=True)
            if name in self._places:
                place = self._places[name]
                arrays[name]["ragged"] = None if callable(place) else place
        manifest = Manifest(
            length=length,
            views=views,
            shard_rows=self.batch_size,
            arrays=arrays,
            layers={f"feature{index}": f"{tap.layer}|{tap.where}" for index, tap in enumerate(self.taps)},
            teacher=described_teacher(self.teacher, self.teacher_inputs),
            data={
                "fingerprint": BY_KEY if self.keys else data_fingerprint(self.dataset, seed, stale),
                "transform_seed": seed,
                "stale": stale,
                "kind": "torch",
            },
            versions={name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            key=None if self.keys is None else self.keys.described,
        )
        self.row_bytes = mean_bytes(manifest, first)
        batches = max(1, int(shard_bytes / max(self.row_bytes * self.batch_size, 1)))
        return replace(manifest, shard_rows=batches * self.batch_size)

    def _rows(self, loaded: Loaded, describe: bool = False) -> Rows:
        """The rows of each array for a batch, from the teacher's outputs.

        Args:
            loaded: The batch.
            describe: Whether it is the first batch, which tells which arrays have positions of tokens.
        """
        device = next((parameter.device for parameter in self.teacher.parameters()), torch.device("cpu"))
        # a copy, since a teacher may change its inputs in place: those of the data set, and those that are compared
        batch = map_tensors(loaded.batch, lambda tensor: tensor.to(device, copy=True))
        with torch.no_grad(), Recording([self.recorder]):
            if self.forward is not None:
                output = self.forward(self.teacher, batch)
            else:
                without_keys = batch if self.keys is None else self.keys.removed(batch, loaded.keys)
                output = call_teacher(self.teacher, without_keys, self.teacher_inputs)
        call = self.recorder.calls[-1] if self.recorder.calls else Call((), {}, who="teacher")
        call.output = output
        kept = {f"feature{index}": call.feature(tap) for index, tap in enumerate(self.taps)}
        if self.outputs:
            kept["output"] = select(output, None, "the teacher's output")
        decoder = is_seq2seq(call)
        self.recorder.clear()
        rows: Rows = {}
        for name, tensor in kept.items():
            if tensor.ndim == 0 or len(tensor) != loaded.number:
                raise CacheError(
                    f"Expected {name!r} to have one entry for each of the {loaded.number} items of a batch, but got"
                    f" shape {tuple(tensor.shape)}. Pass forward=... to call the teacher in another way."
                )
            if describe:
                place = place_of(tensor, batch, self._mask, decoder and name == "output", name)
                if place is not None:
                    self._places[name] = place
            rows[name] = self._of_tokens(name, tensor.detach(), batch)
        if describe and self._mask is not None and not self._places:
            shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
            raise CacheError(
                f"Expected `mask` to give the places of the tokens in {shapes}, but got mask={self._mask!r}, where the"
                " batch has no mask of such a shape (batch, tokens). Pass a key, an index, or a function of the batch."
            )
        if loaded.keys is not None:
            mask = tokens_in(loaded.batch, next(iter(self._places.values()), None))
            seen = input_digests(loaded.batch, mask, range(loaded.number))
            rows["key"] = np.stack([loaded.keys, seen], -1)
        return rows

    def _of_tokens(self, name: str, tensor: Tensor, batch: Any) -> Any:
        """The rows of an array; those of sequences without padding."""
        if name in self._places:
            mask = needed_mask(batch, self._places[name]).to(tensor.device)
            if tensor.shape[:2] != mask.shape:
                raise CacheError(
                    f"Expected {name!r} to have a position for each of the {tuple(mask.shape)} tokens, but got shape"
                    f" {tuple(tensor.shape)}. Pass forward=... to call the teacher in another way."
                )
            return Ragged(as_numbers(name, as_array(tensor[mask])), mask.sum(1).cpu().numpy())
        manifest: Manifest | None = getattr(self, "manifest", None)
        if manifest is not None and list(tensor.shape[1:]) != manifest.arrays[name]["shape"]:
            raise CacheError(
                f"Expected {name!r} to have rows of the shape {tuple(manifest.arrays[name]['shape'])} in every batch,"
                f" but got {tuple(tensor.shape[1:])}. For sequences of differing length put `attention_mask` into the"
                " batch, or pass mask=<key, index, or a function of the batch that returns the mask of the tokens>."
            )
        return as_numbers(name, as_array(tensor))
