"""The student's own text in whole trainings: resumed ones, two processes, your own loops, and other kinds of models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import language_model
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from on_policy_by_hand import (
    Answers,
    Module,
    answers,
    cross_entropy,
    is_own,
    reverse_kl,
    sequences_in,
    teacher,
    trained_by_hand,
)
from processes import run_processes
from token_nets import QUIET, close
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import (
    DistillCallback,
    Distiller,
    FusedLinearDistillation,
    OnPolicyDistillation,
    ReverseKLLoss,
    SequenceDistillation,
    schedules,
)

SCRIPT = Path(__file__).parent / "on_policy_processes.py"
fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this release of torch does not run on the CPU"
)


def fit(module: Any, on_policy: Any, terms: Any = None, data: Any = None, ckpt: Any = None, **settings: Any) -> Any:
    callback = DistillCallback(settings.pop("teacher", None) or teacher(), terms, on_policy=on_policy)
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer = Trainer(**{**QUIET, "max_epochs": 1, **settings}, callbacks=callbacks)
    trainer.fit(module, data or answers(), ckpt_path=ckpt)
    return module


# Resuming ------------------------------------------------------------------------------------------------------------


class Later(Answers):
    """The rows that are left: Lightning does not skip the batches of a loader without a state of its own."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__((index + 6) % len(self))


class Stop(Callback):
    def __init__(self, path: Path, epoch: int, after: int) -> None:
        self.path, self.epoch, self.after = path, epoch, after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.after):
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_stopped_inside_an_epoch_goes_on_with_the_same_text(tmp_path: Path, accumulate: int) -> None:
    on_policy = OnPolicyDistillation(0.7, max_new_tokens=5, temperature=2.0)
    whole = fit(Module(language_model("llama")), on_policy, accumulate_grad_batches=accumulate)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(
            Module(language_model("llama")),
            on_policy,
            callbacks=[Stop(tmp_path / "a.ckpt", 0, 1)],
            accumulate_grad_batches=accumulate,
        )
    torch.manual_seed(3)
    resumed = fit(
        Module(language_model("llama", seed=4)),
        copy.deepcopy(on_policy),
        data=DataLoader(Later(), batch_size=3),
        ckpt=tmp_path / "a.ckpt",
        accumulate_grad_batches=accumulate,
    )
    assert [sequences_in(batch) for batch in resumed.seen] == [sequences_in(batch) for batch in whole.seen[2:]]
    assert any(is_own(batch, index) for index, batch in enumerate(whole.seen[2:], 2))
    close(resumed.model.state_dict(), whole.model.state_dict(), atol=0)


# Your own loop -------------------------------------------------------------------------------------------------------


def loop(
    distiller: Distiller, student: nn.Module, batches: Any, size: int = 2, optimizer: Any = None
) -> list[dict[str, Tensor]]:
    """A loop by hand with windows of several micro-batches; the batches that the student got."""
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.05)
    seen = []
    for start in range(0, len(batches), size):
        optimizer.zero_grad()
        window = [distiller.continued(batch) for batch in batches[start : start + size]]
        with distiller.window(window):
            for batch in window:
                with distiller.record(batch=batch):
                    output = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                if distiller.terms[0].skips_heads:
                    loss = distiller.loss(batch)
                else:
                    loss = distiller.total(cross_entropy(output["logits"], batch), batch)
                (loss / len(window)).backward()
        optimizer.step()
        seen += window
    return seen


@pytest.mark.parametrize("size", [1, 2])
def test_a_loop_of_your_own_equals_the_loop_by_hand(size: int) -> None:
    student = language_model("llama")
    before = copy.deepcopy(student)
    with Distiller(student, teacher(), on_policy=OnPolicyDistillation(0.5, max_new_tokens=6, seed=3)) as distiller:
        seen = loop(distiller, student, list(answers()), size)
    own = [is_own(batch, index) for index, batch in enumerate(seen)]
    assert 0 < sum(own) < 4
    expected = trained_by_hand(before, teacher(), [*zip(seen, own, strict=True)], reverse_kl, accumulate=size)
    close(student.state_dict(), expected, atol=1e-7)
    assert "task_loss" not in distiller.parts if own[-1] else "task_loss" in distiller.parts


def test_a_loop_of_your_own_without_logits_leaves_out_the_cross_entropy_of_own_text() -> None:
    student = language_model("llama")
    before = copy.deepcopy(student)
    term = FusedLinearDistillation(loss=ReverseKLLoss(), weight=2.0, task_weight=0.5)
    on_policy = OnPolicyDistillation(0.5, max_new_tokens=6, seed=3)
    with Distiller(student, teacher(), term, on_policy=on_policy) as distiller:
        seen = loop(distiller, student, list(answers()), 1)
    own = [is_own(batch, index) for index, batch in enumerate(seen)]
    texts = [*zip(seen, own, strict=True)]
    expected = trained_by_hand(before, teacher(), texts, reverse_kl, weight=2.0, task_weight=0.5)
    close(student.state_dict(), expected, atol=1e-7)


