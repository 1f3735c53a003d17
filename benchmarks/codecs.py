"""Bytes, errors and speed of the ways to store a language model's outputs: ``python -m benchmarks.codecs``.

The logits are those of the language demonstration's teacher and student, trained for a few minutes with vocabularies of
32,768 and 128,000 tokens, whose probabilities are still spread over many tokens; and drawn ones that fall with the
logarithm of the rank, steeply in some rows, as those of a large model do, with noise for the student. The gradient is
that of the student's head over all tokens, for SoftTargetLoss at temperature 1; its cosine is taken with the gradient
from the whole distributions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from benchmarks.timing import prepare

if __name__ == "__main__":
    prepare("benchmarks.codecs")

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cache import fidelity, language_like
from benchmarks.demo_logits import Logits, demo_logits
from benchmarks.step_overhead import quiet_lightning
from distill_core.codecs import FullCodec, ScaledCodec, TopKCodec
from distill_core.sampled import NOTHING, SampledCodec

FEATURES = 1024
DEMONSTRATION, DRAWN = "demonstration", "drawn"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        logits: Where the logits come from; ``"features"`` for features.
        classes: Number of classes, or of channels of a feature.
        setting: How numbers are stored.
        bytes: Bytes of a token.
        divergence: Mean KL divergence of what is read from the teacher's distribution over the same outcomes, in nats;
            None where classes are drawn at random, and for features.
        loss_error: Mean difference of SoftTargetLoss from its value for the whole distributions, in nats; of features
            the root of the mean squared error, as a share of their standard deviation.
        cosine: Cosine of the gradient of the student's head; None for features.
        encoded: Thousand tokens encoded in a second on one core.
        decoded: Thousand tokens decoded in a second on one core.
    """

    logits: str
    classes: int
    setting: str
    bytes: float
    divergence: float | None
    loss_error: float
    cosine: float | None
    encoded: float | None
    decoded: float | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted, dtype="float64").sum(-1, keepdims=True))


class Tokens:
    """The teacher's and the student's distributions for some tokens, and a gradient to compare with.

    Args:
        known: Logits of both networks.
    """

    def __init__(self, known: Logits) -> None:
        self.logits, self.hidden = known.teacher, known.hidden
        self.teacher, self.student = log_softmax(known.teacher), log_softmax(known.student)
        self.value = float((np.exp(self.teacher) * (self.teacher - self.student)).sum(-1).mean())
        self.gradient = self.head(np.exp(self.student) - np.exp(self.teacher))

    def head(self, difference: np.ndarray) -> np.ndarray:
        """The gradient of the head, from that of the logits."""
        return difference.T.astype("float32") @ self.hidden

    def compared(self, indices: np.ndarray, logs: np.ndarray, tail: np.ndarray) -> tuple[float, float]:
        """The error of the loss, and the cosine of the gradient, over the known classes and all others together."""
        known = np.take_along_axis(self.student, indices, -1)
        others = np.log(np.maximum(-np.expm1(np.log(np.exp(known).sum(-1, keepdims=True))), 1e-30))
        p, q = np.concatenate([logs, tail], -1).astype("float64"), np.concatenate([known, others], -1)
        value = float((np.exp(p) * (p - q)).sum(-1).mean())
        difference = np.exp(self.student)  # of the others: shared like the student's own
        share = np.exp(tail.astype("float64")) - np.exp(others)
        difference *= -share / np.exp(others)
        np.put_along_axis(difference, indices, np.exp(known) - np.exp(logs.astype("float64")), -1)
        return value - self.value, self.cosine(self.head(difference))

    def cosine(self, gradient: np.ndarray) -> float:
        a, b = gradient.ravel().astype("float64"), self.gradient.ravel().astype("float64")
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def speeds(codec: Any, values: np.ndarray, shard: bool = False) -> tuple[dict[str, np.ndarray], float, float | None]:
    """The stored arrays, and thousand tokens encoded and decoded in a second; None if they are not decoded."""
    started = time.process_time()
    stored = codec.encode(values)
    if codec.decode(stored) is stored["values"]:  # nothing is decoded
        return stored, len(values) / (time.process_time() - started) / 1e3, None
    encoded = len(values) / (time.process_time() - started) / 1e3
    times = 32
    many = {
        name: np.broadcast_to(part, (times * len(values), *part.shape[1:]))
        if shard and name == "scale"
        else np.concatenate([part] * times)
        for name, part in stored.items()
    }
    best = np.inf
    for _ in range(3):
        started = time.process_time()
        codec.decode(many)
        best = min(best, time.process_time() - started)
    return stored, encoded, times * len(values) / best / 1e3


def drawn(number: int, classes: int) -> Logits:
    """Drawn logits, and hidden states as wide as those of the demonstration's student."""
    random, teacher = np.random.default_rng(1), language_like(number, classes)
    student = teacher + 0.7 * random.standard_normal(teacher.shape, "float32")
    return Logits(teacher, student, random.standard_normal((number, 64), "float32"))


