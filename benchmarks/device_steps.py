"""Whole steps on one device, against the same by hand: ``python -m benchmarks --device cuda``.

The loss from hidden states and heads, and training steps of Lightning: a ResNet-18 from a ResNet-50, an MLP whose step
is all launches, and a GPT from a larger one. With ``--device cpu`` everything is tiny: it shows that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.device_timing import Measured, measured_step, show_steps, wait_for
from benchmarks.record import write_record
from benchmarks.step_overhead import quiet_lightning
from benchmarks.timing import Plan, Row, interleave, repeat, show_rows
from benchmarks.workloads import (
    MLP,
    ConvNet,
    HandWritten,
    Plain,
    Premade,
    Workload,
    callback,
    fit,
    forward_arm,
    trainer_for,
)
from lightning_distill import DistillCallback, FusedLinearDistillation, SequenceDistillation
from lightning_distill.functional import fused_linear_divergence, soft_target_kl

ACCELERATORS = {"cuda": "gpu", "cpu": "cpu"}
# The work of a GPU takes wall time.
absolute, compare = partial(timing.absolute, clock="wall"), partial(timing.compare, clock="wall")


@dataclass(frozen=True)
class Size:
    """Sizes on one device.

    Attributes:
        linear: Tokens, vocabulary, and the widths of the two models.
        images: Number and edge of the images.
        sequences: Number and length of the sequences.
        vocabulary: That of the language models.
        student: Width, layers and heads of the small language model.
        teacher: Those of the large one.
        steps: How long to measure each of the three kinds of steps.
    """

    linear: tuple[int, int, int, int]
    images: tuple[int, int]
    sequences: tuple[int, int]
    vocabulary: int
    student: tuple[int, int, int]
    teacher: tuple[int, int, int]
    steps: Plan


SIZES = {
    "cuda": Size(
        linear=(8192, 128256, 2048, 4096),
        images=(128, 224),
        sequences=(8, 1024),
        vocabulary=50304,
        student=(768, 12, 12),
        teacher=(1024, 24, 16),
        steps=Plan(block=5, rounds=9, starts=1, warmup=5),
    ),
    "cpu": Size(
        linear=(64, 1000, 16, 32),
        images=(2, 32),
        sequences=(2, 16),
        vocabulary=200,
        student=(16, 1, 2),
        teacher=(32, 2, 2),
        steps=Plan(block=1, rounds=2, starts=1, warmup=1),
    ),
}
PRODUCTS = "matrix products alone"
LAUNCHES = {"cuda": Plan(block=50, rounds=9, starts=1, warmup=50), "cpu": Plan(1, 2, 1, 1)}


# Hidden states and heads ---------------------------------------------------------------------------------------------


def linear_rows(device: str) -> list[Measured]:
    """The loss from hidden states and heads, its matrix products alone, and the loss of dense logits."""
    tokens, vocabulary, width, teacher_width = SIZES[device].linear
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    new = partial(torch.randn, dtype=dtype)
    student, teacher = new(tokens, width).requires_grad_(), new(tokens, teacher_width)
    weight = (new(vocabulary, width) / width**0.5).requires_grad_()
    teacher_weight = new(vocabulary, teacher_width) / teacher_width**0.5
    tensors = (student, weight, teacher, teacher_weight)
    labels, half = torch.randint(vocabulary, (tokens,)), torch.arange(tokens) % 2 == 0
    name = "linear and KL"
    shape = f"{tokens} tokens, vocabulary {vocabulary}, hidden sizes {width} and {teacher_width}"

    def fused(**settings: Any) -> Callable[[], Tensor]:
        return lambda: fused_linear_divergence(*tensors, **settings)

    def dense() -> Tensor:
        return soft_target_kl(
            F.linear(student, weight), F.linear(teacher, teacher_weight), temperature=1.0, reduction="mean"
        )

    @torch.no_grad()
    def products(size: int) -> Tensor:
        by_hidden, by_weight = torch.empty_like(student), torch.zeros_like(weight)
        for start in range(0, tokens, size):
            rows = slice(start, start + size)
            gradient, _ = student[rows] @ weight.T, teacher[rows] @ teacher_weight.T
            torch.mm(gradient, weight, out=by_hidden[rows])
            by_weight.addmm_(gradient.T, student[rows])
        return by_weight[0, 0]

    ways: dict[str, Callable[[], Tensor]] = {
        **{f"{PRODUCTS}, {size} tokens at a time": partial(products, size) for size in (tokens // 8, tokens // 16)},
        "library": fused(),
        **{f"library, {size} tokens at a time": fused(chunk_size=size) for size in (tokens // 16, tokens // 4)},
        "library, generalized JSD": fused(divergence="jsd"),
        "library, KL and cross entropy": fused(labels=labels, task_weight=0.5),
        "library, half of the tokens": fused(mask=half),
        "dense logits": dense,
        **liger_ways(tensors),
    }

    def step(way: Callable[[], Tensor]) -> Tensor:
        student.grad = weight.grad = None
        value = way()
        if value.requires_grad:
            value.backward()
        return value.detach()

    rows = [measured_step(name, arm, partial(step, way), device, shape) for arm, way in ways.items()]
    student.grad = weight.grad = None
    weight.requires_grad_(False)
    return [*rows, measured_step(name, "library, frozen head", partial(step, fused()), device, shape)]


def liger_ways(tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """Liger's fused loss, if liger-kernel is installed and the tensors are on a GPU."""
    if importlib.util.find_spec("liger_kernel") is None or not tensors[0].is_cuda:
        return {}
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return {"liger, fused linear JSD with beta 0": lambda: loss(*tensors, None)}


