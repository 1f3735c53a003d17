"""Time and memory of the losses on one device: ``python -m benchmarks --device cuda``.

Forward and backward pass of the losses and of the papers' plain formulas, and at vocabulary size of the formulas under
``torch.compile`` and of Liger's losses if liger-kernel is installed, on the same tensors. Milliseconds are medians;
extra memory is the peak beyond the inputs and the student's gradient. With ``--device cpu`` the inputs are tiny: it
shows that everything runs.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import loss_formulas
from benchmarks.device_timing import IN_A_ROW, ROUNDS, Measured, measured_step, show_steps
from benchmarks.loss_cases import CASES, SMALL
from benchmarks.record import write_record
from lightning_distill import functional, losses
from lightning_distill.functional.kernels import Divergence, divergence_and_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]
VOCABULARY = {"cuda": (8192, 50304), "cpu": (64, 1000)}


@dataclass(frozen=True)
class Question:
    """One loss and the ways to compute it.

    Attributes:
        name: First column.
        shape: Shape of both models' tensors.
        dtype: Their type.
        arms: The losses by name; "library" and "formula" among them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    arms: dict[str, Loss]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_between(student.float().log_softmax(-1), teacher.float().log_softmax(-1))


def kl_between(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    return 0.5 * kl_between(log_p, log_m) + 0.5 * kl_between(log_q, log_m)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.float().softmax(-1) - teacher.float().softmax(-1)).abs().sum(-1).mean()


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """DKD with a temperature of 4, weights 1 and 8, as the authors' code computes it."""
    chosen = F.one_hot(labels, student.shape[1]).bool()
    pairs, rest = [], []
    for logits in (student / 4, teacher / 4):
        own = (logits.softmax(1) * chosen).sum(1, keepdim=True)
        pairs.append(torch.cat([own, 1 - own], dim=1).log())
        rest.append((logits - 1000.0 * chosen).log_softmax(1))
    divergences = (F.kl_div(*logarithms, reduction="batchmean", log_target=True) for logarithms in (pairs, rest))
    return 16 * sum(weight * divergence for weight, divergence in zip((1, 8), divergences, strict=True))


def with_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    divergence, task = divergence_and_cross_entropy(student, teacher, labels, Divergence("forward_kl"))
    return divergence.mean() + task.mean()


def questions(device: str) -> Iterator[Question]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = VOCABULARY[device]
    labels = torch.randint(shape[1], shape[:1])
    soft_targets = partial(functional.soft_target_kl, temperature=1.0, reduction="mean")
    pairs: dict[str, tuple[Loss, Loss]] = {
        "KL": (soft_targets, kl),
        "reverse KL": (partial(functional.reverse_kl, reduction="mean"), reverse_kl),
        "generalized JSD": (partial(functional.generalized_jsd, reduction="mean"), jensen_shannon),
        "total variation": (partial(functional.total_variation, reduction="mean"), total_variation),
        "KL and cross entropy": (
            partial(with_cross_entropy, labels=labels),
            lambda student, teacher: kl(student, teacher) + F.cross_entropy(student.float(), labels),
        ),
    }
    for name, (library, formula) in pairs.items():
        arms = {"library": library, "formula": formula, "compiled formula": torch.compile(formula, dynamic=False)}
        yield Question(f"{name}, logits", shape, dtype, arms | liger_arms(name))
    for name, case in CASES.items():
        shape = case.timed or case.shape
        shape = shape if device == "cuda" else SMALL.get(shape, (8, 16, *shape[2:]))
        formula = getattr(loss_formulas, case.formula)
        yield Question(
            name, shape, torch.float32, {"library": getattr(losses, case.loss)(**case.settings), "formula": formula}
        )
    few = torch.randint(1000, (256,))
    formula = partial(decoupled, labels=few)
    library = partial(losses.DecoupledKDLoss(), labels=few)
    yield Question("decoupled", (256, 1000), torch.float32, {"library": library, "formula": formula})


def liger_arms(name: str) -> dict[str, Loss]:
    """Liger's losses, which take log-probabilities, if liger-kernel is installed and has the loss."""
    if importlib.util.find_spec("liger_kernel") is None or name not in ("KL", "generalized JSD"):
        return {}
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True) if name == "KL" else LigerJSD(beta=0.5)
    return {"liger": lambda student, teacher: loss(student.float().log_softmax(-1), teacher.float().log_softmax(-1))}


def measured(question: Question, arm: str, device: str) -> Measured:
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(question.shape, dtype=question.dtype, generator=generator, device=device) for _ in range(2)
    )
    student.requires_grad_()

    def step() -> Tensor:
        student.grad = None
        value = question.arms[arm](student, teacher)
        value.backward()
        return value.detach()

    shape = f"{'x'.join(map(str, question.shape))} {str(question.dtype).removeprefix('torch.')}"
    return measured_step(question.name, arm, step, device, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(VOCABULARY), default="cuda")
    parser.add_argument("--only", default="", help="questions with this in their name")
    parser.add_argument("--json", type=Path, default=Path("on_device.json"), help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    rows = [
        measured(question, arm, arguments.device)
        for question in questions(arguments.device)
        if arguments.only in question.name
        for arm in question.arms
    ]
    title = "Losses on one device"
    show_steps(title, rows, "formula")
    settings = {"device": arguments.device, "rounds": ROUNDS[arguments.device], "steps in a row": IN_A_ROW}
    write_record(arguments.json, title, rows, settings, arguments.device)


if __name__ == "__main__":
    main()
