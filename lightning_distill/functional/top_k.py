"""Distributions with only their likeliest classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
    logits = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    # over the others themselves: 1 minus the sum of the k would lose all digits where the student is sure
    others = temperature * (logits.scatter(-1, teacher.indices, -math.inf) / temperature).logsumexp(-1, keepdim=True)
    student = torch.cat([logits.gather(-1, teacher.indices), others], -1)
    number = math.log(teacher.classes - teacher.indices.shape[-1])
    teacher_merged = torch.cat([teacher.logs / temperature, (teacher.tail - number) / temperature + number], -1)
    return student, temperature * teacher_merged
