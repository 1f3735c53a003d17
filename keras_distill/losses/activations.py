"""Losses on which units are active, and on how features change from layer to layer."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.activations import activation_boundary, solution_flow
from keras_distill.losses.base import FormulaLoss

__all__ = ["ActivationBoundaryLoss", "SolutionFlowLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class ActivationBoundaryLoss(FormulaLoss):
    r"""Squared hinge on the student's responses, averaged over units and examples.

    .. math:: \frac{1}{N D} \sum_n \sum_d \begin{cases} \max(0, m - f^s_{nd})^2 & f^t_{nd} > 0 \\
        \max(0, m + f^s_{nd})^2 & f^t_{nd} \le 0 \end{cases}

    The student learns which units of the teacher are active. Take both features before the ReLU, such as those of the
    batch normalisation. See :func:`keras_distill.functional.activation_boundary`.

    Args:
        margin: Distance m from zero that the student's responses should have, greater than 0; may be set while
            training.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features of equal shape ``(N, ...)`` of the teacher, then the student.

    Raises:
        TypeError: If the margin is not a number.
        ValueError: If the margin is not greater than 0.

    Example:
        >>> round(float(ActivationBoundaryLoss()([[4.0, -1.0, -0.1]], [[0.5, -3.0, 2.0]])), 4)
        3.0833

    References:
        Heo et al. 2019, arXiv:1811.03233, where it initialises the student before the training; deviation:
        the mean instead of the sum over the units.
    """

    _formula = staticmethod(activation_boundary)

    def __init__(
        self,
        *,
        margin: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "activation_boundary_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.positive("margin", margin)
        self._fix(margin=float(margin))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per position."""
        return self._values(y_pred, y_true, per_position=True)


@keras.saving.register_keras_serializable(package="keras_distill")
class SolutionFlowLoss(FormulaLoss):
    r"""Mean squared difference of the products between the channels of consecutive layers, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_l \frac{1}{C_l C_{l+1}} \sum_{a,b} (G^s_{nl,ab} - G^t_{nl,ab})^2, \qquad
        G_{nl,ab} = \frac{1}{P} \sum_{i=1}^{P} f_{nl,a,i} \, f_{n(l+1),b,i}

    It compares how one layer's feature becomes the next one. Give a FeatureDistillation lists of two layers or more:
    ``FeatureDistillation(["layer1", "layer2"], ["layer1", "layer2"], SolutionFlowLoss())``. See
    :func:`keras_distill.functional.solution_flow`.

    Args:
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with a list of features ``(N, H, W, C)`` or ``(N, L, C)`` of the teacher, then the student.

    Example:
        >>> student = [keras.ops.array([[[1.0], [3.0]]]), keras.ops.array([[[2.0], [0.0]]])]
        >>> teacher = [keras.ops.array([[[1.0], [1.0]]]), keras.ops.array([[[4.0], [2.0]]])]
        >>> float(SolutionFlowLoss()(teacher, student))
        4.0

    References:
        Yim et al. 2017, equations 1 and 2 (CVPR), where it initialises the student before the training; deviations, as
        in published code: the mean over the pairs of channels, and averages where the paper has max pooling.
    """

    positions_must_match: ClassVar[bool] = False
    several_layers: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"
    _formula = staticmethod(solution_flow)

    def __init__(
        self,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str = "solution_flow_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
