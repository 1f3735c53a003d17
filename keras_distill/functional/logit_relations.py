"""Formulas on how rows and columns of the models' probabilities relate: student first, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import epsilon_of, prepare_logits, prepare_temperature
from keras_distill.functional.logits import soft_target_kl

__all__ = [
    "batch_correlation",
    "class_correlation",
    "inter_class_relation",
    "intra_class_relation",
    "multi_level_logits",
]

_CORRELATION_EPS = 1e-8


def inter_class_relation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""One minus the correlation of the two models' probabilities of an example, over the classes.

    .. math:: T^2 (1 - \rho(p^s_n, p^t_n)), \qquad \rho(a, b) = \frac{(a - \bar a) \cdot (b - \bar b)}
        {\|a - \bar a\| \, \|b - \bar b\|}, \qquad p = \mathrm{softmax}(z / T)

    The student need not match the teacher's probabilities, only how they compare with each other: a strong teacher is
    easier to follow.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        From 0 to 2 times :math:`T^2`, the shape of the logits without the last dimension.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> round(float(inter_class_relation([[2.0, 0.0, 1.0]], [[0.0, 1.0, 2.0]])[0]), 4)
        1.5

    References:
        Huang et al. 2022 (DIST), equation 8, arXiv:2205.10536; 1e-8 is added to the product of norms. Deviation:
        probabilities that are constant up to rounding are centred but not divided, because the gradient would be
        noise divided by 1e-8; their correlation counts as 0.
    """
    student, teacher, temperature = _rows_of_probabilities(student_logits, teacher_logits, temperature, from_logits)
    return temperature**2 * (1 - _correlation(student, teacher, axis=-1))


def intra_class_relation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""One minus the correlation of the two models' probabilities of a class, over the examples; mean of the classes.

    .. math:: \frac{T^2}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c})), \qquad p = \mathrm{softmax}(z / T)

    It compares which examples of the batch look most like a class. A batch of one example has the value :math:`T^2` and
    the gradient 0.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        A scalar from 0 to 2 times :math:`T^2`: the whole batch is compared, each pixel of a dense map as an example.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> round(float(intra_class_relation(student, teacher)), 4)
        0.6667

    References:
        Huang et al. 2022 (DIST), equation 9, arXiv:2205.10536; as in :func:`inter_class_relation`.
    """
    student, teacher, temperature = _matrices(student_logits, teacher_logits, temperature, from_logits)
    return ops.mean(temperature**2 * (1 - _correlation(student, teacher, axis=0)))


def batch_correlation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Squared difference of the two models' products between the examples of a batch.

    .. math:: \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2, \qquad P = \mathrm{softmax}(z / T)

    It compares which examples a model finds alike. Memory grows with the square of the number of rows; in a dense map
    each pixel is a row.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> round(float(batch_correlation(student, teacher)), 4)
        0.0919

    References:
        Jin, Wang and Lin 2023, "Batch-level Alignment" in section 3, CVPR.
    """
    student, teacher, _ = _matrices(student_logits, teacher_logits, temperature, from_logits)
    return _gram_difference(student, teacher)


def class_correlation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, from_logits: bool = True
) -> Any:
    r"""Squared difference of the two models' products between the classes.

    .. math:: \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2, \qquad P = \mathrm{softmax}(z / T)

    It compares which classes a model finds likely together. The products are summed over the batch, so the value grows
    with its size.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperature: Softening of both distributions, greater than 0; a scalar variable may be changed while training.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, or the temperature is not greater than 0.

    Example:
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> round(float(class_correlation(student, teacher)), 4)
        0.2621

    References:
        Jin, Wang and Lin 2023, "Class-level Alignment" in section 3, CVPR.
    """
    student, teacher, _ = _matrices(student_logits, teacher_logits, temperature, from_logits)
    return _gram_difference(ops.transpose(student), ops.transpose(teacher))


