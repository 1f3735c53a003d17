"""Return values of a training step, means over steps, and teachers in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from nets import ForwardModule, Outputs, StepModule, loader, student, teacher
from torch import nn

from lightning_distill import DistillCallback, Distiller, FeatureDistillation, LogitsDistillation, SoftTargetLoss


def task_loss(module: Any, batch: Any, batch_idx: int) -> Any:
    return F.cross_entropy(module.model(batch[0]), batch[1])


def test_the_means_of_an_epoch_are_the_same_for_a_loss_of_shape_one(trainer):
    metrics = []
    for step in (task_loss, lambda *arguments: task_loss(*arguments).reshape(1)):
        run = trainer(callbacks=DistillCallback(teacher()), max_epochs=1)
        run.fit(StepModule(student(), step), loader(20))
        metrics.append({key: value.reshape(()).item() for key, value in run.callback_metrics.items()})
    assert metrics[0] == pytest.approx(metrics[1])


def test_the_means_of_an_epoch_weigh_the_last_batch_by_its_size(trainer):
    outputs = Outputs()
    run = trainer(callbacks=[DistillCallback(teacher()), outputs], max_epochs=1, max_steps=-1)
    run.fit(StepModule(student(), task_loss), loader(10, batch_size=8))
    full, rest = (output["loss"].item() for output in outputs.outputs)
    assert run.callback_metrics["distill/loss"].item() == pytest.approx(0.8 * full + 0.2 * rest)
    assert abs(full - rest) > 1e-3


def test_a_step_that_adds_the_loss_itself_says_nothing_about_the_next_one(trainer):
    def step(module: Any, batch: Any, batch_idx: int) -> Any:
        loss = task_loss(module, batch, batch_idx)
        if batch_idx == 0:
            loss = loss + callback.loss()
        return loss

    losses = []
    for function in (task_loss, step):
        callback, outputs = DistillCallback(teacher()), Outputs()
        trainer(callbacks=[callback, outputs]).fit(StepModule(student(), function), loader())
        losses.append([output["loss"].item() for output in outputs.outputs])
    assert losses[0] == pytest.approx(losses[1])


class Rows(nn.Module):
    """Class scores (N, C, L), with the classes in dimension 1, which the shape alone does not say."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores * x.flatten(1).mean(1)[:, None, None]


def test_the_agreement_with_several_teachers_is_that_with_their_mean_probabilities():
    network, several = Rows(0), [Rows(1), Rows(2)]
    x = loader().dataset.tensors[0]
    with Distiller(network, several, SoftTargetLoss(class_dim=1)) as distiller:
        with distiller.record():
            network(x)
        ((_, merged),) = distiller.agree()
    probabilities = torch.stack([teacher(x).softmax(1) for teacher in several]).mean(0)
    torch.testing.assert_close(merged.exp(), probabilities.detach())


@pytest.mark.parametrize("returned", [1.0, "loss", [1], {"loss": None}, {}], ids=repr)
def test_lightning_says_what_a_step_may_return(trainer, returned):
    module = StepModule(student(), lambda module, batch, _: (module.model(batch[0]), returned)[1])
    with pytest.raises(MisconfigurationException, match="training_step"):
        trainer(callbacks=DistillCallback(teacher())).fit(module, loader())


def test_without_logging_nothing_is_measured_in_validation(trainer):
    network = teacher()
    called: list[bool] = []
    network.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    run = trainer(callbacks=DistillCallback(network, log=False))
    run.validate(ForwardModule(student()), loader(), verbose=False)
    assert not called
    assert not [key for key in run.callback_metrics if key.startswith("distill/")]
    run = trainer(callbacks=DistillCallback(network, log=False))
    run.fit(ForwardModule(student()), loader(), loader())
    assert len(called) == 2  # the steps
    assert not [key for key in run.callback_metrics if key.startswith("distill/")]


def test_a_teacher_in_double_precision_answers_the_same_under_mixed_precision(trainer):
    seen = []
    for precision in ("32-true", "bf16-mixed"):
        answers: list[torch.Tensor] = []
        network = teacher().double()
        network.register_forward_hook(lambda module, inputs, output, kept=answers: kept.append(output))
        terms = [LogitsDistillation(), FeatureDistillation("layer1", "layer1")]
        run = trainer(callbacks=DistillCallback(network, terms), max_steps=1, precision=precision)
        run.fit(StepModule(student(), task_loss), loader())
        assert answers[0].dtype == torch.float64
        seen.append(answers[0])
    assert torch.equal(*seen)


def test_weights_that_are_all_zero_leave_the_task_loss_to_be_differentiated(trainer):
    outputs = Outputs()
    callback = DistillCallback(teacher(), LogitsDistillation(weight=0.0), task_weight=0.0)
    module = StepModule(student(), task_loss)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer(callbacks=[callback, outputs]).fit(module, loader())
    assert [output["loss"].item() for output in outputs.outputs] == [0.0, 0.0]
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


def test_a_second_total_does_not_count_the_calls_of_the_first():
    network: nn.Module = student()
    x, y = next(iter(loader()))
    with Distiller(network, teacher()) as distiller:
        totals = []
        for scale in (1.0, 3.0):
            with distiller.record():
                loss = F.cross_entropy(network(scale * x), y)
            totals.append(distiller.total(loss).item())
    with Distiller(network, teacher()) as distiller:
        with distiller.record():
            loss = F.cross_entropy(network(3.0 * x), y)
        assert distiller.total(loss).item() == totals[1] != totals[0]
