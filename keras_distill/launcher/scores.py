"""Scores of students, and the best of them."""

from __future__ import annotations

from typing import Any

import keras

from distill_core.launcher import scores
from keras_distill import checks, compat
from keras_distill.launcher.batches import batches_of
from keras_distill.launcher.conf import Metric
from keras_distill.launcher.criteria import check_several_classes, one_hot
from keras_distill.recording import select
from keras_distill.teachers import chosen_inputs


class BestStudent(scores.BestStudent):
    """The best weights that a student has had."""

    checks = checks

    def _copy(self, student: keras.Model) -> list[Any]:
        weights: list[Any] = student.get_weights()
        return weights

    def _fill(self, student: keras.Model, weights: list[Any]) -> None:
        student.set_weights(weights)


class Scoring(keras.callbacks.Callback):
    """A callback that scores the student after its epochs and loads its best weights at the end.

    Args:
        best: Keeper of the best weights.
        student: The student.
        teacher: The teacher, or None.
    """

    def __init__(self, best: scores.BestStudent, student: keras.Model, teacher: keras.Model | None) -> None:
        super().__init__()
        self.best, self.student, self.teacher = best, student, teacher

    def on_train_begin(self, logs: Any = None) -> None:
        """Before the first step: score teacher and student."""
        self.best.begin(self.student, self.teacher)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """After each epoch: score the student."""
        self.best.end_epoch(self.student)

    def on_train_end(self, logs: Any = None) -> None:
        """At the end: restore the best weights."""
        self.best.restore(self.student)


class MetricEvaluation:
    """A function that scores a model on data.

    Args:
        data: Batches of inputs and labels, in any form that the training takes.
        metric: The metric.
        batch_size: Size of the batches that arrays are cut into.
    """

    def __init__(self, data: Any, metric: Metric, batch_size: int = 32) -> None:
        self._data, self._metric, self._batch_size = data, metric, batch_size

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger number is better; True for metrics that do not say it."""
        if self._metric.keras is None:
            return not self._metric.is_error
        return compat.direction(self._metric.keras.make()) != "down"

    def __call__(self, model: keras.Model) -> float:
        """The metric over all the data.

        Raises:
            ValueError: If the data hold no batch.
        """
        metric = None
        for inputs, labels, *weights in batches_of(self._data, self._batch_size):
            output = select(model(chosen_inputs(model, inputs), training=False), None, "the model's output")
            labels = keras.ops.convert_to_tensor(labels)
            if metric is None:
                metric = _made(self._metric, labels, output)
            if self._metric.F1 is not None and not one_hot(labels, output):
                labels = keras.ops.one_hot(keras.ops.reshape(labels, (-1,)), output.shape[-1])
            metric.update_state(labels, output, *weights)
        if metric is None:
            raise ValueError(checks.message("`eval_dataloader` to hold at least one batch", "none"))
        return scores.judge(metric.result(), checks)


def _made(metric: Metric, labels: Any, output: Any) -> Any:
    """The configured metric, for labels and outputs of these shapes."""
    if metric.keras is not None:
        return metric.keras.make()
    if metric.compares_classes and (metric.F1 or {}).get("threshold") is None:  # with one, a single score is a class
        check_several_classes(output, "Name a metric of Keras: {keras: {class_path: keras.metrics.BinaryAccuracy}}.")
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
