"""Divergences of two softmaxes in the fastest of four ways that the tensors and their device allow.

1. ``plain``: the formulas, for small logits and whatever PyTorch can do with a formula: ``torch.compile``, which fuses
   it, ``torch.func``, forward mode, subclasses of tensors. A gradient that is differentiated again comes from it too.
2. ``saved``: on a CPU, gradients computed with the values in chunks of rows, and kept for the backward pass.
3. ``analytic``: gradients written out for the backward pass, for large logits; nothing of their size is kept.
4. ``triton_rows``: the same in a kernel that reads the logits once or twice, for large logits on a GPU. The
   environment variable ``DISTILL_KERNELS=0`` turns it off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_distill import compat
from lightning_distill.functional.inputs import Reduction, reduced
from lightning_distill.functional.kernels import analytic, plain, saved
from lightning_distill.functional.kernels.settings import Divergence
from lightning_distill.functional.primitives import is_ordinary

# Logits of fewer numbers take a GPU no longer than the launches of any way; on a CPU their gradient may be kept.
_LARGE = 2**22
_SMALL = 2**17  # on a CPU, the plain formulas of fewer numbers take no longer than the call of an autograd function
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it once


def divergence(
    student: Tensor,
    teacher: Tensor,
    settings: Divergence,
    dim: int = -1,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Divergence of each row of logits or their mean, with a gradient for the student.

    Args:
        student: Logits of any shape; minus infinity is a probability of 0.
        teacher: The teacher's logits, same shape, without a gradient. Half precision is read as it is; the
            arithmetic is float32, or float64 if one of the two is.
        settings: The divergence.
        dim: Dimension of the classes.
        mask: True where a row counts, the shape without ``dim``; None where all count.
        reduction: "none" or "mean".

    Returns:
        Divergence in nats, the shape without ``dim``, 0 in rows that do not count; or the mean over those that do.

    Raises:
        ValueError: If ``reduction`` is unknown.
    """
    learned = isinstance(settings.temperature, Tensor)  # the other ways have no gradient for it
    way = plain if learned else _way(student, teacher, settings, dim)
    if way is plain:
        return plain.divergence(student, teacher, settings, dim, mask, reduction)
    return reduced(_pair(student, teacher, settings, way, dim, mask)[0], mask, reduction)


