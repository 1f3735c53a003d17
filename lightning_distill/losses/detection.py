"""Losses for detectors: the scores of boxes, and feature maps with boxes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.detection import focal_global, quality_focal
from lightning_distill.functional.primitives import LEAST_SCORE
from lightning_distill.losses.base import DistillationLoss, LogitsLoss
from lightning_distill.losses.networks import built
from lightning_distill.schedules import Schedule

__all__ = ["FocalGlobalLoss", "QualityFocalLoss"]


class QualityFocalLoss(LogitsLoss):
    r"""Binary cross entropy of each class under the teacher's scores, weighed by the distance between the scores.

    .. math:: -\frac{1}{N C} \sum_n \sum_c |s^s_{nc} - s^t_{nc}|^\beta
        \left( s^t_{nc} \log s^s_{nc} + (1 - s^t_{nc}) \log (1 - s^s_{nc}) \right), \qquad s = \sigma(z)

    For detectors that answer each class with yes or no at very many places. See
    :func:`lightning_distill.functional.quality_focal`.

    Args:
        power: The exponent :math:`\beta` of the distance, at least 1; a number or a schedule.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.

    Returns:
        A scalar in nats when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``power`` is less than 1, or ``class_dim`` is 0.

    Example:
        >>> QualityFocalLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.1215)

    References:
        Wang et al. 2023 (CrossKD), arXiv:2306.11369, the term on the class scores, with a power of 1.
    """

    class_scores: ClassVar[bool] = True
    _formula = staticmethod(quality_focal)

    def __init__(self, *, power: float | Schedule = 1.0, class_dim: int | None = None) -> None:
        super().__init__(class_dim)
        self.power = self._setting("power", power, lambda name, value: checks.at_least(name, value, 1))


class FocalGlobalLoss(DistillationLoss):
    r"""Differences of two feature maps inside and outside of boxes, where the teacher looks, and of their contexts.

    .. math:: \frac{1}{N} \sum_n \Big[ \sum_{p,c} (\alpha w_p + \beta b_p) A^t_p C^t_c (f^s_{pc} - f^t_{pc})^2
        + \gamma \Big( \sum_p |A^s_p - A^t_p| + \sum_c |C^s_c - C^t_c| \Big)
        + \lambda \sum_{p,c} \left( G^s(f^s) - G^t(f^t) \right)_{pc}^2 \Big]

    Objects and background are weighed apart, and both by the teacher's attention :math:`A^t`, :math:`C^t` over
    positions and channels. The contexts G are learned: each adds to a map what it reads from all its positions. Inside
    a ``FeatureDistillation(..., FocalGlobalLoss(), boxes=...)`` they are made, trained, saved and resumed as adapters
    are, one pair for each level. See :func:`lightning_distill.functional.focal_global`.

    Args:
        temperature: Softening of both attentions, greater than 0; a number or a schedule.
        foreground_weight: The factor :math:`\alpha` of the positions in boxes, a number or a schedule.
        background_weight: The factor :math:`\beta` of the positions outside.
        attention_weight: The factor :math:`\gamma` of the attentions.
        context_weight: The factor :math:`\lambda` of the contexts.

    Returns:
        A scalar when called with maps ``(N, C, H, W)`` of the student, then the teacher, and the weights of
        :func:`lightning_distill.functional.foreground_weights`, shape ``(N, H, W)``.

    Raises:
        TypeError: If a setting is not a number or a schedule.
        ValueError: If the temperature is not greater than 0, or a weight is negative.

    Example:
        >>> loss = FocalGlobalLoss(foreground_weight=1.0, attention_weight=0.0, context_weight=0.0)
        >>> loss.build(torch.Size((1, 1, 1, 2)), torch.Size((1, 1, 1, 2)))
        >>> student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 0.0]]]])
        >>> loss(student, teacher, torch.tensor([[[1.0, 0.0]]])).detach()
        tensor(7.9802)

    References:
        Yang et al. 2022 (FGD), arXiv:2111.11837; the defaults are those of its code for RetinaNet. For two-stage
        detectors it has 5e-5, 2.5e-5, 5e-5 and 5e-7.
    """

    learned: ClassVar[bool] = True
    needs_boxes: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float | Schedule = 0.5,
        *,
        foreground_weight: float | Schedule = 1e-3,
        background_weight: float | Schedule = 5e-4,
        attention_weight: float | Schedule = 1e-3,
        context_weight: float | Schedule = 5e-6,
    ) -> None:
        super().__init__()
        self.temperature = self._setting("temperature", temperature)
        self.foreground_weight = self._setting("foreground_weight", foreground_weight, checks.non_negative)
        self.background_weight = self._setting("background_weight", background_weight, checks.non_negative)
        self.attention_weight = self._setting("attention_weight", attention_weight, checks.non_negative)
        self.context_weight = self._setting("context_weight", context_weight, checks.non_negative)
        self.student_context: Context | None = None
        self.teacher_context: Context | None = None

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make both contexts for maps of these shapes, replacing earlier ones."""
        if len(student) != 4 or len(teacher) != 4:
            expected = "`student` and `teacher` to be maps (N, C, H, W)"
            raise ValueError(checks.message(expected, f"shapes {tuple(student)} and {tuple(teacher)}"))
        self.student_context, self.teacher_context = Context(student[1]), Context(teacher[1])

    def forward(self, student: Tensor, teacher: Tensor, foreground: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        return focal_global(
            student,
            teacher,
            foreground,
            student_context=built(self.student_context),
            teacher_context=built(self.teacher_context),
            mask=mask,
            reduction="mean",
            **{name: getattr(self, name) for name in self._shown},
        )


class Context(nn.Module):
    """Adds to a map what is read from all its positions: attention, a narrow layer, normalisation, a wide layer.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 2, 1)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.reduce, self.norm = nn.Conv2d(channels, narrow, 1), nn.LayerNorm([narrow, 1, 1])
        self.expand = nn.Conv2d(narrow, channels, 1)
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)  # at first nothing is added

    def forward(self, feature: Tensor, positions: Tensor | None = None) -> Tensor:
        """The map with its context added.

        Args:
            feature: Shape ``(N, C, H, W)``.
            positions: True where a position counts, shape ``(N, H, W)``; None where all count.
        """
        scores = self.attention(feature).flatten(2)
        if positions is not None:
            scores = scores.masked_fill(~positions.flatten(1)[:, None], LEAST_SCORE)
        read = feature.flatten(2) @ scores.softmax(2).mT
        added: Tensor = self.expand(self.norm(self.reduce(read.unsqueeze(3))).relu())
        return feature + added
