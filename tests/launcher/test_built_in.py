"""Built-in training, on the Trainer: from YAML to a saved student (N2, N10, N17-N24)."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from tiny import Mlp, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import Distillation
from lightning_distill import IntermediateLayersKnowledgeDistillationLoss as Intermediate
from lightning_distill import KnowledgeDistillationLoss as Knowledge
from lightning_distill.launcher.training import Scoring

HERE = Path(__file__).parent
YAML = """
model: {name: digits_net, framework: pytorch}
distillation:
  train:
    start_epoch: 0
    end_epoch: 8
    frequency: 1
    optimizer:
      SGD: {learning_rate: 0.3, momentum: 0.9, nesterov: true, weight_decay: 0.0001}
    criterion:
      KnowledgeDistillationLoss:
        temperature: 4
        loss_types: ['CE', 'KL']
        loss_weights: [0.5, 0.5]
    trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false}
evaluation: {accuracy: {metric: {topk: 1}}}
tuning: {random_seed: 9527}
"""


def net(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Steps(Callback):
    """Counts batches, optimizer steps and epochs."""

    def __init__(self) -> None:
        self.batches = self.steps = self.epochs = 0

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        self.batches += 1
        self.steps = trainer.global_step

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epochs += 1


def ready_for(distiller, train: dict[str, Any] | None = None, **settings: Any) -> Distillation:
    """A small training that needs nothing more."""
    settings = {"train_dataloader": loader(), "criterion": Knowledge(), **settings}
    trainer = settings.pop("trainer_settings", {})
    return distiller(Mlp(5), Mlp(7, seed=1), train=train or {}, trainer_settings=trainer, **settings)


# From YAML to accuracy ----------------------------------------------------------------------------------------------


@pytest.fixture
def digits_teacher(digits) -> nn.Module:
    x, y, _, _ = digits
    teacher = net(96, seed=1)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    return teacher


def test_n2_yaml_distils_digits_and_leaves_the_teacher_alone(tmp_path, digits, digits_teacher):
    x, y, held_x, held_y = digits
    path = tmp_path / "distill.yaml"
    path.write_text(YAML)
    student, before = net(16), weights(digits_teacher)
    start = weights(student)
    distiller = Distillation(path)
    distiller.student_model, distiller.teacher_model = student, digits_teacher
    distiller.train_dataloader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)
    distiller.eval_dataloader = DataLoader(TensorDataset(held_x, held_y), batch_size=200)
    assert distiller.fit() is student
    accuracy = (student.eval()(held_x).argmax(-1) == held_y).float().mean().item()
    assert accuracy > 0.85
    assert accuracy == pytest.approx(distiller.best_score, abs=1e-6), "over all rows, the last batch being smaller"
    assert distiller.scores.first_score < 0.4
    assert distiller.scores.teacher_score > 0.9
    assert not any(torch.equal(value, start[name]) for name, value in student.state_dict().items())
    assert same(before, weights(digits_teacher))
    assert digits_teacher.training
    assert all(parameter.requires_grad for parameter in digits_teacher.parameters())


def test_n17_the_same_seed_gives_the_same_weights(distiller, digits):
    x, y, _, _ = digits
    ends = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)  # the state before does not matter
        ready = Distillation({"tuning": {"random_seed": seed}, "distillation": {"train": {"iteration": 3}}})
        ready.conf.distillation.train.trainer.update(accelerator="cpu", enable_progress_bar=False)
        student = nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.5), nn.Linear(12, 10))
        student.load_state_dict({name: torch.full_like(value, 0.01) for name, value in student.state_dict().items()})
        ready.student_model, ready.teacher_model, ready.criterion = student, net(12, seed=1), Intermediate([["0", "0"]])
        ready.train_dataloader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
        ends.append(weights(ready.fit()))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


# How long ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "epochs", "batches"),
    [
        ({}, 1, 4),
        ({"end_epoch": 3}, 3, 12),
        ({"start_epoch": 1, "end_epoch": 3}, 2, 8),
        ({"iteration": 1}, 1, 1),
        ({"iteration": 3, "end_epoch": 2}, 2, 6),
        ({"iteration": 100}, 1, 4),
    ],
)
def test_n19_epochs_and_iterations_are_as_configured(distiller, train, epochs, batches):
    counter = Steps()
    ready_for(distiller, train, trainer_settings={"callbacks": [counter]}).fit()
    assert (counter.epochs, counter.batches) == (epochs, batches)


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_n20_scores_are_taken_with_the_configured_frequency(distiller, frequency):
    seen = []
    ready_for(
        distiller, {"end_epoch": 6, "frequency": frequency}, eval_func=lambda model: seen.append(model) or 0.0
    ).fit()
    assert len(seen) == 2 + 6 // frequency


def test_n2_best_weights_come_back_from_built_in_training(distiller):
    scores, kept = iter([0.9, 0.1, 0.5, 0.8, 0.3]), []

    def score(model: nn.Module) -> float:
        kept.append(weights(model))
        return next(scores)

    student = ready_for(distiller, {"end_epoch": 3}, eval_func=score).fit()
    assert same(weights(student), kept[3])
    assert not same(weights(student), kept[4])


def test_n21_accumulated_gradients_equal_larger_batches(distiller):
    counter, ends = Steps(), []
    for size, settings in ((4, {"accumulate_grad_batches": 2, "callbacks": [counter]}), (8, {})):
        student = Mlp(5)
        ready = distiller(student, Mlp(7, seed=1), Intermediate(["body"], add_origin_loss=True),
                          train={"end_epoch": 2}, trainer_settings=settings)  # fmt: skip
        torch.manual_seed(5)
        ready.train_dataloader = loader(batch_size=size)
        ready.optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        ends.append(weights(ready.fit()))
    assert (counter.batches, counter.steps) == (8, 4)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


# The user's own optimizer, criterion and Trainer ---------------------------------------------------------------------

OPTIMIZERS: list[tuple[dict[str, Any], Any]] = [
    ({"SGD": {"learning_rate": 0.2}}, lambda p: torch.optim.SGD(p, lr=0.2)),
    (
        {"SGD": {"learning_rate": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    ({"Adam": {}}, lambda p: torch.optim.Adam(p)),
    (
        {"Adam": {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-4, "amsgrad": True}},
        lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.9), eps=1e-4, amsgrad=True),
    ),
    ({"AdamW": {"learning_rate": 0.02}}, lambda p: torch.optim.AdamW(p, lr=0.02)),
    (
        {"AdamW": {"learning_rate": 0.02, "weight_decay": 0.3}},
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    ),
]


@pytest.mark.parametrize(("section", "make"), OPTIMIZERS)
def test_n22_optimizer_from_yaml_equals_a_loop_with_torchs(distiller, section, make):
    ready = ready_for(distiller, {"optimizer": section}, criterion=Knowledge(2.0, ["CE", "KL"], [0.3, 0.7]))
    by_hand, teacher = copy.deepcopy(ready.student_model), ready.teacher_model
    optimizer = make(by_hand.parameters())
    for x, y in loader():
        output, p = by_hand(x), (teacher(x).detach() / 2).softmax(-1)
        soft = (p * (p.log() - (output / 2).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        (0.3 * F.cross_entropy(output, y) + 0.7 * 4 * soft).backward()
        optimizer.step()
    for name, value in ready.fit().state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])


@pytest.mark.parametrize("form", ["object", "function"])
def test_n10_a_custom_optimizer_trains(distiller, form):
    ends = []
    for own in (True, False):
        ready = ready_for(distiller, {} if own else {"optimizer": {"SGD": {"learning_rate": 0.2}}})
        if own:
            make = lambda parameters: torch.optim.SGD(parameters, lr=0.2)  # noqa: E731
            ready.optimizer = make if form == "function" else make(ready.student_model.parameters())
        ends.append(weights(ready.fit()))
    assert same(*ends)


def test_n10_a_custom_criterion_and_task_loss_are_used(distiller):
    seen = []

    def criterion(student_output: Tensor, teacher_output: Tensor, student_loss: Tensor) -> Tensor:
        seen.append((student_loss.item(), F.mse_loss(student_output, F.one_hot(labels[len(seen)], 3).float()).item()))
        return student_loss + (student_output - teacher_output).square().sum()

    labels = [y for _, y in loader()]
    ready = ready_for(distiller, criterion=criterion)
    ready.task_loss = lambda output, y: F.mse_loss(output, F.one_hot(y, 3).float())
    ready.fit()
    assert len(seen) == 4
    assert all(got == pytest.approx(expected) for got, expected in seen)


def test_a_custom_criterion_takes_the_outputs_of_a_teacher_that_runs_in_inference_mode(distiller):
    ends = []
    for decorate in (torch.no_grad(), torch.inference_mode()):
        ready = ready_for(distiller, criterion=lambda student, teacher, loss: F.mse_loss(student, teacher))
        ready.teacher_model.forward = decorate(ready.teacher_model.forward)
        ends.append(weights(ready.fit()))
    assert same(*ends)


def test_n10_a_custom_trainer_runs_and_keeps_no_scoring_of_the_launcher(distiller, trainer):
    counter = Steps()
    own: Trainer = trainer(max_steps=3, callbacks=[counter])
    ready_for(distiller, trainer=own, eval_func=lambda model: 0.0).fit()
    assert counter.batches == 3
    assert not any(isinstance(callback, Scoring) for callback in own.callbacks), "a second fit would score twice"


@pytest.mark.parametrize(
    ("criterion", "logged"),
    [
        (lambda student_output, teacher_output, student_loss: student_loss + 0 * student_output.sum(), True),
        (Knowledge(2.0, ["CE", "KL"], [0.3, 0.7]), True),
        (Intermediate(["body"]), False),
    ],
    ids=["a function", "with a weight", "without a weight"],
)
def test_the_own_loss_is_logged_where_it_counts(distiller, trainer, criterion: Any, logged: bool) -> None:
    own: Trainer = trainer(max_steps=1)
    ready_for(distiller, trainer=own, criterion=criterion).fit()
    assert ("train_loss" in own.callback_metrics) == logged
    assert "distill/loss" in own.callback_metrics
    if logged:
        x, y = next(iter(loader()))
        expected = F.cross_entropy(Mlp(5)(x), y)
        torch.testing.assert_close(own.callback_metrics["train_loss"].cpu(), expected.detach())


@pytest.mark.parametrize("name", ["labels", "label", "target", "y"])
def test_n10_batches_may_be_dicts(distiller, name):
    plain, named = ready_for(distiller), ready_for(distiller)
    named.train_dataloader = [{"x": x, name: y} for x, y in loader()]
    assert same(weights(plain.fit()), weights(named.fit()))


class TwoInputs(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = Mlp(5, seed=seed)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.net(first + second)


def test_n10_inputs_may_be_several(distiller):
    halves = [((x / 2, x / 2), y) for x, y in loader()]
    ends = []
    for data, models in ((halves, (TwoInputs(0), TwoInputs(1))), (list(loader()), (Mlp(5), Mlp(5, seed=1)))):
        ready = distiller(*models, Intermediate([["", ""]]), train_dataloader=data)
        ends.append([value.detach() for value in ready.fit().parameters()])
    for parameter, expected in zip(*ends, strict=True):
        torch.testing.assert_close(parameter, expected)


def test_n10_data_come_from_the_yaml_where_none_are_set(distiller):
    counter = Steps()
    data = {"class_path": "tiny.loader", "init_args": {"rows": 12, "batch_size": 4}}
    ready_for(
        distiller, {"dataloader": data}, trainer_settings={"callbacks": [counter]}, train_dataloader=None
    ).fit()  # fmt: skip
    assert counter.batches == 3


def test_n10_no_data_raise(distiller):
    with pytest.raises(ValueError, match=r"`train_dataloader` to be set, or `distillation\.train\.dataloader`"):
        ready_for(distiller, train_dataloader=None).fit()


def test_n11_nothing_is_left_after_an_exception_in_built_in_training(distiller):
    def criterion(*_: Any) -> Tensor:
        raise ArithmeticError("in the middle")

    ready = ready_for(distiller, criterion=criterion)
    teacher, student = ready.teacher_model, ready.student_model
    with pytest.raises(ArithmeticError, match="in the middle"):
        ready.fit()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.training
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in [*student.modules(), *teacher.modules()]
    )


# The trained student -----------------------------------------------------------------------------------------------


def test_n23_student_is_saved_and_exported(distiller, tmp_path):
    ready = ready_for(distiller)
    student = ready.fit()
    ready.save(tmp_path / "student.pt")
    assert same(weights(student), torch.load(tmp_path / "student.pt", weights_only=True))
    x = torch.randn(2, 4)
    ready.export(tmp_path / "student.pt2", x)
    program = torch.export.load(tmp_path / "student.pt2").module()
    torch.testing.assert_close(program(x), student(x))
    assert student.training


@pytest.mark.distributed
def test_n24_two_processes_equal_one_on_the_same_batches(tmp_path):
    sys.path.insert(0, str(HERE))
    try:
        from launcher_processes import trained
    finally:
        sys.path.remove(str(HERE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    base = {**os.environ, "PYTHONPATH": paths, "USE_LIBUV": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(HERE / "launcher_processes.py"), str(tmp_path)]
    logs = [(tmp_path / f"{rank}.log").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(command, env={**base, "LOCAL_RANK": str(rank)}, stdout=log, stderr=log, cwd=tmp_path)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0, 0], "\n\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    pair = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = trained(0, 1)
    assert pair[0] == pair[1]
    assert pair[0]["teacher_same"]
    assert pair[0]["best"] == pytest.approx(alone["best"], rel=1e-5)
    for name, value in alone["student"].items():
        torch.testing.assert_close(torch.tensor(pair[0]["student"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)
