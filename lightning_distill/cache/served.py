"""A cache of the log-probabilities of a served model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from distill_core.arrays import manifest_of_outputs
from distill_core.codecs import Likeliest
from distill_core.columns import Array, Ragged
from distill_core.locks import locked
from distill_core.manifest import KEY
from distill_core.served import Answers, Question
from distill_core.storage import Storage
from distill_core.store import CacheError, Writer, begin, check_folder, fingerprint
from distill_core.terminal import short
from lightning_distill.cache.data import data_fingerprint
from lightning_distill.cache.keyed import Key, SampleKeys, input_digest, plain
from lightning_distill.cache.positions import Mask, noted_place

Tokens = str | int | Callable[[Any], Any]
_MEASURED = 256  # samples whose lengths tell the size of a row


class ServedTeacher:
    """A served model's answers for the samples of some data.

    Args:
        dataset: The data, map-style, with a length.
        answers: Asks for sequences.
        name: Name of the model, which :meth:`TeacherCache.open` and a resumed build compare.
        tokens: Where a sample has its tokens.
        key: Where a sample has its key; None numbers the samples.
        dtype: How log-probabilities are stored, ``"float16"`` or ``"uint8"``.
        mask: Where a batch of the training keeps the mask of its tokens.
        batch_size: Number of sequences in a request.
        requests: Number of requests at the same time.
        shard_bytes: Approximate size of a shard.

    Raises:
        CacheError: If a sample has no tokens, or a setting does not fit.
    """

    def __init__(
        self,
        dataset: Any,
        answers: Answers,
        *,
        name: str,
        tokens: Tokens,
        key: Key | None,
        dtype: str,
        mask: Mask | None,
        batch_size: int,
        requests: int,
        shard_bytes: int,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise CacheError(f"Expected a map-style dataset with a length, but got {type(dataset).__name__}.")
        for setting, value in (("batch_size", batch_size), ("requests", requests), ("shard_bytes", shard_bytes)):
            if type(value) is not int or value < 1:
                raise CacheError(
                    f"Expected `{setting}` to be a whole number of 1 or more, but got {setting}={value!r}."
                )
        self.dataset, self.answers, self.tokens = dataset, answers, tokens
        self.keys = None if key is None else SampleKeys(key)
        self.batch_size, self.requests = batch_size, requests
        manifest = manifest_of_outputs(
            len(dataset),
            {},
            kind="torch",
            data=None if key is not None else data_fingerprint(dataset, None, False),
            teacher={"class": "served model", "fingerprint": fingerprint([name])},
            key=None if self.keys is None else self.keys.described,
        )
        described = Storage(dtype, answers.top_k).describe("output", (answers.vocabulary,), channels_first=True)
        manifest = replace(manifest, arrays={"output": {**described, "ragged": noted_place(mask)}})
        lengths = [len(self.tokens_of(dataset[index])) for index in range(min(len(dataset), _MEASURED))]
        row_bytes = manifest.codecs["output"].bytes_per_item * float(np.mean(lengths))
        self.manifest = replace(manifest, shard_rows=max(batch_size, int(shard_bytes / max(row_bytes, 1))))

    def tokens_of(self, sample: Any) -> list[int]:
        """The tokens of a sample, without padding.

        Args:
            sample: The sample.

        Raises:
            CacheError: If it has none.
        """
        if callable(self.tokens):
            tokens = self.tokens(sample)
        else:
            try:
                tokens = sample[self.tokens]
            except (KeyError, IndexError, TypeError):
                names = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
                raise CacheError(
                    f"Expected every sample to have its tokens at tokens={self.tokens!r}, but got a sample of {names}."
                    " Pass tokens=<a column, an index, or a function of the sample>."
                ) from None
        numbers = np.asarray(tokens)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size:
            raise CacheError(
                f"Expected the tokens of a sample to be one or more whole numbers, but got {short(tokens)}. Tokenize"
                " the text first."
            )
        present = sample.get("attention_mask") if isinstance(sample, Mapping) and not callable(self.tokens) else None
        if present is not None:
            numbers = numbers[np.asarray(present).astype(bool)]
        counted: list[int] = numbers.tolist()
        return counted

    def build(self, folder: Path, *, resume: bool, progress: bool) -> None:
        """Ask for the shards that are missing, and write each once all its answers are there.

        Args:
            folder: The folder of the cache.
            resume: Whether a build that was begun is continued.
            progress: Whether to show a progress bar.

        Raises:
            CacheError: If answers stay missing or wrong, or the folder holds something else. Shards stay.
            OSError: If the disk is full.
        """
        from rich.progress import Progress  # imported late, as in the builder

        check_folder(folder)
        with locked(folder), Progress(disable=not progress) as bar, ThreadPoolExecutor(self.requests) as pool:
            begin(folder, self.manifest, resume)
            writer = Writer(folder, self.manifest)
            if self.keys is not None:
                writer.check_inputs(self._digests(*self._questions(range(min(self.batch_size, len(self.dataset))))))
            missing = writer.missing
            task = bar.add_task("answers", total=sum(len(self.manifest.shard_range(shard)) for shard in missing))
            for shard in missing:
                for _ in self._write(writer, shard, pool):
                    bar.advance(task, self.batch_size)
            writer.finish()

    def _write(self, writer: Writer, shard: int, pool: ThreadPoolExecutor) -> Iterator[None]:
        rows = self.manifest.shard_range(shard)
        questions = [
            self._questions(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)
        ]
        answered = []
        for answers in pool.map(self.answers, [asked for asked, _ in questions]):
            answered.append(answers)
            yield
        writer.write(
            shard,
            (self._batch(answers, asked, keys) for answers, (asked, keys) in zip(answered, questions, strict=True)),
        )

    def _questions(self, rows: range) -> tuple[list[Question], list[Any]]:
        """The questions about some rows, and the keys of their samples."""
        samples = [self.dataset[row] for row in rows]
        keys = list(rows) if self.keys is None else self.keys.values(samples)
        named = [str(key) if isinstance(key, (bytes, tuple)) else key for key in map(plain, keys)]
        return [
            Question(row, key, self.tokens_of(sample)) for row, key, sample in zip(rows, named, samples, strict=True)
        ], keys

    def _batch(
        self, answers: Sequence[Likeliest], questions: Sequence[Question], keys: Sequence[Any]
    ) -> dict[str, Any]:
        values = Likeliest(
            np.concatenate([answer.classes for answer in answers]),
            np.concatenate([answer.logs for answer in answers]),
            self.answers.vocabulary,
        )
        batch: dict[str, Any] = {"output": Ragged(values, np.array([len(answer.classes) for answer in answers]))}
        return batch if self.keys is None else {**batch, KEY: self._digests(questions, keys)}

    def _digests(self, questions: Sequence[Question], keys: Sequence[Any]) -> Array:
        """The digests of the keys and of the tokens of some samples."""
        seen = [input_digest(torch.tensor(question.tokens)) for question in questions]
        return np.stack([cast("SampleKeys", self.keys).digests(keys), np.array(seen, "uint64")], -1)
