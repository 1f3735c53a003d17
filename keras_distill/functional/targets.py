"""Formulas on logits as targets, class by class or with regard to the true class: student first, one value per row."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import (
    IGNORE_INDEX,
    ignored,
    log_odds,
    logarithm,
    prepare_labels,
    prepare_logits,
    prepare_number,
    prepare_temperature,
)
from keras_distill.functional.primitives import LEAST_SCORE, kl_from_logs

__all__ = ["binary_soft_target", "decoupled_kd", "minifinetuning", "normalized_kd", "weighted_soft_labels"]

_WEIGHT_EPS = 1e-7
# A logit of probability 0. Minus infinity would make the gradient NaN, and the sum of two of these still is a float32.


def decoupled_kd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    target_weight: Any = 1.0,
    nontarget_weight: Any = 8.0,
    temperature: Any = 4.0,
    ignore_index: int = IGNORE_INDEX,
    from_logits: bool = True,
) -> Any:
    r"""Two divergences: between the target class and all others together, and among the others.

    .. math:: T^2 \left( a \, \mathrm{KL}(b^t \| b^s) + b \, \mathrm{KL}(q^t \| q^s) \right), \qquad
        b = (p_y, 1 - p_y), \quad q_c = p_c / (1 - p_y), \quad p = \mathrm{softmax}(z / T)

    The plain divergence weights the second part by :math:`1 - p^t_y`, which makes it small where the teacher is
    certain. Here its weight is a setting. With two classes the second part is 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` or ``(N, ..., 1)``, from 0 to C - 1; a
            row with a negative label does not count, and one of C or more makes the row NaN.
        target_weight: Weight of the divergence between target and the rest, 0 or greater.
        nontarget_weight: Weight of the divergence among the other classes, 0 or greater.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats times :math:`T^2`, the shape of the logits without the last dimension;
            0 in rows that do not count.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0
            or a weight is negative.

    Example:
        >>> round(float(decoupled_kd([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], [0])[0]), 4)
        4.4776

    References:
        Zhao et al. 2022, equation 7, arXiv:2203.08679. The authors' code has a target weight of 1 and, by teacher,
        non-target weights of 2 to 8 for CIFAR-100 (temperature 4) and 0.5 to 2 for ImageNet (temperature 1).
        Deviation: computed in log space without the target class, and always finite. The authors' code subtracts 1000
        from the target's logit and takes logarithms of sums, which may be infinite.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    target_weight = prepare_number("target_weight", target_weight, student, checks.non_negative)
    nontarget_weight = prepare_number("nontarget_weight", nontarget_weight, student, checks.non_negative)
    temperature = prepare_temperature(temperature, student)
    student, teacher, is_target, counts = _rows(student, teacher, labels, ignore_index)
    student, teacher = student / temperature, teacher / temperature
    rest_student, rest_teacher = _others(student, is_target), _others(teacher, is_target)
    # p_y / (1 - p_y) = exp(margin): both logarithms of b are log-sigmoids and never of a rounded sum.
    margin_student = _target(student, is_target) - ops.logsumexp(rest_student, axis=-1)
    margin_teacher = _target(teacher, is_target) - ops.logsumexp(rest_teacher, axis=-1)
    target_part = ops.zeros_like(margin_student)
    for sign in (1, -1):
        log_student, log_teacher = ops.log_sigmoid(sign * margin_student), ops.log_sigmoid(sign * margin_teacher)
        target_part = target_part + ops.exp(log_teacher) * (log_teacher - log_student)
    log_student, log_teacher = ops.log_softmax(rest_student, axis=-1), ops.log_softmax(rest_teacher, axis=-1)
    nontarget_part = kl_from_logs(log_teacher, log_student)
    return temperature**2 * _where_counted(counts, target_weight * target_part + nontarget_weight * nontarget_part)


def normalized_kd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    nontarget_weight: Any = 1.5,
    temperature: Any = 1.0,
    ignore_index: int = IGNORE_INDEX,
    from_logits: bool = True,
) -> Any:
    r"""Cross entropy on the target class, weighted by the teacher, plus cross entropy among the other classes.

    .. math:: -p^t_y \log p^s_y - \gamma T^2 \sum_{c \ne y} q^t_c \log q^s_c, \qquad
        p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}_{c \ne y}(z / T)

    The other classes' probabilities are normalised to add up to 1 in both models before they are compared, so that the
    two cross entropies do not compete. Its smallest value is not 0. With two classes the second part is 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` or ``(N, ..., 1)``, from 0 to C - 1; a
            row with a negative label does not count, and one of C or more makes the row NaN.
        nontarget_weight: Weight :math:`\gamma` of the cross entropy among the other classes, 0 or greater.
        temperature: Softening of both distributions over the other classes, greater than 0; a scalar variable may be
            changed while training.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Cross entropy in nats, the shape of the logits without the last dimension;
            0 in rows that do not count.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0
            or the weight is negative.

    Example:
        >>> round(float(normalized_kd([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], [0])[0]), 4)
        1.9481

    References:
        Yang et al. 2023, section 3.1, arXiv:2303.13005; deviation: the student's own cross entropy on the label is the
        task loss and not part of this one. The target part has no temperature.
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    nontarget_weight = prepare_number("nontarget_weight", nontarget_weight, student, checks.non_negative)
    temperature = prepare_temperature(temperature, student)
    student, teacher, is_target, counts = _rows(student, teacher, labels, ignore_index)
    log_student = _target(ops.log_softmax(student, axis=-1), is_target)
    log_teacher = _target(ops.log_softmax(teacher, axis=-1), is_target)
    rest_student, rest_teacher = (_others(logits / temperature, is_target) for logits in (student, teacher))
    others = -ops.sum(ops.softmax(rest_teacher, axis=-1) * ops.log_softmax(rest_student, axis=-1), axis=-1)
    values = nontarget_weight * temperature**2 * others - ops.exp(log_teacher) * log_student
    return _where_counted(counts, values)


