"""Distributions with only their likeliest classes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_distill import compat
from lightning_distill.functional.inputs import savable
from lightning_distill.functional.kernels.pieces import pieces
from lightning_distill.functional.primitives import LEAST_SCORE, bounded, is_ordinary

_LARGE = 2**17  # numbers from which a chunk at a time is faster


class TopK(NamedTuple):
    """The k likeliest classes of each row.

    Attributes:
        indices: Their indices, int64, shape ``(..., k)``.
        logs: Their log-probabilities in nats, shape ``(..., k)``.
        tail: The log-probability of all other classes together, shape ``(..., 1)``.
        classes: Number of all classes.
    """

    indices: Tensor
    logs: Tensor
    tail: Tensor
    classes: int


class Sampled(TopK):
    """Classes drawn at random from each row, with probabilities whose mean over the draws is the teacher's.

    All other classes have probability 0: ``tail`` is a large negative number.
    """

    __slots__ = ()


def merge_classes(student_logits: Tensor, teacher: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    r"""Logits over k + 1 outcomes: the teacher's k likeliest classes, and all others together.

    .. math:: z_i, \quad i \le k; \qquad z_{k+1} = T \log \sum_{i > k} \exp(z_i / T)

    Any divergence of the two results at that temperature is the one between the merged distributions. Only the sum of
    the teacher's other classes is known; to soften it, they are assumed to be equally likely.

    Args:
        student_logits: Logits of the student, shape ``(..., C)``.
        teacher: The teacher's likeliest classes for the same rows.
        temperature: Softening at which the divergence will be taken, greater than 0.

    Returns:
        The student's and the teacher's logits, both ``(..., k + 1)``.

    Raises:
        ValueError: If the numbers of classes or the rows differ.

    Example:
        >>> teacher = TopK(torch.tensor([[2]]), torch.tensor([[0.5]]).log(), torch.tensor([[0.5]]).log(), classes=3)
        >>> student, _ = merge_classes(torch.tensor([[0.1, 0.3, 0.6]]).log(), teacher, temperature=1.0)
        >>> student.exp()
        tensor([[0.6000, 0.4000]])
    """
    rows = teacher.indices.shape[:-1]
    if student_logits.shape != (*rows, teacher.classes):
        raise ValueError(
            f"Expected `student_logits` to have the teacher's shape {(*rows, teacher.classes)}, but got"
            f" {tuple(student_logits.shape)}. The cache comes from another teacher or other data. For a larger"
            " vocabulary build it with forward=<a function that returns the classes which both have>."
        )
    indices = savable(teacher.indices)
    is_small = student_logits.numel() < _LARGE or isinstance(temperature, Tensor)  # which may get a gradient
    if is_small or torch.compiler.is_compiling() or not is_ordinary(student_logits):
        student = _merged(student_logits, indices, temperature)
    else:
        student = compat.applied(_Merged, student_logits, indices, temperature)
    number = math.log(teacher.classes - teacher.indices.shape[-1])
    teacher_merged = torch.cat([teacher.logs / temperature, (teacher.tail - number) / temperature + number], -1)
    return student, temperature * teacher_merged


def _merged(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    logits = bounded(logits if logits.dtype == torch.float64 else logits.float())
    # over the others themselves: 1 minus the sum of the k would lose all digits where the student is sure
    others = temperature * (logits.scatter(-1, indices, LEAST_SCORE) / temperature).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), others], -1)


class _Merged(torch.autograd.Function):
    """The same in chunks of rows, of which nothing of the logits' size is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        merged = logits.new_empty(*indices.shape[:-1], indices.shape[-1] + 1, dtype=dtype)
        for part, chosen, result in pieces(logits, indices, merged):
            scores = part.to(dtype).clamp(min=LEAST_SCORE)
            result[..., :-1] = scores.gather(-1, chosen)
            largest = scores.scatter_(-1, chosen, LEAST_SCORE).amax(-1, keepdim=True)
            total = scores.sub_(largest).div_(temperature).exp_().sum(-1, keepdim=True)
            result[..., -1:] = largest + temperature * total.log()
        ctx.save_for_backward(logits, indices, merged)
        ctx.temperature = temperature
        return merged

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, indices, merged = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or compat.transforms_are_active(upstream):  # to be differentiated again, or for many at once
            with torch.enable_grad():
                values = _merged(logits, indices, ctx.temperature)
            return *torch.autograd.grad(values, logits, upstream, create_graph=again), None, None
        gradient = torch.empty_like(logits)
        for part, chosen, result, up, slope in pieces(logits, indices, merged, upstream, gradient):
            shares = slope if slope.dtype == merged.dtype else None
            shares = torch.sub(part, result[..., -1:], out=shares).div_(ctx.temperature).exp_().mul_(up[..., -1:])
            of_chosen = up[..., :-1].masked_fill(part.gather(-1, chosen) < LEAST_SCORE, 0.0)
            shares.scatter_(-1, chosen, 0.0).scatter_add_(-1, chosen, of_chosen)
            if shares is not slope:
                slope.copy_(shares)
        return gradient, None, None
