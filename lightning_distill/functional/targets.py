"""Formulas on logits as targets, class by class or with regard to the true class: student first, one value per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import (
    IGNORE_INDEX,
    Reduction,
    prepare_labelled,
    prepare_logits,
    reduced,
)
from lightning_distill.functional.kernels.plain import kl_from_logs
from lightning_distill.functional.primitives import LEAST_SCORE, or_one, softened

__all__ = ["binary_soft_target", "decoupled_kd", "minifinetuning", "normalized_kd", "weighted_soft_labels"]

_WEIGHT_EPS = 1e-7


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = IGNORE_INDEX,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Two divergences: between the target class and all others together, and among the others.

    .. math:: T^2 \left( a \, \mathrm{KL}(b^t \| b^s) + b \, \mathrm{KL}(q^t \| q^s) \right), \qquad
        b = (p_y, 1 - p_y), \quad q_c = p_c / (1 - p_y), \quad p = \mathrm{softmax}(z / T)

    The plain divergence weights the second part by :math:`1 - p^t_y`, which makes it small where the teacher is
    certain. Here its weight is a setting. With two classes the second part is 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` (the logits without ``class_dim``), from 0 to C - 1; a
            row with a negative label does not count.
        target_weight: Weight of the divergence between target and the rest, 0 or greater.
        nontarget_weight: Weight of the divergence among the other classes, 0 or greater.
        temperature: Softening of both distributions, greater than 0.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last;
            with three, the labels' shape decides.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, the labels not integers, or a setting has a wrong
            type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0
            or a weight is negative.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> labels = torch.tensor([0])
        >>> decoupled_kd(student, teacher, labels)
        tensor([4.4776])

    References:
        Zhao et al. 2022, equation 7, arXiv:2203.08679. The authors' code has a target weight of 1 and, by teacher,
        non-target weights of 2 to 8 for CIFAR-100 (temperature 4) and 0.5 to 2 for ImageNet (temperature 1).
        Deviation: computed in log space without the target class, and always finite. The authors' code subtracts 1000
        from the target's logit and takes logarithms of sums, which may be infinite.
    """
    checks.non_negative("target_weight", target_weight)
    checks.non_negative("nontarget_weight", nontarget_weight)
    checks.temperature(temperature)
    student, teacher, target, counts, factor = prepare_labelled(
        student_logits, teacher_logits, labels, class_dim, ignore_index=ignore_index, mask=mask
    )
    (of_student, rest_student), (of_teacher, rest_teacher) = (
        _split(softened(logits, temperature, counts), target) for logits in (student, teacher)
    )
    # p_y / (1 - p_y) = exp(margin): both logarithms of b are log-sigmoids and never of a rounded sum.
    margin_student, margin_teacher = (
        own - torch.logsumexp(rest, dim=-1) for own, rest in ((of_student, rest_student), (of_teacher, rest_teacher))
    )
    log_student, log_teacher = (
        F.logsigmoid(torch.stack([margin, -margin], dim=-1)) for margin in (margin_student, margin_teacher)
    )
    target_part = kl_from_logs(log_teacher, log_student, -1)
    log_student, log_teacher = F.log_softmax(rest_student, dim=-1), F.log_softmax(rest_teacher, dim=-1)
    nontarget_part = kl_from_logs(log_teacher, log_student, -1)
    values = factor * (target_weight * target_part + nontarget_weight * nontarget_part)
    return reduced(values, counts, reduction) * temperature**2


