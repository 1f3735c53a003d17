"""Scores of students, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from distill_core.launcher import scores
from lightning_distill import checks
from lightning_distill.launcher.conf import Metric
from lightning_distill.modes import evaluating
from lightning_distill.recording import map_tensors, select
from lightning_distill.recording.batches import call_with, split_batch


class BestStudent(scores.BestStudent):
    """The best weights that a student has had; models are scored in eval mode and without gradients."""

    checks = checks

    def _evaluate(self, model: nn.Module) -> Any:
        with evaluating(model), torch.no_grad():
            return super()._evaluate(model)

    def _copy(self, student: nn.Module) -> dict[str, Any]:
        copied: dict[str, Any] = map_tensors(dict(student.state_dict()), lambda tensor: tensor.detach().cpu().clone())
        return copied

    def _fill(self, student: nn.Module, weights: dict[str, Any]) -> None:
        # layers that the loop has added since, such as adaptation layers, keep their weights
        student.load_state_dict({**student.state_dict(), **weights})


class MetricEvaluation:
    """A function that scores a model on a data loader.

    Args:
        loader: Batches of inputs and labels.
        metric: The metric.
    """

    def __init__(self, loader: Iterable[Any], metric: Metric) -> None:
        self._loader, self._metric = loader, metric

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger number is better; True for metrics that do not say it."""
        if self._metric.torchmetrics is None:
            return not self._metric.is_error
        made = self._metric.torchmetrics.make()
        first = next(iter(made.values())) if isinstance(made, torchmetrics.MetricCollection) else made
        return getattr(first, "higher_is_better", None) is not False

    def __call__(self, model: nn.Module) -> float:
        """The metric over the whole loader.

        Raises:
            ValueError: If the loader has no batch.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        metric: torchmetrics.Metric | None = None
        for batch in self._loader:
            inputs, labels = split_batch(map_tensors(batch, lambda tensor: tensor.to(device)))
            output = select(call_with(model, inputs), None, "the model's output")
            if metric is None:
                metric = _made(self._metric, output).to(device)
            one_hot = labels.ndim > 1 and labels.shape == output.shape
            if one_hot and _compares_likeliest(self._metric):  # torchmetrics would take them wrongly
                labels = labels.argmax(1)
            metric.update(output, labels)
        if metric is None:
            raise ValueError("Expected `eval_dataloader` to hold at least one batch, but got none.")
        return scores.judge(metric.compute(), checks)


def _compares_likeliest(metric: Metric) -> bool:
    """Whether a metric compares the likeliest class with the label: a task of its own may be binary or multilabel."""
    settings = {**(metric.Accuracy or {}), **(metric.F1 or {})}
    return metric.compares_classes and settings.get("task", "multiclass") == "multiclass"


def _made(metric: Metric, output: Tensor) -> torchmetrics.Metric:
    """The configured metric, for outputs of this shape."""
    if metric.torchmetrics is not None:
        made: torchmetrics.Metric = metric.torchmetrics.make()
        return made
    if _compares_likeliest(metric):
        remedy = "Name a metric: {torchmetrics: {class_path: torchmetrics.classification.BinaryAccuracy}}."
        checks.several_classes(output, remedy)
    class_dim = min(1, output.ndim - 1)  # as in torch's cross entropy and in torchmetrics: of maps too
    classes: dict[str, Any] = {"task": "multiclass", "num_classes": output.shape[class_dim], "average": "micro"}
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