def test_a_resumed_loop_draws_what_the_whole_one_draws() -> None:
    settings: dict[str, Any] = {"on_policy": OnPolicyDistillation(0.5, max_new_tokens=5, temperature=2.0, seed=2)}
    batches, student = list(answers()), language_model("llama")
    whole = loop(Distiller(student, teacher(), **settings), student, batches)
    student = language_model("llama")
    first = Distiller(student, teacher(), **settings)
    loop(first, student, batches[:2])
    second = Distiller(student, teacher(), **settings)
    second.load_state_dict(first.state_dict())
    again = loop(second, student, batches[2:])
    assert [sequences_in(batch) for batch in again] == [sequences_in(batch) for batch in whole[2:]]


def test_a_schedule_of_the_share_counts_the_steps_of_the_loop() -> None:
    on_policy = OnPolicyDistillation(
        schedules.Step([0.0, 1.0], boundaries=[2], over="steps"), max_new_tokens=4, temperature=0
    )
    student = language_model("llama")
    distiller = Distiller(student, teacher(), on_policy=on_policy)
    seen = loop(distiller, student, list(answers()), 1)
    assert [is_own(batch, index) for index, batch in enumerate(seen)] == [False, False, True, True]
    assert distiller.scheduler.values == {"on_policy_fraction": 1.0}


def test_a_loop_of_fabric_writes_with_the_module_inside_its_wrapper() -> None:
    models = []
    for wraps in (False, True):
        student = language_model("llama")
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        if wraps:
            student, optimizer = Fabric(accelerator="cpu", devices=1).setup(student, optimizer)
        with Distiller(student, teacher(), on_policy=OnPolicyDistillation(0.5, max_new_tokens=6, seed=3)) as distiller:
            loop(distiller, student, list(answers()), optimizer=optimizer)
        models.append(student)
    close(models[0].state_dict(), models[1].state_dict(), atol=0)


def test_a_loop_evaluates_on_batches_that_the_student_has_not_continued() -> None:
    student, teacher = language_model("llama"), language_model("llama", 24, 1)
    batch = next(iter(answers()))
    values = []
    for on_policy in (None, OnPolicyDistillation(1.0, max_new_tokens=4)):
        distiller = Distiller(student, teacher, SequenceDistillation(), on_policy=on_policy)
        with torch.no_grad(), distiller.record(needs_grad=False):
            student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        with torch.no_grad():
            values.append(distiller.loss(batch))
        distiller.close()
    assert values[0] > 0
    assert torch.equal(*values)


def test_a_batch_that_was_not_continued_is_refused_in_words() -> None:
    student = language_model("llama")
    distiller = Distiller(student, teacher(), on_policy=OnPolicyDistillation(max_new_tokens=4))
    batch = next(iter(answers()))
    with distiller.record():
        output = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="the batch to be one that `continued` has returned"):
        distiller.total(cross_entropy(output["logits"], batch), batch)
    with pytest.raises(ValueError, match="`on_policy` to be given"):
        Distiller(student, teacher()).continued(batch)


# Two processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(SCRIPT, "pair", 2, tmp_path_factory.mktemp("pair"))


@pytest.mark.distributed
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=fsdp2)])
def test_two_processes_decide_alike_and_have_the_weights_of_the_loop_by_hand(
    pair: Any, name: str, accumulate: int
) -> None:
    first, second = (rank[name if accumulate == 1 else f"{name}_accumulating"] for rank in pair)
    assert first["own"] == second["own"]
    assert 0 < sum(first["own"]) < len(first["own"])
    batches = [tensors(batch) for both in zip(first["batches"], second["batches"], strict=True) for batch in both]
    own = [flag for flag in first["own"] for _ in range(2)]
    written = [batch["labels"].ne(-100).sum(1).max() for batch, flag in zip(batches, own, strict=True) if flag]
    assert written[::2] != written[1::2]  # texts of other lengths, and no process waited for the other
    texts = [*zip(batches, own, strict=True)]
    expected = trained_by_hand(language_model("llama"), teacher(), texts, reverse_kl, accumulate=2 * accumulate)
    for rank in (first, second):
        close(rank["state"], {key: expected[key] for key in rank["state"]}, atol=1e-7)


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in batch.items()}


@pytest.mark.distributed
@fsdp2
def test_a_function_of_the_user_is_refused_where_parameters_are_sharded(pair: Any) -> None:
    assert all("`generate` of Hugging Face where its parameters are sharded" in rank["refused"] for rank in pair)
