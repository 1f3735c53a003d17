"""One process, several together, or a Trainer, that build a cache or a part of it."""

from __future__ import annotations

import contextlib
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from distill_core.locks import locked
from distill_core.parts import WHOLE, Part
from distill_core.remote import building
from distill_core.store import CacheError, Writer, begin, check_folder
from lightning_distill.cache.builder import Builder
from lightning_distill.cache.predicting import predict
from lightning_distill.cache.ranks import process_rank, together


def build(
    teacher: nn.Module,
    dataset: Any,
    path: str | PathLike[str],
    *,
    trainer: Trainer | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> None:
    """Run the teacher over the data and write a cache, or a part of it.

    Args:
        teacher: The teacher.
        dataset: The data.
        path: The folder, or its URL.
        trainer: Runs the build inside its ``predict``; None runs it here.
        device: Where the teacher runs; None leaves it where it is, or where the Trainer puts it.
        **settings: ``part``, ``resume``, ``progress``, and the settings of :class:`Builder`.

    Raises:
        CacheError: As in :meth:`TeacherCache.build`.
    """
    work = partial(_built, teacher, dataset, path, device=device, **settings)
    if trainer is None:
        work()
    else:
        predict(trainer, teacher, device, work)


def _built(
    teacher: nn.Module,
    dataset: Any,
    path: str | PathLike[str],
    *,
    resume: bool = True,
    progress: bool = True,
    part: Part = WHOLE,
    **settings: Any,
) -> None:
    builder = Builder(teacher, dataset, **settings)
    try:
        with together(), building(path, copies=process_rank()[0] == 0) as folder:
            _write(builder, folder, resume=resume, progress=progress, part=part)
    finally:
        builder.close()


def _write(builder: Builder, folder: Path, *, resume: bool, progress: bool, part: Part) -> None:
    """Write the cache, or a part of it.

    Args:
        builder: The build.
        folder: The folder of the cache.
        resume: Whether to complete a build that was begun.
        progress: Whether to print the size and show a progress bar.
        part: The part to write; the cache is complete once the folder holds all parts.

    Raises:
        CacheError: If another process builds there, the data of a part are a stream, or the folder holds something
            else.
        OSError: If the disk is full; complete shards stay, and resuming completes the cache.
    """
    # imported late: the import takes as long as that of this package
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if builder.is_stream and part != WHOLE:
        raise CacheError(
            f"Expected a data set with a length to build part {part.number} of {part.count}, but got a stream. Build it"
            " in one process."
        )
    rank, world = process_rank()
    with contextlib.ExitStack() as stack:
        with together():
            if rank == 0:
                check_folder(folder)
                stack.enter_context(locked(folder))
                begin(folder, builder.manifest, resume)
        with together():
            writer = Writer(folder, builder.manifest)
            if builder.first_keys is not None and not builder.manifest.data["stale"]:
                writer.check_inputs(builder.first_keys)
            # before any process writes: all must see the same shards missing
            numbers = part.chosen(writer.missing)[rank::world]
        console = Console(quiet=not (progress and rank == 0))
        console.print(builder.words(writer))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with together(), Progress(*columns, console=console, disable=console.quiet) as bar:
            for shard, batches in builder.shards(writer, numbers, bar):
                writer.write(shard, batches)
        with together():
            if rank == 0 and (part == WHOLE or not writer.missing):
                writer.finish(builder.streamed)
