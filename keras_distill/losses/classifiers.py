"""The loss that reads the student's feature with the teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.classifiers import softmax_regression
from keras_distill.functional.inputs import prepare
from keras_distill.losses.base import DistillationLoss
from keras_distill.losses.networks import Network, built, linear_classifier
from keras_distill.schedules import Schedule

__all__ = ["SoftmaxRegressionLoss"]

_EPS = 1e-5


@keras.saving.register_keras_serializable(package="keras_distill")
class SoftmaxRegressionLoss(DistillationLoss):
    r"""Squared difference of two averaged features, and of the logits that the teacher's classifier makes of them.

    .. math:: \frac{1}{N} \sum_n \left( w_f \frac{1}{C} \| \bar h_n - \bar f^t_n \|_2^2
        + w_r \frac{1}{K} \| W \bar h_n - W \bar f^t_n \|_2^2 \right), \qquad
        h = \mathrm{ReLU}(\mathrm{BN}(A f^s))

    Take the last feature of each model before its classifier, as a map or averaged. The connector is learned: a linear
    map A of the channels to the teacher's (a 1x1 convolution of maps), batch normalisation with the statistics of the
    batch, and a ReLU. No adapter is needed, and the positions may differ. The teacher's classifier W stays as it is. In
    a FeatureDistillation the connector is made, trained and saved as adapters are, and W is read from the teacher: a
    loaded model needs its teacher again. See :func:`keras_distill.functional.softmax_regression`.

    Args:
        classifier: Name of the teacher's classifier, a Dense layer; ``None`` takes the only Dense layer of the teacher
            that takes as many numbers as the feature has channels.
        feature_weight: Weight of the first part, 0 or greater, or a schedule.
        regression_weight: Weight of the second part, 0 or greater, or a schedule.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with features ``(N, H, W, C)``, ``(N, L, C)`` or ``(N, C)`` of the teacher, then the
        student's of the same examples.

    Raises:
        TypeError: If a weight is not a number.
        ValueError: If a weight is negative.

    Example:
        >>> loss = SoftmaxRegressionLoss()
        >>> loss.build((None, 4, 4, 8), (None, 4, 4, 16))
        >>> [tuple(variable.shape) for variable in loss.layer.trainable_variables]
        [(16,), (16,), (8, 16)]

    References:
        Yang et al. 2021 (SRRL, "Knowledge distillation via softmax regression representation learning"), section 3,
        ICLR, with both weights 1.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    reads_teacher: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        *,
        classifier: str | None = None,
        feature_weight: float | Schedule = 1.0,
        regression_weight: float | Schedule = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "softmax_regression_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if not isinstance(classifier, str | None):
            raise TypeError(checks.message("`classifier` to be the name of a layer", f"classifier={classifier!r}"))
        self._fix(classifier=classifier)
        self.feature_weight = self._setting("feature_weight", feature_weight, checks.non_negative)
        self.regression_weight = self._setting("regression_weight", regression_weight, checks.non_negative)
        self._channels: int | None = None
        self._kernel: keras.Variable | None = None  # the teacher's: neither tracked nor saved

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the connector for features of these shapes, replacing an earlier one."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        self._channels = teacher[-1]
        connector = keras.layers.Dense(self._channels, use_bias=False, dtype=self.dtype)
        self.layer = Network([connector], name="connector", dtype=self.dtype)
        weights = {"shape": (self._channels,), "dtype": self.dtype}
        self.layer.scale = self.layer.add_weight(name="scale", initializer="ones", **weights)
        self.layer.shift = self.layer.add_weight(name="shift", initializer="zeros", **weights)
        self.layer.build(tuple(student))

    def read_teacher(self, layer_of: Callable[[str | None], keras.layers.Layer]) -> None:
        """Take the kernel of the teacher's classifier."""
        kernel = linear_classifier(layer_of, self.classifier, self._channels).kernel
        self._kernel = keras.Variable(ops.convert_to_numpy(kernel), trainable=False, dtype=self.dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        connector = built(self.layer)
        if self._kernel is None:
            remedy = "Set the model's teacher, or call loss.read_teacher(lambda name: teacher.get_layer(...))."
            raise ValueError(checks.message("the teacher's classifier to be known", "none", remedy))
        student, teacher = prepare(y_pred, y_true)
        mapped = connector(student)
        axes = tuple(range(len(mapped.shape) - 1))
        centred = mapped - ops.mean(mapped, axis=axes)
        standardized = centred / ops.sqrt(ops.mean(ops.square(centred), axis=axes) + _EPS)
        feature = ops.relu(connector.scale * standardized + connector.shift)
        weights = {name: getattr(self, name) for name in ("feature_weight", "regression_weight")}
        return softmax_regression(feature, teacher, classifier=self._kernel, **weights)
