"""What every formula does to its two tensors first: check them, choose the precision, cut the teacher's gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_distill import checks

Reduction = Literal["none", "mean"]


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
