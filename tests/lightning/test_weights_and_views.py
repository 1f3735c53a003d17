"""Weights of 0, which skip work (L26), and several views in one step (L28)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation, Tap

MakeTrainer = Callable[..., Trainer]


def gap(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).mean()


class Counting(nets.MLP):
    def __init__(self, width: int = 10) -> None:
        super().__init__(width)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class Counted:
    """A loss that counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.count += 1
        return gap(student, teacher)


class Schedule(Callback):
    """Sets the weight of a term, or the task weight, before each step."""

    def __init__(self, owner: Any, name: str, values: list[float]) -> None:
        self.owner, self.name, self.values = owner, name, values

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        setattr(self.owner, self.name, self.values[batch_idx])


# L26 -----------------------------------------------------------------------------------------------------------------


def test_a_weight_of_zero_skips_the_work_of_its_term_alone(trainer: MakeTrainer) -> None:
    """L26: the loss of that term is not called, its value is not logged."""
    logits, feature = Counted(), Counted()
    terms = [LogitsDistillation(logits), FeatureDistillation("layer2", "layer2", feature, weight=0.0)]
    fit = trainer(max_epochs=1, log_every_n_steps=1, callbacks=[DistillCallback(nets.teacher(), terms)])
    fit.fit(nets.InnerModule(nets.student()), nets.loader())
    assert (logits.count, feature.count) == (3, 0)
    assert "distill/logits_loss" in fit.callback_metrics
    assert "distill/layer2_loss" not in fit.callback_metrics


@pytest.mark.exact
@pytest.mark.parametrize("task_weight", [1.0, 0.5])
def test_all_weights_zero_skip_the_teacher(trainer: MakeTrainer, task_weight: float) -> None:
    """L26: not one forward pass, and the task weight still holds."""
    teacher = nets.make(Counting, 2)
    callback = DistillCallback(teacher, LogitsDistillation(weight=0.0), task_weight=task_weight)
    module = nets.InnerModule(nets.student())
    trainer(max_epochs=1, callbacks=[callback]).fit(module, nets.loader())
    assert teacher.count == 0
    net = nets.student()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in nets.batches():
        optimizer.zero_grad()
        (task_weight * F.cross_entropy(net(x), y)).backward()
        optimizer.step()
    assert nets.same(nets.snapshot(net), nets.snapshot(module.model))