def outputs(name: str, known: Logits) -> list[Result]:
    """The codecs of outputs, and the paper's draws with replacement."""
    tokens, results, classes = Tokens(known), list[Result](), known.teacher.shape[1]
    full = FullCodec((classes,), "float16")
    stored, encoded, decoded = speeds(full, tokens.logits)
    logs = log_softmax(full.decode(stored).astype("float32"))
    error = float((np.exp(logs) * (logs - tokens.student)).sum(-1).mean()) - tokens.value
    cosine = tokens.cosine(tokens.head(np.exp(tokens.student) - np.exp(logs)))
    apart = float((np.exp(tokens.teacher) * (tokens.teacher - logs)).sum(-1).mean())
    results.append(Result(name, classes, "all, float16", full.bytes_per_item, apart, error, cosine, encoded, decoded))
    for label, codec in (
        ("top_k=50, float16", TopKCodec((classes,), 50, "float16")),
        ("top_k=50, uint8", TopKCodec((classes,), 50, "uint8")),
        ("top_k=11, uint8", TopKCodec((classes,), 11, "uint8")),
        ("sampled=12", SampledCodec((classes,), 12)),
        ("sampled=18", SampledCodec((classes,), 18)),
        ("sampled=50", SampledCodec((classes,), 50)),
    ):
        stored, encoded, decoded = speeds(codec, tokens.logits)
        compared = tokens.compared(*codec.decode(stored))
        divergence = fidelity(codec, tokens.logits, stored)[0] if isinstance(codec, TopKCodec) else None
        results.append(Result(name, classes, label, codec.bytes_per_item, divergence, *compared, encoded, decoded))
    results.append(with_replacement(name, tokens, classes, 50))
    return results


def with_replacement(name: str, tokens: Tokens, classes: int, draws: int) -> Result:
    """Draws with replacement, as in arXiv:2503.16870: 3 bytes for each distinct class and its count."""
    random, rows = np.random.default_rng(2), []
    for logs in tokens.teacher:
        p = np.exp(logs)
        rows.append(np.unique(random.choice(classes, draws, p=p / p.sum()), return_counts=True))
    width = max(len(indices) for indices, _ in rows)
    indices, logs = np.zeros((len(rows), width), "int64"), np.full((len(rows), width), NOTHING)
    for row, (drawn, counts) in enumerate(rows):
        unused = np.setdiff1d(np.arange(draws + width), drawn)[: width - len(drawn)]
        indices[row] = np.concatenate([drawn, unused])
        logs[row, : len(drawn)] = np.log(counts / draws)
    size = 3 * float(np.mean([len(drawn) for drawn, _ in rows]))
    compared = tokens.compared(indices, logs, np.full((len(rows), 1), NOTHING))
    return Result(name, classes, f"paper: {draws} draws with replacement", size, None, *compared, None, None)


def features(number: int) -> list[Result]:
    """The codecs of features, whose channels have scales of several orders of magnitude."""
    random = np.random.default_rng(0)
    values = random.standard_normal((number, FEATURES), "float32") * np.exp(random.normal(0, 2, FEATURES))
    values = values.astype("float32")
    results = []
    for label, codec in (
        ("features, float16", FullCodec((FEATURES,), "float16")),
        ("features, uint8", ScaledCodec((FEATURES,), 0)),
    ):
        stored, encoded, decoded = speeds(codec, values, shard=True)
        stored = {name: np.broadcast_to(part, (number, *part.shape[1:])) for name, part in stored.items()}
        wrong = (codec.decode(stored).astype("float32") - values) / values.std(0)
        error = float(np.sqrt(np.square(wrong).mean()))
        results.append(Result("features", FEATURES, label, codec.bytes_per_item, None, error, None, encoded, decoded))
    return results


def table(results: list[Result]) -> Table:
    """The results for the terminal."""
    heads = ("logits", "classes", "setting", "bytes a token", "KL", "error of the loss", "cosine", "encoded", "decoded")
    shown = Table(*heads)
    for result in results:
        speed = [
            "" if value is None else f"{value:,.0f} k tokens/s" if value >= 10 else f"{value:,.1f} k tokens/s"
            for value in (result.encoded, result.decoded)
        ]
        cosine = "" if result.cosine is None else f"{result.cosine:.5f}"
        divergence = "" if result.divergence is None else f"{result.divergence:.1e}"
        row = (f"{result.classes:,}", result.setting, f"{result.bytes:,.0f}", divergence, f"{result.loss_error:.1e}")
        shown.add_row(result.logits, *row, cosine, *speed)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens of tiny networks")
    parser.add_argument("--json", type=Path, default=Path("codecs.json"), help="where to write the figures")
    arguments = parser.parse_args()
    quiet_lightning()
    number, results, settings = 64 if arguments.quick else 256, list[Result](), dict[str, Any]()
    for classes in (32_768, 128_000):
        known = demo_logits(number, classes, arguments.quick)
        settings[f"nats of teacher and student, {classes}"] = known.losses
        settings[f"steps of teacher and student, {classes}"] = known.steps
        results += outputs(DEMONSTRATION, known)
        results += outputs(DRAWN, drawn(number, classes))
    results += features(16 * number)
    Console().print(table(results))
    settings["tokens"] = number
    write_record(arguments.json, "Ways to store a language model's outputs", results, settings)


if __name__ == "__main__":
    main()
