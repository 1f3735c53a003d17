"""A chain of teacher assistants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from plain_trainer import PLAIN
from processes import run_processes
from tiny import Mlp, dataset
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillModule, FeatureDistillation, LogitsDistillation, assistant_chain, load_teacher

QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu"}


def networks() -> list[Mlp]:
    return [Mlp(9, seed=3), Mlp(7, seed=2), Mlp(5, seed=1)]


def terms() -> list:
    return [LogitsDistillation(), FeatureDistillation("body", "body")]


def settings(**others: Any) -> dict[str, Any]:
    make = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    return {"terms": terms(), "optimizer": make, "validate": False, **others}


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=8)


class Stops(Callback):
    """Fails in the second epoch of the second fit."""

    fits = 0

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        Stops.fits += trainer.current_epoch == 0
        if Stops.fits == 2 and trainer.current_epoch == 1:
            raise RuntimeError("power cut")


def make_trainer(*callbacks: Callback) -> Trainer:
    torch.manual_seed(7)
    return Trainer(max_epochs=3, callbacks=list(callbacks), **QUIET)


pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def chain(folder: Path, made: list | None = None, *callbacks: Callback) -> nn.Module:
    return assistant_chain(
        made or networks(),
        trainer=lambda: make_trainer(*callbacks),
        folder=folder,
        train_dataloaders=loader(),
        **settings(),
    )


def equal(first: nn.Module, second: nn.Module) -> bool:
    values = second.state_dict()
    return all(torch.equal(value, values[name]) for name, value in first.state_dict().items())


def test_a_chain_equals_its_stages_one_after_the_other(tmp_path: Path) -> None:
    student = chain(tmp_path)
    teacher, assistant, expected = networks()
    for small, large in ((assistant, teacher), (expected, assistant)):
        make_trainer().fit(DistillModule(small, large, **settings()), loader())
    assert equal(student, expected)
    assert not student.training
    kept = load_teacher(tmp_path / "stage_1" / "student.ckpt", Mlp(7), prefix="student.")
    assert equal(kept, assistant)


def test_a_chain_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = chain(tmp_path / "whole")
    Stops.fits = 0
    with pytest.raises(RuntimeError, match="power cut"):
        chain(tmp_path / "stopped", None, Stops())
    files = {str(path.relative_to(tmp_path / "stopped")) for path in (tmp_path / "stopped").glob("*/*")}
    assert files == {"stage_1/student.ckpt", "stage_2/last.ckpt"}
    assert equal(chain(tmp_path / "stopped"), whole)
    assert not (tmp_path / "stopped" / "stage_2" / "last.ckpt").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A chain of networks with statistics in two processes, whole, and from the middle of its second stage."""
    script = Path(__file__).parents[1] / "teachers_in_processes.py"
    return run_processes(script, "chain", 2, tmp_path_factory.mktemp("chain"))


@pytest.mark.distributed
def test_assistants_and_students_are_the_same_in_both_processes(pair) -> None:
    assert pair[0]["whole"] == pair[1]["whole"]
    assert pair[0]["resumed"] == pair[1]["resumed"]


@pytest.mark.distributed
def test_a_chain_of_two_processes_that_was_stopped_goes_on_to_the_same_bits(pair) -> None:
    for rank in pair:
        assert rank["whole"] == rank["resumed"]


@pytest.mark.distributed
def test_the_first_process_alone_writes_and_each_stage_is_kept_once(pair) -> None:
    files = [f"whole/stage_{number}/{name}" for number in (1, 2) for name in ("last.ckpt", "last.ckpt", "student.ckpt")]
    assert pair[0]["written"] == [*files, "stopped/stage_2/last.ckpt", "stopped/stage_2/student.ckpt"]
    assert pair[1]["written"] == []


def test_a_finished_chain_trains_nothing(tmp_path: Path) -> None:
    student = chain(tmp_path)
    again = assistant_chain(networks(), trainer=lambda: pytest.fail("a fit"), folder=tmp_path, **settings())
    assert equal(again, student)


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *arguments, **others: None)  # as on another machine
    with pytest.raises(ValueError, match=r"`folder` to be one that all processes see, but.*stage_1"):
        chain(tmp_path)


def test_a_folder_of_other_networks_is_refused(tmp_path: Path) -> None:
    chain(tmp_path)
    with pytest.raises(ValueError, match="to fit Mlp, but got size mismatch"):
        chain(tmp_path, [Mlp(9), Mlp(8), Mlp(5)])


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher, assistant, _ = networks()
    with pytest.raises(ValueError, match="a teacher and at least one student, but got 1"):
        chain(tmp_path, [teacher])
    with pytest.raises(ValueError, match=r"networks\[2\] stands in the list twice"):
        chain(tmp_path, [teacher, assistant, teacher])
    with pytest.raises(TypeError, match=r"`networks\[1\]` to be a module, but got str"):
        chain(tmp_path, [teacher, "small"])
    with pytest.raises(TypeError, match=r"`trainer` to be a function that makes a Trainer.*but got a Trainer"):
        assistant_chain([teacher, assistant], trainer=make_trainer(), folder=tmp_path)
    same = make_trainer()
    with pytest.raises(ValueError, match="a new Trainer for each stage"):
        assistant_chain(
            networks(), trainer=lambda: same, folder=tmp_path, train_dataloaders=loader(), **settings(log=False)
        )


def test_a_fit_that_was_interrupted_is_not_taken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> None:
        self.state.status = "interrupted"

    monkeypatch.setattr(Trainer, "fit", interrupted)
    with pytest.raises(RuntimeError, match="fit of stage 1 to finish, but it was interrupted"):
        chain(tmp_path)
    assert not (tmp_path / "stage_1" / "student.ckpt").exists()
