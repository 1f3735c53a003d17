"""Run a teacher once over the data and store its outputs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from distill_core.codecs import Array
from distill_core.locks import locked
from distill_core.store import CacheError, Manifest, Writer, begin, check_folder, fingerprint
from lightning_distill.cache.data import (
    AttachedDataset,
    IndexedBatch,
    IndexedCollate,
    check_repeatable,
    data_fingerprint,
    tensor_bits,
)
from lightning_distill.cache.ranks import process_rank, together
from lightning_distill.recording import Call, Recorder, Recording, Tap, map_tensors, select
from lightning_distill.recording.batches import call_with, inputs_in
from lightning_distill.teachers.hold import Hold

if TYPE_CHECKING:
    from rich.progress import Progress

Forward = Callable[[nn.Module, Any], Any]


class Builder:
    """One build of a cache: its settings, and the manifest that follows from them.

    Args:
        teacher: The teacher.
        dataset: The data, map-style.
        layers: Layers whose features are kept.
        outputs: Whether the outputs are kept.
        top_k: Number of classes of each output that are kept; None keeps all.
        dtype: Precision of the stored numbers.
        views: Number of augmented views of each sample.
        transform_seed: Seed of the views.
        batch_size: Number of samples in a batch.
        num_workers: Number of worker processes that load data.
        collate_fn: Makes a batch of samples; None is torch's own.
        forward: Calls the teacher with a batch; None calls it with the batch's inputs.
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
        layers: Sequence[str | Tap],
        outputs: bool,
        top_k: int | None,
        dtype: str,
        views: int,
        transform_seed: int | None,
        batch_size: int,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        forward: Forward | None,
        device: torch.device | str | None,
        allow_stale_augmentation: bool,
        shard_bytes: int,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise CacheError(
                "Expected a map-style dataset with a length, whose samples have numbers, but got"
                f" {type(dataset).__name__}. Keep its samples in a list, or give it `__len__` and `__getitem__`."
            )
        self.teacher, self.forward = teacher, forward or call_teacher
        self.taps = [Tap.of(layer) for layer in layers]
        self.outputs, self.batch_size = outputs, batch_size
        self._num_workers = num_workers
        self._collate = IndexedCollate(collate_fn or torch.utils.data.default_collate)
        if views > 1 and transform_seed is None:
            raise CacheError(f"Expected `transform_seed` to be given with views={views}, but got None. Pass a number.")
        if not outputs and not self.taps:
            raise CacheError("Expected something to keep, but got outputs=False and no layers. Name layers.")
        if dtype == "uint8" and top_k is None:
            raise CacheError("Expected `dtype` to be float16, bfloat16 or float32 without top_k, but got 'uint8'.")
        self.frozen = Hold(teacher)
        self.recorder = Recorder(teacher, self.taps, "teacher")
        self.recorder.check((f"layers[{index}]", tap) for index, tap in enumerate(self.taps))
        try:
            with together():  # the data may change between reads in one process and not in another
                self.attached = AttachedDataset(dataset, len(dataset), transform_seed)
                stale = check_repeatable(dataset, transform_seed, allow_stale_augmentation)
                self.frozen.take(None if device is None else torch.device(device))
                self.manifest = self._described(views, top_k, dtype, stale, shard_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Restore the teacher."""
        self.recorder.clear()
        self.frozen.release()

    def shards(
        self, numbers: Sequence[int], progress: Progress | None = None
    ) -> Iterator[tuple[int, Iterator[dict[str, Array]]]]:
        """Run the teacher for some shards, one after the other.

        Args:
            numbers: Numbers of the shards.
            progress: Progress bar, or None.

        Yields:
            The number and the batches of each shard; the batches must be consumed before the next shard.
        """
        batches = [batch for shard in numbers for batch in self._batches(shard)]
        task = None if progress is None else progress.add_task("teacher", total=sum(map(len, batches)))
        loaded = iter(self._loader(batches, self._num_workers))

        def rows(shard: int) -> Iterator[dict[str, Array]]:
            for batch in self._batches(shard):
                yield self._rows(next(loaded))
                if progress is not None and task is not None:
                    progress.advance(task, len(batch))

        for shard in numbers:
            yield shard, rows(shard)

    def _batches(self, shard: int) -> list[list[int]]:
        # always the same batches for a shard: results depend on the batch by rounding
        rows = self.manifest.shard_range(shard)
        return [list(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]

    def _loader(self, batches: list[list[int]], workers: int) -> DataLoader[Any]:
        return DataLoader(self.attached, batch_sampler=batches, num_workers=workers, collate_fn=self._collate)

    def _described(self, views: int, top_k: int | None, dtype: str, stale: bool, shard_bytes: int) -> Manifest:
        """The manifest, with the shapes from a first batch."""
        codes = list(range(min(self.batch_size, len(self.attached))))
        first = self._rows(next(iter(self._loader([codes], 0))))
        arrays: dict[str, dict[str, Any]] = {}
        for name, rows in first.items():
            shape = list(rows.shape[1:])
            if name == "output" and top_k is not None:
                arrays[name] = {"shape": shape, "dtype": dtype, "top_k": top_k}
            else:
                arrays[name] = {"shape": shape, "dtype": "float16" if dtype == "uint8" else dtype}
        seed = self.attached.transform_seed
        whole = self.attached.dataset
        manifest = Manifest(
            length=len(whole),
            views=views,
            shard_rows=self.batch_size,
            arrays=arrays,
            layers={f"feature{index}": f"{tap.layer}|{tap.where}" for index, tap in enumerate(self.taps)},
            teacher={"class": type(self.teacher).__qualname__, "fingerprint": teacher_fingerprint(self.teacher)},
            data={
                "fingerprint": data_fingerprint(whole, seed, stale),
                "transform_seed": seed,
                "stale": stale,
                "kind": "torch",
            },
            versions={name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        )
        row = max(sum(codec.bytes_per_row for codec in manifest.codecs.values()), 1)
        batches = max(1, shard_bytes // (row * self.batch_size))
        return replace(manifest, shard_rows=batches * self.batch_size)

    def _rows(self, indexed: IndexedBatch) -> dict[str, Array]:
        """The rows of each array for a batch, from the teacher's outputs."""
        device = next((parameter.device for parameter in self.teacher.parameters()), torch.device("cpu"))
        batch = map_tensors(indexed.batch, lambda tensor: tensor.to(device))
        with torch.no_grad(), Recording([self.recorder]):
            output = self.forward(self.teacher, batch)
        call = self.recorder.calls[-1] if self.recorder.calls else Call((), {}, who="teacher")
        call.output = output
        kept = {f"feature{index}": call.feature(tap) for index, tap in enumerate(self.taps)}
        if self.outputs:
            kept["output"] = select(output, None, "the teacher's output")
        self.recorder.clear()
        for name, tensor in kept.items():
            if tensor.ndim == 0 or len(tensor) != len(indexed.rows):
                raise CacheError(
                    f"Expected {name!r} to have one entry for each of the {len(indexed.rows)} items of a batch, but got"
                    f" shape {tuple(tensor.shape)}. Pass forward=... to call the teacher in another way."
                )
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in kept.items()}


