"""Losses on logits as targets, class by class or in view of the right class, which the batch's labels name."""

from __future__ import annotations

from typing import ClassVar

from lightning_distill import checks
from lightning_distill.functional.inputs import IGNORE_INDEX
from lightning_distill.functional.targets import (
    binary_soft_target,
    decoupled_kd,
    minifinetuning,
    normalized_kd,
    weighted_soft_labels,
)
from lightning_distill.losses.base import LabelledLoss, LogitsLoss
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.schedules import Schedule

__all__ = ["BinarySoftTargetLoss", "DecoupledKDLoss", "MinifinetuningLoss", "NormalizedKDLoss", "WeightedSoftLabelLoss"]


class DecoupledKDLoss(LabelledLoss):
    r"""Two divergences, on the target class and among the others, averaged over the examples.

    .. math:: \frac{T^2}{N} \sum_n a \, \mathrm{KL}(b^t_n \| b^s_n) + b \, \mathrm{KL}(q^t_n \| q^s_n), \qquad
        b = (p_y, 1 - p_y), \quad q_c = p_c / (1 - p_y), \quad p = \mathrm{softmax}(z / T)

    The teacher's knowledge about the other classes counts even where it is confident. See
    :func:`lightning_distill.functional.decoupled_kd`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        target_weight: Weight of the divergence between target and the rest, 0 or greater; a number or a schedule.
        nontarget_weight: Weight of the divergence among the other classes, 0 or greater; a number or a schedule.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last; with
            three, the labels' shape decides.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, of the teacher, and labels ``(N,
        ...)``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, a weight is negative or ``class_dim`` is the batch
            dimension.

    Example:
        >>> import torch
        >>> DecoupledKDLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(4.4776)

    References:
        Zhao et al. 2022, equation 7, arXiv:2203.08679. The authors' code has a target weight of 1 and, by teacher,
        non-target weights of 2 to 8 for CIFAR-100 (temperature 4) and 0.5 to 2 for ImageNet (temperature 1).
    """

    learns_temperature: ClassVar[bool] = True
    _formula = staticmethod(decoupled_kd)

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 4.0,
        *,
        target_weight: float | Schedule = 1.0,
        nontarget_weight: float | Schedule = 8.0,
        ignore_index: int = IGNORE_INDEX,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(class_dim, ignore_index)
        self.temperature = self._setting("temperature", temperature)
        self.target_weight = self._setting("target_weight", target_weight, checks.non_negative)
        self.nontarget_weight = self._setting("nontarget_weight", nontarget_weight, checks.non_negative)


class NormalizedKDLoss(LabelledLoss):
    r"""Cross entropies on the target class and among the others, averaged over the examples.

    .. math:: -\frac{1}{N} \sum_n p^t_{ny} \log p^s_{ny} + \gamma T^2 \sum_{c \ne y} q^t_{nc} \log q^s_{nc}, \qquad
        p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}_{c \ne y}(z / T)

    Both models' probabilities of the other classes add up to 1 before they are compared. See
    :func:`lightning_distill.functional.normalized_kd`.

    The factor :math:`T^2` is on the non-target part alone; the target part has no temperature.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        nontarget_weight: Weight of the cross entropy among the other classes, 0 or greater; a number or a schedule.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last; with
            three, the labels' shape decides.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, of the teacher, and labels ``(N,
        ...)``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, the weight is negative or ``class_dim`` is the batch
            dimension.

    Example:
        >>> import torch
        >>> NormalizedKDLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(1.9481)

    References:
        Yang et al. 2023, section 3.1, arXiv:2303.13005. The authors' code has a weight of 1.5 at temperature 1 by
        default and 3.5 at temperature 3 for CIFAR-100.
    """

    learns_temperature: ClassVar[bool] = True
    _formula = staticmethod(normalized_kd)

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 1.0,
        *,
        nontarget_weight: float | Schedule = 1.5,
        ignore_index: int = IGNORE_INDEX,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(class_dim, ignore_index)
        self.temperature = self._setting("temperature", temperature)
        self.nontarget_weight = self._setting("nontarget_weight", nontarget_weight, checks.non_negative)


