"""Labels of built-in training: one-hot, of single scores, and of another task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Mlp
from torch import nn

from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge
from lightning_distill.launcher.conf import Metric
from lightning_distill.launcher.scores import MetricEvaluation

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
LAYERS = Intermediate(["body"])


def single(width: int) -> nn.Module:
    network = Mlp(width)
    network.head = nn.Linear(width, 1)
    return network


@pytest.mark.parametrize("metric", [{"topk": 1}, {"topk": 2}, {"Accuracy": {}}, {"F1": {}}])
def test_one_hot_labels_are_scored_like_class_numbers(metric: Any) -> None:
    forms = (Y, F.one_hot(Y, 3), F.one_hot(Y, 3).float())
    scores = [MetricEvaluation([(X, labels)], Metric(**metric))(Mlp(5)) for labels in forms]
    assert 0 < scores[0] < 1
    assert scores == [scores[0]] * 3


@pytest.mark.parametrize("metric", [{"topk": 1}, {"Accuracy": {}}, {"F1": {}}])
def test_maps_are_scored_by_position(metric: Any) -> None:
    """The classes are the second dimension, as in cross entropy."""
    images = torch.randn(4, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(120).view(4, 5, 6) % 3
    one_hot = F.one_hot(classes, 3).movedim(-1, 1)
    network = nn.Conv2d(2, 3, 1)
    rows = [network(images).movedim(1, -1).flatten(0, 2).detach(), classes.flatten()]
    expected = MetricEvaluation([rows], Metric(**metric))(nn.Identity())
    for labels in (classes, one_hot):
        assert MetricEvaluation([(images, labels)], Metric(**metric))(network) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [torch.zeros(16, dtype=torch.long), torch.ones(16, 1)])
@pytest.mark.parametrize(
    "criterion", [Knowledge(), Intermediate(["body"], add_origin_loss=True), lambda s, t, loss: loss]
)
def test_cross_entropy_of_a_single_score_is_refused(distiller, labels: Any, criterion: Any) -> None:
    """It is 0 whatever the student does."""
    ready = distiller(single(5), single(5), criterion, train_dataloader=[(X, labels)])
    with pytest.raises(ValueError, match=r"to score at least 2 classes, .* shape \(16, 1\). Set `task_loss`"):
        ready.fit()


@pytest.mark.parametrize("metric", [{"topk": 1}, {"Accuracy": {}}, {"F1": {}}])
def test_a_metric_of_classes_is_refused_for_a_single_score(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"to score at least 2 classes, .*class_path: torchmetrics.classification"):
        MetricEvaluation([(X, Y)], Metric(**metric))(single(5))


def test_labels_are_not_looked_at_where_they_do_not_count(distiller) -> None:
    """Those of another task may be in any form."""
    ready = distiller(single(5), single(5), LAYERS, train_dataloader=[(X, torch.zeros(16, 1, dtype=torch.long))])
    before = ready.student_model.body.weight.detach().clone()
    ready.teacher_model.body.weight.data += 1
    ready.fit()
    assert not torch.equal(before, ready.student_model.body.weight)


BINARY = {"task": "binary"}, X[:, :1], (X[:, :1] > 0).long()
SEVERAL = {"task": "multilabel", "num_labels": 4}, X, (X > 0).long()
NUMBERS = {"num_classes": 3}, Y, Y


@pytest.mark.parametrize("name", ["Accuracy", "F1"])
@pytest.mark.parametrize("form", [BINARY, SEVERAL, NUMBERS])
def test_scores_of_another_task_and_numbers_of_classes_are_scored_as_they_are(name: str, form: Any) -> None:
    settings, outputs, labels = form
    assert MetricEvaluation([(outputs, labels)], Metric(**{name: settings}))(nn.Identity()) == 1
