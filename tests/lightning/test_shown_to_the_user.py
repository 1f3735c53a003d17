"""The settings as hyper-parameters of the loggers, and the losses in the progress bar."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_project import ROOT
from tiny import Classifier, Mlp, ValidatedClassifier, loader

from lightning_distill import DistillCallback, DistillModule, FeatureDistillation, LogitsDistillation, SoftTargetLoss
from lightning_distill.schedules import Linear, Schedule

EXPECTED: dict[str, Any] = {
    "distill/teacher": "tiny.Mlp",
    "distill/teacher_dtype": "bfloat16",
    "distill/student": "model",
    "distill/task_weight": 0.25,
    "distill/logits/term": "LogitsDistillation(weight=0.5, output=None, name='logits')",
    "distill/logits/weight": 0.5,
    "distill/logits/loss": "SoftTargetLoss",
    "distill/logits/class_dim": None,
    "distill/logits/temperature": "Linear(start=8.0, end=2.0, duration=1.0, over='fraction')",
    "distill/logits/standardize": False,
    "distill/body/term": "FeatureDistillation('body' -> 'body', weight=1.0, adapter='linear', name='body')",
    "distill/body/weight": "Schedule(function=halved, over='epochs')",
    "distill/body/loss": "FeatureDistance",
    "distill/body/kind": "cosine",
    "distill/body/channel_dim": None,
}


def halved(epoch: float) -> float:
    return 0.5**epoch


def callback(**settings: Any) -> DistillCallback:
    terms = [
        LogitsDistillation(SoftTargetLoss(temperature=Linear(8, 2)), weight=0.5),
        FeatureDistillation("body", "body", "cosine", adapter="linear", weight=Schedule(halved, over="epochs")),
    ]
    defaults = {"student": "model", "task_weight": 0.25, "teacher_dtype": "bfloat16", **settings}
    return DistillCallback(Mlp(7, seed=1), terms, **defaults)


class WithHyperparameters(Classifier):
    def __init__(self, lr: float = 0.1, depth: int = 2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()


class PrivateHyperparameters(Classifier):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)


class DataWithHyperparameters(LightningDataModule):
    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(self.hparams.rows)


def logged(folder: str | None) -> dict[str, Any]:
    with open(f"{folder}/hparams.yaml", encoding="utf-8") as file:
        return yaml.safe_load(file)  # plain values only: safe_load refuses objects


def test_the_settings_reach_the_logger(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(callbacks=callback(), logger=logger).fit(Classifier(), loader())
    assert logged(logger.log_dir) == EXPECTED


def test_the_settings_stand_beside_the_hyperparameters_of_module_and_data(trainer, tmp_path):
    logger, module = CSVLogger(tmp_path), WithHyperparameters()
    run = trainer(callbacks=callback(), logger=logger)
    run.fit(module, datamodule=DataWithHyperparameters())
    assert logged(logger.log_dir) == {**EXPECTED, "lr": 0.1, "depth": 2, "rows": 16}
    assert dict(module.hparams) == {"lr": 0.1, "depth": 2}
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"] == {"lr": 0.1, "depth": 2}
    assert WithHyperparameters.load_from_checkpoint(tmp_path / "last.ckpt").hparams.depth == 2


def test_hyperparameters_that_the_module_keeps_from_loggers_stay_private(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(callbacks=callback(), logger=logger).fit(PrivateHyperparameters(), loader())
    assert logged(logger.log_dir) == EXPECTED


def test_tensorboard_shows_both_sets_in_its_table(trainer, tmp_path):
    """It shows the first set that a run logs, and Lightning logs the module's by itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    logger = TensorBoardLogger(tmp_path)
    trainer(callbacks=callback(), logger=logger).fit(WithHyperparameters(), loader())
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    metadata = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    table = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert set(table) == {*EXPECTED, "lr", "depth"}
    assert table["distill/logits/weight"].number_value == 0.5
    assert logged(logger.log_dir) == {**EXPECTED, "lr": 0.1, "depth": 2}


