"""Losses on embeddings and a queue of the teacher's earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.functional.queues import queue_similarity
from keras_distill.functional.vectors import unit
from keras_distill.losses.base import DistillationLoss
from keras_distill.schedules import Schedule

__all__ = ["QueueSimilarityLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class QueueSimilarityLoss(DistillationLoss):
    r"""Cross entropy between the two models' softmaxes over an embedding's similarities to a queue of the teacher's.

    .. math:: - \frac{1}{N} \sum_n \sum_{j=0}^{K} p^t_{nj} \log p^s_{nj}, \qquad
        p^s_n = \mathrm{softmax}_j(z^s_n \cdot d_j / T_s), \quad p^t_n = \mathrm{softmax}_j(z^t_n \cdot d_j / T_t)

    For embeddings of whole images, without labels. The queue holds the teacher's embeddings d of the last ``size``
    examples, and for each example its own. Inside a FeatureDistillation it is made and saved as adapters are. A
    training step adds the batch to the queue after it was compared, and the oldest entries leave it; evaluation changes
    nothing. At first it holds random vectors, as in the authors' code. Each of several teachers has its own queue. See
    :func:`keras_distill.functional.queue_similarity`.

    Args:
        size: Number of entries of the queue, at least 1.
        student_temperature: Softening of the student's distribution, greater than 0; a number or a schedule.
        teacher_temperature: Softening of the teacher's distribution, greater than 0; a number or a schedule.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar in nats when called with embeddings ``(N, D)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of its range, or several replicas train under ``tf.distribute``, whose queues
            would differ.

    Example:
        >>> loss = QueueSimilarityLoss(size=2)
        >>> loss.build((None, 3), (None, 3))
        >>> tuple(loss.layer.queue.shape)
        (2, 3)

    References:
        Fang et al. 2021 (SEED), equations 4 and 5, arXiv:2101.04731, with temperatures of 0.2 and 0.01 and 65,536
        entries.
    """

    learned: ClassVar[bool] = True
    keeps_teacher: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        *,
        size: int = 65536,
        student_temperature: float | Schedule = 0.2,
        teacher_temperature: float | Schedule = 0.01,
        reduction: str | None = "sum_over_batch_size",
        name: str = "queue_similarity_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.integer("size", size)
        checks.at_least("size", size, 1)
        self._fix(size=int(size))
        self.student_temperature = self._setting("student_temperature", student_temperature)
        self.teacher_temperature = self._setting("teacher_temperature", teacher_temperature)

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make a queue of random vectors for features of these shapes, replacing an earlier one."""
        if len(student) != 2 or len(teacher) != 2 or student[1] != teacher[1]:
            expected = "`student` and `teacher` to be embeddings (N, D) of equal width"
            remedy = 'Pass adapter="pool", or name the pooling layers.'
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}", remedy))
        self.layer = keras.layers.Layer(name="queue", dtype=self.dtype)
        self.layer.queue = self.layer.add_weight(
            name="queue",
            shape=(self.size, teacher[1]),
            dtype=self.dtype,
            trainable=False,
            initializer=keras.initializers.RandomNormal(stddev=1.0),
        )
        self.layer.built = True

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example; in training the batch joins the queue."""
        if self.layer is None:
            remedy = "Call loss.build(student.shape, teacher.shape) once, or use the loss in a FeatureDistillation."
            raise ValueError(checks.message("the loss to be built before it is called", "no queue", remedy))
        queue = ops.convert_to_tensor(self.layer.queue)
        values = queue_similarity(
            y_pred,
            y_true,
            queue=queue,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        if self.training:
            if backends.replicas() > 1:
                expected = "one replica for QueueSimilarityLoss, whose queue cannot be shared"
                raise ValueError(checks.message(expected, f"{backends.replicas()} replicas"))
            fresh = unit(ops.cast(ops.stop_gradient(y_true), queue.dtype), 1)
            self.layer.queue.assign(ops.concatenate([fresh, queue], axis=0)[: self.size])
        return values
