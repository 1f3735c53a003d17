"""Metrics that compare the student with its teacher, for ``DistillModel``, or for a loop of your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.functional.inputs import prepare
from keras_distill.functional.logits import soft_target_kl
from keras_distill.functional.top_k import TopK, best_scores

_NAMES = ("student_logits", "teacher_logits")


@keras.saving.register_keras_serializable(package="keras_distill")
class TeacherMetric(keras.metrics.Mean):
    """Base of the metrics on the two models' logits: the mean of one value for each row.

    ``DistillModel(..., teacher_metrics=[...])`` updates them in ``fit`` and ``evaluate``. A subclass defines
    :meth:`values`.

    Args:
        name: Name of the metric.
        dtype: Precision of the state; ``None`` is ``keras.config.floatx()``.

    Example:
        >>> class LargestDifference(TeacherMetric):
        ...     def values(self, student_logits, teacher_logits):
        ...         return ops.max(ops.abs(student_logits - teacher_logits), axis=-1)
        >>> metric = LargestDifference("largest_difference")
        >>> metric.update_state(ops.array([[4.0, 1.0], [0.0, 0.5]]), ops.array([[2.0, 0.0], [0.0, 0.0]]))
        >>> float(metric.result())
        1.25
    """

    def values(self, student_logits: Any, teacher_logits: Any) -> Any:
        """One value for each row.

        Args:
            student_logits: Shape ``(N, ..., C)``.
            teacher_logits: Same shape; or a :class:`keras_distill.functional.top_k.TopK` if a cache holds only the
                likeliest classes.

        Returns:
            Shape ``(N, ...)``.
        """
        raise NotImplementedError

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Values of the rows of one batch, added to the state.

        Args:
            y_true: The teacher's logits, shape ``(N, ..., C)``.
            y_pred: The student's logits, same shape.
            sample_weight: Weight of each row.
        """
        super().update_state(self.values(y_pred, y_true), sample_weight)


@keras.saving.register_keras_serializable(package="keras_distill")
class TeacherAgreement(TeacherMetric):
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

    def values(self, student_logits: Any, teacher_logits: Any) -> Any:
        """1 for each row where both models choose the same class, 0 for all others."""
        if isinstance(teacher_logits, TopK):
            teacher_logits = best_scores(teacher_logits)
        student, teacher = _pair(student_logits, teacher_logits)
        if student.shape[-1] == 1:
            agrees = ops.equal(ops.squeeze(student, -1) > 0, ops.squeeze(teacher, -1) > 0)
        else:
            agrees = ops.equal(backends.likeliest(student), backends.likeliest(teacher))
        return ops.cast(agrees, "float32")


@keras.saving.register_keras_serializable(package="keras_distill")
class TeacherDivergence(TeacherMetric):
    r"""Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.

    .. math:: \frac{1}{N} \sum_n \sum_c p^t_{nc} (\log p^t_{nc} - \log p^s_{nc}), \qquad p = \mathrm{softmax}(z / T)

    Unlike SoftTargetLoss it is not multiplied by :math:`T^2`, so it is a divergence of two distributions at any
    temperature.
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

    def values(self, student_logits: Any, teacher_logits: Any) -> Any:
        """The divergence of each row, in nats."""
        if isinstance(teacher_logits, TopK):
            expected = f"a cache of full outputs for {type(self).__name__}"
            received = f"the likeliest {teacher_logits.indices.shape[-1]} classes alone"
            raise ValueError(checks.message(expected, received, "Build it without top_k."))
        student, teacher = _pair(student_logits, teacher_logits)
        if student.shape[-1] == 1:
            # The sigmoid of z is the softmax of (0, z).
            student, teacher = (ops.concatenate([ops.zeros_like(z), z], axis=-1) for z in (student, teacher))
        return soft_target_kl(student, teacher, temperature=self.temperature) / self.temperature**2

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {**super().get_config(), "temperature": self.temperature}


class NamesMeasured:
    """Names of metrics that were measured.

    An object of its own: Keras puts a wrapper around the sets of a metric, in which ``torch.compile`` loses names.

    Attributes:
        since_reset: Names measured since the last reset.
        in_step: Names measured in the step that is running or being traced, None outside of a step.
    """

    def __init__(self) -> None:
        self.since_reset: set[str] = set()
        self.in_step: set[str] | None = None

    def current(self) -> set[str]:
        """The names of the step, or of all steps since the last reset outside of a step."""
        return self.since_reset if self.in_step is None else self.in_step


class LossParts(compat.MetricsList):
    """The parts of the loss and the metrics of the teacher, in a list in which Keras' callbacks find their direction.

    ``result`` holds the metrics that were measured since the last reset; within a step, those of the step.

    Args:
        parts: Names of the parts.
        teacher_metrics: Metrics of the two models' logits.
        learned: Names of learned numbers, which have no better direction.

    Attributes:
        teacher_metrics: These metrics.
        names_measured: The names that were measured.

    Example:
        >>> parts = LossParts(["task"])
        >>> parts.add("task_loss", 2.0, 4)
        >>> {name: float(value) for name, value in parts.result().items()}
        {'task_loss': 2.0}
    """

    def __init__(
        self, parts: Iterable[str], teacher_metrics: Sequence[TeacherMetric] = (), learned: Iterable[str] = ()
    ) -> None:
        means = [keras.metrics.Mean(name=f"{part}_loss") for part in parts]
        for mean in means:
            compat.set_direction(mean, "down")
        numbers = [keras.metrics.Mean(name=name) for name in learned]
        super().__init__([*means, *teacher_metrics, *numbers], name="loss_parts")
        self.teacher_metrics = list(teacher_metrics)
        self.names_measured = NamesMeasured()

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
        self.names_measured.current().add(name)
        metric = next(metric for metric in self.metrics if metric.name == name)
        metric.update_state(value, ops.cast(rows, "float32"))

    def compare(self, student_logits: Any, teacher_logits: Any, weights: Any = None) -> None:
        """Update the metrics of the teacher.

        Args:
            student_logits: Shape ``(N, ..., C)``.
            teacher_logits: Same shape.
            weights: Weight of each row, or None.
        """
        for metric in self.teacher_metrics:
            self.names_measured.current().add(metric.name)
            metric.update_state(teacher_logits, student_logits, sample_weight=weights)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a custom ``train_step`` calls it with (y, y_pred), but ``compute_loss`` has updated the means."""

    def reset_state(self) -> None:
        """Reset all means."""
        self.names_measured.since_reset = set()
        super().reset_state()

    def result(self) -> dict[str, Any]:
        """The value of each metric that has been measured."""
        return self.result_of(self.names_measured.current())

    def result_of(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of some metrics, in the order of the list."""
        chosen = set(names)
        return {metric.name: metric.result() for metric in self.metrics if metric.name in chosen}


def _pair(student_logits: Any, teacher_logits: Any) -> tuple[Any, Any]:
    student, teacher = prepare(student_logits, teacher_logits, _NAMES)
    checks.same_shape(student, teacher, names=_NAMES, remedy="Both models must score the same classes.")
    if len(student.shape) == 1:
        student, teacher = ops.expand_dims(student, -1), ops.expand_dims(teacher, -1)
    return student, teacher
