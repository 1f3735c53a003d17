"""Scores of students, and the best of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_distill import checks
from keras_distill.launcher.batches import batches_of
from keras_distill.launcher.conf import Metric
from keras_distill.launcher.criteria import one_hot
from keras_distill.recording import select

_LOG = logging.getLogger("keras_distill")


class BestStudent:
    """The best weights that a student has had, by a function that scores a model.

    Args:
        score: Called with a model, gives a number, or several in a list or dict of which the first is the judge;
            ``None`` keeps nothing.
        higher_is_better: Whether a larger number is better.
        frequency: How many epochs lie between two scores, 1 or more.

    Attributes:
        teacher_score: What the teacher reached before the training, or None.
        first_score: What the student reached before it, or None.
        best_score: The best that the student has reached, or None.
    """

    def __init__(self, score: Callable[[Any], Any] | None, higher_is_better: bool, frequency: int) -> None:
        self._score, self._higher, self._frequency = score, higher_is_better, frequency
        self._epochs = 0
        self._weights: list[Any] = []
        self.teacher_score: float | None = None
        self.first_score: float | None = None
        self.best_score: float | None = None

    def begin(self, student: keras.Model, teacher: keras.Model | None) -> None:
        """Score both models before the training.

        Args:
            student: The student, whose weights are the best so far.
            teacher: The teacher, if there is one.
        """
        if self._score is None:
            return
        self.teacher_score = None if teacher is None else judge(self._score(teacher))
        self._take(student, self._score)
        self.first_score = self.best_score
        _LOG.info("Scores before training: teacher %s, student %s.", self.teacher_score, self.first_score)

    def end_epoch(self, student: keras.Model) -> None:
        """Score the student, if the epoch is one of those after which it is."""
        self._epochs += 1
        if self._score is not None and self._epochs % self._frequency == 0:
            self._take(student, self._score)

    def restore(self, student: keras.Model) -> None:
        """Give the student the best weights that it has had."""
        if self._weights:
            student.set_weights(self._weights)

    def _take(self, student: keras.Model, evaluate: Callable[[Any], Any]) -> None:
        score, best = judge(evaluate(student)), self.best_score
        if best is None or best != best or (score > best if self._higher else score < best):
            self.best_score, self._weights = score, student.get_weights()
        _LOG.info("Score after %d epochs: %s, the best %s.", self._epochs, score, self.best_score)


class Scoring(keras.callbacks.Callback):
    """A callback that scores the student after its epochs and gives it the best weights at the end.

    Args:
        best: What keeps them.
        student: The student.
        teacher: The teacher, if there is one.
    """

    def __init__(self, best: BestStudent, student: keras.Model, teacher: keras.Model | None) -> None:
        super().__init__()
        self.best, self.student, self.teacher = best, student, teacher

    def on_train_begin(self, logs: Any = None) -> None:
        """Before the first step: score teacher and student."""
        self.best.begin(self.student, self.teacher)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """After each epoch: score the student."""
        self.best.end_epoch(self.student)

    def on_train_end(self, logs: Any = None) -> None:
        """At the end: restore the best."""
        self.best.restore(self.student)


def judge(score: Any) -> float:
    """The number by which models are compared.

    Args:
        score: A number, or several in a list or dict of which the first counts.

    Returns:
        The number.

    Raises:
        TypeError: If there is no number.

    Example:
        >>> judge({"accuracy": 0.75, "loss": 1.2})
        0.75
    """
    one: Any = score
    while isinstance(one, (Mapping, list, tuple)) and one:
        one = next(iter(one.values())) if isinstance(one, Mapping) else one[0]
    try:
        return float(one)
    except (TypeError, ValueError):
        raise TypeError(checks.message("`eval_func` to return a number, or several", f"{score!r}")) from None


class MetricEvaluation:
    """A function that scores a model on data.

    Args:
        data: Batches of inputs and labels, in any form that the training takes.
        metric: The metric.
        batch_size: Size of the batches that arrays are cut into.
    """

    def __init__(self, data: Any, metric: Metric, batch_size: int = 32) -> None:
        self._data, self._metric, self._batch_size = data, metric, batch_size

    def __call__(self, model: keras.Model) -> float:
        """The metric over all the data."""
        metric = None
        for inputs, labels, *weights in batches_of(self._data, self._batch_size):
            output = select(model(inputs, training=False), None, "the model's output")
            labels = keras.ops.convert_to_tensor(labels)
            if metric is None:
                metric = _made(self._metric, labels, output)
            if self._metric.F1 is not None and not one_hot(labels, output):
                labels = keras.ops.one_hot(keras.ops.reshape(labels, (-1,)), output.shape[-1])
            metric.update_state(labels, output, *weights)
        if metric is None:
            raise ValueError(checks.message("`eval_dataloader` to give at least one batch", "none"))
        return judge(metric.result())


def _made(metric: Metric, labels: Any, output: Any) -> Any:
    """The metric of Keras that a configuration means, for labels and outputs of some shape."""
    if metric.keras is not None:
        return metric.keras.make()
    sparse = not one_hot(labels, output)
    if metric.topk is not None:
        kinds = (keras.metrics.TopKCategoricalAccuracy, keras.metrics.SparseTopKCategoricalAccuracy)
        return kinds[sparse](k=metric.topk)
    if metric.Accuracy is not None:
        kinds = (keras.metrics.CategoricalAccuracy, keras.metrics.SparseCategoricalAccuracy)
        return kinds[sparse](**metric.Accuracy)
    if metric.F1 is not None:
        return keras.metrics.F1Score(**{"average": "macro", **metric.F1})
    if metric.MAE is not None:
        return keras.metrics.MeanAbsoluteError(**metric.MAE)
    if metric.RMSE is not None:
        return keras.metrics.RootMeanSquaredError(**metric.RMSE)
    return keras.metrics.MeanSquaredError(**(metric.MSE or {}))
