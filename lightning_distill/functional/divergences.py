"""Divergences between the two models' distributions: student first, one value per row, no gradient into the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, check_logits, prepare_logits, reduced
from lightning_distill.functional.kernels import Divergence, divergence, softmax_divergence
from lightning_distill.functional.primitives import softened
from lightning_distill.functional.rows import alpha_beta_terms

__all__ = [
    "alpha_beta_divergence",
    "generalized_jsd",
    "interpolated_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of the teacher's probabilities from the student's.

    .. math:: \sum_c p^s_c (\log p^s_c - \log p^t_c), \qquad p = \mathrm{softmax}(z / T)

    A student that is too small to cover all of the teacher's likely classes concentrates on the most likely ones. The
    forward divergence makes it spread out. A class that the teacher forbids (minus infinity) is left out on both sides,
    where the divergence would be infinite.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> reverse_kl(student, teacher)
        tensor([0.4825])

    References:
        Gu et al. 2023 (MiniLLM), equation 1, arXiv:2306.08543; deviation: the divergence of the whole distribution at
        each position, summed exactly, instead of an estimate from sampled sequences. It has no factor
        :math:`T^2`.
    """
    settings = Divergence("reverse_kl", temperature=temperature)
    return _divergence(student_logits, teacher_logits, settings, class_dim, mask, reduction)


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence of the two models' probabilities.

    .. math:: \beta \, \mathrm{KL}(p^t \| m) + (1 - \beta) \, \mathrm{KL}(p^s \| m), \qquad
        m = \beta p^t + (1 - \beta) p^s, \qquad p = \mathrm{softmax}(z / T)

    It is bounded. A :math:`\beta` of 0 gives the forward divergence :math:`\mathrm{KL}(p^t \| p^s)`, 1 gives the
    reverse :math:`\mathrm{KL}(p^s \| p^t)`, and values between them lie between the two.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        beta: Share of the teacher in the mixture, from 0 to 1.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0 or
            ``beta`` is not from 0 to 1.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> generalized_jsd(student, teacher, beta=0.1)
        tensor([0.0226])

    References:
        Agarwal et al. 2023 (GKD), section 2 and equation 1, arXiv:2306.13649. At 0 and 1 the formula itself is 0. As in
        published code, 0 and 1 give the two divergences instead, which are the limits of the formula divided by
        :math:`\beta` or :math:`1 - \beta`. It has no factor :math:`T^2`.
    """
    checks.between("beta", beta, 0, 1)
    settings = Divergence.of("jensen_shannon", beta, temperature)
    return _divergence(student_logits, teacher_logits, settings, class_dim, mask, reduction)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of a mixture of both models from the teacher's probabilities.

    .. math:: \mathrm{KL}(p^t \, \| \, \alpha p^t + (1 - \alpha) p^s), \qquad p = \mathrm{softmax}(z)

    The mixture is never far below the teacher: the value is at most :math:`-\log \alpha` and the gradient stays small
    where the student gives probability 0 to a class and the teacher does not.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        skew: Share :math:`\alpha` of the teacher in the mixture, from 0 (no mixture) to less than 1.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``skew`` is out of its range.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> skew_kl(student, teacher)
        tensor([0.2103])

    References:
        Ko et al. 2024 (DistiLLM), equation 4, arXiv:2402.03898; deviation: the whole divergence, where the authors'
        code leaves out the teacher's entropy, which has no gradient.
    """
    # At 1 the mixture would be the first distribution itself: the loss would be zero for any student.
    checks.fraction("skew", skew)
    settings = Divergence.of("skew_kl", skew)
    return _divergence(student_logits, teacher_logits, settings, class_dim, mask, reduction)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of a mixture of both models from the student's probabilities.

    .. math:: \mathrm{KL}(p^s \, \| \, \alpha p^s + (1 - \alpha) p^t), \qquad p = \mathrm{softmax}(z)

    It is the reverse divergence with a bound: if the student favours a class that the teacher finds impossible, the
    gradient does not grow with the teacher's certainty. The gradient passes through the mixture too.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        skew: Share :math:`\alpha` of the student in the mixture, from 0 (no mixture) to less than 1.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``skew`` is out of its range.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> skew_reverse_kl(student, teacher)
        tensor([0.2873])

    References:
        Ko et al. 2024 (DistiLLM), section 3.1, arXiv:2402.03898.
    """
    # At 1 the mixture would be the first distribution itself: the loss would be zero for any student.
    checks.fraction("skew", skew)
    settings = Divergence.of("skew_reverse_kl", skew)
    return _divergence(student_logits, teacher_logits, settings, class_dim, mask, reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Total variation distance of the two models' probabilities.

    .. math:: \frac{1}{2} \sum_c |p^s_c - p^t_c|, \qquad p = \mathrm{softmax}(z / T)

    It is symmetric and bounded: one example on which the models disagree entirely counts 1, however certain they are.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Distance from 0 to 1, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> total_variation(student, teacher)
        tensor([0.2710])

    References:
        Wen et al. 2023 (f-distill), theorem 1, arXiv:2307.15190, where the sum over the steps bounds the distance of
        whole sequences; deviation: the distance at each position, summed exactly. It has no factor :math:`T^2`.
    """
    settings = Divergence("total_variation", temperature=temperature)
    return _divergence(student_logits, teacher_logits, settings, class_dim, mask, reduction)