def test_a_scheduled_weight_takes_effect_in_the_next_step(trainer: MakeTrainer) -> None:
    """L26: off, on, off; the adapter is made when first needed, and trained like the loop written by hand."""
    teacher, adapter = nets.make(Counting, 2), nets.make(nn.Linear, 5, 6, 10)
    weights = [0.0, 2.0, 0.0]
    term = FeatureDistillation("layer2", "layer2", gap, weight=0.0, adapter=adapter)
    module = nets.InnerModule(nets.student(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    callbacks = [Schedule(term, "weight", weights), DistillCallback(teacher, term)]
    trainer(max_epochs=1, callbacks=callbacks).fit(module, nets.loader())
    assert teacher.count == 1
    net = nets.student()
    optimizer = torch.optim.SGD([*net.parameters(), *adapter.parameters()], lr=0.1)
    for weight, (x, y) in zip(weights, nets.batches(), strict=True):
        optimizer.zero_grad()
        feature = net.layer2(torch.tanh(net.layer1(x.flatten(1))))
        loss = F.cross_entropy(net.head(torch.tanh(feature)), y)
        if weight:
            with torch.no_grad():
                teacher_feature = teacher.layer2(torch.tanh(teacher.layer1(x.flatten(1))))
            loss = loss + weight * gap(adapter(feature), teacher_feature)
        loss.backward()
        optimizer.step()
    nets.close(list(module.model.parameters()), list(net.parameters()), 1e-6)
    nets.close(list(term.adapters.parameters()), list(adapter.parameters()), 1e-6)


def test_a_scheduled_task_weight_takes_effect_in_the_next_step(trainer: MakeTrainer) -> None:
    """L26: a weight may be set while training, the callback's own too."""
    callback, outputs = DistillCallback(nets.teacher(), LogitsDistillation(gap)), nets.Outputs()
    module = nets.InnerModule(nets.student(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    schedule = Schedule(callback, "task_weight", [0.0, 1.0, 3.0])
    trainer(max_epochs=1, callbacks=[schedule, callback, outputs]).fit(module, nets.loader())
    net, teacher = nets.student(), nets.teacher()
    expected = [
        weight * F.cross_entropy(net(x), y) + gap(net(x), teacher(x))
        for weight, (x, y) in zip([0.0, 1.0, 3.0], nets.batches(), strict=True)
    ]
    nets.close([output["loss"] for output in outputs.outputs], [loss.detach() for loss in expected], 1e-6)


def test_a_task_weight_of_zero_leaves_the_distillation_alone(trainer: MakeTrainer) -> None:
    """L26: a task loss that is not finite must not leak through 0 * inf."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return module.model(batch[0]).sum() * float("inf")

    module = nets.StepModule(nets.student(), step)
    trainer(callbacks=[DistillCallback(nets.teacher(), task_weight=0.0)]).fit(module, nets.loader())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
def test_the_cross_entropy_of_a_single_score_is_refused_where_it_has_a_weight(
    trainer: MakeTrainer, task_weight: float
) -> None:
    """It is 0 whatever the student does; without a weight the labels may be those of a regression."""
    student, teacher = (torch.nn.Linear(4, 1) for _ in range(2))
    before = [parameter.detach().clone() for parameter in student.parameters()]
    module = DistillModule(student, teacher, LogitsDistillation(gap), task_weight=task_weight)
    data = torch.utils.data.DataLoader([(torch.randn(4), torch.randn(1)) for _ in range(8)], batch_size=8)
    words = r"to score at least 2 classes, .* shape \(8, 1\)\. Set `task_loss`"
    with pytest.raises(ValueError, match=words) if task_weight else nullcontext():
        trainer(max_epochs=1).fit(module, data, data)
    assert all(torch.equal(*pair) == bool(task_weight) for pair in zip(before, student.parameters(), strict=True))


def test_the_cross_entropy_of_maps_of_a_single_class_is_refused(trainer: MakeTrainer) -> None:
    student, teacher = (torch.nn.Conv2d(2, 1, 1) for _ in range(2))
    data = torch.utils.data.DataLoader([(torch.randn(2, 4, 4), torch.zeros(4, 4).long())] * 2, batch_size=2)
    with pytest.raises(ValueError, match=r"to score at least 2 classes, .* shape \(2, 1, 4, 4\)\. Set `task_loss`"):
        trainer(max_epochs=1).fit(DistillModule(student, teacher, LogitsDistillation(gap)), data, data)


# L28 -----------------------------------------------------------------------------------------------------------------


def views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x.flip(-1), 0.5 * x


def test_every_view_with_gradients_is_distilled_and_averaged(trainer: MakeTrainer) -> None:
    """L28: the teacher is called with each view, except the one under no_grad."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        first, second, third = views(batch[0])
        logits = module.model(first)
        with torch.no_grad():  # between the two, so that a trace of it would disturb the second
            target = module.model(third).argmax(-1)
        return F.cross_entropy(logits, batch[1]) + F.cross_entropy(module.model(second), target)

    teacher, adapter = nets.make(Counting, 2), nets.make(nn.Linear, 5, 6, 10)
    by_hand = copy.deepcopy(adapter)
    terms = [LogitsDistillation(gap), FeatureDistillation("layer2", "layer2", gap, weight=2.0, adapter=adapter)]
    callback = DistillCallback(teacher, terms)
    module = nets.StepModule(nets.student(), step)
    trainer(max_epochs=1, callbacks=[callback]).fit(module, nets.loader())
    assert teacher.count == 6

    net = nets.student()
    optimizer = torch.optim.SGD([*net.parameters(), *by_hand.parameters()], lr=0.1, momentum=0.9)
    for x, y in nets.batches():
        optimizer.zero_grad()
        first, second, third = views(x)
        losses, logits = [], []
        for view in (first, second):
            feature = net.layer2(torch.tanh(net.layer1(view.flatten(1))))
            logits.append(net.head(torch.tanh(feature)))
            with torch.no_grad():
                teacher_feature = teacher.layer2(torch.tanh(teacher.layer1(view.flatten(1))))
                answer = teacher.head(torch.tanh(teacher_feature))
            losses.append(gap(logits[-1], answer) + 2.0 * gap(by_hand(feature), teacher_feature))
        with torch.no_grad():
            target = net(third).argmax(-1)
        task = F.cross_entropy(logits[0], y) + F.cross_entropy(logits[1], target)
        (task + (losses[0] + losses[1]) / 2).backward()
        optimizer.step()
    nets.close(list(module.model.parameters()), list(net.parameters()), 1e-6)
    nets.close(list(callback.terms[1].adapters.parameters()), list(by_hand.parameters()), 1e-6)


def test_views_under_no_grad_alone_do_not_count_as_calls_of_the_student(trainer: MakeTrainer) -> None:
    """L28: only a call with gradients can be distilled."""

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            module.model(batch[0])
        return module.model.head.weight.sum()

    module = nets.StepModule(nets.student(), step)
    with pytest.raises(ValueError, match="to be called with gradients in `training_step`, but it was not"):
        trainer(callbacks=[DistillCallback(nets.teacher())]).fit(module, nets.loader())


def test_the_labels_of_several_views_are_the_batch_s_own(trainer: MakeTrainer) -> None:
    """L27, L28: a loss that needs labels gets the same ones for each view."""
    seen: list[Tensor] = []

    class WithLabels(Counted):
        needs_labels = True

        def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(labels)
            return gap(student, teacher)

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(module.model(view), batch[1]) for view in views(batch[0])[:2])

    module = nets.StepModule(nets.student(), step)
    trainer(callbacks=[DistillCallback(nets.teacher(), LogitsDistillation(WithLabels()))]).fit(module, nets.loader())
    nets.close(seen, [nets.batches()[index][1] for index in (0, 0, 1, 1)], 0.0)


def test_one_run_of_a_layer_inside_a_view_can_be_tapped_by_its_index(trainer: MakeTrainer) -> None:
    """L11, L28: call indices count within one view, not over the views."""

    class Recurrent(nets.MLP):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layer1(x.flatten(1)))
            for _ in range(3):
                x = torch.tanh(self.layer2(x))
            return self.head(x)

    def step(module: Any, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(module.model(view), batch[1]) for view in views(batch[0])[:2])

    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(student: Tensor, teacher: Tensor) -> Tensor:
        pairs.append((student.detach(), teacher))
        return gap(student, teacher)

    teacher, net = nets.make(Recurrent, 2, 6), nets.make(Recurrent, 1, 6)
    start = copy.deepcopy(net)
    term = FeatureDistillation(Tap("layer2", call=2), Tap("layer2", call=0), keep, adapter=None)
    module = nets.StepModule(net, step)
    trainer(max_steps=1, callbacks=[DistillCallback(teacher, term)]).fit(module, nets.loader())
    for (student_feature, teacher_feature), view in zip(pairs, views(nets.batches()[0][0])[:2], strict=True):
        with torch.no_grad():
            x = torch.tanh(start.layer1(view.flatten(1)))
            for _ in range(2):
                x = torch.tanh(start.layer2(x))
            expected = start.layer2(x), teacher.layer2(torch.tanh(teacher.layer1(view.flatten(1))))
        nets.close([student_feature, teacher_feature], list(expected), 1e-6)