def normalized_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    nontarget_weight: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Cross entropy on the target class, weighted by the teacher, plus cross entropy among the other classes.

    .. math:: -p^t_y \log p^s_y - \gamma T^2 \sum_{c \ne y} q^t_c \log q^s_c, \qquad
        p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}_{c \ne y}(z / T)

    The other classes' probabilities are normalised to add up to 1 in both models before they are compared, so that the
    two cross entropies do not compete. Its smallest value is not 0. With two classes the second part is 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` (the logits without ``class_dim``), from 0 to C - 1; a
            row with a negative label does not count.
        nontarget_weight: Weight :math:`\gamma` of the cross entropy among the other classes, 0 or greater.
        temperature: Softening of both distributions over the other classes, greater than 0.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last;
            with three, the labels' shape decides.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, the labels not integers, or a setting has a wrong
            type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0
            or the weight is negative.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> labels = torch.tensor([0])
        >>> normalized_kd(student, teacher, labels)
        tensor([1.9481])

    References:
        Yang et al. 2023, section 3.1, arXiv:2303.13005; deviation: the student's own cross entropy on the label is the
        task loss and not part of this one. The target part has no temperature.
    """
    checks.non_negative("nontarget_weight", nontarget_weight)
    checks.temperature(temperature)
    student, teacher, target, counts, factor = prepare_labelled(
        student_logits, teacher_logits, labels, class_dim, ignore_index=ignore_index, mask=mask
    )
    student, teacher = (softened(logits, 1.0, counts) for logits in (student, teacher))
    log_student, log_teacher = (
        F.log_softmax(logits, dim=-1).gather(-1, target).squeeze(-1) for logits in (student, teacher)
    )
    rest_student, rest_teacher = (_split(logits, target)[1] / temperature for logits in (student, teacher))
    others = -(F.softmax(rest_teacher, dim=-1) * F.log_softmax(rest_student, dim=-1)).sum(dim=-1)
    values = nontarget_weight * temperature**2 * others - log_teacher.exp() * log_student
    return reduced(factor * values, counts, reduction)


def weighted_soft_labels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    ignore_index: int = IGNORE_INDEX,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Cross entropy under the soft targets, weighted by how much better the teacher does on the example.

    .. math:: -\left(1 - \exp\left(-\frac{L^s}{L^t}\right)\right) T^2 \sum_c p^t_c \log p^s_c, \qquad
        L = -\log \mathrm{softmax}(z)_y, \quad p = \mathrm{softmax}(z / T)

    An example on which the student's own loss is far below the teacher's counts little: there soft targets regularise
    more than they teach. The weight is a constant, without a gradient. The smallest value is not 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` (the logits without ``class_dim``), from 0 to C - 1; a
            row with a negative label does not count.
        temperature: Softening of both distributions, greater than 0.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last;
            with three, the labels' shape decides.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Weighted cross entropy in nats times :math:`T^2`, one value per row: the shape of the logits without
        ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, the labels not integers, or a setting has a wrong
            type.
        ValueError: If the shapes do not fit, there are fewer than two classes or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> labels = torch.tensor([0])
        >>> weighted_soft_labels(student, teacher, labels)
        tensor([3.5700])

    References:
        Zhou et al. 2021, equations 13 and 14, arXiv:2102.00650; 1e-7 is added to the teacher's loss. The authors weight
        the term by 2.5 on ImageNet (temperature 2) and by 2.25 on CIFAR-100 (temperature 4).
    """
    checks.temperature(temperature)
    student, teacher, target, counts, factor = prepare_labelled(
        student_logits, teacher_logits, labels, class_dim, ignore_index=ignore_index, mask=mask
    )
    # An impossible label gets a large loss, or 0 if no class is possible; NaN in the logits stays NaN below.
    own_student, own_teacher = (
        torch.nan_to_num(-F.log_softmax(logits, dim=-1).gather(-1, target).squeeze(-1), nan=0.0, posinf=-LEAST_SCORE)
        for logits in (student.detach(), teacher)
    )
    weight = torch.where(counts, -torch.expm1(-own_student / (own_teacher + _WEIGHT_EPS)), 0.0)
    soft_targets = F.softmax(softened(teacher, temperature, counts), dim=-1)
    log_student = F.log_softmax(softened(student, temperature, counts), dim=-1)
    cross_entropy = -(soft_targets * log_student).sum(dim=-1)
    return reduced(factor * weight * cross_entropy, counts, reduction) * temperature**2


def minifinetuning(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.2,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's probabilities from the teacher's, corrected towards the labels.

    .. math:: T^2 \sum_c q_c (\log q_c - \log p^s_c), \qquad q = (1 - w) p^t + w e_y, \quad p = \mathrm{softmax}(z / T)

    .. math:: w = \frac{\min(\tau, 1 - p^t_y)}{1 - p^t_y} \text{ if the label is the likeliest class k, else }
        \frac{p^t_k - p^t_y + \tau}{1 + p^t_k - p^t_y}

    A correct teacher gets :math:`\tau` surer of the label; a wrong one is changed until the label leads over its own
    choice by :math:`\tau`. The other classes keep their proportions.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` (the logits without ``class_dim``), from 0 to C - 1; a
            row with a negative label does not count.
        threshold: Lead :math:`\tau` of the label in a corrected target, at least 0 and less than 1.
        temperature: Softening of both distributions, greater than 0; it precedes the correction.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last;
            with three, the labels' shape decides.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, the labels not integers, or a setting has a wrong
            type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0 or
            the threshold is out of its range.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> minifinetuning(student, teacher, torch.tensor([1]))
        tensor([0.8968])

    References:
        Belcak et al. 2025 (MFT), arXiv:2506.15702; deviation from the authors' code: nothing is added to the divisors,
        so that a teacher that is certain of the label is corrected as well.
    """
    checks.fraction("threshold", threshold)
    checks.positive("temperature", temperature)
    student, teacher, label, counts, factor = prepare_labelled(
        student_logits, teacher_logits, labels, class_dim, ignore_index=ignore_index, mask=mask
    )
    log_student = F.log_softmax(softened(student, temperature, counts), dim=-1)
    probabilities = F.softmax(softened(teacher, temperature, counts), dim=-1)
    of_label, largest = probabilities.gather(-1, label), probabilities.amax(dim=-1, keepdim=True)
    rest = 1 - of_label
    kept = torch.where(
        of_label == largest,
        (rest - threshold).clamp(min=0) / or_one(rest),
        (1 - threshold) / (1 + largest - of_label),
    )
    target = (kept * probabilities).scatter_add(-1, label, 1 - kept)
    values = (torch.xlogy(target, target) - target * log_student).sum(dim=-1)
    return reduced(factor * values, counts, reduction) * temperature**2