def alpha_beta_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Alpha-beta divergence of the two models' probabilities.

    .. math:: \frac{1}{\alpha \beta (\alpha + \beta)} \sum_c \alpha (p^t_c)^{\alpha + \beta}
        + \beta (p^s_c)^{\alpha + \beta} - (\alpha + \beta) (p^t_c)^\alpha (p^s_c)^\beta,
        \qquad p = \mathrm{softmax}(z / T)

    A larger :math:`\alpha` lets the classes that the teacher finds likely weigh more, a larger :math:`\beta` those in
    which the student is confident already. It is the forward divergence at (1, 0), the reverse one at (0, 1) and the
    squared Hellinger distance times 4 at (0.5, 0.5). Where an exponent or their sum is 0, it is the formula's limit.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        alpha: Exponent of the teacher's probabilities, any number.
        beta: Exponent of the student's probabilities, any number.
        temperature: Softening of both distributions, greater than 0.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0 or an
            exponent is not finite.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> alpha_beta_divergence(student, teacher)
        tensor([0.4891])

    References:
        Wang et al. 2025 (ABKD), arXiv:2505.04560. The limits are those of Cichocki, Cruces and Amari 2011;
        deviation from the authors' code, whose limits have another factor, so that its value jumps there. Powers of
        probabilities are at most 1e15. It has no factor :math:`T^2`.
    """
    checks.number("alpha", alpha)
    checks.number("beta", beta)
    checks.positive("temperature", temperature)
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask)
    log_student, log_teacher = (
        F.log_softmax(softened(logits, temperature, counts, dim), dim=dim) for logits in (student, teacher)
    )
    terms = alpha_beta_terms(log_student, log_teacher, alpha=alpha, beta=beta)
    return reduced(terms.sum(dim=dim), counts, reduction)


def interpolated_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    interpolation: float = 0.4,
    class_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student's probabilities from those on the way from student to teacher.

    .. math:: \sum_c p_c (\log p_c - \log p^s_c), \qquad
        p = \mathrm{softmax}((1 - t) \bar z^s + t z^t), \quad p^s = \mathrm{softmax}(z^s)

    A teacher that is far stronger than the student is approached step by step: the target lies between the two models'
    logits. The student's part in it, :math:`\bar z^s`, is a constant without a gradient. At t = 1 it is the forward
    divergence.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)`` (classes at ``class_dim``), C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        interpolation: Share t of the teacher in the target's logits, from 0 (the loss is zero) to 1.
        class_dim: Dimension of the classes; None means 1 for logits of four or more dimensions, else the last.
        mask: True where a row counts, shape ``(N,)`` or the logits' without ``class_dim``; None where all count.
        reduction: ``"none"`` for one value per row, ``"mean"`` for their mean.

    Returns:
        Divergence in nats, one value per row: the shape of the logits without ``class_dim``.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``interpolation`` is not from 0 to 1.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0]])
        >>> interpolated_kl(student, teacher, interpolation=0.8)
        tensor([0.1999])

    References:
        Shing et al. 2025 (TAID), section 3, arXiv:2501.16937; deviation from the authors' code: the whole divergence,
        where the code leaves out the entropy of the target, which has no gradient.
    """
    checks.between("interpolation", interpolation, 0, 1)
    student, teacher, dim, counts = prepare_logits(student_logits, teacher_logits, class_dim, mask=mask)
    student, teacher = (softened(logits, 1.0, counts, dim) for logits in (student, teacher))
    target = torch.lerp(student.detach(), teacher, interpolation)
    return reduced(softmax_divergence(student, target, dim), counts, reduction)


def _divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    settings: Divergence,
    class_dim: int | None,
    mask: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    checks.positive("temperature", settings.temperature)
    student, teacher, dim, counts = check_logits(student_logits, teacher_logits, class_dim, mask=mask)
    return divergence(student, teacher, settings, dim, counts, reduction)
