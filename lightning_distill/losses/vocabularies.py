"""Losses between models whose vocabularies differ."""

from __future__ import annotations

from typing import ClassVar

from lightning_distill.functional.vocabularies import universal_logit
from lightning_distill.losses.base import LogitsLoss
from lightning_distill.schedules import Schedule

__all__ = ["UniversalLogitLoss"]


class UniversalLogitLoss(LogitsLoss):
    r"""Wasserstein distance of sorted probabilities, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_i |p^s_{n(i)} - p^t_{n(i)}|, \qquad p = \mathrm{softmax}(z / T)

    Here :math:`p_{(i)}` is the i-th largest probability, and 0 beyond the last class. The two models may have different
    classes and different numbers of them. See :func:`lightning_distill.functional.universal_logit`; for two language
    models see :class:`CrossTokenizerDistillation`, which finds the positions to compare.

    The loss is not multiplied by :math:`T^2`: at a higher temperature its gradient is smaller.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.

    Returns:
        A scalar from 0 to 2 when called with logits ``(N, ..., C)`` of the student, then ``(N, ..., D)`` of the
        teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> UniversalLogitLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 4.0, 1.0, 1.0]]))
        tensor(0.4914)

    References:
        Boizard et al. 2024 (ULD), arXiv:2402.12030.
    """

    channels_must_match: ClassVar[bool] = False
    _formula = staticmethod(universal_logit)

    def __init__(self, temperature: float | Schedule = 1.0, *, class_dim: int | None = None) -> None:
        super().__init__(class_dim)
        self.temperature = self._setting("temperature", temperature)
