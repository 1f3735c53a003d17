"""One row for every situation of the divergences over a vocabulary, and the check that every way must pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import oracle_divergences as oracle
import torch
from torch import Tensor

from lightning_distill.functional.kernels import Divergence, dispatch, plain, saved

SHARES = {"jensen_shannon": 0.3, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
KINDS = (*("forward_kl", "cross_entropy", "reverse_kl", "total_variation"), *SHARES)
# A gradient's relative error when it is stored; Triton's interpreter cuts bfloat16 off instead of rounding it.
HALVES = {torch.bfloat16: 2**-7, torch.float16: 2**-11}


@dataclass(frozen=True)
class KernelCase:
    """One situation.

    Attributes:
        kind: The divergence.
        classes: How many there are.
        temperature: Softening.
        dtype: Type of both models' logits, or of the student's where ``teacher_dtype`` is set.
        teacher_dtype: Type of the teacher's; None for the student's.
        impossible: Whose last classes are minus infinity: "student", "teacher", "both" or nobody's.
        masked: Whether some rows do not count.
        labelled: Whether the cross entropy of labels is computed beside the divergence.
        layout: "rows", "sequence" for a part of longer sequences, "pixels" for classes that do not lie next to each
            other, or "odd" for rows that do not begin at a multiple of 16 bytes.
    """

    kind: str
    classes: int = 37
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    impossible: str = ""
    masked: bool = False
    labelled: bool = False
    layout: str = "rows"

    def __str__(self) -> str:
        """Everything that differs from the defaults."""
        words = [self.kind, str(self.classes), f"T{self.temperature:g}", str(self.dtype)[6:], self.impossible]
        words += ["masked" * self.masked, "labelled" * self.labelled, self.layout if self.layout != "rows" else ""]
        return "-".join(filter(None, words))

    @property
    def settings(self) -> Divergence:
        return Divergence(self.kind, SHARES.get(self.kind, 0.0), self.temperature)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both models' logits with the classes last, in rows of one or two dimensions."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (scale * torch.randn(self._shape, generator=generator) for scale in (2.0, 3.0))
        teacher = teacher + 20
        for who, logits in (("student", student), ("teacher", teacher)):
            if self.impossible in (who, "both"):
                logits.movedim(self._dim, -1)[..., -max(self.classes // 5, 1) :] = -math.inf
        pair = student.to(self.dtype), teacher.to(self.teacher_dtype or self.dtype)
        student, teacher = (self._arranged(logits.movedim(self._dim, -1)) for logits in pair)
        return student, teacher

    @property
    def _shape(self) -> tuple[int, ...]:
        return {"sequence": (2, 3, self.classes), "pixels": (2, self.classes, 2, 2)}.get(self.layout, (4, self.classes))

    @property
    def _dim(self) -> int:
        return 1 if self.layout == "pixels" else -1

    def _arranged(self, logits: Tensor) -> Tensor:
        if self.layout == "sequence":
            return logits[:, :-1]
        if self.layout == "odd":
            wider = torch.zeros(len(logits), self.classes + 3, dtype=logits.dtype)
            wider[:, 1:-2] = logits
            return wider[:, 1:-2]
        return logits

    def rows(self, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """The mask and the labels: a row of either kind alone, of both and of neither."""
        index = torch.arange(shape.numel()).view(shape)
        labels = torch.where(index % 4 < 2, (7 * index) % self.classes, -100)
        return index % 2 == 0 if self.masked else None, labels if self.labelled else None


def check(case: KernelCase, way: ModuleType) -> None:
    """Values and gradient of one way, against float64."""
    student, teacher = case.logits()
    mask, labels = case.rows(student.shape[:-1])
    student = student.detach().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    upstreams = [torch.rand(student.shape[:-1], generator=generator) for _ in range(2)]

    values, task = computed(way, student, teacher, case.settings, mask, labels)
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    total = (values * upstreams[0]).sum()
    if task is not None:
        total = total + (task * upstreams[1]).sum()
    total.backward(retain_graph=True)
    first, student.grad = student.grad, None
    total.backward()

    torch.testing.assert_close(student.grad, first, rtol=0, atol=0)  # a second use of the graph
    assert first.dtype == case.dtype
    slack = 10.0 if way is plain else 1.0  # its softmax divides by T first, and sums up without care
    compare(case, [values, task], first, upstreams, (student, teacher), mask, labels, slack)


def check_in_place(case: KernelCase, rows_in_place: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Values, and the gradient where the student's logits were, against float64."""
    student, teacher = case.logits()
    mask, labels = case.rows(student.shape[:-1])
    weights = None if mask is None else torch.where(mask, 0.5, 0.0)
    gradient = student.clone()
    values, task = rows_in_place(gradient, teacher, case.settings, weights=weights, labels=labels, task_weight=0.25)
    upstreams = [torch.ones(len(student)) if weights is None else weights, torch.full((len(student),), 0.25)]
    compare(case, [values, task], gradient, upstreams, (student, teacher), mask, labels)


