"""What every formula does to its two tensors first: check them, choose the precision, cut the teacher's gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_distill import checks

Reduction = Literal["none", "mean"]
_LOGITS = ("student_logits", "teacher_logits")


def prepare(student: Tensor, teacher: Tensor, names: tuple[str, str] = ("student", "teacher")) -> tuple[Tensor, Tensor]:
    """Both tensors in one precision of at least float32, the teacher's detached.

    Args:
        student: The student's tensor, any shape.
        teacher: The teacher's tensor, any shape.
        names: What an error calls the two.

    Returns:
        The student's and the teacher's tensor, float32 where both are float32 or narrower, else float64.

    Raises:
        TypeError: If one of them is no floating point tensor.

    Example:
        >>> student, teacher = prepare(torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16))
        >>> student.dtype, teacher.dtype
        (torch.float32, torch.float32)
    """
    checks.floating(names[0], student)
    checks.floating(names[1], teacher)
    if student.dtype == teacher.dtype == torch.float32:  # by far the commonest: nothing to convert
        return student, teacher.detach() if teacher.requires_grad else teacher
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def prepare_logits(
    student_logits: Tensor, teacher_logits: Tensor, class_dim: int, *, at_least: int = 2
) -> tuple[Tensor, Tensor]:
    """Both models' logits as :func:`prepare` gives them, after a check of their shapes.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.
        at_least: The fewest classes that the formula makes sense for.

    Returns:
        The student's and the teacher's logits, float32 or float64.

    Raises:
        TypeError: If the logits are no floating point tensors, or ``class_dim`` is no int.
        ValueError: If the shapes differ, ``class_dim`` is no inner dimension, or there are too few classes.

    Example:
        >>> student, teacher = prepare_logits(torch.ones(2, 3, dtype=torch.float16), torch.zeros(2, 3), -1)
        >>> student.dtype, teacher.shape
        (torch.float32, torch.Size([2, 3]))
    """
    student, teacher = prepare(student_logits, teacher_logits, _LOGITS)
    checks.same_shape(student, teacher, names=_LOGITS, remedy="Both models must score the same classes.")
    shape = tuple(student.shape)
    if student.ndim < 2:
        expected = "`student_logits` to have a batch dimension and a class dimension"
        raise ValueError(checks.message(expected, f"shape {shape}", "Use unsqueeze(-1) for one score per example."))
    checks.inner_dim("class_dim", class_dim, student.ndim)
    if student.shape[class_dim] < at_least:
        # The softmax over one class is always 1: the loss would be zero whatever the student does.
        expected = f"`student_logits` to have at least {at_least} classes at class_dim={class_dim}"
        raise ValueError(checks.message(expected, f"shape {shape}", "Use LogitMSELoss for a single score."))
    return student, teacher


def prepare_labels(labels: Tensor, rows: Tensor) -> Tensor:
    """Class indices that fit the rows of logits, as int64.

    Args:
        labels: Class index of each row, shape ``(N, ...)``, from 0 to C - 1.
        rows: Logits with the classes last, shape ``(N, ..., C)``.

    Returns:
        The labels with a dimension of one at the end, ready to gather with, shape ``(N, ..., 1)``.

    Raises:
        TypeError: If the labels are no tensor of integers.
        ValueError: If there is not one label for each row.

    Example:
        >>> prepare_labels(torch.tensor([2, 0], dtype=torch.int32), torch.ones(2, 3))
        tensor([[2],
                [0]])
    """
    remedy = "Pass class indices; labels.argmax(-1) makes them from one-hot or mixed labels."
    if not isinstance(labels, Tensor):
        raise TypeError(checks.message("`labels` to be a tensor of class indices", f"a {type(labels).__name__}"))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(checks.message("`labels` to hold class indices", f"a tensor of {labels.dtype}", remedy))
    if labels.shape != rows.shape[:-1]:
        expected = f"`labels` to have one class index for each row of logits, shape {tuple(rows.shape[:-1])}"
        raise ValueError(checks.message(expected, f"shape {tuple(labels.shape)}", remedy))
    return labels.long().unsqueeze(-1)