def weighted_soft_labels(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    temperature: Any = 2.0,
    ignore_index: int = IGNORE_INDEX,
    from_logits: bool = True,
) -> Any:
    r"""Cross entropy under the soft targets, weighted by how much better the teacher does on the example.

    .. math:: -\left(1 - \exp\left(-\frac{L^s}{L^t}\right)\right) T^2 \sum_c p^t_c \log p^s_c, \qquad
        L = -\log \mathrm{softmax}(z)_y, \quad p = \mathrm{softmax}(z / T)

    An example on which the student's own loss is far below the teacher's counts little: there soft targets regularise
    more than they teach. The weight is a constant, without a gradient. The smallest value is not 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` or ``(N, ..., 1)``, from 0 to C - 1; a
            row with a negative label does not count, and one of C or more makes the row NaN.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Weighted cross entropy in nats times :math:`T^2`, the shape of the logits without the last dimension;
            0 in rows that do not count.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes do not fit, there are fewer than two classes or the temperature is not greater than 0.

    Example:
        >>> round(float(weighted_soft_labels([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], [0])[0]), 3)
        3.57

    References:
        Zhou et al. 2021, equations 13 and 14, arXiv:2102.00650; 1e-7 is added to the teacher's loss. The authors weight
        the term by 2.5 on ImageNet (temperature 2) and by 2.25 on CIFAR-100 (temperature 4).
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    temperature = prepare_temperature(temperature, student)
    student, teacher, is_target, counts = _rows(student, teacher, labels, ignore_index)
    own_student = -_target(ops.log_softmax(ops.stop_gradient(student), axis=-1), is_target)
    own_teacher = -_target(ops.log_softmax(teacher, axis=-1), is_target)
    weight = -ops.expm1(-own_student / (own_teacher + _WEIGHT_EPS))
    soft_targets = ops.softmax(teacher / temperature, axis=-1)
    cross_entropy = -ops.sum(soft_targets * ops.log_softmax(student / temperature, axis=-1), axis=-1)
    return _where_counted(counts, weight * cross_entropy) * temperature**2


def minifinetuning(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    threshold: float = 0.2,
    temperature: Any = 1.0,
    ignore_index: int = IGNORE_INDEX,
    from_logits: bool = True,
) -> Any:
    r"""Kullback-Leibler divergence of the student's probabilities from the teacher's, corrected towards the labels.

    .. math:: T^2 \sum_c q_c (\log q_c - \log p^s_c), \qquad q = (1 - w) p^t + w e_y, \quad p = \mathrm{softmax}(z / T)

    .. math:: w = \frac{\min(\tau, 1 - p^t_y)}{1 - p^t_y} \text{ if the label is the likeliest class k, else }
        \frac{p^t_k - p^t_y + \tau}{1 + p^t_k - p^t_y}

    A correct teacher gets :math:`\tau` surer of the label; a wrong one is changed until the label leads over its own
    choice by :math:`\tau`. The other classes keep their proportions.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        labels: Class index of each row, shape ``(N, ...)`` or ``(N, ..., 1)``, from 0 to C - 1; a
            row with a negative label does not count, and one of C or more makes the row NaN.
        threshold: Lead :math:`\tau` of the label in a corrected target, at least 0 and less than 1.
        temperature: Softening of both distributions, greater than 0; it precedes the correction. A scalar variable may
            be changed while training.
        ignore_index: A label that marks rows that do not count, beside negative ones.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        Divergence in nats times :math:`T^2`, the shape of the logits without the last dimension;
            0 in rows that do not count.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes do not fit, there are fewer than two classes, the temperature is not greater than 0 or
            the threshold is out of its range.

    Example:
        >>> round(float(minifinetuning([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]], [1])[0]), 4)
        0.8968

    References:
        Belcak et al. 2025 (MFT), arXiv:2506.15702; deviation from the authors' code: nothing is added to the divisors,
        so that a teacher that is certain of the label is corrected as well.
    """
    checks.fraction("threshold", threshold)
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    temperature = prepare_temperature(temperature, student)
    student, teacher, is_label, counts = _rows(student, teacher, labels, ignore_index)
    log_student = ops.log_softmax(student / temperature, axis=-1)
    probabilities = ops.softmax(teacher / temperature, axis=-1)
    of_label = ops.expand_dims(_target(probabilities, is_label), -1)
    largest = ops.max(probabilities, axis=-1, keepdims=True)
    rest = 1.0 - of_label
    kept = ops.where(
        of_label == largest,
        ops.maximum(rest - threshold, 0.0) / ops.where(rest > 0, rest, ops.ones_like(rest)),
        (1.0 - threshold) / (1.0 + largest - of_label),
    )
    target = kept * probabilities + (1.0 - kept) * ops.cast(is_label, probabilities.dtype)
    values = ops.sum(target * (logarithm(target) - log_student), axis=-1)
    return _where_counted(counts, values) * temperature**2


def binary_soft_target(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Binary cross entropy of each class under the teacher's soft targets, averaged over the classes.

    .. math:: -\frac{T^2}{C} \sum_c \left( s^t_c \log s^s_c + (1 - s^t_c) \log (1 - s^s_c) \right), \qquad
        s = \sigma(z / T)

    For models that answer each class with yes or no (several labels per example), or that have a single score. Its
    smallest value is not 0 but :math:`T^2` times the mean entropy of the teacher's answers.

    Args:
        student_logits: Scores before the sigmoid, shape ``(N, ..., C)``.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both models' answers, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities of a sigmoid and z is the logarithm of
            their odds.

    Returns:
        Cross entropy in nats times :math:`T^2`, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, or the temperature is not greater than 0.

    Example:
        >>> round(float(binary_soft_target([[2.0, 0.0, 1.0]], [[4.0, 1.0, 0.0]])[0]), 4)
        0.5564

    References:
        Hinton, Vinyals and Dean 2015, section 2, arXiv:1503.02531; deviation: a sigmoid for each class instead of one
        softmax over the classes.
    """
    checks.boolean("from_logits", from_logits)
    student, teacher = prepare_logits(student_logits, teacher_logits, at_least=1)
    temperature = prepare_temperature(temperature, student)
    if not from_logits:
        student, teacher = log_odds(student), log_odds(teacher)
    student, teacher = student / temperature, teacher / temperature
    yes = ops.sigmoid(teacher) * ops.log_sigmoid(student)
    no = ops.sigmoid(-teacher) * ops.log_sigmoid(-student)
    return -ops.mean(yes + no, axis=-1) * temperature**2