def computed(
    way: ModuleType, student: Tensor, teacher: Tensor, settings: Divergence, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if way in (plain, saved):
        task = None if labels is None else plain.cross_entropy(student, labels, -1)
        if way is plain:
            return plain.divergence(student, teacher, settings, -1, mask), task
        return dispatch._Divergence.apply(student, teacher, mask, None, settings, saved)[0], task
    return dispatch._Divergence.apply(student, teacher, mask, labels, settings, way)


def compare(
    case: KernelCase,
    values: list[Tensor | None],
    gradient: Tensor,
    upstreams: list[Tensor],
    logits: tuple[Tensor, Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    slack: float = 1.0,
) -> None:
    wide, teacher = (tensor.detach().double().flatten(0, -2) for tensor in logits)
    wide.requires_grad_()
    divergence = oracle.divergence(case.kind, wide, teacher, case.settings.share, case.temperature)
    rows = [divergence if mask is None else torch.where(mask.flatten(), divergence, 0.0)]
    rows += [] if labels is None else [oracle.cross_entropy(wide, labels.flatten())]
    total = sum((row * upstream.double().flatten()).sum() for row, upstream in zip(rows, upstreams, strict=False))
    if not torch.isfinite(total):  # a class that is impossible to one model only
        assert all(torch.isfinite(tensor).all() for tensor in (values[0], gradient))
        return
    total.backward()
    for value, row in zip(values, rows, strict=False):
        limits = {"rtol": slack * 1e-6, "atol": slack * 1e-6 / min(case.temperature, 1)}
        torch.testing.assert_close(value.double().flatten(), row.detach(), **limits)
    expected = wide.grad.view(gradient.shape)
    error = (gradient.double() - expected).norm(dim=-1)
    terms = divergence.detach().abs().clamp(min=1).view(error.shape) / case.temperature  # which cancel each other
    limit = (2e-6 * slack + HALVES.get(case.dtype, 0.0)) * (expected.norm(dim=-1) + 0.1 * terms)
    assert (error <= limit).all(), (error / limit).max()
    hidden = gradient[~mask & (labels < 0 if labels is not None else True)] if mask is not None else gradient[:0]
    assert (hidden == 0).all()


def small_cases() -> Iterator[KernelCase]:
    """Situations for every way, the interpreter too."""
    for kind in KINDS:
        yield KernelCase(kind, labelled=True, masked=True, temperature=2.0)
        yield KernelCase(kind, impossible="student")
        yield KernelCase(kind, impossible="teacher", temperature=0.05)
    for kind in ("forward_kl", "jensen_shannon"):
        yield KernelCase(kind, temperature=0.05)
        yield KernelCase(kind, temperature=100.0)
        yield KernelCase(kind, impossible="both", labelled=True)
        yield KernelCase(kind, classes=2)
        yield KernelCase(kind, classes=1003, layout="odd")
        yield KernelCase(kind, dtype=torch.bfloat16, classes=64)
        yield KernelCase(kind, dtype=torch.float16, teacher_dtype=torch.float32, classes=64)
        yield KernelCase(kind, layout="sequence", masked=True, classes=40)
    yield KernelCase("reverse_kl", layout="pixels")


def large_cases() -> Iterator[KernelCase]:
    """Situations for the ways that PyTorch runs, in which a chunk is less than a row, or many."""
    for kind in KINDS:
        for classes in (2, 3, 1000, 50257, 128256):
            yield KernelCase(kind, classes=classes)
        for temperature in (0.05, 4.0, 100.0):
            yield KernelCase(kind, temperature=temperature, classes=1003)
            yield KernelCase(kind, temperature=temperature, impossible="both")
        for dtype in HALVES:
            yield KernelCase(kind, dtype=dtype, classes=1000)
        for layout in ("odd", "sequence", "pixels"):
            yield KernelCase(kind, layout=layout, masked=True, labelled=True)
