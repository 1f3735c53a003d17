"""Teachers, taps, adapters, losses and caches that meet equal a few lines by hand, or are refused in words."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from plain_trainer import PLAIN
from tiny import CLASSES, INPUTS, Classifier, Mlp, ValidatedClassifier, dataset, loader
from torch import Tensor, nn

from lightning_distill import (
    CallableTeacher,
    DistillCallback,
    Distiller,
    EMATeacher,
    FeatureDistillation,
    LogitsDistillation,
    MarginReLULoss,
    MutualLearning,
    ReusedClassifierDistillation,
    SelfDistillation,
    Tap,
    TeacherCache,
    assistant_chain,
)
from lightning_distill.cache import CacheError
from lightning_distill.functional.mixtures import mean_logits
from lightning_distill.schedules import Linear

QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu", "num_sanity_val_steps": 0}
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOURCE = torch.tensor([0, 1, 0, 1, 1, 0])
X = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(1))


class Patches(nn.Module):
    """Tokens of an image, behind class and register tokens."""

    def __init__(self, prefix: int, patch: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.first = nn.Conv2d(3, 6, patch, patch), nn.Parameter(5 * torch.randn(1, prefix, 6))
            self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def tokens(self, images: Tensor) -> Tensor:
        return torch.cat([self.first.expand(len(images), -1, -1), self.embed(images).flatten(2).mT], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.tokens(images))[:, 0])


def total(student: nn.Module, teacher: Any, terms: Any, inputs: Tensor, batch: Any = None, **settings: Any) -> Tensor:
    with Distiller(student, teacher, terms, task_weight=0, **settings) as distiller:
        distiller.follow(torch.optim.SGD(student.parameters(), lr=0.1))
        with distiller.record():
            task = student(inputs).mean()
        return distiller.total(task, batch).detach()


def test_tokens_of_a_route_are_pooled_without_their_class_tokens() -> None:
    student, teachers = Patches(1, 4), [Patches(1, 4, seed=1), Patches(2, 2, seed=2)]
    term = FeatureDistillation("block", "block", adapter="pool")
    value = total(student, teachers, term, IMAGES, {"source": SOURCE}, route="source")
    with torch.no_grad():
        pooled = [net.block(net.tokens(IMAGES))[:, net.first.shape[1] :].mean(1) for net in (student, *teachers)]
    expected = F.mse_loss(pooled[0], torch.where(SOURCE[:, None] == 0, pooled[1], pooled[2]))
    torch.testing.assert_close(value, expected)


def test_a_cache_of_tokens_is_pooled_like_its_teacher(tmp_path: Path) -> None:
    student, teacher = Patches(1, 4), Patches(2, 2, seed=1)
    cache = TeacherCache.build(
        teacher,
        list(IMAGES),
        tmp_path,
        layers=["block"],
        dtype="float32",
        progress=False,
        forward=lambda net, x: net(x),
    )
    term = FeatureDistillation("block", "block", adapter="pool")
    live = total(student, teacher, term, IMAGES)
    batch = next(iter(torch.utils.data.DataLoader(cache.attach(list(IMAGES)), batch_size=6)))
    torch.testing.assert_close(total(student, cache, term, IMAGES, batch), live)


def test_a_cache_keeps_one_tensor_of_a_layer(tmp_path: Path) -> None:
    layers = [Tap("body", call=0), Tap("body", call=1)]
    with pytest.raises(CacheError, match="the output of each layer once, but got 'body' twice"):
        TeacherCache.build(Mlp(5), dataset(), tmp_path, layers=layers, progress=False)


class Undefined(nn.Module):
    """A teacher whose scores of one example are NaN."""

    def forward(self, x: Tensor) -> Tensor:
        scores = Mlp(5, seed=1)(x)
        return torch.where(torch.arange(len(x))[:, None] == 2, torch.full_like(scores, math.nan), scores)


def test_weights_by_confidence_are_not_read_where_an_example_does_not_count() -> None:
    batch = {"mask": torch.tensor([True, True, False, True, True, True])}
    term = lambda: LogitsDistillation(mask="mask")  # noqa: E731
    values = [
        total(Mlp(5), [first, Mlp(6, seed=2)], term(), X, batch, teacher_weights="entropy")
        for first in (Undefined(), Mlp(5, seed=1))
    ]
    torch.testing.assert_close(*values)


def test_a_teacher_of_weight_0_may_forbid_classes() -> None:
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -math.inf]])]
    torch.testing.assert_close(mean_logits(scores, torch.tensor([1.0, 0.0])), scores[0])
    assert mean_logits(scores, torch.tensor([0.5, 0.5])).tolist() == [[2.0, -math.inf]]


@pytest.mark.parametrize("autocast", [False, True])
def test_each_of_several_teachers_computes_in_its_own_precision(autocast: bool) -> None:
    half, double = Mlp(5, seed=1).bfloat16(), Mlp(6, seed=2).double()
    seen: list[torch.dtype] = []
    function = CallableTeacher(lambda x: seen.append(x.dtype) or x[:, :CLASSES])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = total(Mlp(5), [half, double, function], None, X)
        alone = torch.stack([total(Mlp(5), teacher, None, X) for teacher in (half, double, function)])
        routed = total(Mlp(5), [half, double], None, X, {"source": SOURCE}, route="source")
    torch.testing.assert_close(together, alone.mean())
    assert set(seen) == {torch.float32}
    assert math.isfinite(routed)


class Estimator:
    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return np.full((len(x), CLASSES), 1 / CLASSES)


def test_a_callback_with_an_estimator_is_pickled() -> None:
    loaded = pickle.loads(pickle.dumps(DistillCallback(CallableTeacher(Estimator()))))
    torch.testing.assert_close(loaded.teacher(X).softmax(-1), torch.full((6, CLASSES), 1 / CLASSES))


# The moving average --------------------------------------------------------------------------------------------------


class Pickles(Callback):
    def __init__(self, distill: DistillCallback) -> None:
        self.distill = distill

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.loaded = pickle.loads(pickle.dumps(self.distill))


def test_copies_of_a_callback_with_a_moving_average_train_with_their_own() -> None:
    distill = DistillCallback(EMATeacher(0.5), student="model")
    pickles, copied = Pickles(distill), copy.deepcopy(distill)
    Trainer(callbacks=[distill, pickles], max_epochs=1, **QUIET).fit(Classifier(), loader())
    network = distill.teacher.network
    for other in (copied, pickles.loaded):
        Trainer(callbacks=other, max_epochs=1, **QUIET).fit(Classifier(Mlp(5, seed=3)), loader())
        assert other.teacher.network is not network
    assert distill.teacher.network is network


def test_a_validation_before_the_training_does_not_start_the_average() -> None:
    distill, module = DistillCallback(EMATeacher(1.0), student="model"), ValidatedClassifier()
    Trainer(callbacks=distill, **QUIET).validate(module, loader(), verbose=False)
    assert distill.adapter_state() == {}
    module.model.load_state_dict(Mlp(5, seed=9).state_dict())
    Trainer(callbacks=distill, max_steps=2, **QUIET).fit(module, loader(), loader())
    for name, value in distill.teacher.network.state_dict().items():  # with a decay of 1 it stays where it began
        torch.testing.assert_close(value, Mlp(5, seed=9).state_dict()[name])


def test_an_evaluation_in_a_loop_before_the_training_does_not_start_the_average() -> None:
    student = Mlp(5)
    with Distiller(student, EMATeacher(1.0)) as distiller:
        distiller.follow(optimizer := torch.optim.SGD(student.parameters(), lr=0.1))
        with distiller.record(needs_grad=False), torch.no_grad():
            student(X)
        distiller.agree()
        student.load_state_dict(Mlp(5, seed=9).state_dict())
        with distiller.record():
            task = student(X).mean()
        distiller.total(task).backward()
        optimizer.step()
        average = distiller.teacher.network.state_dict()
    for name, value in Mlp(5, seed=9).state_dict().items():
        torch.testing.assert_close(average[name], value)


# Validation ----------------------------------------------------------------------------------------------------------


def test_validation_runs_adapters_in_eval_mode_and_leaves_them_alone() -> None:
    adapter = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
    term = FeatureDistillation("body", "body", adapter=adapter)
    distill, module = DistillCallback(Mlp(7, seed=1), term, student="model", validate=True), ValidatedClassifier()
    trainer = Trainer(callbacks=distill, max_epochs=1, **QUIET)
    trainer.fit(module, loader(), loader(rows=6))
    trained = distill.terms[0].adapters[0]
    assert all(part.training for part in trained.modules())
    assert trained[1].num_batches_tracked == 4
    values = []
    with torch.no_grad():
        for x, _ in loader(rows=6):
            value = F.mse_loss(trained.eval()(module.model.body(x)), Mlp(7, seed=1).body(x))
            values.append(len(x) / 6 * value)
    torch.testing.assert_close(trainer.callback_metrics["distill/val_body_loss"], sum(values))


# Terms on the student alone ------------------------------------------------------------------------------------------


def test_a_term_on_the_student_alone_counts_once_beside_several_teachers() -> None:
    term = lambda: SelfDistillation("body", "head", adapter="linear")  # noqa: E731
    teachers = [Mlp(5, seed=1), Mlp(6, seed=2)]
    alone = total(Mlp(5), None, term(), X)
    for settings in ({}, {"teacher_weights": [1, 3]}, {"route": lambda batch: SOURCE}):
        torch.testing.assert_close(total(Mlp(5), teachers, term(), X, X, **settings), alone)
    distill = DistillCallback(teachers, term(), student="model", validate=True)
    trainer = Trainer(callbacks=distill, max_epochs=1, **QUIET)
    trainer.fit(ValidatedClassifier(), loader(), loader(rows=6))
    assert len(distill.terms[0].adapters) == 1
    assert "distill/val_body_loss" in trainer.callback_metrics


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(INPUTS), nn.BatchNorm1d(INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("teacher", [None, Normed()])
def test_self_distillation_takes_no_numbers_from_the_layers_of_a_teacher(teacher: Any) -> None:
    term = SelfDistillation("first", "second", MarginReLULoss())
    others = [] if teacher is None else [FeatureDistillation("second", "second")]
    with pytest.raises(ValueError, match="no numbers from a teacher's layers in a SelfDistillation"):
        total(Normed(), teacher, [*others, term], X)
    with_margins = SelfDistillation("first", "second", MarginReLULoss(margins=[-1.0] * INPUTS))
    assert math.isfinite(total(Normed(), None, with_margins, X))


def test_students_that_teach_each_other_have_no_term_that_is_trained() -> None:
    with pytest.raises(ValueError, match="terms on outputs without parameters of their own in MutualLearning"):
        MutualLearning([Mlp(5), Mlp(5, seed=1)], [LogitsDistillation(), SelfDistillation("body", "head")])


def test_a_student_without_a_classifier_of_its_own_is_refused_as_an_assistant() -> None:
    term = ReusedClassifierDistillation("act", "act", classifier="head")
    with pytest.raises(ValueError, match="terms that train the whole student, who teaches the next one"):
        assistant_chain([Mlp(7), Mlp(6), Mlp(5)], term, trainer=lambda: Trainer(**QUIET), folder="chain")


def test_a_copy_of_a_callback_has_teacher_weights_of_its_own() -> None:
    distill = DistillCallback([Mlp(5, seed=1), Mlp(6, seed=2)], teacher_weights=[1.0, Linear(1.0, 0.0)])
    copied = copy.deepcopy(distill)
    copied.mix.weights[0].weight = 3.0
    assert distill.mix.shares() == [0.5, 0.5]
    assert copied.mix.shares() == [0.75, 0.25]
