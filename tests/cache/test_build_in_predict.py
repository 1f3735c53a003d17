"""A build inside ``Trainer.predict``: the same files, the Trainer's precision and processes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_nets import network, table
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from plain_trainer import PLAIN
from torch import nn

from distill_core.store import CacheError
from lightning_distill import TeacherCache

SETTINGS: dict[str, Any] = {"batch_size": 4, "shard_bytes": 200, "progress": False}
QUIET: dict[str, Any] = {**PLAIN, "accelerator": "cpu"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


class Watched(nn.Module):
    """Notes the precision of autocast and the mode of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(8)
        self.seen: set[tuple[Any, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add((torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None, self.training))
        output: torch.Tensor = self.network(x)
        return output


class DeepSpeedStrategy(DDPStrategy):
    """Lightning's own is of this kind and name, and needs another package."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    TeacherCache.build(network(8), table(), folder, **SETTINGS)
    return folder


def test_a_trainer_writes_the_files_that_a_plain_build_writes(tmp_path: Path, plain: Path) -> None:
    teacher = network(8).train()
    cache = TeacherCache.build(teacher, table(), tmp_path, trainer=Trainer(**QUIET), **SETTINGS)
    assert files(tmp_path) == files(plain)
    cache.verify()
    assert teacher.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in teacher.parameters())


def test_the_teacher_runs_in_the_trainers_precision(tmp_path: Path) -> None:
    teacher = Watched()
    TeacherCache.build(teacher, table(), tmp_path, trainer=Trainer(precision="bf16-mixed", **QUIET), **SETTINGS)
    assert teacher.seen == {(torch.bfloat16, False)}


def test_a_stopped_build_is_completed_by_a_trainer(tmp_path: Path, plain: Path) -> None:
    TeacherCache.build(network(8), table(), tmp_path, **SETTINGS)
    (tmp_path / "shard-00001.json").unlink()
    TeacherCache.build(network(8), table(), tmp_path, trainer=Trainer(**QUIET), **SETTINGS)
    assert files(tmp_path) == files(plain)


def test_a_trainer_builds_a_part(tmp_path: Path, plain: Path) -> None:
    for number in (1, 2):
        part = f"{number}/2"
        trainer = Trainer(**QUIET)
        TeacherCache.build_part(network(8), table(), tmp_path / str(number), part, trainer=trainer, **SETTINGS)
    TeacherCache.merge(tmp_path / "whole", [tmp_path / "1", tmp_path / "2"])
    assert files(tmp_path / "whole") == files(plain)


@pytest.mark.distributed
def test_the_trainers_processes_share_the_work(tmp_path: Path, plain: Path) -> None:
    trainer = Trainer(strategy="ddp_spawn", devices=2, **QUIET)
    TeacherCache.build(network(8), table(), tmp_path, trainer=trainer, **SETTINGS)
    assert files(tmp_path) == files(plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainer": Trainer(precision="bf16-true", **QUIET)}, "precision 'bf16-true' converts them. Use '32-true'"),
        (
            {"trainer": Trainer(strategy=ModelParallelStrategy(), devices=1, **QUIET)},
            "a whole teacher in each process, but got the strategy ModelParallelStrategy",
        ),
        (
            {"trainer": Trainer(strategy=DeepSpeedStrategy(), devices=2, **QUIET)},
            "a whole teacher in each process, but got the strategy DeepSpeedStrategy",
        ),
        ({"trainer": Trainer(**QUIET), "device": "cpu"}, "Expected `device` to be None with `trainer`"),
    ],
)
def test_a_trainer_that_changes_the_teacher_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CacheError, match=words):
        TeacherCache.build(network(8), table(), tmp_path, **settings, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_something_else_as_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected `trainer` to be a Lightning Trainer, but got a str"):
        TeacherCache.build(network(8), table(), tmp_path, trainer="ddp", **SETTINGS)  # type: ignore[arg-type]
