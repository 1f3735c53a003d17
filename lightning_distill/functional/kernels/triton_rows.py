"""The divergences as Triton kernels: the same functions as in ``analytic``, and both in one, in place."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_distill.functional.kernels.analytic import NUMBERS
from lightning_distill.functional.kernels.settings import Divergence
from lightning_distill.functional.kernels.triton_kernels import KINDS, backward, forward, in_place

_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
_WORD = 16  # bytes that a lane reads at once


def accepts(student: Tensor, teacher: Tensor, dim: int) -> bool:
    """Whether the kernels can read the logits.

    Args:
        student: Logits of any shape.
        teacher: The teacher's logits, same shape.
        dim: Dimension of the classes.

    Returns:
        True for classes that lie next to each other, in float32 or half precision, on one device.
    """
    last = dim in (-1, student.ndim - 1) and student.shape[-1] < 2**30
    both = (student, teacher)
    return last and student.device == teacher.device and all(logits.dtype in _PRECISIONS for logits in both)


def statistics(
    student: Tensor, teacher: Tensor, settings: Divergence, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Values of each row, and the numbers that their gradient needs: see :func:`.analytic.statistics`.

    Args:
        student: Logits, shape ``(..., C)``.
        teacher: The teacher's logits, same shape.
        settings: The divergence.
        mask: True where a row counts, shape ``(...)``; None where all count. Other rows are not read.
        labels: Class index of each row, negative where it has none, shape ``(...)``; None without a cross entropy.

    Returns:
        The divergence of each row in nats, the cross entropy of each row's label (or None), and the numbers of each
        row, shape ``(..., 6)``; the values are 0 in rows that do not count.
    """
    rows = student.shape[:-1]
    new = torch.empty if mask is None else torch.zeros
    values = new(rows, dtype=torch.float32, device=student.device)
    numbers = new((*rows, NUMBERS), dtype=torch.float32, device=student.device)
    task = None if labels is None else torch.zeros_like(values)
    logits = _Rows.of(student, teacher)
    logits.launch(forward, (values, task, numbers), settings, mask, labels, whole_sum=_whole_sum(settings, labels))
    return values, task, numbers


def gradient(
    student: Tensor,
    teacher: Tensor,
    numbers: Tensor,
    settings: Divergence,
    mask: Tensor | None,
    labels: Tensor | None,
    upstream: Tensor,
    task_upstream: Tensor | None,
) -> Tensor:
    """Gradient of the values for the student's logits: see :func:`.analytic.gradient`.

    Args:
        student: As in :func:`statistics`.
        teacher: As in :func:`statistics`.
        numbers: Those of :func:`statistics`.
        settings: The divergence.
        mask: As in :func:`statistics`.
        labels: As in :func:`statistics`.
        upstream: Gradient of each row's divergence, shape ``(...)``.
        task_upstream: Gradient of each row's cross entropy, shape ``(...)``; None without labels.

    Returns:
        Shape and type of ``student``; 0 in rows that do not count.
    """
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    logits = _Rows.of(student, teacher, result)
    upstreams = _contiguous(upstream), _contiguous(task_upstream)
    logits.launch(backward, (numbers, *upstreams), settings, mask, labels)
    return result


def rows_in_place(
    student: Tensor,
    teacher: Tensor,
    settings: Divergence,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    task_weight: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    r"""Values of each row, and their gradient in place of the student's logits.

    Args:
        student: Logits, shape ``(N, C)``, rows contiguous. They become the gradient of :math:`\sum_i w_i D_i + c
            \sum_i H_i`, with the divergences :math:`D`, the weights :math:`w`, the task weight :math:`c` and the cross
            entropies :math:`H`.
        teacher: The teacher's logits, same shape, rows contiguous.
        settings: The divergence.
        weights: Weight of each row's divergence, float or bool, shape ``(N,)``; a row of weight 0 and without a label
            is not read. None for 1.
        labels: Class index of each row, negative where it has none, shape ``(N,)``; None without a cross entropy.
        task_weight: Weight of the cross entropies.

    Returns:
        The divergence of each row without its weight, 0 where that is 0, and the cross entropy of each row (or None).
    """
    if student.stride(1) != 1 or teacher.stride(1) != 1:
        raise ValueError(
            "Expected the classes of `student` and `teacher` to lie next to each other. Pass contiguous rows."
        )
    values = torch.zeros(len(student), dtype=torch.float32, device=student.device)
    task = None if labels is None else torch.zeros_like(values)
    logits = _Rows.of(student, teacher)
    whole_sum = _whole_sum(settings, labels)
    logits.launch(in_place, (values, task), settings, weights, labels, float(task_weight), whole_sum=whole_sum)
    return values, task


class _Rows(NamedTuple):
    """Tensors of shape (outer rows, inner rows, classes), whose classes lie next to each other."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> _Rows:
        """Views of tensors of shape ``(..., C)``; copies only of those whose strides do not fit."""
        tensors = tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
        if tensors[0].ndim != 3:
            tensors = tuple(tensor.flatten(0, -2).unsqueeze(1) for tensor in tensors)
        return cls(tensors)

    def launch(
        self,
        kernel: Any,
        pointers: tuple[Tensor | None, ...],
        settings: Divergence,
        weights: Tensor | None,
        labels: Tensor | None,
        *numbers: float,
        **options: bool,
    ) -> None:
        """Run a kernel with one program for each row, and wide reads if all rows are aligned."""
        first = self.tensors[0]
        outer_rows, inner_rows, classes = first.shape
        word = _WORD // max(tensor.element_size() for tensor in self.tensors)
        aligned = classes % word == 0 and all(
            tensor.data_ptr() % _WORD == 0 and tensor.stride(0) % word == 0 and tensor.stride(1) % word == 0
            for tensor in self.tensors
        )
        lanes = 128 if classes <= 4096 else 256 if classes <= 16384 else 512
        if not outer_rows * inner_rows:
            return
        strides = [stride for tensor in self.tensors for stride in tensor.stride()[:2]]
        elsewhere = first.is_cuda and first.get_device() != torch.cuda.current_device()
        with torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext():
            kernel[(outer_rows * inner_rows,)](
                *self.tensors, *strides, inner_rows, *pointers, _contiguous(weights), _contiguous(labels),
                1 / settings.temperature, settings.floor, float(settings.share), *numbers,
                classes=classes, kind=KINDS[settings.kind], weighted=weights is not None, labelled=labels is not None,
                aligned=aligned, lanes=lanes, word=word, num_warps=lanes // 32, **options,
            )  # fmt: skip


def _whole_sum(settings: Divergence, labels: Tensor | None) -> bool:
    """Whether the cross entropy needs a sum of exponentials of its own."""
    return labels is not None and settings.temperature != 1


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