# Steps of Lightning --------------------------------------------------------------------------------------------------


def image_networks() -> tuple[str, str]:
    """Names of the student and the teacher for images: those of torchvision, if it is installed."""
    installed = importlib.util.find_spec("torchvision") is not None
    return ("ResNet-18", "ResNet-50") if installed else ("a small ConvNet", "a ConvNet of twice the width")


def image_workload(device: str) -> Workload:
    number, edge = SIZES[device].images
    images, labels = torch.randn(number, 3, edge, edge, device=device), torch.randint(100, (number,), device=device)
    if importlib.util.find_spec("torchvision") is None:
        return Workload("conv", ConvNet(8).to(device), ConvNet(16).to(device).eval(), [(images, labels)])
    from torchvision.models import resnet18, resnet50

    student, teacher = (make(num_classes=100).to(device) for make in (resnet18, resnet50))
    return Workload("resnet", student, teacher.eval(), [(images, labels)])


def image_rows(device: str, compiled: bool) -> Iterator[Row]:
    """A network from a larger one in mixed precision, against a module written by hand."""
    work = image_workload(device)
    settings: dict[str, Any] = {"accelerator": ACCELERATORS[device], "precision": "bf16-mixed"}

    def teacher_alone() -> Any:
        network, images = copy.deepcopy(work.teacher), work.batches[0][0]

        @torch.no_grad()
        def forward(index: int) -> None:
            with torch.autocast(device, torch.bfloat16):
                network(images)

        return repeat(forward)

    arms = {
        "plain": fit(work, lambda: Plain(work), **settings),
        "teacher": teacher_alone(),
        "hand": fit(work, lambda: HandWritten(work, False), **settings),
        "logits": fit(work, lambda: Plain(work), lambda: callback(work), **settings),
        "hand features": fit(work, lambda: HandWritten(work, True), **settings),
        "features": fit(work, lambda: Plain(work), lambda: callback(work, True), **settings),
    }
    if compiled:
        arms["hand features, compiled"] = fit(work, lambda: compiled_network(HandWritten(work, True)), **settings)
        arms["features, compiled"] = fit(
            work, lambda: compiled_network(Plain(work)), lambda: callback(work, True), **settings
        )
    runs = interleave(arms, SIZES[device].steps, "images", partial(wait_for, device))
    yield from (absolute(f"images: {arm}", runs, arm) for arm in arms)
    yield compare("images: logits / by hand", runs, "logits", "hand", gate=1.01)
    yield compare("images: two features / by hand", runs, "features", "hand features", gate=1.01)
    if compiled:
        question = "images: compiled student, two features / by hand"
        yield compare(question, runs, "features, compiled", "hand features, compiled", gate=1.03)


def compiled_network(module: Plain) -> Plain:
    module.network.compile()
    return module


def mlp_rows(device: str) -> Iterator[Row]:
    """Steps that are all launches: milliseconds beyond a module written by hand."""
    batches = [(torch.randn(64, 64, device=device), torch.randint(10, (64,), device=device))]
    work = Workload("mlp", MLP(128).to(device), MLP(192).to(device).eval(), batches)
    settings = {"accelerator": ACCELERATORS[device]}
    arms = {
        "plain": fit(work, lambda: Plain(work), **settings),
        "hand": fit(work, lambda: HandWritten(work, False), **settings),
        "logits": fit(work, lambda: Plain(work), lambda: callback(work), **settings),
        "hand features": fit(work, lambda: HandWritten(work, True), **settings),
        "features": fit(work, lambda: Plain(work), lambda: callback(work, True), **settings),
    }
    runs = interleave(arms, LAUNCHES[device], "MLP", partial(wait_for, device))
    yield from (absolute(f"small MLP: {arm}", runs, arm) for arm in arms)
    yield compare("small MLP: logits - by hand", runs, "logits", "hand", unit="ms", gate=0.10)
    yield compare("small MLP: two features - by hand", runs, "features", "hand features", unit="ms", gate=0.40)


