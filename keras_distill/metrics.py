"""Metrics that compare the student with its teacher, for ``compile``, ``evaluate`` or a custom loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.functional.inputs import prepare
from keras_distill.functional.logits import soft_target_kl

_NAMES = ("student_logits", "teacher_logits")


@keras.saving.register_keras_serializable(package="keras_distill")
class TeacherAgreement(keras.metrics.Mean):
    """Share of the rows of logits where student and teacher give the highest score to the same class.

    It measures how often the student decides as its teacher does, right or wrong. With a single score per example,
    ``(N, 1)`` or ``(N,)``, the two agree if both scores lie on the same side of zero; zero counts as negative.

    Args:
        name: Name of the metric.
        dtype: Precision of the state; ``None`` is ``keras.config.floatx()``.

    Returns:
        From 0 to 1, higher is better. ``update_state`` takes logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If the logits are not floating point tensors.
        ValueError: If the shapes differ.

    Example:
        >>> metric = TeacherAgreement()
        >>> teacher = [[4.0, 1.0, 0.0], [0.0, 1.0, 5.0], [1.0, 2.0, 3.0]]
        >>> metric.update_state(teacher, [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
        >>> round(float(metric.result()), 4)
        0.6667

    References:
        Stanton et al. 2021 (average top-1 agreement), arXiv:2106.05945.
    """

    def __init__(self, name: str = "teacher_agreement", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        compat.set_direction(self, "up")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Agreeing rows of one batch, added to the state.

        Args:
            y_true: The teacher's logits, shape ``(N, ..., C)``.
            y_pred: The student's logits, same shape.
            sample_weight: Weight of each row.
        """
        super().update_state(_agrees(y_pred, y_true), sample_weight)


@keras.saving.register_keras_serializable(package="keras_distill")
class TeacherDivergence(keras.metrics.Mean):
    r"""Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.

    .. math:: \frac{1}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc}), \qquad p = \mathrm{softmax}(z / T)

    Unlike SoftTargetLoss it has no factor :math:`T^2`: it is a divergence of two distributions at any temperature.
    A single score per example, ``(N, 1)`` or ``(N,)``, is read as the logit of one of two classes, as by the sigmoid.

    Args:
        temperature: Softening of both distributions, greater than 0.
        name: Name of the metric.
        dtype: Precision of the state; ``None`` is ``keras.config.floatx()``.

    Returns:
        From 0 up, in nats, lower is better. ``update_state`` takes logits ``(N, ..., C)`` of the teacher, then the
        student.

    Raises:
        TypeError: If the logits are not floating point tensors or the temperature is not a number.
        ValueError: If the shapes differ or the temperature is not greater than 0.

    Example:
        >>> metric = TeacherDivergence(temperature=2.0)
        >>> metric.update_state([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])
        >>> round(float(metric.result()), 4)
        0.1424

    References:
        Stanton et al. 2021 (average predictive KL), arXiv:2106.05945.
    """

    def __init__(self, temperature: float = 1.0, name: str = "teacher_divergence", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        checks.positive("temperature", temperature)
        self.temperature = float(temperature)
        compat.set_direction(self, "down")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Divergences of the rows of one batch, added to the state.

        Args:
            y_true: The teacher's logits, shape ``(N, ..., C)``.
            y_pred: The student's logits, same shape.
            sample_weight: Weight of each row.
        """
        student, teacher = _pair(y_pred, y_true)
        if student.shape[-1] == 1:
            # The sigmoid of z is the softmax of (0, z).
            student, teacher = (ops.concatenate([ops.zeros_like(z), z], axis=-1) for z in (student, teacher))
        divergence = soft_target_kl(student, teacher, temperature=self.temperature) / self.temperature**2
        super().update_state(divergence, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {**super().get_config(), "temperature": self.temperature}


class LossParts(compat.MetricsList):
    """The parts of the loss and the agreement as means, in a list in which Keras' callbacks find their direction.

    ``result`` holds the metrics that were measured since the last reset; within a step, those of the step.

    Args:
        parts: Names of the parts.
        agreement: Whether the agreement with the teacher is among the metrics.

    Attributes:
        measured: Names measured since the last reset.
        now: Names measured in the step that is running or being traced, None outside of a step.

    Example:
        >>> parts = LossParts(["task"], agreement=True)
        >>> parts.add("task_loss", 2.0, 4)
        >>> {name: float(value) for name, value in parts.result().items()}
        {'task_loss': 2.0}
    """

    def __init__(self, parts: Iterable[str], *, agreement: bool) -> None:
        means = [keras.metrics.Mean(name=f"{part}_loss") for part in parts]
        for mean in means:
            compat.set_direction(mean, "down")
        super().__init__([*means, TeacherAgreement()] if agreement else means, name="loss_parts")
        self.measured: set[str] = set()
        self.now: set[str] | None = None

    @property
    def names(self) -> set[str]:
        """Names of all metrics."""
        return {metric.name for metric in self.metrics}

    def add(self, name: str, value: Any, rows: Any) -> None:
        """Update the mean of a metric.

        Args:
            name: Name of the metric.
            value: A scalar.
            rows: Number of examples or rows that the value is the mean of.
        """
        (self.measured if self.now is None else self.now).add(name)
        metric = next(metric for metric in self.metrics if metric.name == name)
        keras.metrics.Mean.update_state(metric, value, ops.cast(rows, "float32"))

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a custom ``train_step`` calls it with (y, y_pred), but ``compute_loss`` has updated the means."""

    def reset_state(self) -> None:
        """Reset all means."""
        self.measured = set()
        super().reset_state()

    def result(self) -> dict[str, Any]:
        """The value of each metric that has been measured."""
        names = self.measured if self.now is None else self.now
        return self.result_of(names)

    def result_of(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of some metrics, in the order of the list."""
        wanted = set(names)
        return {metric.name: metric.result() for metric in self.metrics if metric.name in wanted}


def agreement(student_logits: Any, teacher_logits: Any, mask: Any = None, *, threshold: float = 0.0) -> tuple[Any, Any]:
    """Share of the rows where student and teacher choose the same class, and their number.

    Args:
        student_logits: Shape ``(N, ..., C)``.
        teacher_logits: Same shape.
        mask: True for rows that count, or None for all.
        threshold: A single score above it means that the class is chosen; 0 for logits, 0.5 for probabilities.

    Returns:
        The share and the number, two scalars.
    """
    agrees = _agrees(student_logits, teacher_logits, threshold)
    counts = ops.ones_like(agrees) if mask is None else ops.ones_like(agrees) * ops.cast(mask, agrees.dtype)
    rows = ops.sum(counts)
    return ops.sum(agrees * counts) / ops.maximum(rows, 1.0), rows


def _agrees(student_logits: Any, teacher_logits: Any, threshold: float = 0.0) -> Any:
    student, teacher = _pair(student_logits, teacher_logits)
    if student.shape[-1] == 1:
        agrees = ops.equal(ops.squeeze(student, -1) > threshold, ops.squeeze(teacher, -1) > threshold)
    else:
        agrees = ops.equal(backends.likeliest(student), backends.likeliest(teacher))
    return ops.cast(agrees, "float32")


def _pair(student_logits: Any, teacher_logits: Any) -> tuple[Any, Any]:
    student, teacher = prepare(student_logits, teacher_logits, _NAMES)
    checks.same_shape(student, teacher, names=_NAMES, remedy="Both models must score the same classes.")
    if len(student.shape) == 1:
        student, teacher = ops.expand_dims(student, -1), ops.expand_dims(teacher, -1)
    return student, teacher
