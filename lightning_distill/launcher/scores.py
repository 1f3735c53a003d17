"""Scores of students, and the best of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from lightning_distill.launcher.batches import call_with, split_batch
from lightning_distill.launcher.conf import Metric
from lightning_distill.recording import map_tensors, select

_LOG = logging.getLogger("lightning_distill")


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
        self._weights: dict[str, Any] | None = None
        self.teacher_score: float | None = None
        self.first_score: float | None = None
        self.best_score: float | None = None

    def begin(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Score both models before the training.

        Args:
            student: The student, whose weights are the best so far.
            teacher: The teacher, if there is one.
        """
        if self._score is None:
            return
        self.teacher_score = None if teacher is None else judge(_evaluated(self._score, teacher))
        self.first_score = None
        self._take(student)
        self.first_score = self.best_score
        _LOG.info("Scores before training: teacher %s, student %s.", self.teacher_score, self.first_score)

    def end_epoch(self, student: nn.Module) -> None:
        """Score the student, if the epoch is one of those after which it is."""
        self._epochs += 1
        if self._score is not None and self._epochs % self._frequency == 0:
            self._take(student)

    def restore(self, student: nn.Module) -> None:
        """Give the student the best weights that it has had."""
        if self._weights is not None:
            student.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Epochs, scores and the best weights, to go on with."""
        return {
            "epochs": self._epochs,
            "weights": self._weights,
            "scores": (self.teacher_score, self.first_score, self.best_score),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved training was."""
        self._epochs, self._weights = state["epochs"], state["weights"]
        self.teacher_score, self.first_score, self.best_score = state["scores"]

    def _take(self, student: nn.Module) -> None:
        score = judge(_evaluated(self._score, student))  # type: ignore[arg-type]
        best = self.best_score
        if best is None or best != best or (score > best if self._higher else score < best):
            self.best_score = score
            self._weights = map_tensors(dict(student.state_dict()), lambda tensor: tensor.detach().cpu().clone())
        _LOG.info("Score after %d epochs: %s, the best %s.", self._epochs, score, self.best_score)


def _evaluated(score: Callable[[Any], Any], model: nn.Module) -> Any:
    """The score in eval mode and without gradients; the modes are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return score(model)
    finally:
        for module in training:
            module.training = True


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
        raise TypeError(f"Expected `eval_func` to return a number, or several, but got {score!r}.") from None


class MetricEvaluation:
    """A function that scores a model on a data loader.

    Args:
        loader: Batches of inputs and labels.
        metric: The metric.
    """

    def __init__(self, loader: Iterable[Any], metric: Metric) -> None:
        self._loader, self._metric = loader, metric

    def __call__(self, model: nn.Module) -> float:
        """The metric over the whole loader."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        metric: torchmetrics.Metric | None = None
        for batch in self._loader:
            inputs, labels = split_batch(map_tensors(batch, lambda tensor: tensor.to(device)))
            output = select(call_with(model, inputs), None, "the model's output")
            if metric is None:
                metric = _made(self._metric, output).to(device)
            metric.update(output, labels)
        if metric is None:
            raise ValueError("Expected `eval_dataloader` to give at least one batch, but got none.")
        return judge(metric.compute())


def _made(metric: Metric, output: Tensor) -> torchmetrics.Metric:
    """The metric of torchmetrics that a configuration means, for outputs of a shape."""
    if metric.torchmetrics is not None:
        made: torchmetrics.Metric = metric.torchmetrics.make()
        return made
    classes: dict[str, Any] = {"task": "multiclass", "num_classes": output.shape[-1], "average": "micro"}
    if metric.topk is not None:
        return torchmetrics.Accuracy(**classes, top_k=metric.topk)
    if metric.Accuracy is not None:
        return torchmetrics.Accuracy(**{**classes, **metric.Accuracy})
    if metric.F1 is not None:
        return torchmetrics.F1Score(**{**classes, "average": "macro", **metric.F1})
    if metric.MAE is not None:
        return torchmetrics.MeanAbsoluteError(**metric.MAE)
    if metric.RMSE is not None:
        return torchmetrics.MeanSquaredError(squared=False, **metric.RMSE)
    return torchmetrics.MeanSquaredError(**(metric.MSE or {}))