# Language models -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a GPT: causal attention, then two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).flatten(2))
        return x + self.outer(F.gelu(self.inner(self.norm2(x))))


class GPT(nn.Module):
    """Token indices (B, T) to logits (B, T, V)."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return self.lm_head(self.norm(self.blocks(embedded)))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


class LanguageModel(LightningModule):
    """The student alone."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(student)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return cross_entropy(self.network(batch["input_ids"]), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class WithoutLogits(LanguageModel):
    """The student whose loss the term makes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.network(batch["input_ids"])
        return None


class ByHand(LanguageModel):
    """The student and its distillation, as most people write it."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student)
        self.outside = [copy.deepcopy(teacher).eval().requires_grad_(False)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        logits = self.network(batch["input_ids"])
        with torch.no_grad():
            teacher_logits = self.outside[0](batch["input_ids"])
        log_q = F.log_softmax(logits[:, :-1].float(), -1).flatten(0, 1)
        log_p = F.log_softmax(teacher_logits[:, :-1].float(), -1).flatten(0, 1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return cross_entropy(logits, batch["labels"]) + divergence


def gpt_rows(device: str) -> Iterator[Row]:
    """A step of a GPT with cross entropy and forward KL to a larger one, everything in bfloat16."""
    size = SIZES[device]
    student, teacher = (
        GPT(size.vocabulary, size.sequences[1], *shape).to(device, torch.bfloat16)
        for shape in (size.student, size.teacher)
    )
    tokens = torch.randint(size.vocabulary, size.sequences, device=device)
    batches: Any = [{"input_ids": tokens, "labels": tokens}]
    work = Workload("gpt", student, teacher, batches)
    modules: dict[str, tuple[Callable[[], LightningModule], Callable[[], DistillCallback] | None]] = {
        "student": (lambda: LanguageModel(student), None),
        "hand": (lambda: ByHand(student, teacher), None),
        "SequenceDistillation": (
            lambda: LanguageModel(student),
            lambda: DistillCallback(copy.deepcopy(teacher), SequenceDistillation()),
        ),
        "FusedLinearDistillation": (
            lambda: WithoutLogits(student),
            lambda: DistillCallback(copy.deepcopy(teacher), FusedLinearDistillation(task_weight=1.0)),
        ),
    }
    settings: dict[str, Any] = {"accelerator": ACCELERATORS[device], "precision": "bf16-true"}
    if device == "cuda":
        for name, (module, distil) in modules.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            trainer_for([] if distil is None else [distil()], **settings).fit(module(), Premade(batches, 3))
            yield Row(f"GPT: {name}, peak memory", (torch.cuda.max_memory_allocated() - base) / 2**30, "GiB")
    arms = {name: fit(work, module, distil, **settings) for name, (module, distil) in modules.items()}
    arms["teacher"] = forward_arm(copy.deepcopy(teacher), [tokens])
    runs = interleave(arms, size.steps, "GPT", partial(wait_for, device))
    yield from (absolute(f"GPT: {arm}", runs, arm) for arm in arms)
    for arm in ("hand", "SequenceDistillation", "FusedLinearDistillation"):
        yield compare(f"GPT: {arm} / (student + teacher)", runs, arm, "student", "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--only", default="", help="questions with this in their name: linear, images, mlp or gpt")
    parser.add_argument("--compiled", action="store_true", help="images with a compiled student too")
    parser.add_argument("--json", type=Path, default=Path("device_steps.json"), help="where to write the figures")
    arguments = parser.parse_args()
    device = arguments.device
    quiet_lightning()
    torch.manual_seed(0)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    questions: dict[str, Callable[[], Any]] = {
        "linear": partial(linear_rows, device),
        "images": partial(image_rows, device, arguments.compiled),
        "mlp": partial(mlp_rows, device),
        "gpt": partial(gpt_rows, device),
    }
    written: list[Measured | Row] = []
    for name, question in questions.items():
        if arguments.only not in name:
            continue
        with torch.device(device) if name == "linear" else contextlib.nullcontext():
            rows = list(question())
        written += rows
        if name == "linear":
            show_steps("Hidden states and heads", rows, rows[0].arm)
        else:
            show_rows(f"Steps of Lightning: {name}", rows)
    settings = {"device": device, **asdict(SIZES[device]), "image networks": image_networks()}
    write_record(arguments.json, "Whole steps on one device", written, settings, device)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    main()
