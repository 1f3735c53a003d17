"""Formulas that read a feature with the teacher's classifier: student first, channels last, one value per example."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill import checks
from keras_distill.functional.inputs import prepare, prepare_number
from keras_distill.functional.vectors import averaged

__all__ = ["softmax_regression"]


def softmax_regression(
    student: Any, teacher: Any, *, classifier: Any, feature_weight: Any = 1.0, regression_weight: Any = 1.0
) -> Any:
    r"""Squared difference of two averaged features, and of the logits that the teacher's classifier makes of them.

    .. math:: w_f \frac{1}{C} \| \bar f^s - \bar f^t \|_2^2 + w_r \frac{1}{K} \| W \bar f^s - W \bar f^t \|_2^2

    The second part weighs differences by what they mean to the teacher's classifier. Its bias cancels.

    Args:
        student: The student's feature with the teacher's channels, ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.
        teacher: The teacher's feature of the same examples, such a shape too; the positions may differ.
        classifier: The kernel of the teacher's classifier, shape ``(C, K)`` for K classes: W is its transpose.
        feature_weight: Weight of the first part, 0 or greater; a scalar variable may be changed while training.
        regression_weight: Weight of the second part, the same.

    Returns:
        Weighted sum of the two means, shape ``(N,)``.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a weight is not a number.
        ValueError: If examples or channels differ, or a weight is negative.

    Example:
        >>> kernel = [[1.0, 0.0, 1.0], [1.0, 2.0, 0.0]]
        >>> float(softmax_regression([[1.0, 2.0]], [[0.0, 4.0]], classifier=kernel)[0])
        8.5

    References:
        Yang et al. 2021 (SRRL), equations 4 to 6, ICLR; the authors' code has both weights 1.
    """
    student, teacher = prepare(student, teacher)
    weights = [
        prepare_number(name, value, student, checks.non_negative)
        for name, value in (("feature_weight", feature_weight), ("regression_weight", regression_weight))
    ]
    shapes = tuple(student.shape), tuple(teacher.shape)
    if min(map(len, shapes)) < 2:
        expected = "`student` and `teacher` to have examples and channels"
        raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}"))
    student, teacher = averaged(student), averaged(teacher)
    remedy = "Map the student's feature to the teacher's channels."
    checks.same_shape(student, teacher, names=("averaged student", "averaged teacher"), remedy=remedy)
    kernel = ops.stop_gradient(ops.cast(ops.convert_to_tensor(classifier), student.dtype))
    if len(kernel.shape) != 2 or kernel.shape[0] != teacher.shape[-1]:
        expected = f"`classifier` to have the shape ({teacher.shape[-1]}, classes)"
        raise ValueError(checks.message(expected, f"shape {tuple(kernel.shape)}"))
    difference = student - teacher
    logits = ops.matmul(difference, kernel)
    return weights[0] * ops.mean(ops.square(difference), axis=-1) + weights[1] * ops.mean(ops.square(logits), axis=-1)