def _rows(student: Any, teacher: Any, labels: Any, ignore_index: int) -> tuple[Any, Any, Any, Any]:
    """Both models' logits with zeros in the rows that do not count, where the label's class is, which rows count."""
    labels = prepare_labels(labels, student)
    counts = ops.logical_not(ignored(labels, ignore_index))
    student, teacher = (
        ops.where(ops.expand_dims(counts, -1), logits, ops.zeros_like(logits)) for logits in (student, teacher)
    )
    labels = ops.where(counts, labels, ops.zeros_like(labels))
    classes = ops.arange(ops.shape(student)[-1], dtype="int32")
    return student, teacher, ops.equal(classes, ops.expand_dims(labels, axis=-1)), counts


def _where_counted(counts: Any, values: Any) -> Any:
    return ops.where(counts, values, ops.zeros_like(values))


def _target(values: Any, is_target: Any) -> Any:
    """Each row's value at its label; NaN if the label is not a class, as in Keras' own cross entropy."""
    value = ops.sum(ops.where(is_target, values, ops.zeros_like(values)), axis=-1)
    return ops.where(ops.any(is_target, axis=-1), value, ops.full_like(value, float("nan")))


def _others(logits: Any, is_target: Any) -> Any:
    """The logits with the label's class made impossible."""
    return ops.where(is_target, ops.full_like(logits, LEAST_SCORE), logits)
