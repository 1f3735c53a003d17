"""The divergences with the gradient computed beside the value, in chunks that stay in a processor's cache.

One tensor of the logits' size is kept for the backward pass, which only multiplies it: less than autograd keeps, and
the exponentials are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.functional.kernels import in_place
from lightning_distill.functional.kernels.pieces import pieces, precision
from lightning_distill.functional.kernels.settings import Divergence

_PLAUSIBLE = 1e20  # divergences of a chunk whose sum is larger, or NaN, are those of infinite scores


def statistics(
    student: Tensor, teacher: Tensor, settings: Divergence, mask: Tensor | None, labels: None = None
) -> tuple[Tensor, None, Tensor]:
    """Values of each row, and their gradient.

    Args:
        student: Logits, shape ``(..., C)``, any strides and floating point type.
        teacher: The teacher's logits, same shape.
        settings: The divergence.
        mask: True where a row counts, shape ``(...)``; None where all count.
        labels: None: this way has no cross entropy.

    Returns:
        The divergence of each row in nats, 0 in a row that does not count; None; and the gradient of each value for the
        student's logits times the temperature, float32 or float64.
    """
    dtype = precision(student, teacher)
    gradient = torch.empty_like(student, dtype=dtype) if mask is None else torch.zeros_like(student, dtype=dtype)
    values = gradient.new_zeros(student.shape[:-1])
    for x, y, keep, value, slope in pieces(student, teacher, mask, values, gradient):
        if keep is None:
            value.copy_(_divergence(x.to(dtype), y.to(dtype), settings, slope))
        else:
            scores = torch.empty_like(x[keep], dtype=dtype)
            value[keep] = _divergence(x[keep].to(dtype), y[keep].to(dtype), settings, scores)
            slope[keep] = scores
    return values, None, gradient


def _divergence(x: Tensor, y: Tensor, settings: Divergence, slope: Tensor) -> Tensor:
    """Divergence of each row; its gradient times the temperature overwrites ``slope``."""
    floor = settings.floor
    # A least score of NaN does not tell whether another row has a class that the teacher forbids.
    leaves_out = settings.kind == "reverse_kl" and y.numel() > 0 and not y.amin().item() > floor
    if not leaves_out:
        values = _unchecked(x, y, settings, slope)
        if abs(values.sum().item()) < _PLAUSIBLE:
            return values
    x, y = (logits.clamp(min=floor) for logits in (x, y))  # the difference of two infinite scores is NaN
    if leaves_out:  # a class that the teacher forbids, on both sides
        x.masked_fill_(y <= floor, floor)
    return _unchecked(x, y, settings, slope)


def _unchecked(x: Tensor, y: Tensor, settings: Divergence, slope: Tensor) -> Tensor:
    """The same, right wherever the divergences are finite."""
    torch.sub(x, x.amax(-1, keepdim=True), out=slope)  # before the division: it keeps more digits
    targets = y - y.amax(-1, keepdim=True)
    if settings.temperature != 1:
        for scores in (slope, targets):
            scores.mul_(1 / settings.temperature)  # a division takes twice as long
    return in_place.divergence(slope, targets, settings).squeeze(-1)


def gradient(
    student: Tensor,
    teacher: Tensor,
    numbers: Tensor,
    settings: Divergence,
    mask: Tensor | None,
    labels: None,
    upstream: Tensor,
    task_upstream: None,
) -> Tensor:
    """Gradient of the values for the student's logits.

    Args:
        student: As in :func:`statistics`.
        teacher: Not used.
        numbers: The gradient of :func:`statistics`.
        settings: The divergence.
        mask: Not used: the gradient is 0 in rows that do not count.
        labels: None.
        upstream: Gradient of each row's divergence, shape ``(...)``.
        task_upstream: None.

    Returns:
        Shape and type of ``student``.
    """
    return (numbers * (upstream / settings.temperature).unsqueeze(-1)).to(student.dtype)
