"""The first steps of every formula: check both tensors, choose the precision, cut the teacher's gradient, mask."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_distill import checks

Reduction = Literal["none", "mean"]
IGNORE_INDEX = -100
_LOGITS = ("student_logits", "teacher_logits")


class Logits(NamedTuple):
    """Both models' logits, ready for a formula.

    Attributes:
        student: The student's logits.
        teacher: The teacher's logits, without a gradient.
        class_dim: The dimension of the classes, resolved.
        mask: True where a row counts, the shape of the logits without ``class_dim``; None where all rows count.
    """

    student: Tensor
    teacher: Tensor
    class_dim: int
    mask: Tensor | None


class LabelledLogits(NamedTuple):
    """Both models' logits with the classes last, and the class of each row.

    Attributes:
        student: The student's logits, shape ``(N, ..., C)``.
        teacher: The teacher's logits, same shape.
        target: Class index of each row, safe to gather with, shape ``(N, ..., 1)``; 0 in the rows that do not count.
        mask: True where a row counts, shape ``(N, ...)``.
        factor: 1, and NaN where a label names no class, shape ``(N, ...)``: a formula's values are multiplied by it.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    mask: Tensor
    factor: Tensor


def prepare(student: Tensor, teacher: Tensor, names: tuple[str, str] = ("student", "teacher")) -> tuple[Tensor, Tensor]:
    """Both tensors in one precision of at least float32, the teacher's detached.

    Args:
        student: The student's tensor, any shape.
        teacher: The teacher's tensor, any shape.
        names: Names of the two in an error.

    Returns:
        The student's and the teacher's tensor, float32 where both are float32 or narrower, else float64.

    Raises:
        TypeError: If one of them is not a floating point tensor.

    Example:
        >>> student, teacher = prepare(torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16))
        >>> student.dtype, teacher.dtype
        (torch.float32, torch.float32)
    """
    checks.floating(names[0], student)
    checks.floating(names[1], teacher)
    teacher = savable(teacher)
    if student.dtype == teacher.dtype == torch.float32:  # the most common case: nothing to convert
        return student, teacher.detach() if teacher.requires_grad else teacher
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def savable(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save: a copy of one that was made in inference mode, else the tensor itself.

    Args:
        tensor: Any tensor, such as an output of a teacher whose ``forward`` is decorated with
            ``torch.inference_mode()``.
    """
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def resolve_class_dim(logits: Tensor, class_dim: int | None = None, labels: Tensor | None = None) -> int:
    """Dimension of the classes: 1 for logits of four or more dimensions, else the last.

    With three dimensions, labels of shape ``(N, L)`` tell ``(N, C, L)`` from ``(N, L, C)`` where C and L differ; where
    they fit both or neither, the classes are the last dimension.

    Args:
        logits: Class scores, shape ``(N, ..., C)`` or ``(N, C, H, W)``.
        class_dim: The user's own choice, which takes precedence.
        labels: Class index of each row, where the loss has them.

    Returns:
        The dimension.

    Raises:
        TypeError: If ``class_dim`` is not an int.
        ValueError: If ``class_dim`` is not an inner dimension of the logits.

    Example:
        >>> resolve_class_dim(torch.ones(2, 5, 4, 4)), resolve_class_dim(torch.ones(2, 7, 5))
        (1, -1)
        >>> resolve_class_dim(torch.ones(2, 5, 7), labels=torch.zeros(2, 7, dtype=torch.int64))
        1
    """
    if class_dim is not None:
        checks.inner_dim("class_dim", class_dim, logits.ndim)
        return class_dim
    if logits.ndim >= 4:
        return 1
    if logits.ndim == 3 and isinstance(labels, Tensor) and labels.ndim == 2:
        examples, first, second = logits.shape
        if first != second and labels.shape == (examples, second):
            return 1
    return -1


def check_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_dim: int | None = None,
    *,
    mask: Tensor | None = None,
    at_least: int = 2,
    same_classes: bool = True,
) -> Logits:
    """Both models' logits as they are, after a check of their types and shapes; the teacher's without a gradient.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``.
        at_least: The fewest classes that the formula makes sense for.
        same_classes: Whether both models must score the same classes. False compares two vocabularies, whose sizes may
            differ.

    Returns:
        The logits, the dimension of the classes and the mask of the rows.

    Raises:
        TypeError: If the logits are not floating point tensors, the mask is not bool, or ``class_dim`` is not an int.
        ValueError: If the shapes differ, ``class_dim`` is not an inner dimension, or there are too few classes.

    Example:
        >>> logits = check_logits(torch.ones(2, 3, dtype=torch.float16), torch.zeros(2, 3))
        >>> logits.student.dtype, logits.teacher.shape, logits.class_dim
        (torch.float16, torch.Size([2, 3]), -1)
    """
    for name, logits in zip(_LOGITS, (student_logits, teacher_logits), strict=True):
        checks.floating(name, logits)
    remedy = "Both models must score the same classes."
    if same_classes or student_logits.ndim != teacher_logits.ndim:
        checks.same_shape(student_logits, teacher_logits, names=_LOGITS, remedy=remedy)
    shape = tuple(student_logits.shape)
    if len(shape) < 2:
        expected = "`student_logits` to have a batch dimension and a class dimension"
        raise ValueError(checks.message(expected, f"shape {shape}", "Use unsqueeze(-1) for one score per example."))
    dim = resolve_class_dim(student_logits, class_dim)
    if not same_classes and without(dim, shape) != without(dim, tuple(teacher_logits.shape)):
        expected = "`student_logits` and `teacher_logits` to have equal shapes"
        remedy = "Both models must score the same rows, and only the number of classes may differ."
        raise ValueError(checks.message(expected, f"{shape} and {tuple(teacher_logits.shape)}", remedy))
    for name, logits in zip(_LOGITS, (student_logits, teacher_logits), strict=True):
        if logits.shape[dim] < at_least:
            # The softmax over one class is always 1: the loss would be zero for any student.
            expected = f"`{name}` to have at least {at_least} classes at class_dim={dim}"
            remedy = "Use BinarySoftTargetLoss for a single score before a sigmoid, or LogitMSELoss for a regression."
            raise ValueError(checks.message(expected, f"shape {tuple(logits.shape)}", remedy))
    if mask is not None:
        mask = rows_mask(mask, without(dim, shape))
    teacher_logits = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
    return Logits(student_logits, teacher_logits, dim, mask)


def without(dim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without one of its dimensions.

    Args:
        dim: The dimension, from either end.
        shape: The shape.

    Example:
        >>> without(-2, (4, 5, 6))
        (4, 6)
    """
    place = dim % len(shape)
    return shape[:place] + shape[place + 1 :]


def prepare_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_dim: int | None = None,
    *,
    mask: Tensor | None = None,
    at_least: int = 2,
) -> Logits:
    """Both models' logits in the precision of :func:`prepare`, after the checks of :func:`check_logits`.

    Args:
        student_logits: As in :func:`check_logits`.
        teacher_logits: As in :func:`check_logits`.
        class_dim: As in :func:`check_logits`.
        mask: As in :func:`check_logits`.
        at_least: As in :func:`check_logits`.

    Returns:
        The logits, the dimension of the classes and the mask of the rows.

    Raises:
        TypeError: As :func:`check_logits` does.
        ValueError: As :func:`check_logits` does.

    Example:
        >>> logits = prepare_logits(torch.ones(2, 3, dtype=torch.float16), torch.zeros(2, 3))
        >>> logits.student.dtype, logits.teacher.shape, logits.class_dim
        (torch.float32, torch.Size([2, 3]), -1)
    """
    student, teacher, dim, mask = check_logits(student_logits, teacher_logits, class_dim, mask=mask, at_least=at_least)
    return Logits(*prepare(student, teacher, _LOGITS), dim, mask)