def test_several_loggers_and_callbacks_each_have_their_settings(trainer, tmp_path):
    loggers = [CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")]
    callbacks = [callback(), DistillCallback([Mlp(6), Mlp(7)], name="second")]
    trainer(callbacks=callbacks, logger=loggers).fit(Classifier(), loader())
    for logger in loggers:
        values = logged(logger.log_dir)
        assert {key: values[key] for key in EXPECTED} == EXPECTED
        assert values["second/teacher"] == "tiny.Mlp, tiny.Mlp"
        assert values["second/logits/temperature"] == 4.0


def test_a_resumed_run_logs_the_settings_that_it_trains_with(trainer, tmp_path):
    first = trainer(callbacks=callback(), logger=CSVLogger(tmp_path), max_epochs=1)
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    logger = CSVLogger(tmp_path)
    second = trainer(callbacks=callback(task_weight=0.75), logger=logger, max_epochs=2)
    second.fit(Classifier(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert logged(logger.log_dir) == {**EXPECTED, "distill/task_weight": 0.75}


def test_the_settings_are_logged_in_a_fit_alone_and_not_with_log_false(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(callbacks=callback(), logger=logger).validate(ValidatedClassifier(), loader(), verbose=False)
    assert "distill/teacher" not in logger.experiment.hparams
    trainer(callbacks=callback(log=False), logger=logger).fit(Classifier(), loader())
    assert "distill/teacher" not in logger.experiment.hparams


def test_distill_module_logs_its_settings(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(logger=logger).fit(DistillModule(Mlp(5), Mlp(7), task_weight=0.5), loader(), loader(6))
    assert logged(logger.log_dir)["distill/task_weight"] == 0.5


TWO = """
import sys
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from tiny import Classifier, Mlp, loader
from lightning_distill import DistillCallback

class Recorder(Logger):
    name, version = "recorder", 0
    def log_metrics(self, metrics, step=None): pass
    def log_hyperparams(self, params, *args, **kwargs):
        rank = torch.distributed.get_rank()
        with open(f"{sys.argv[1]}/rank{rank}", "a") as file:
            file.write(f"{params['distill/task_weight']}\\n")

if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_steps=1, logger=Recorder(), enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=DistillCallback(Mlp(7), task_weight=0.25),
    )
    trainer.fit(Classifier(), loader())
"""


@pytest.mark.distributed
def test_of_two_processes_the_first_alone_logs_the_settings(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "USE_LIBUV": "0"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(path.name, path.read_text()) for path in sorted(tmp_path.glob("rank*"))] == [("rank0", "0.25\n")]


# The progress bar -----------------------------------------------------------------------------------------------------


class Bar(ProgressBar):
    """Keeps the numbers that a progress bar would show after each batch and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, float]] = []

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        self.shown.append(dict(trainer.progress_bar_metrics))

    def on_fit_end(self, trainer, pl_module) -> None:
        self.shown.append(dict(trainer.progress_bar_metrics))


def shown(trainer, distilling: DistillCallback | None, module: LightningModule | None = None, **data: Any) -> Bar:
    bar = Bar()
    callbacks = [bar, *([] if distilling is None else [distilling])]
    run = trainer(callbacks=callbacks, enable_progress_bar=True, max_epochs=1, max_steps=-1, log_every_n_steps=50)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of training batches")
        run.fit(ValidatedClassifier() if module is None else module, loader(), **{"val_dataloaders": loader(6), **data})
    return bar


def distill_keys(numbers: dict[str, float]) -> set[str]:
    return {key for key in numbers if key.startswith("distill/")}


def test_the_progress_bar_shows_no_value_of_the_callback_by_default(trainer):
    assert all(distill_keys(numbers) == set() for numbers in shown(trainer, callback()).shown)


def test_the_progress_bar_shows_the_distillation_loss_in_every_step_and_the_agreement_at_the_end(trainer):
    bar = shown(trainer, callback(prog_bar=True))
    assert [distill_keys(numbers) for numbers in bar.shown[:-1]] == [{"distill/distillation_loss"}] * 4
    assert len({numbers["distill/distillation_loss"] for numbers in bar.shown[:-1]}) == 4
    assert distill_keys(bar.shown[-1]) == {"distill/distillation_loss", "distill/val_teacher_agreement"}


@pytest.mark.parametrize("prog_bar", ["logits_temperature", ["body_loss", "val_body_loss", "task_loss"]])
def test_the_progress_bar_shows_the_values_that_are_named(trainer, prog_bar):
    bar = shown(trainer, callback(prog_bar=prog_bar))
    names = [prog_bar] if isinstance(prog_bar, str) else prog_bar
    assert distill_keys(bar.shown[-1]) == {f"distill/{name}" for name in names}


def test_the_progress_bar_shows_every_loader(trainer):
    bar = shown(trainer, callback(prog_bar=True), val_dataloaders=[loader(6), loader(8)])
    suffixes = {f"distill/val_teacher_agreement/dataloader_idx_{index}" for index in range(2)}
    assert distill_keys(bar.shown[-1]) == {"distill/distillation_loss", *suffixes}


def test_distill_module_shows_values_in_the_progress_bar(trainer):
    bar = shown(trainer, None, DistillModule(Mlp(5), Mlp(7), prog_bar=["logits_loss"]))
    assert distill_keys(bar.shown[0]) == {"distill/logits_loss"}


def test_values_in_the_progress_bar_are_logged_as_often_as_the_others(trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=callback(prog_bar=["logits_loss"]), logger=logger, max_steps=4, log_every_n_steps=2)
    run.fit(Classifier(), loader())
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) % 2 == 1]
    assert [bool(row["distill/body_loss"]) for row in rows] == [True] * len(rows)
    assert [bool(row["distill/logits_loss"]) for row in rows] == [True] * len(rows)


def test_a_name_that_is_not_logged_is_refused_when_the_fit_starts(trainer):
    distilling = callback(prog_bar=["logit_loss"])
    with pytest.raises(ValueError, match=r"Expected `prog_bar` to be one of 'loss'.* Closest: 'logits_loss'"):
        trainer(callbacks=distilling).fit(Classifier(), loader())


def test_a_progress_bar_without_logging_is_refused():
    with pytest.raises(ValueError, match=r"Expected `log` to be True where values are shown .* prog_bar=True"):
        callback(log=False, prog_bar=True)
