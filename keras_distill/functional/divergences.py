"""Divergences between the two models' distributions: student first, one value per row, no gradient into the teacher."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare_logits, prepare_number, prepare_temperature
from keras_distill.functional.primitives import LEAST_SCORE, kl_from_logs, softmax_divergence

__all__ = [
    "alpha_beta_divergence",
    "generalized_jsd",
    "interpolated_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]

# Logarithms of probabilities and of their powers: those of an impossible class would overflow if the exponent is
# negative.
_LEAST_LOG, _LARGEST_LOG = -1e15, math.log(1e15)
_CLOSE_TO_ZERO = 1e-6  # exponents below it take the formula's limit, which is the more accurate there


def reverse_kl(student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True) -> Any:
    r"""Kullback-Leibler divergence of the teacher's probabilities from the student's.

    .. math:: \sum_c p^s_c (\log p^s_c - \log p^t_c), \qquad p = \mathrm{softmax}(z / T)

    A student that is too small to cover all of the teacher's likely classes concentrates on the most likely ones. The
    forward divergence makes it spread out. A class that the teacher forbids (minus infinity) is left out on both sides,
    where the divergence would be infinite.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> round(float(reverse_kl([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.4825

    References:
        Gu et al. 2023 (MiniLLM), equation 1, arXiv:2306.08543; deviation: the divergence of the whole distribution at
        each position, summed exactly, instead of an estimate from sampled sequences. The value is
        not multiplied by :math:`T^2`.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    student = ops.where(teacher <= LEAST_SCORE, ops.full_like(student, LEAST_SCORE), student)
    return kl_from_logs(*_softened(student, teacher, temperature))


def generalized_jsd(
    student_logits: Any,
    teacher_logits: Any,
    *,
    beta: float = 0.5,
    temperature: Any = 1.0,
    from_logits: bool = True,
) -> Any:
    r"""Generalised Jensen-Shannon divergence of the two models' probabilities.

    .. math:: \beta \, \mathrm{KL}(p^t \| m) + (1 - \beta) \, \mathrm{KL}(p^s \| m), \qquad
        m = \beta p^t + (1 - \beta) p^s, \qquad p = \mathrm{softmax}(z / T)

    It is bounded. A :math:`\beta` of 0 gives the forward divergence :math:`\mathrm{KL}(p^t \| p^s)`, 1 gives the
    reverse :math:`\mathrm{KL}(p^s \| p^t)`, and values between them lie between the two.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        beta: Share of the teacher in the mixture, from 0 to 1.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0 or
            ``beta`` is not from 0 to 1.

    Example:
        >>> round(float(generalized_jsd([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], beta=0.1)[0]), 4)
        0.0226

    References:
        Agarwal et al. 2023 (GKD), section 2 and equation 1, arXiv:2306.13649. At 0 and 1 the formula itself is 0. As in
        published code, 0 and 1 give the two divergences instead, which are the limits of the formula divided by
        :math:`\beta` or :math:`1 - \beta`. It has no factor :math:`T^2`.
    """
    checks.between("beta", beta, 0, 1)
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature, from_logits)
    if beta == 0:
        return kl_from_logs(log_teacher, log_student)
    if beta == 1:
        return kl_from_logs(log_student, log_teacher)
    log_mixture = _log_mixture(log_teacher, log_student, beta)
    return beta * kl_from_logs(log_teacher, log_mixture) + (1 - beta) * kl_from_logs(log_student, log_mixture)


def skew_kl(student_logits: Any, teacher_logits: Any, *, skew: float = 0.1, from_logits: bool = True) -> Any:
    r"""Kullback-Leibler divergence of a mixture of both models from the teacher's probabilities.

    .. math:: \mathrm{KL}(p^t \, \| \, \alpha p^t + (1 - \alpha) p^s), \qquad p = \mathrm{softmax}(z)

    The mixture is never far below the teacher: the value is at most :math:`-\log \alpha` and the gradient stays small
    for classes that the student considers impossible but the teacher does not.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        skew: Share :math:`\alpha` of the teacher in the mixture, from 0 (no mixture) to less than 1.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``skew`` is out of its range.

    Example:
        >>> round(float(skew_kl([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.2103

    References:
        Ko et al. 2024 (DistiLLM), equation 4, arXiv:2402.03898; deviation: the whole divergence, where the authors'
        code leaves out the teacher's entropy, which has no gradient.
    """
    # At 1 the mixture would be the first distribution itself: the loss would be zero for any student.
    checks.fraction("skew", skew)
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, 1.0, from_logits)
    return kl_from_logs(log_teacher, _log_mixture(log_teacher, log_student, skew))


def skew_reverse_kl(student_logits: Any, teacher_logits: Any, *, skew: float = 0.1, from_logits: bool = True) -> Any:
    r"""Kullback-Leibler divergence of a mixture of both models from the student's probabilities.

    .. math:: \mathrm{KL}(p^s \, \| \, \alpha p^s + (1 - \alpha) p^t), \qquad p = \mathrm{softmax}(z)

    It is the reverse divergence with a bound: if the student favours a class that the teacher finds impossible, the
    gradient does not grow with the teacher's certainty. The gradient passes through the mixture too.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        skew: Share :math:`\alpha` of the student in the mixture, from 0 (no mixture) to less than 1.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``skew`` is out of its range.

    Example:
        >>> round(float(skew_reverse_kl([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.2873

    References:
        Ko et al. 2024 (DistiLLM), section 3.1, arXiv:2402.03898.
    """
    # At 1 the mixture would be the first distribution itself: the loss would be zero for any student.
    checks.fraction("skew", skew)
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, 1.0, from_logits)
    return kl_from_logs(log_student, _log_mixture(log_student, log_teacher, skew))


def total_variation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Total variation distance of the two models' probabilities.

    .. math:: \frac{1}{2} \sum_c |p^s_c - p^t_c|, \qquad p = \mathrm{softmax}(z / T)

    It is symmetric and bounded: one example on which the models disagree entirely counts 1, however certain they are.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Distance from 0 to 1, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> round(float(total_variation([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.271

    References:
        Wen et al. 2023 (f-distill), theorem 1, arXiv:2307.15190, where the sum over the steps bounds the distance of
        whole sequences; deviation: the distance at each position, summed exactly. The value is
        not multiplied by :math:`T^2`.
    """
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature, from_logits)
    return 0.5 * ops.sum(ops.abs(ops.exp(log_student) - ops.exp(log_teacher)), axis=-1)


def alpha_beta_divergence(
    student_logits: Any,
    teacher_logits: Any,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: Any = 1.0,
    from_logits: bool = True,
) -> Any:
    r"""Alpha-beta divergence of the two models' probabilities.

    .. math:: \frac{1}{\alpha \beta (\alpha + \beta)} \sum_c \alpha (p^t_c)^{\alpha + \beta}
        + \beta (p^s_c)^{\alpha + \beta} - (\alpha + \beta) (p^t_c)^\alpha (p^s_c)^\beta,
        \qquad p = \mathrm{softmax}(z / T)

    A larger :math:`\alpha` lets the classes that the teacher finds likely weigh more, a larger :math:`\beta` those in
    which the student is confident already. It is the forward divergence at (1, 0), the reverse one at (0, 1) and the
    squared Hellinger distance times 4 at (0.5, 0.5). Where an exponent or their sum is 0, it is the formula's limit.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        alpha: Exponent of the teacher's probabilities, any number.
        beta: Exponent of the student's probabilities, any number.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, the temperature is not greater than 0 or an
            exponent is not finite.

    Example:
        >>> round(float(alpha_beta_divergence([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.4891

    References:
        Wang et al. 2025 (ABKD), arXiv:2505.04560. The limits are those of Cichocki, Cruces and Amari 2011;
        deviation from the authors' code, whose limits have another factor, so that its value jumps there. Powers of
        probabilities are at most 1e15. The value is not multiplied by :math:`T^2`.
    """
    checks.number("alpha", alpha)
    checks.number("beta", beta)
    logs = _log_probabilities(student_logits, teacher_logits, temperature, from_logits)
    log_q, log_p = (ops.maximum(log, _LEAST_LOG) for log in logs)
    q_power, p_power, mixed = (
        ops.exp(ops.minimum(power, _LARGEST_LOG))
        for power in ((alpha + beta) * log_q, (alpha + beta) * log_p, alpha * log_p + beta * log_q)
    )
    apart = log_q - log_p
    no_alpha, no_beta, no_total = (abs(exponent) < _CLOSE_TO_ZERO for exponent in (alpha, beta, alpha + beta))
    if no_alpha and no_beta:
        terms = 0.5 * ops.square(apart)
    elif no_alpha:  # [q^b log(q^b / p^b) - q^b + p^b] / b^2
        terms = (beta * apart * q_power - q_power + p_power) / beta**2
    elif no_beta:  # [p^a log(p^a / q^a) - p^a + q^a] / a^2
        terms = (q_power - p_power - alpha * apart * p_power) / alpha**2
    elif no_total:  # [log(q^a / p^a) + (p / q)^a - 1] / a^2
        terms = (alpha * apart + mixed - 1.0) / alpha**2
    else:
        terms = (alpha * p_power + beta * q_power - (alpha + beta) * mixed) / (alpha * beta * (alpha + beta))
    return ops.sum(terms, axis=-1)


def interpolated_kl(
    student_logits: Any, teacher_logits: Any, *, interpolation: Any = 0.4, from_logits: bool = True
) -> Any:
    r"""Kullback-Leibler divergence of the student's probabilities from those on the way from student to teacher.

    .. math:: \sum_c p_c (\log p_c - \log p^s_c), \qquad
        p = \mathrm{softmax}((1 - t) \bar z^s + t z^t), \quad p^s = \mathrm{softmax}(z^s)

    A teacher that is far stronger than the student is approached step by step: the target lies between the two models'
    logits. The student's part in it, :math:`\bar z^s`, is a constant without a gradient. At t = 1 it is the forward
    divergence.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        interpolation: Share t of the teacher in the target's logits, from 0 (the loss is zero) to 1; a scalar variable
            may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or ``interpolation`` is not from 0 to 1.

    Example:
        >>> round(float(interpolated_kl([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], interpolation=0.8)[0]), 4)
        0.1999

    References:
        Shing et al. 2025 (TAID), section 3, arXiv:2501.16937; deviation from the authors' code: the whole divergence,
        where the code leaves out the entropy of the target, which has no gradient.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    share = prepare_number("interpolation", interpolation, student, _check_share)
    return softmax_divergence(student, (1.0 - share) * ops.stop_gradient(student) + share * teacher)


def _log_probabilities(
    student_logits: Any, teacher_logits: Any, temperature: Any, from_logits: bool
) -> tuple[Any, Any]:
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    return _softened(student, teacher, temperature)


def _softened(student: Any, teacher: Any, temperature: Any) -> tuple[Any, Any]:
    temperature = prepare_temperature(temperature, student)
    return ops.log_softmax(student / temperature, axis=-1), ops.log_softmax(teacher / temperature, axis=-1)


def _log_mixture(log_p: Any, log_q: Any, share: float) -> Any:
    # log(share p + (1 - share) q) without leaving log space, where p or q may be less than the smallest float.
    if share == 0:
        return log_q
    log_p, log_q = log_p + math.log(share), log_q + math.log1p(-share)
    # Not ops.logaddexp: where its two arguments are equal, TensorFlow passes the whole gradient to the first.
    largest = ops.stop_gradient(ops.maximum(log_p, log_q))
    return largest + ops.log(ops.exp(log_p - largest) + ops.exp(log_q - largest))


def _check_share(name: str, value: Any) -> None:
    checks.between(name, value, 0, 1)