def multi_level_logits(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    from_logits: bool = True,
) -> Any:
    r"""Divergence of each example, of the batch's products and of the classes', averaged over several temperatures.

    .. math:: \frac{1}{K} \sum_T \left( \frac{T^2}{N} \sum_n \mathrm{KL}(p^t_n \| p^s_n)
        + \frac{1}{N} \| P_s P_s^\top - P_t P_t^\top \|_F^2 + \frac{1}{C} \| P_s^\top P_s - P_t^\top P_t \|_F^2 \right)

    Several temperatures cover the teacher's first choices and its faint preferences together. The parts are
    :func:`soft_target_kl`, :func:`batch_correlation` and :func:`class_correlation`.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, ..., C)``, C of 2 or more.
        teacher_logits: The teacher's scores for the same inputs, same shape.
        temperatures: The K temperatures, each greater than 0.
        from_logits: Whether these are logits; if False they are probabilities and z is their logarithm.

    Returns:
        A scalar: the whole batch is compared.

    Raises:
        TypeError: If the logits are not floating point tensors, or a setting has the wrong type.
        ValueError: If the shapes differ, there are fewer than two classes, ``temperatures`` is empty or one of them is
            not greater than 0.

    Example:
        >>> student = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
        >>> round(float(multi_level_logits(student, teacher)), 4)
        0.8134

    References:
        Jin, Wang and Lin 2023, section 3, CVPR; deviations: the mean over the temperatures, where the paper has the
        sum; :math:`T^2` and the mean over the examples in the divergence, as in the authors' code; but without that
        code's two views of each image and its masks of confidence.
    """
    checks.positives("temperatures", temperatures)
    total = 0.0
    for temperature in temperatures:
        student, teacher, _ = _matrices(student_logits, teacher_logits, temperature, from_logits)
        examples = soft_target_kl(student_logits, teacher_logits, temperature=temperature, from_logits=from_logits)
        classes = _gram_difference(ops.transpose(student), ops.transpose(teacher))
        total = total + ops.mean(examples) + _gram_difference(student, teacher) + classes
    return total / len(temperatures)


def _rows_of_probabilities(
    student_logits: Any, teacher_logits: Any, temperature: Any, from_logits: bool
) -> tuple[Any, Any, Any]:
    student, teacher = prepare_logits(student_logits, teacher_logits, from_logits=from_logits)
    temperature = prepare_temperature(temperature, student)
    return ops.softmax(student / temperature, axis=-1), ops.softmax(teacher / temperature, axis=-1), temperature


def _matrices(student_logits: Any, teacher_logits: Any, temperature: Any, from_logits: bool) -> tuple[Any, Any, Any]:
    student, teacher, temperature = _rows_of_probabilities(student_logits, teacher_logits, temperature, from_logits)
    shape = (-1, ops.shape(student)[-1])
    return ops.reshape(student, shape), ops.reshape(teacher, shape), temperature


def _gram_difference(student: Any, teacher: Any) -> Any:
    difference = ops.matmul(student, ops.transpose(student)) - ops.matmul(teacher, ops.transpose(teacher))
    return ops.sum(ops.square(difference)) / ops.cast(ops.shape(difference)[0], difference.dtype)


def _correlation(student: Any, teacher: Any, axis: int) -> Any:
    (student, norm_student), (teacher, norm_teacher) = (_centred(values, axis) for values in (student, teacher))
    return ops.sum(student * teacher, axis=axis) / (norm_student * norm_teacher + _CORRELATION_EPS)


def _centred(values: Any, axis: int) -> tuple[Any, Any]:
    centred = values - ops.mean(values, axis=axis, keepdims=True)
    squares = ops.sum(ops.square(centred), axis=axis)
    count = ops.cast(ops.shape(values)[axis], values.dtype)
    rounding = 16 * epsilon_of(values) ** 2 * count * ops.square(ops.max(ops.stop_gradient(values), axis=axis))
    # Chosen before the root is taken: the root of a zero has no gradient, not even where its value is not used.
    return centred, ops.sqrt(ops.where(squares <= rounding, ops.ones_like(squares), squares))
