"""Formulas on the two models' logits: student first, one value per row of logits, no gradient into the teacher."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import epsilon_of, prepare_logits, prepare_temperature
from keras_distill.functional.primitives import LEAST_SCORE, kl_from_logs

__all__ = ["hard_target", "logit_mse", "soft_cross_entropy", "soft_target_kl"]

_STANDARDIZE_EPS = 1e-7


def soft_target_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: Any = 4.0,
    standardize: bool = False,
    from_logits: bool = True,
) -> Any:
    r"""Kullback-Leibler divergence of the student's softened probabilities from the teacher's soft targets.

    .. math:: T^2 \sum_c p^t_c (\log p^t_c - \log p^s_c), \qquad p = \mathrm{softmax}(z / T)

    The factor :math:`T^2` keeps the size of the gradient about the same when the temperature changes.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        standardize: Whether each row of logits is z-scored first (unbiased standard deviation plus 1e-7), so that
            the student need not copy the size of the teacher's logits.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats times :math:`T^2`, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> divergence = soft_target_kl([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], temperature=2.0)
        >>> round(float(divergence[0]), 4)
        0.5694

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531. Standardisation: Sun et al. 2024, section 4.3,
        arXiv:2403.01427; deviations: the unbiased deviation plus 1e-7, as in the authors' code, where algorithm 1
        divides by C and adds nothing; and a row that is constant up to rounding is centred but not divided, because
        dividing by 1e-7 would give gradients that overflow half precision.
    """
    checks.boolean("standardize", standardize)
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    temperature = prepare_temperature(temperature, student)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    log_student = ops.log_softmax(student / temperature, axis=-1)
    log_teacher = ops.log_softmax(teacher / temperature, axis=-1)
    return kl_from_logs(log_teacher, log_student) * temperature**2


def soft_cross_entropy(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Cross entropy of the student's softened probabilities under the teacher's soft targets.

    .. math:: -T^2 \sum_c p^t_c \log p^s_c, \qquad p = \mathrm{softmax}(z / T)

    It is :func:`soft_target_kl` plus :math:`T^2` times the teacher's entropy: the gradient is the same, and the
    smallest value is that entropy instead of 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Cross entropy in nats times :math:`T^2`, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> round(float(soft_cross_entropy([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.518

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    temperature = prepare_temperature(temperature, student)
    soft_targets = ops.softmax(teacher / temperature, axis=-1)
    return -ops.sum(soft_targets * ops.log_softmax(student / temperature, axis=-1), axis=-1) * temperature**2


def hard_target(student_logits: Any, teacher_logits: Any, *, from_logits: bool = True) -> Any:
    r"""Cross entropy of the student's probabilities with the teacher's decision.

    .. math:: -\log p^s_k, \qquad k = \arg\max_c z^t_c, \quad p = \mathrm{softmax}(z)

    The teacher's most likely class is taken as a label: how sure the teacher is does not count. Of equally likely
    classes it is the first.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Cross entropy in nats, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or ``from_logits`` is not a bool.
        ValueError: If the shapes differ or there are fewer than two classes.

    Example:
        >>> round(float(hard_target([[2.0, 0.0, 1.0]], [[1.0, 4.0, 0.0]])[0]), 4)
        2.4076

    References:
        Touvron et al. 2021 (DeiT), equation 3, arXiv:2012.12877; deviation: the student's cross entropy on the label is
        the task loss and not part of this one.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    decision = ops.expand_dims(ops.argmax(teacher, axis=-1), -1)
    log_student = ops.log_softmax(student, axis=-1)
    return -ops.squeeze(ops.take_along_axis(log_student, decision, axis=-1), axis=-1)


def logit_mse(student_logits: Any, teacher_logits: Any, *, from_logits: bool = True) -> Any:
    r"""Mean squared difference of the two models' logits.

    .. math:: \frac{1}{C} \sum_c (z^s_c - z^t_c)^2

    Logits keep what the softmax throws away (their common shift) and need no temperature.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Mean squared difference, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or ``from_logits`` is not a bool.
        ValueError: If the shapes differ.

    Example:
        >>> float(logit_mse([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0])
        2.0

    References:
        Ba and Caruana 2014, section 2.2, arXiv:1312.6184; deviation: the mean over the classes, without the factor 1/2.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits, at_least=1, finite=False)
    return ops.mean(ops.square(student - teacher), axis=-1)


def _standardized(logits: Any) -> Any:
    possible = logits > LEAST_SCORE  # a class of probability 0 has no part in the row's mean and deviation
    zeros = ops.zeros_like(logits)
    scores = ops.where(possible, logits, zeros)
    count = ops.sum(ops.cast(possible, logits.dtype), axis=-1, keepdims=True)
    mean = ops.sum(scores, axis=-1, keepdims=True) / ops.maximum(count, 1.0)
    centred = ops.where(possible, scores - mean, zeros)
    variance = ops.sum(ops.square(centred), axis=-1, keepdims=True) / ops.maximum(count - 1.0, 1.0)
    rounding = 4 * epsilon_of(logits) * ops.max(ops.abs(ops.stop_gradient(scores)), axis=-1, keepdims=True)
    # The root of a zero variance has no gradient and 1e-7 is a divisor out of reach of float16: constant rows get 1.
    deviation = ops.sqrt(ops.where(variance <= ops.square(rounding), ops.ones_like(variance), variance))
    return ops.where(possible, centred / (deviation + _STANDARDIZE_EPS), ops.full_like(logits, LEAST_SCORE))