class WeightedSoftLabelLoss(LabelledLoss):
    r"""Cross entropy under the soft targets, weighted by example and averaged over the examples.

    .. math:: -\frac{T^2}{N} \sum_n \left(1 - \exp\left(-\frac{L^s_n}{L^t_n}\right)\right)
        \sum_c p^t_{nc} \log p^s_{nc}, \qquad L = -\log \mathrm{softmax}(z)_y, \quad p = \mathrm{softmax}(z / T)

    An example on which the student already does better than the teacher counts little. See
    :func:`lightning_distill.functional.weighted_soft_labels`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0; a number, a schedule or a
            CurriculumTemperature.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last; with
            three, the labels' shape decides.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, of the teacher, and labels ``(N,
        ...)``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> WeightedSoftLabelLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(3.5700)

    References:
        Zhou et al. 2021, equations 13 and 14, arXiv:2102.00650; the authors weight the term by 2.5 on ImageNet
        (temperature 2) and by 2.25 on CIFAR-100 (temperature 4).
    """

    learns_temperature: ClassVar[bool] = True
    _formula = staticmethod(weighted_soft_labels)

    def __init__(
        self,
        temperature: float | Schedule | CurriculumTemperature = 2.0,
        *,
        ignore_index: int = IGNORE_INDEX,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(class_dim, ignore_index)
        self.temperature = self._setting("temperature", temperature)


class MinifinetuningLoss(LabelledLoss):
    r"""Divergence from the teacher's probabilities corrected towards the labels, averaged over the examples.

    .. math:: \frac{T^2}{N} \sum_n \mathrm{KL}(q_n \| p^s_n), \qquad q = (1 - w) p^t + w e_y, \quad
        p = \mathrm{softmax}(z / T)

    The weight w makes a correct teacher surer of the label by the threshold, and lets the label lead over the choice of
    a wrong teacher by it. Made to fine-tune a model with itself as the teacher, on little data, without forgetting. The
    labels are in the targets: no task loss is needed. See
    :func:`lightning_distill.functional.minifinetuning`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes.

    Args:
        temperature: Softening of both distributions, greater than 0, before the correction; a number or a schedule.
        threshold: Lead of the label in a corrected target, at least 0 and less than 1; may be set while training.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last; with
            three, the labels' shape decides.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with logits ``(N, ..., C)`` of the student, of the
        teacher, and labels ``(N, ...)``.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, the threshold is out of its range or ``class_dim`` is the
            batch dimension.

    Example:
        >>> import torch
        >>> loss = MinifinetuningLoss()
        >>> loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([1]))
        tensor(0.8968)

    References:
        Belcak et al. 2025 (MFT), arXiv:2506.15702, where it is the only loss.
    """

    _formula = staticmethod(minifinetuning)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        threshold: float = 0.2,
        ignore_index: int = IGNORE_INDEX,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(class_dim, ignore_index)
        checks.fraction("threshold", threshold)
        self.temperature = self._setting("temperature", temperature)
        self._fix(threshold=float(threshold))


class BinarySoftTargetLoss(LogitsLoss):
    r"""Binary cross entropy of each class under the teacher's soft targets, averaged over classes and examples.

    .. math:: -\frac{T^2}{N C} \sum_n \sum_c s^t_{nc} \log s^s_{nc} + (1 - s^t_{nc}) \log (1 - s^s_{nc}), \qquad
        s = \sigma(z / T)

    For models with several labels per example, or a single score. See
    :func:`lightning_distill.functional.binary_soft_target`.

    The factor :math:`T^2` keeps the gradient's size when the temperature changes. Each score decides whether its class
    is present, so ``class_scores`` is True.

    Args:
        temperature: Softening of both models' answers, greater than 0; a number or a schedule.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> BinarySoftTargetLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.5564)

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; deviation: a sigmoid for each class instead of one
        softmax over the classes. The paper gives no weight for it.
    """

    class_scores: ClassVar[bool] = True
    _formula = staticmethod(binary_soft_target)

    def __init__(self, temperature: float | Schedule = 1.0, *, class_dim: int | None = None) -> None:
        super().__init__(class_dim)
        self.temperature = self._setting("temperature", temperature)
