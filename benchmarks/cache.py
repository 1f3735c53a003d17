"""The cost of a step with the teacher's outputs read from disk: ``python -m benchmarks.cache``.

Every arm is a real ``Trainer.fit`` with a shuffled DataLoader. The same student is trained alone, with the teacher
live, and from a cache of that teacher. Then the top-k codec by itself: bytes, fidelity, and time to decode.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Arm, Plan, Row, Tick, absolute, compare, interleave, prepare, repeat, report

if __name__ == "__main__":
    prepare("benchmarks.cache")

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.step_overhead import quiet_lightning
from benchmarks.workloads import Clock, ConvNet, trainer_for
from distill_core.codecs import TopKCodec
from lightning_distill import DistillCallback, TeacherCache

QUICK, FULL = Plan(2, 5, 1, 2), Plan(2, 10, 2, 2)
TIMES = (4, 10)  # how many times the student's arithmetic the teacher's is
# From DistillKit's documentation of its codec: classes kept, bytes a token
DISTILLKIT = {"budget": (50, 114), "recommended": (128, 300)}


@dataclass(frozen=True)
class Case:
    """A student, teachers of several sizes and data for them.

    Attributes:
        network: Makes the student (1) or a teacher of so many times its arithmetic.
        batch_size: Items in a batch.
        top_k: How the cache keeps outputs.
        dtype: The same.
        gate: Upper limit of the cached step's time over that of the student alone.
    """

    network: Callable[[int], nn.Module]
    data: TensorDataset
    batch_size: int
    top_k: int | None
    dtype: str
    gate: float


class LanguageModel(nn.Module):
    """A causal transformer over token indices (N, T); gives (N, T, vocabulary)."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


class Module(LightningModule):
    """The student alone: cross entropy of its last axis."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x).flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def images() -> Case:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(100, (512,)))
    return Case(lambda times: ConvNet(round(40 * times**0.5)), data, 32, None, "float16", gate=1.05)


def tokens() -> Case:
    torch.manual_seed(0)
    text = torch.randint(8192, (64, 129))
    data = TensorDataset(text[:, :-1], text[:, 1:])
    return Case(lambda times: LanguageModel(*{1: (256, 6)}.get(times, (512, 8)), 8192), data, 4, 50, "uint8", gate=1.10)


# Questions -----------------------------------------------------------------------------------------------------------


def fit(case: Case, student: nn.Module, teacher: Any) -> Arm:
    """An arm: steps of the student, alone or with a teacher, live or cached."""

    def arm(tick: Tick, units: int) -> None:
        torch.manual_seed(2)
        callbacks = [Clock(tick)] if teacher is None else [Clock(tick), DistillCallback(teacher)]
        sampler = RandomSampler(case.data, replacement=True, num_samples=(units + 1) * case.batch_size)
        loader = DataLoader(case.data, case.batch_size, sampler=sampler)
        trainer_for(callbacks).fit(Module(student), loader)

    return arm


def step_questions(name: str, case: Case, times: tuple[int, ...], plan: Plan) -> list[Row]:
    """The steps before and after: with the teacher live, and from its cache."""
    student = case.network(1)
    arms = {"plain": fit(case, student, None)}
    with tempfile.TemporaryDirectory() as folder:
        for factor in times:
            teacher = case.network(factor).eval()
            cache = TeacherCache.build(
                teacher, case.data, Path(folder, str(factor)), top_k=case.top_k, dtype=case.dtype, progress=False
            )
            arms[f"live {factor}"], arms[f"cached {factor}"] = fit(case, student, teacher), fit(case, student, cache)
        runs = interleave(arms, plan, name)
    rows = [absolute(f"{name}: plain step", runs, "plain", "student alone, for scale")]
    for factor in times:
        label = f"{name}, teacher {factor}x"
        rows.append(compare(f"{label}: live / plain", runs, f"live {factor}", "plain"))
        rows.append(compare(f"{label}: cached / plain", runs, f"cached {factor}", "plain", gate=case.gate))
    return rows


def language_like(rows: int, classes: int) -> np.ndarray:
    """Logits that fall with the logarithm of the rank, some rows steeply, as a language model's do."""
    random = np.random.default_rng(0)
    steep = random.uniform(0.8, 2.5, (rows, 1))
    logits = -steep * np.log(np.arange(1, classes + 1)) + 0.3 * random.standard_normal((rows, classes))
    return random.permuted(logits, axis=1).astype("float32")


def codec_questions(plan: Plan) -> list[Row]:
    """Bytes, fidelity and decoding of the top-k codec."""
    rows = []
    for classes, dtype, gate in ((128_000, "uint8", 165), (128_000, "float16", 210), (1000, "uint8", 120)):
        codec, logits = TopKCodec((classes,), 50, dtype), language_like(256, classes)
        stored = codec.encode(logits)
        label = f"{classes} classes, k=50, {dtype}"
        rows.append(Row(f"{label}: bytes a token", codec.bytes_per_item, "bytes", gate=gate))
        divergence, apart = fidelity(codec, logits, stored)
        rows.append(Row(f"{label}: mean KL over k + 1 outcomes", divergence, "nats", gate=1e-3))
        rows.append(Row(f"{label}: mean |delta log p|", apart, "nats", gate=0.03))
        many = {name: np.concatenate([part] * 16) for name, part in stored.items()}
        number = len(many["tail"])
        timings = interleave({"decode": repeat(lambda index, c=codec, m=many: c.decode(m))}, plan, label)["decode"]
        micro = sorted(1e6 * timing.cpu / number for timing in timings)[len(timings) // 2]
        rows.append(Row(f"{label}: decoding a token", micro, "us", gate=1.0, note=f"{1 / micro:.1f} million a second"))
    for pick, (k, size) in DISTILLKIT.items():
        codec_bytes = TopKCodec((128_000,), k, "uint8").bytes_per_item
        note = f"{pick} setting, k={k}: about {size} bytes by its documentation, {codec_bytes} here. Not installed."
        rows.append(Row(f"peer DistillKit, {pick}: bytes a token here / there", codec_bytes / size, "x", note=note))
    return rows


def fidelity(codec: TopKCodec, logits: np.ndarray, stored: dict[str, np.ndarray]) -> tuple[float, float]:
    """Mean divergence of the decoded outputs from the teacher's, over k + 1 outcomes, and mean error of log p."""
    indices, logs, tail = codec.decode(stored)
    exact = logits.astype("float64")
    exact -= np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True)) + exact.max(-1, keepdims=True)
    kept = np.take_along_axis(exact, indices, -1)
    others = np.log(-np.expm1(np.log(np.exp(kept).sum(-1, keepdims=True))))
    teacher_logs, decoded_logs = np.concatenate([kept, others], -1), np.concatenate([logs, tail], -1).astype("float64")
    decoded_logs -= np.log(np.exp(decoded_logs).sum(-1, keepdims=True))
    return float((np.exp(teacher_logs) * (teacher_logs - decoded_logs)).sum(-1).mean()), float(
        np.abs(kept - logs).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=Path("cache.json"), help="where to write the figures")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    quiet_lightning()
    rows = [
        *step_questions("images", images(), TIMES, plan),
        *step_questions("language model", tokens(), TIMES[:1], plan),
        *codec_questions(plan),
    ]
    report("The cost of a cached teacher", rows, arguments.json, asdict(plan))


if __name__ == "__main__":
    main()
