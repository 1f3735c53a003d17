"""Formulas with learned parts: student first, channels last, no gradient into the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare
from keras_distill.functional.vectors import averaged, centred, flattened, or_one, per_example, spread_or_one

__all__ = ["log_sum_distance", "masked_generative", "variational_information"]

_REMEDY = "The learned part must return the teacher's channels at the teacher's positions."


def variational_information(
    student: Any, teacher: Any, *, mean: Callable[[Any], Any], variance: Any, per_position: bool = False
) -> Any:
    r"""Negative log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts.

    .. math:: \frac{1}{D} \sum_d \frac{1}{2} \left( \frac{(\mu(f^s)_d - f^t_d)^2}{\sigma_{c(d)}^2}
        + \log \sigma_{c(d)}^2 \right)

    Minimizing it raises a lower bound on the information that the two features share. Channels that the student cannot
    predict get a large variance and cost little. The constant :math:`\frac{1}{2} \log 2 \pi` is left out, so values may
    be negative.

    Args:
        student: The student's feature, shape ``(N, ..., C_s)``.
        teacher: The teacher's feature with D numbers per example, shape ``(N, ..., C)``.
        mean: The learned map from the student's feature to the teacher's shape.
        variance: The learned variance of each channel of the teacher, greater than 0, shape ``(C,)``.
        per_position: Whether only the channels are averaged.

    Returns:
        Mean over the example's numbers in nats, shape ``(N,)``, or ``(N, ...)`` per position.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If ``mean`` does not have the teacher's shape, or the variances are not one for each channel.

    Example:
        >>> values = variational_information([[1.0, 2.0]], [[4.0, 2.0]], mean=lambda f: 2 * f, variance=[1.0, 4.0])
        >>> round(float(values[0]), 4)
        1.5966

    References:
        Ahn et al. 2019, equations 5 and 6, arXiv:1904.05835; deviation: the mean instead of the sum over channels and
        positions, as in published code.
    """
    student, teacher = prepare(student, teacher)
    predicted = ops.cast(mean(student), teacher.dtype)
    checks.same_shape(predicted, teacher, names=("mean(student)", "teacher"), remedy=_REMEDY)
    variance = ops.cast(variance, teacher.dtype)
    if tuple(variance.shape) != (teacher.shape[-1],):
        expected = f"`variance` to have one value for each of the teacher's {teacher.shape[-1]} channels"
        raise ValueError(checks.message(expected, f"shape {tuple(variance.shape)}"))
    values = 0.5 * (ops.square(predicted - teacher) / variance + ops.log(variance))
    return ops.mean(values, axis=-1) if per_position else per_example(values)


def masked_generative(student: Any, teacher: Any, *, generator: Callable[[Any], Any], mask: Any = None) -> Any:
    r"""Squared error of the teacher's feature as generated from the unmasked part of the student's.

    .. math:: \sum_d \left( G(m \odot f^s)_d - f^t_d \right)^2

    Each part of the student's feature must hold enough information to predict the rest. The sum makes values large: the
    paper's weights are 7e-5 and smaller.

    Args:
        student: The student's feature, shape ``(N, ..., C)``.
        teacher: The teacher's feature with D numbers per example, shape ``(N, ...)``.
        generator: The learned map G from the masked feature to the teacher's.
        mask: 0 where the student's feature is hidden, else 1; a shape that broadcasts to the feature's. None hides
            nothing.

    Returns:
        Sum over the example's numbers, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor.
        ValueError: If the generator does not return the teacher's shape.

    Example:
        >>> values = masked_generative(
        ...     [[1.0, 2.0, 0.5]], [[4.0, 3.0, 1.0]], generator=lambda f: 3 * f, mask=ops.array([1.0, 0.0, 1.0])
        ... )
        >>> float(values[0])
        10.25

    References:
        Yang et al. 2022, section 3, arXiv:2205.01529, which weighs the sum with alpha.
    """
    student, teacher = prepare(student, teacher)
    generated = generator(student if mask is None else student * ops.cast(mask, student.dtype))
    generated = ops.cast(generated, teacher.dtype)
    checks.same_shape(generated, teacher, names=("generator(student)", "teacher"), remedy=_REMEDY)
    return ops.sum(flattened(ops.square(generated - teacher), 1), axis=-1)


def log_sum_distance(
    student: Any, teacher: Any, *, projection: Callable[[Any], Any], power: float = 4.0, eps: float = 1e-4
) -> Any:
    r"""Logarithm of the summed powers of the differences between two batch-normalised features, one projected.

    .. math:: \log \sum_n \sum_c |\hat z^s_{nc} - \hat z^t_{nc}|^a, \qquad
        z^s_n = W \bar f^s_n, \quad z^t_n = \bar f^t_n, \quad
        \hat z_{nc} = \frac{z_{nc} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

    Features are averaged over their positions first; the mean :math:`\mu` and the variance :math:`\sigma^2` are those
    of the batch. The logarithm keeps the gradient large while the difference shrinks, and the power stresses the
    largest differences. The value may be negative. Where the features do not differ at all, as in a batch of one
    example, it is 0 without a gradient.

    Args:
        student: The student's feature, shape ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, H, W, C_s)``.
        teacher: The teacher's feature of the same examples, such a shape too, with C channels.
        projection: The learned map W from ``(N, C_s)`` to ``(N, C)``.
        power: The exponent a of the differences, at least 1.
        eps: Added to the variances, greater than 0.

    Returns:
        A scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a setting is not a number.
        ValueError: If the numbers of examples differ, a feature has no channels, ``projection`` does not have the
            teacher's channels, or a setting is out of its range.

    Example:
        >>> student, teacher = [[1.0], [3.0], [2.0]], [[0.0], [1.0], [5.0]]
        >>> value = log_sum_distance(student, teacher, projection=lambda feature: 2 * feature)
        >>> round(float(value), 4)
        2.4714

    References:
        Miles and Mikolajczyk 2023 (SRD), section 3, arXiv:2303.11098; deviation: 0 in the place of the logarithm of 0.
    """
    checks.at_least("power", power, 1)
    checks.positive("eps", eps)
    student, teacher = prepare(student, teacher)
    shapes = tuple(student.shape), tuple(teacher.shape)
    if len(shapes[0]) < 2 or len(shapes[1]) < 2 or checks.shapes_differ(shapes[0][:1], shapes[1][:1]):
        expected = "`student` and `teacher` to have the same number of examples and a dimension of channels"
        raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}"))
    student, teacher = (averaged(feature) for feature in (student, teacher))
    projected = projection(student)
    checks.same_shape(projected, teacher, names=("projection(student)", "teacher"), remedy=_REMEDY)
    apart = ops.abs(_batch_normalized(projected, eps) - _batch_normalized(teacher, eps))
    return ops.log(or_one(ops.sum(ops.power(apart, power))))


def _batch_normalized(rows: Any, eps: float) -> Any:
    difference = centred(rows, 0)
    return difference / spread_or_one(difference, 0, count=ops.cast(ops.shape(rows)[0], rows.dtype), eps=eps)
