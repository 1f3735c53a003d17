"""``lightning-distill fit``: the final numbers, errors of one line, tracebacks of bugs alone, and its help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from plain_trainer import PLAIN

from distill_core.cli import TRACEBACK_HINT
from distill_core.cli.lightning import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:No seed found"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
Capture = pytest.CaptureFixture[str]
Fit = Callable[..., tuple[int, list[str], list[str]]]
LOGITS = "lightning_distill.LogitsDistillation"
MODULE = """
from tiny import Data, Mlp
from lightning.pytorch import LightningDataModule
from lightning_distill import DistillModule

class Buggy(DistillModule):
    def training_step(self, batch, batch_idx):
        return {}["loss"]

class WrongValue(DistillModule):
    def training_step(self, batch, batch_idx):
        raise ValueError("a bug of the user's")

class Unprepared(LightningDataModule):
    def train_dataloader(self):
        open("no-such-images.npy")

class Networks:
    @classmethod
    def pretrained(cls, *inputs, **settings) -> Mlp:  # in the manner of transformers
        return Mlp(settings["width"])

def untyped(width=7):
    return Mlp(width)

def picky(width: int) -> Mlp:
    if width > 9:
        raise ValueError("width must be at most 9")
    return Mlp(width)
"""


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Fit:
    """Run ``fit`` on a file with changes; returns the exit code, the lines printed and our lines of errors."""
    monkeypatch.setattr(sys, "argv", ["lightning-distill"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fit_project", None)
    del sys.modules["fit_project"]
    (tmp_path / "fit_project.py").write_text(MODULE)

    def run(*options: str, trainer: Any = None, **changes: Any) -> tuple[int, list[str], list[str]]:
        network = {"class_path": "tiny.Mlp", "init_args": {"width": 5}}
        init_args = {"student": network, "teacher": network, **changes.pop("init_args", {})}
        values = {
            "model": {"class_path": changes.pop("model", "lightning_distill.DistillModule"), "init_args": init_args},
            "data": {"class_path": "tiny.Data"},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", **PLAIN, **(trainer or {})},
            **changes,
        }
        (tmp_path / "fit.yaml").write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value is not None})
        )
        code = main(["fit", "--config", "fit.yaml", *options])
        out, error = capsys.readouterr()
        return code, out.splitlines(), [line for line in error.splitlines() if line.startswith("lightning-distill")]

    return run


def test_fit_prints_the_final_numbers_and_the_checkpoint_without_a_progress_bar(fit: Fit) -> None:
    code, out, errors = fit(trainer={"enable_checkpointing": True, "max_epochs": 2})
    assert (code, errors) == (0, [])
    rows = dict(line.split(maxsplit=1) for line in out)
    assert (rows["epochs"], rows["steps"]) == ("2", "8")
    assert {"distill/val_teacher_agreement", "distill/loss", "train_loss", "val_loss"} <= rows.keys()
    total = float(rows["distill/task_loss"]) + float(rows["distill/distillation_loss"])
    assert float(rows["distill/loss"]) == pytest.approx(total, rel=1e-4)
    assert Path(rows["checkpoint"]).is_file()
    assert len({line.index(line.split(maxsplit=1)[1], len(line.split()[0])) for line in out}) == 1  # one column


def test_only_the_first_process_prints_the_final_numbers(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    assert fit() == (0, [], [])


def term(**init_args: Any) -> dict[str, Any]:
    return {"terms": [{"class_path": LOGITS, "init_args": init_args}]}


def loss(name: str = "SoftTargetLoss", **init_args: Any) -> dict[str, Any]:
    return term(loss={"class_path": f"lightning_distill.{name}", "init_args": init_args})


TERM = "fit.yaml: model.init_args.terms[0]"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": None}, "Expected fit.yaml to say where the data come from, but got no `data`. Add `data:"),
    "a layer that does not exist": (
        {"init_args": {"terms": [{"class_path": "lightning_distill.FeatureDistillation",
                                  "init_args": {"student_layer": "bdy", "teacher_layer": "body"}}]}},
        "Expected `terms[0].student_layer` to name a module of the student, but got 'bdy'. Closest: 'body'.",
    ),
    "a wrong key of a loss": (
        {"init_args": loss(temprature=2.0)},
        f"{TERM}.init_args.loss.init_args: Expected arguments of SoftTargetLoss, but got `temprature`. Closest: 'temp",
    ),
    "a wrong key beside a method that takes anything": (
        {"init_args": {"teacher": {"class_path": "fit_project.Networks.pretrained", "init_args": {"width": 5}},
                       **loss(temprature=2.0)}},
        f"{TERM}.init_args.loss.init_args: Expected arguments of SoftTargetLoss, but got `temprature`. Closest: 'temp",
    ),
    "a method that does not exist": (
        {"init_args": {"teacher": {"class_path": "fit_project.Networks.pretraned"}}},
        "fit.yaml: model.init_args.teacher.class_path: Expected a class or a function, but 'fit_project.Networks.pret",
    ),
    "a wrong type of a loss's setting": (
        {"init_args": loss(temperature="hot")},
        f"{TERM}.init_args.loss.init_args.temperature: Expected float | Schedule | CurriculumTemperature, but got"
        " 'hot'.",
    ),
    "a number that a loss refuses": (
        {"init_args": loss(temperature=-2.0)},
        "Expected `temperature` to be greater than 0, but got temperature=-2.0.",
    ),
    "an unknown class": (
        {"init_args": loss("SoftTargetLos")},
        f"{TERM}.init_args.loss.class_path: Expected a class or a function, but 'lightning_distill.SoftTargetLos'",
    ),
    "a loss that is not one": (
        {"init_args": term(loss={"class_path": "torch.nn.ReLU"})},
        f"{TERM}.init_args.loss: Expected DistillationLoss | LossCallable | None, but got {{'class_path': 'torch.nn.R",
    ),
    "a wrong key of the module": (
        {"init_args": {"studnt": 3}},
        "fit.yaml: model.init_args: Expected arguments of DistillModule, but got `studnt`. Closest: 'student'.",
    ),
    "a wrong key of the trainer": (
        {"trainer": {"max_epoch": 3}},
        "fit.yaml: trainer: Expected arguments of Trainer, but got `max_epoch`. Closest: 'max_epochs'",
    ),
    "a wrong section": ({"trainers": {"max_epochs": 1}}, "fit.yaml: trainers: Expected a section of the file"),
    "a cache that does not exist": (
        {"init_args": {"teacher": {"class_path": "lightning_distill.TeacherCache.open",
                                   "init_args": {"path": "nowhere"}}}},
        "Expected a cache's manifest.json in nowhere, but the folder has none.",
    ),
    "a function without a return type": (
        {"init_args": {"teacher": {"class_path": "fit_project.untyped"}}},
        "fit.yaml: model.init_args.teacher: Expected Teacher, but got {'class_path': 'fit_project.untyped'}. Write in"
        " Python what untyped returns: `def untyped(...) -> torch.nn.Module`.",
    ),
    "a missing argument": (
        {"model": "lightning_distill.DistillModule", "init_args": {"student": {"class_path": "tiny.Mlp"}}},
        "fit.yaml: model.init_args.student.init_args: Expected `width`, which Mlp requires, but it is missing.",
    ),
    "a setting that Lightning refuses": ({"trainer": {"accelerator": "abacus"}}, "abacus"),
    "a network that refuses its arguments": (
        {"init_args": {"student": {"class_path": "fit_project.picky", "init_args": {"width": 10}}}},
        "width must be at most 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_in_the_file_is_one_line(fit: Fit, case: str) -> None:
    changes, words = WRONG[case]
    code, out, errors = fit(**changes)
    assert (code, len(errors)) == (2, 1), errors
    assert words in errors[0]
    assert len(errors[0]) < 500
    assert not [line for line in out if line.startswith("epochs")]


def test_a_wrong_option_is_one_line_of_a_readable_length(fit: Fit) -> None:
    code, _, errors = fit("--model.init_args.student=3")
    assert (code, len(errors)) == (2, 1)
    assert len(errors[0]) < 450
    assert errors[0].endswith("See `lightning-distill fit --help`.")


def test_a_file_that_the_data_need_and_that_is_missing_exits_1(fit: Fit) -> None:
    code, _, errors = fit(data={"class_path": "fit_project.Unprepared"})
    message = f"no-such-images.npy: No such file or directory {TRACEBACK_HINT}"
    assert (code, errors) == (1, [f"lightning-distill fit: {message}"])


@pytest.mark.parametrize(("model", "error"), [("Buggy", KeyError), ("WrongValue", ValueError)])
def test_a_bug_keeps_its_traceback(fit: Fit, model: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"loss|a bug of the user's"):
        fit(model=f"fit_project.{model}")


def test_a_bug_of_this_project_would_keep_its_traceback(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that a check raises on purpose are one line."""
    from lightning_distill import compat

    monkeypatch.setattr(compat, "is_log_step", None)  # run.py calls it
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fit()


def test_help_is_one_page_with_an_example_that_can_be_parsed(capsys: Capture) -> None:
    assert main(["fit", "--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 80
    assert page.index("--config") < page.index("example:") < page.index("LogitsDistillation")
    text = page.split("where distill.yaml holds:\n")[1].split("  `model` may be")[0]
    example = yaml.safe_load(text)
    assert example["model"]["class_path"] == "lightning_distill.DistillModule"
    assert example["trainer"] == {"max_epochs": 10}


def test_help_all_shows_lightnings_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-distill"])
    assert main(["fit", "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in page
    assert len(page.splitlines()) > 300