def prepare_labelled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    class_dim: int | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    mask: Tensor | None = None,
) -> LabelledLogits:
    """Both models' logits and the labels, for a formula that looks at the label's class.

    A row whose label is negative or ``ignore_index`` does not count, and no label is ever used as an index out of
    bounds: on a GPU that would end the process.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, the logits' shape without ``class_dim``.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last; with
            three, the labels' shape decides.
        ignore_index: A label that marks rows without a class, beside the negative ones.
        mask: True where a row counts, shape ``(N,)`` or the labels'.

    Returns:
        The logits with the classes last, the class of each row and the mask.

    Raises:
        TypeError: If the logits are not floating point tensors, the labels not integers, or a setting has the wrong
            type.
        ValueError: If the shapes do not fit, or a label on the CPU is not less than the number of classes. On another
            device, where looking would make the host wait, the row's value is NaN instead.

    Example:
        >>> logits = prepare_labelled(torch.ones(3, 4), torch.zeros(3, 4), torch.tensor([2, -100, 0]))
        >>> logits.target.flatten(), logits.mask
        (tensor([2, 0, 0]), tensor([ True, False,  True]))
    """
    checks.integer("ignore_index", ignore_index)
    checks.floating("student_logits", student_logits)
    dim = resolve_class_dim(student_logits, class_dim, labels)
    student, teacher, dim, _ = prepare_logits(student_logits, teacher_logits, dim)
    student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    labels = _checked_labels(labels, student)
    counts = (labels >= 0) & (labels != ignore_index)
    if mask is not None:
        counts = counts & rows_mask(mask, tuple(labels.shape))
    classes = student.shape[-1]
    labels = torch.where(counts, labels, 0)
    _check_range(labels, classes)
    factor = torch.where(labels < classes, 1.0, torch.nan)
    return LabelledLogits(student, teacher, labels.clamp(max=classes - 1).unsqueeze(-1), counts, factor)


