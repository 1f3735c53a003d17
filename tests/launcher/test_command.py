"""``lightning-distill fit`` and ``validate-config`` (N13), and the migration page (N15)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import lightning_distill
from distill_core.cli.lightning import main

Capture = pytest.CaptureFixture[str]
GOOD = {"distillation": {"train": {"end_epoch": 2, "optimizer": {"SGD": {"learning_rate": 0.1}}}}}
FIT = {
    "model": {
        "class_path": "lightning_distill.DistillModule",
        "init_args": {
            "student": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 16, "out_features": 5}},
            "teacher": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 16, "out_features": 5}},
        },
    },
    "data": {"class_path": "my_data.Data"},
    "trainer": {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    },
}
DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 16), torch.arange(8) % 5), 4)

    val_dataloader = train_dataloader
"""


def written(folder: Path, values: object) -> str:
    (folder / "config.yml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(folder / "config.yml")


def test_n13_a_good_file_is_called_ok(tmp_path: Path, capsys: Capture) -> None:
    """N13"""
    assert main(["validate-config", written(tmp_path, GOOD)]) == 0
    assert capsys.readouterr().out.endswith("config.yml: OK\n")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distilation": {}}, "Expected `distilation` to be a known key, but got {}. Closest: 'distillation'."),
        ({"distillation": {"train": {"end_epoch": 0}}}, "Expected `distillation.train.end_epoch` to be greater than"),
        ("{]", "Expected a YAML file"),
    ],
)
def test_n13_a_bad_file_exits_2_with_one_line(tmp_path: Path, capsys: Capture, values: object, words: str) -> None:
    """N13"""
    assert main(["validate-config", written(tmp_path, values)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_n13_a_file_that_is_not_there_exits_1(tmp_path: Path, capsys: Capture) -> None:
    """N13"""
    for command in (["validate-config"], ["fit", "--config"]):
        assert main([*command, str(tmp_path / "nowhere.yaml")]) == 1
        error = capsys.readouterr().err
        assert "nowhere.yaml" in error
        assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:No seed found")
def test_n13_fit_trains_what_a_file_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """N13: with data from the working directory, and once more in the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-distill"])
    (tmp_path / "my_data.py").write_text(DATA)
    path = list(sys.path)
    for _ in range(2):
        assert main(["fit", "--config", written(tmp_path, FIT)]) == 0
    assert sys.path == path
    wrong = {**FIT, "trainer": {**FIT["trainer"], "max_epoch": 1}}
    capsys.readouterr()
    assert main(["fit", "--config", written(tmp_path, wrong)]) == 2
    assert "max_epoch" in capsys.readouterr().err


def test_n13_help_lists_the_commands(capsys: Capture) -> None:
    """N13"""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "fit", "validate-config", "cache"))


def test_n15_the_migration_page_names_what_exists() -> None:
    """N15: every name on the right-hand side, and the factors that the tests measure."""
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    for name in ("Distillation", "DistillationConf", "SelfDistillation"):
        assert hasattr(lightning_distill, name)
        assert name in page
    for name in re.findall(r"\w+KnowledgeDistillationLoss(?!Config)\b|\bKnowledgeDistillationLoss(?!Config)\b", page):
        assert hasattr(lightning_distill, name), name
    for hook in re.findall(r"`(on_\w+)`", page.split("of still older")[0].split("pre_epoch_begin")[0]):
        assert hasattr(lightning_distill.Distillation, hook), hook
    assert "1/C" in page
