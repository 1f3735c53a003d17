"""Formulas that read a feature with the teacher's classifier: student first, one value per example."""

from __future__ import annotations

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.inputs import Reduction, prepare
from lightning_distill.functional.primitives import product
from lightning_distill.functional.vectors import averaged, over_examples, positions_mask, without

__all__ = ["softmax_regression"]


def softmax_regression(
    student: Tensor,
    teacher: Tensor,
    *,
    classifier: Tensor,
    feature_weight: float = 1.0,
    regression_weight: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Squared difference of two averaged features, and of the logits that the teacher's classifier makes of them.

    .. math:: w_f \frac{1}{C} \| \bar f^s - \bar f^t \|_2^2 + w_r \frac{1}{K} \| W \bar f^s - W \bar f^t \|_2^2

    The second part weighs differences by what they mean to the teacher's classifier. Its bias cancels.

    Args:
        student: The student's feature with the teacher's channels, ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``.
        teacher: The teacher's feature of the same examples, such a shape too; the positions may differ.
        classifier: The weight W of the teacher's classifier, shape ``(K, C)`` for K classes.
        feature_weight: Weight of the first part, 0 or greater.
        regression_weight: Weight of the second part, 0 or greater.
        mask: True where an example counts, shape ``(N,)``, or a position, if both features have the same positions;
            None where all count.
        reduction: ``"none"`` for one value per example, ``"mean"`` for the mean over the examples that count.

    Returns:
        Weighted sum of the two means, shape ``(N,)``, or a scalar.

    Raises:
        TypeError: If a feature is not a floating point tensor, or a weight is not a number.
        ValueError: If examples or channels differ, or a weight is negative.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> softmax_regression(student, teacher, classifier=torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]]))
        tensor([8.5000])

    References:
        Yang et al. 2021 (SRRL), equations 4 to 6, ICLR; the authors' code has both weights 1.
    """
    checks.non_negative("feature_weight", feature_weight)
    checks.non_negative("regression_weight", regression_weight)
    student, teacher = prepare(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2:
        expected = "`student` and `teacher` to have examples and channels"
        raise ValueError(checks.message(expected, f"{tuple(student.shape)} and {tuple(teacher.shape)}"))
    positions = [positions_mask(mask, feature) for feature in (student, teacher)]
    student, teacher = (
        averaged(without(feature, counts), counts)
        for feature, counts in zip((student, teacher), positions, strict=True)
    )
    remedy = "Map the student's feature to the teacher's channels."
    checks.same_shape(student, teacher, names=("averaged student", "averaged teacher"), remedy=remedy)
    if classifier.ndim != 2 or classifier.shape[1] != teacher.shape[1]:
        expected = f"`classifier` to have the shape (classes, {teacher.shape[1]})"
        raise ValueError(checks.message(expected, f"shape {tuple(classifier.shape)}"))
    difference = student - teacher
    logits = product(difference, classifier.detach().to(difference).mT)
    values = feature_weight * difference.square().mean(dim=1) + regression_weight * logits.square().mean(dim=1)
    return over_examples(values, positions[0], reduction)