def rows_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """A mask of the examples or of the rows, as a mask of the rows.

    Args:
        mask: True where a row counts, bool, shape ``(N,)`` or more of the dimensions of ``shape``.
        shape: Shape of the rows, ``(N, ...)``.

    Returns:
        The mask in that shape.

    Raises:
        TypeError: If the mask is not a bool tensor.
        ValueError: If its shape does not fit.

    Example:
        >>> rows_mask(torch.tensor([True, False]), (2, 3))
        tensor([[ True,  True,  True],
                [False, False, False]])
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        remedy = "True marks what counts: pass mask.bool() for a mask of zeros and ones."
        raise TypeError(checks.message("`mask` to be a tensor of bools", got, remedy))
    if not 1 <= mask.ndim <= len(shape) or tuple(mask.shape) != shape[: mask.ndim]:
        expected = f"`mask` to have the shape {shape}, or that of its first dimensions"
        raise ValueError(checks.message(expected, f"shape {tuple(mask.shape)}"))
    mask = savable(mask)
    rows: Tensor = mask.view(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape)
    return rows


def reduced(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Values of the rows, or their mean over the rows that count.

    Args:
        values: One value per row, any shape.
        mask: True where a row counts, same shape; None where all count.
        reduction: "none" or "mean".

    Returns:
        The values, 0 in rows that do not count; or a scalar, 0 (with a gradient of zeros) where no row counts.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Example:
        >>> reduced(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]), "mean")
        tensor(3.5000)
    """
    check_reduction(reduction)
    if mask is None:
        return values.mean() if reduction == "mean" else values
    values = torch.where(mask, values, 0.0)
    return values.sum() / mask.sum().clamp(min=1) if reduction == "mean" else values


def check_reduction(reduction: str) -> None:
    """Check that a reduction is "none" or "mean".

    Args:
        reduction: The caller's choice.

    Raises:
        TypeError: If it is not a string.
        ValueError: If ``reduction`` is unknown.
    """
    checks.one_of("reduction", reduction, ("none", "mean"))


def _checked_labels(labels: Tensor, rows: Tensor) -> Tensor:
    """Labels that fit the rows of logits, as int64."""
    remedy = "Pass class indices; labels.argmax(-1) makes them from one-hot or mixed labels."
    if not isinstance(labels, Tensor):
        raise TypeError(checks.message("`labels` to be a tensor of class indices", f"a {type(labels).__name__}"))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(checks.message("`labels` to hold class indices", f"a tensor of {labels.dtype}", remedy))
    if labels.shape != rows.shape[:-1]:
        expected = f"`labels` to have one class index for each row of logits, shape {tuple(rows.shape[:-1])}"
        raise ValueError(checks.message(expected, f"shape {tuple(labels.shape)}", remedy))
    return savable(labels).long()


def _check_range(labels: Tensor, classes: int) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    try:
        largest = int(labels.max())
    except RuntimeError:  # inside torch.func.vmap, where no value can be read
        return
    if largest >= classes:
        expected = f"`labels` to be less than the number of classes, {classes}"
        remedy = f"Pass ignore_index={largest} if this label marks rows without a class."
        raise ValueError(checks.message(expected, f"a label of {largest}", remedy))