def binary_soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Binary cross entropy of each class under the teacher's soft targets, averaged over the classes.

    .. math:: -\frac{T^2}{C} \sum_c \left( s^t_c \log s^s_c + (1 - s^t_c) \log (1 - s^s_c) \right), \qquad
        s = \sigma(z / T)

    For models that answer each class with yes or no (several labels per example), or that have a single score. Its
    smallest value is not 0 but :math:`T^2` times the mean entropy of the teacher's answers.

    Args:
        student_logits: Scores before the sigmoid, shape ``(N, ..., C)`` (classes at ``class_dim``).
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both models' answers, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Cross entropy in nats times :math:`T^2`, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> binary_soft_target(student, teacher)
        tensor([0.5564])

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; deviation: a sigmoid for each class instead of one
        softmax over the classes.
    """
    checks.positive("temperature", temperature)
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask, at_least=1)
    student, teacher = (softened(logits, temperature, counts, dim) for logits in (student, teacher))
    yes = teacher.sigmoid() * F.logsigmoid(student)
    no = (-teacher).sigmoid() * F.logsigmoid(-student)
    return reduced(-(yes + no).mean(dim=dim), counts, reduction) * temperature**2


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target's logit, and all logits with a target of probability 0, less than even an impossible class has."""
    return logits.gather(-1, target).squeeze(-1), logits.scatter(-1, target, 2 * LEAST_SCORE)
