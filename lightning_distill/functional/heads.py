"""The inputs of a loss that applies both models' heads itself: checked, flattened, cut to the shared vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import rows_mask

Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight and bias


class Head(NamedTuple):
    """Hidden states of all tokens and the head that they go into, without gradients and in the products' precision.

    Attributes:
        hidden: Shape ``(N, H)``.
        weight: Shape ``(V, H)`` with V the shared vocabulary.
        bias: Shape ``(V,)``, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def write_logits(self, rows: slice | Tensor, out: Tensor) -> None:
        """Logits of some tokens, written into a buffer of shape ``(tokens, V)``."""
        if self.bias is None:
            torch.mm(self.hidden[rows], self.weight.T, out=out)
        else:
            torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)


class HeadInputs(NamedTuple):
    """Both models' heads, and the tokens that count.

    Attributes:
        student: The student's side.
        teacher: The teacher's side.
        labels: Index of the token to predict, shape ``(N,)``, or None.
        rows: Indices of the tokens that count; None where all do.
        size: Number of tokens that count.
    """

    student: Head
    teacher: Head
    labels: Tensor | None
    rows: Tensor | None
    size: int

    def chunk(self, start: int, size: int) -> slice | Tensor:
        """An index of the next tokens that count, at most ``size`` of them."""
        stop = min(start + size, self.size)
        return slice(start, stop) if self.rows is None else self.rows[start:stop]


def prepare_heads(
    student: Side,
    teacher: Side,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    ignore_index: int,
    task: bool,
) -> HeadInputs:
    """Check all tensors, before any product, and find the tokens that count.

    Under autocast the products have its precision, as those of ``nn.Linear`` have.

    Args:
        student: Hidden states ``(..., H)``, weight ``(V, H)`` and bias ``(V,)`` or None.
        teacher: The teacher's, with the same positions.
        labels: Index of the token to predict at each position, or None.
        mask: True where a position counts, or None.
        ignore_index: A label of positions that do not count, beside the negative ones.
        task: Whether labels are used as classes of the shared vocabulary.

    Returns:
        The inputs. A mask or labels make the host wait for the device once, for the number of tokens.

    Raises:
        TypeError: If a tensor has the wrong type.
        ValueError: If shapes or devices do not fit together, or a label on the CPU is out of the vocabulary.
    """
    checks.integer("ignore_index", ignore_index)
    for side, tensors in (("student", student), ("teacher", teacher)):
        _check_head(side, *tensors)
    student_hidden, teacher_hidden = student[0], teacher[0]
    shape = tuple(student_hidden.shape[:-1])
    if teacher_hidden.shape[:-1] != shape:
        expected = "`student_hidden` and `teacher_hidden` to have the same positions"
        got = f"{shape} and {tuple(teacher_hidden.shape[:-1])}"
        raise ValueError(checks.message(expected, got, "Both models must have read the same tokens."))
    _check_devices(
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        student_weight=student[1],
        teacher_weight=teacher[1],
        student_bias=student[2],
        teacher_bias=teacher[2],
        labels=labels,
        mask=mask,
    )
    vocabulary = min(len(student[1]), len(teacher[1]))
    if vocabulary < 2:
        # The softmax over a single token is always 1: the loss would be zero for any student.
        raise ValueError(checks.message("`student_weight` to have at least 2 rows in common with the teacher's", "1"))
    counts = None if mask is None else rows_mask(mask, shape).flatten()
    if labels is not None:
        labels = _checked_labels(labels, shape).flatten()
        with_label = (labels >= 0) & (labels != ignore_index)
        counts = with_label if counts is None else counts & with_label
        _check_range(torch.where(counts, labels, 0), vocabulary if task else len(student[1]))
    elif task:
        raise ValueError(checks.message("`labels` for the cross entropy of `task_weight`", "labels=None"))
    rows = None if counts is None else counts.nonzero().squeeze(-1)
    size = student_hidden.shape[:-1].numel() if rows is None else len(rows)
    return HeadInputs(_prepared(*student, vocabulary), _prepared(*teacher, vocabulary), labels, rows, size)


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    names = (f"{side}_hidden", f"{side}_weight", f"{side}_bias")
    tensors = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for name, tensor in zip(names, tensors, strict=False):
        checks.floating(name, tensor)
    if hidden.ndim < 2:
        expected = f"`{names[0]}` to have at least a dimension of positions and one of features"
        raise ValueError(checks.message(expected, f"shape {tuple(hidden.shape)}"))
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        expected = f"`{names[1]}` to have the shape (vocabulary, {hidden.shape[-1]}), as the weight of nn.Linear"
        raise ValueError(checks.message(expected, f"shape {tuple(weight.shape)}"))
    if bias is not None and bias.shape != weight.shape[:1]:
        expected = f"`{names[2]}` to have the shape {tuple(weight.shape[:1])}"
        raise ValueError(checks.message(expected, f"shape {tuple(bias.shape)}"))
    if not torch.is_autocast_enabled(hidden.device.type) and len({tensor.dtype for tensor in tensors}) > 1:
        expected = f"`{side}_hidden`, `{side}_weight` and `{side}_bias` to have equal dtypes"
        remedy = "Convert them, or use torch.autocast."
        raise TypeError(checks.message(expected, " and ".join(str(tensor.dtype) for tensor in tensors), remedy))


def _check_devices(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, device in devices.items():
        if device != devices["student_hidden"]:
            expected = f"`{name}` to be on the device of `student_hidden`, {devices['student_hidden']}"
            raise ValueError(checks.message(expected, str(device)))


def _checked_labels(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(checks.message("`labels` to be a tensor of token indices", f"a {type(labels).__name__}"))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(checks.message("`labels` to hold token indices", f"a tensor of {labels.dtype}"))
    if labels.shape != shape:
        expected = f"`labels` to have the shape {shape} of the positions"
        raise ValueError(checks.message(expected, f"shape {tuple(labels.shape)}"))
    return labels.long()


def _check_range(labels: Tensor, vocabulary: int) -> None:
    if labels.device.type != "cpu" or not labels.numel():
        return  # looking would make the host wait for the device
    largest = int(labels.max())
    if largest >= vocabulary:
        expected = f"`labels` to be less than the size of the vocabulary, {vocabulary}"
        remedy = f"Pass ignore_index={largest} if this label marks positions that do not count."
        raise ValueError(checks.message(expected, f"a label of {largest}", remedy))


def _prepared(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int) -> Head:
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
    return Head(
        hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype),
        weight.detach()[:vocabulary].to(dtype),  # a view, unless the precision changes
        None if bias is None else bias.detach()[:vocabulary].to(dtype),
    )