def build(builder: Builder, folder: Path, *, resume: bool, progress: bool) -> None:
    """Write the cache.

    Args:
        builder: The build.
        folder: The folder of the cache.
        resume: Whether to complete a build that was begun.
        progress: Whether to print the size and show a progress bar.

    Raises:
        CacheError: If another process builds there, or the folder holds something else.
        OSError: If the disk is full; complete shards stay, and resuming completes the cache.
    """
    # imported late: the import takes as long as that of this package
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rank, world = process_rank()
    with contextlib.ExitStack() as stack:
        with together():
            if rank == 0:
                check_folder(folder)
                stack.enter_context(locked(folder))
                begin(folder, builder.manifest, resume)
        with together():
            writer = Writer(folder, builder.manifest)
            missing = writer.missing
        console = Console(quiet=not (progress and rank == 0))
        size = f"{builder.manifest.rows:,} rows, {builder.manifest.bytes / 2**20:,.1f} MiB"
        console.print(f"{size} in {builder.manifest.shards} shards; {len(missing)} to build")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with together(), Progress(*columns, console=console, disable=console.quiet) as bar:
            for shard, batches in builder.shards(missing[rank::world], bar):
                writer.write(shard, batches)
        with together():
            if rank == 0:
                writer.finish()


def call_teacher(teacher: nn.Module, batch: Any) -> Any:
    """The teacher's output for a batch: called with the batch's inputs."""
    return call_with(teacher, inputs_in(batch))


def teacher_fingerprint(teacher: nn.Module) -> str:
    """A digest of a teacher's class, parameters and buffers.

    Args:
        teacher: The teacher.

    Returns:
        32 hexadecimal digits.
    """

    def parts() -> Iterator[Any]:
        yield type(teacher).__qualname__
        for name, value in teacher.state_dict().items():
            yield name
            if isinstance(value, Tensor):
                yield tensor_bits(value)

    return fingerprint(parts())
