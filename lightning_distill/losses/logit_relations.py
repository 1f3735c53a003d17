"""Losses on how rows and columns of the models' probabilities relate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.logit_relations import inter_and_intra_class_relation, multi_level_logits
from lightning_distill.losses.base import LogitsLoss
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.schedules import Schedule

__all__ = ["DISTLoss", "MultiLevelLogitLoss"]


class DISTLoss(LogitsLoss):
    r"""One minus the correlation of the two models' probabilities, over the classes and over the examples.

    .. math:: \frac{T^2 \beta}{N} \sum_n (1 - \rho(p^s_n, p^t_n)) + \frac{T^2 \gamma}{C} \sum_c (1 - \rho(p^s_
        {:,c}, p^t_{:,c})),
        \qquad p = \mathrm{softmax}(z / T)

    It keeps relations rather than exact values, which helps if the teacher is much stronger than the student. See
    :func:`lightning_distill.functional.inter_class_relation` and
    :func:`lightning_distill.functional.intra_class_relation`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes. A class with scores of minus infinity
    still counts as a class, with probability 0.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        inter_weight: Weight :math:`\beta` of the relations between the classes of an example, 0 or greater; a
            number or a schedule.
        intra_weight: Weight :math:`\gamma` of the relations between the examples of a class, 0 or greater; a
            number or a schedule.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the student, then the teacher; the whole batch is compared.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, a weight is negative or ``class_dim`` is the batch
            dimension.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> DISTLoss()(student, teacher)
        tensor(1.2769)

    References:
        Huang et al. 2022 (DIST), equations 8 and 9, arXiv:2205.10536, with weights of 2 for ImageNet (temperature 1)
        and CIFAR-100 (temperature 4), and of 1 for detection and segmentation.
    """

    class_scores: ClassVar[bool] = True
    learns_temperature: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 1.0,
        *,
        inter_weight: float | Schedule = 1.0,
        intra_weight: float | Schedule = 1.0,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(class_dim)
        self.temperature = self._setting("temperature", temperature)
        self.inter_weight = self._setting("inter_weight", inter_weight, checks.non_negative)
        self.intra_weight = self._setting("intra_weight", intra_weight, checks.non_negative)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        inter, intra = inter_and_intra_class_relation(
            student, teacher, temperature=self._number("temperature"), class_dim=self.class_dim, mask=mask
        )
        return self.inter_weight * inter + self.intra_weight * intra


class MultiLevelLogitLoss(LogitsLoss):
    r"""Divergence of each example, of the batch and of the classes, averaged over several temperatures.

    .. math:: \frac{1}{K} \sum_T \left( \frac{T^2}{N} \sum_n \mathrm{KL}(p^t_n \| p^s_n)
        + \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2 + \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2 \right)

    Several temperatures cover the teacher's first choices and its faint preferences together. See
    :func:`lightning_distill.functional.multi_level_logits`.

    The factor :math:`T^2` is on the divergence, not on the products.

    Args:
        temperatures: The K temperatures, each greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the student, then the teacher; the whole batch is compared.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``temperatures`` is empty, one is not greater than 0, or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> MultiLevelLogitLoss()(student, teacher)
        tensor(0.8134)

    References:
        Jin, Wang and Lin 2023, section 3, CVPR; deviations as in the function. The authors' code has a weight of 9 for
        the sum over the five temperatures, which is 45 for their mean.
    """

    _of_batch: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    _formula = staticmethod(multi_level_logits)

    def __init__(
        self, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0), *, class_dim: int | None = None
    ) -> None:
        super().__init__(class_dim)
        checks.positives("temperatures", temperatures)
        self._fix(temperatures=tuple(float(temperature) for temperature in temperatures))
