"""The cost of aligning the tokens of two tokenizers, beside a step: ``python -m benchmarks.token_alignment``.

The rows are files of the language demonstration's text, the models its teacher and student. The collate function of
``CrossTokenizerDistillation`` is compared with torch's own, and the difference with a step, both on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, prepare, report

if __name__ == "__main__":
    prepare("benchmarks.token_alignment")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_distill import CrossTokenizerDistillation, Distiller
from lightning_distill.demo.language.networks import GPT
from lightning_distill.demo.language.text import source_files, train_tokenizer
from lightning_distill.demo.language.training import Settings

VOCABULARIES = 1024, 4096  # of student and teacher
ROUNDS = 3


class Model(nn.Module):
    """The demonstration's network, called by keyword."""

    def __init__(self, vocabulary: int, length: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = GPT(vocabulary, length, *size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids)
        return logits


def seconds(work: Callable[[], Any]) -> float:
    """The least processor time of a few rounds, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def rows_of(sequences: int, tokens: int) -> list[Row]:
    """The figures for a batch.

    Args:
        sequences: Number of rows.
        tokens: Number of the student's tokens of each row.
    """
    texts = [path.read_text("utf-8") for path in source_files()["train"]]
    own, other = (train_tokenizer(texts, vocabulary) for vocabulary in VOCABULARIES)
    encoded = (own.encode(text).ids for text in texts)
    samples = [torch.tensor(ids[:tokens]) for ids in encoded if len(ids) >= tokens][:sequences]
    batch = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in samples]
    settings, rows = Settings(), []
    for method in ("uld", "chunks"):
        term = CrossTokenizerDistillation(own, other, method)  # type: ignore[arg-type]
        collate = term.collate()
        student, teacher = (
            Model(vocabulary, 2 * tokens, size)
            for vocabulary, size in zip(VOCABULARIES, (settings.student_size, settings.teacher_size), strict=True)
        )
        distiller, collated = Distiller(student, teacher, term), collate(batch)

        def step(distiller: Any = distiller, student: nn.Module = student, collated: Any = collated) -> None:
            with distiller.record(batch=collated):
                logits = student(collated["input_ids"], collated["attention_mask"])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), collated["labels"][:, 1:].flatten())
            distiller.total(loss, collated).backward()

        aligning = seconds(lambda collate=collate: collate(batch)) - seconds(lambda: default_collate(batch))
        whole = seconds(step)
        rows.append(Row(f"{method}: alignment of a batch", 1000 * aligning, "ms"))
        rows.append(Row(f"{method}: a step", 1000 * whole, "ms"))
        rows.append(Row(f"{method}: alignment / a step", aligning / whole, "x", gate=0.05))
        distiller.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter rows")
    parser.add_argument("--json", type=Path, default=Path("token_alignment.json"), help="where to write the figures")
    arguments = parser.parse_args()
    sequences, tokens = (4, 128) if arguments.quick else (16, 1024)
    settings = {"sequences": sequences, "tokens": tokens, "vocabularies": VOCABULARIES}
    report("Aligning two tokenizers", rows_of(sequences, tokens), arguments.json, settings)


if __name__ == "__main__":
    main()