def divergence_and_cross_entropy(
    student: Tensor, teacher: Tensor, labels: Tensor, settings: Divergence, dim: int = -1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Divergence of each row and cross entropy of its label, from one pass over the student's logits.

    Args:
        student: As in :func:`divergence`.
        teacher: As in :func:`divergence`.
        labels: Class index of each row, int64, less than the number of classes; negative where a row has no label.
        settings: The divergence.
        dim: Dimension of the classes.
        mask: True where the divergence counts; the cross entropy counts in every row with a label.

    Returns:
        Divergence of each row as in :func:`divergence`, and cross entropy at a temperature of 1 in nats, 0 in rows
        without a label.
    """
    way = _way(student, teacher, settings, dim)
    # The sums of the reverse divergence leave out classes that the cross entropy has.
    if way in (plain, saved) or settings.kind == "reverse_kl":
        return divergence(student, teacher, settings, dim, mask), plain.cross_entropy(student, labels, dim)
    return _pair(student, teacher, settings, way, dim, mask, labels)


def softmax_divergence(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax from the teacher's, of features of any size.

    Args:
        student: Scores of any shape; minus infinity is a probability of 0.
        teacher: Scores of the same shape; they get no gradient.
        dim: Dimension of the softmax.

    Returns:
        Divergence in nats, the shape without ``dim``; 0 where all scores are minus infinity.
    """
    teacher, settings = teacher.detach(), Divergence("forward_kl")
    if _is_saved(student) and is_ordinary(student, teacher):
        return _pair(student, teacher, settings, saved, dim)[0]
    return plain.divergence(student, teacher, settings, dim, None)


def rows_in_place_for(student: Tensor, teacher: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The kernel for a loss that owns its logits and needs nothing but their gradient.

    Args:
        student: Logits, shape ``(N, C)``.
        teacher: The teacher's logits, same shape.

    Returns:
        :func:`.triton_rows.rows_in_place`, or None if it cannot be used for such logits on their device.
    """
    kernels = _triton_rows(student.device.type)
    usable = kernels is not None and is_ordinary(student, teacher) and kernels.accepts(student, teacher, -1)
    return kernels.rows_in_place if kernels is not None and usable else None


def _way(student: Tensor, teacher: Tensor, settings: Divergence, dim: int) -> ModuleType:
    """The module that computes a divergence of logits."""
    device = student.device.type
    is_large = student.numel() >= _LARGE or _is_interpreted(device)
    if torch.compiler.is_compiling() or device == "meta" or not (is_large or _is_saved(student)):
        return plain
    if not is_ordinary(student, teacher):
        return plain
    if not is_large:
        return saved
    kernels = _triton_rows(device)
    return analytic if kernels is None or not kernels.accepts(student, teacher, dim) else kernels


def _is_saved(student: Tensor) -> bool:
    """Whether a gradient that is kept pays off."""
    is_on_cpu = student.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_on_cpu and student.numel() >= _SMALL and student.requires_grad and torch.is_grad_enabled()


def _pair(
    student: Tensor,
    teacher: Tensor,
    settings: Divergence,
    way: ModuleType,
    dim: int,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergences, and the cross entropies if there are labels, from a way with a gradient of its own."""
    pair: tuple[Tensor, Tensor] = compat.applied(
        _Divergence, student.movedim(dim, -1), teacher.movedim(dim, -1), mask, labels, settings, way
    )
    return pair


def _is_interpreted(device: str) -> bool:
    """Whether the environment asks for Triton's interpreter, which runs on the CPU."""
    return device == "cpu" and _INTERPRETED


@functools.cache
def _triton_rows(device: str) -> ModuleType | None:
    """The kernels, which run on a GPU, or in Triton's interpreter where the environment asks for it."""
    usable = device == "cuda" or _is_interpreted(device)
    if not usable or os.environ.get("DISTILL_KERNELS") == "0" or importlib.util.find_spec("triton") is None:
        return None
    from lightning_distill.functional.kernels import triton_rows

    return triton_rows


class _Divergence(torch.autograd.Function):
    """Values of one way; the gradient is computed in the backward pass, as often as there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        settings: Divergence,
        way: ModuleType,
    ) -> tuple[Tensor, Tensor | None]:
        values, task, numbers = way.statistics(student, teacher, settings, mask, labels)
        # Autograd does not save tensors from inference mode. They have no history: an attribute is as good.
        others = [(other, other is not None and other.is_inference()) for other in (teacher, mask, labels)]
        ctx.from_inference = [other if is_inference else None for other, is_inference in others]
        ctx.save_for_backward(student, numbers, *(None if is_inference else other for other, is_inference in others))
        ctx.settings, ctx.way = settings, way
        return values, task

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, task_upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        student, numbers, *others = ctx.saved_tensors
        teacher, mask, labels = (
            other if from_inference is None else from_inference
            for other, from_inference in zip(others, ctx.from_inference, strict=True)
        )
        settings, again = ctx.settings, torch.is_grad_enabled()
        if not again and not compat.transforms_are_active(upstream):
            gradient = ctx.way.gradient(student, teacher, numbers, settings, mask, labels, upstream, task_upstream)
            return gradient, *[None] * 5
        with torch.enable_grad():  # to be differentiated again, or for many upstream gradients at once
            values = [plain.divergence(student, teacher, settings, -1, mask)]
            if labels is not None:
                values.append(plain.cross_entropy(student, labels, -1))
        upstreams = [upstream, task_upstream][: len(values)]
        return *torch.autograd.grad(values, student, upstreams, create_graph=again), *[None] * 5
