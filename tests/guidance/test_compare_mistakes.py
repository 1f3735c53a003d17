"""`compare` on LightningModules: mistakes in its arguments and its files, and the command after a kill -9."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compared import TRAINER, LitClassifier, compared, loaders, teacher
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import distill_core.cli.lightning
from distill_core.guidance.records import check_settings
from lightning_distill import DistillModule, FeatureDistillation, LogitsDistillation
from lightning_distill.guidance import run_once

ROOT = Path(__file__).parents[2]
STATE = LitClassifier().state_dict()
TEACHER = teacher()


def with_the_memory_of_a_state() -> LitClassifier:
    module = LitClassifier()
    module.load_state_dict(STATE, assign=True)
    return module


def with_a_part_of_the_teacher() -> LitClassifier:
    module = LitClassifier()
    module.net.head.bias = nn.Parameter(TEACHER.head.bias)  # of the same memory
    return module


class WithTeacher(LitClassifier):
    """A module that keeps the teacher of all runs in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = TEACHER


AGAIN = "Expected `module` to make new weights for each run"
SHARED = "Expected `teacher` to share no parameter with the student, but both train 'head.bias'"

# Refusals ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no length": ({"trainer": {"accelerator": "cpu"}}, ValueError, "Expected `trainer` to say how long a run is"),
    "no end": ({"trainer": {"max_epochs": -1}}, ValueError, "Expected `trainer` to say how long a run is"),
    "a Trainer": ({"trainer": 3}, TypeError, "Expected `trainer` to be a dict"),
    "an unknown argument": ({"trainer": {"max_epoch": 1}}, ValueError, "'max_epoch' is not one. Closest: 'max_epochs'"),
    "a time": (
        {"trainer": {**TRAINER, "max_time": "0:1"}},
        ValueError,
        "without max_time, so that runs have equal",
    ),
    "two devices": ({"trainer": {**TRAINER, "devices": 2}}, ValueError, "to train on one device, but got devices=2"),
    "a mode": ({"mode": "higher"}, ValueError, "Expected `mode` to be"),
    "no workers": ({"workers": 0}, ValueError, "Expected `workers` to be at least 1"),
    "no methods": ({"methods": {}}, ValueError, "at least one method"),
    "a method's argument": ({"methods": {"a": {"terms": [], "wieght": 1}}}, ValueError, "'wieght' is not one"),
    "an argument": ({"task_wieght": 1}, ValueError, "Expected `compare` to hold arguments of DistillCallback"),
    "a method's value": (
        {"methods": {"a": {"task_weight": -1.0}}},
        ValueError,
        r"methods\['a'\]: Expected `task_w",
    ),
    "a method's term": ({"methods": {"a": ["kl"]}}, TypeError, r"methods\['a'\]: Expected"),
    "a network": ({"module": nn.ReLU}, TypeError, "Expected `module` to make a LightningModule, but got a ReLU"),
    "a distilling module": (
        {"module": lambda: DistillModule(nn.Linear(2, 2), nn.Linear(2, 2))},
        ValueError,
        "a module that does not distil by itself",
    ),
    "a network of all runs": (
        {"module": functools.cache(LitClassifier)},
        ValueError,
        AGAIN,
    ),
    "one memory for all runs": ({"module": with_the_memory_of_a_state}, ValueError, AGAIN),
    "a part of the teacher": ({"module": with_a_part_of_the_teacher, "teacher": TEACHER}, ValueError, SHARED),
    "no validation data": (
        {"data": lambda: loaders()[0]},
        TypeError,
        "Expected `data` to be a LightningDataModule",
    ),
    "a layer": ({"methods": {"a": [FeatureDistillation("bodi", "body", "mse")]}}, ValueError, "but got 'bodi'. Known"),
    "checkpoints": ({"trainer": {**TRAINER, "callbacks": ModelCheckpoint()}}, ValueError, "Pass save_weights=True"),
    "a lambda in processes": ({"data": lambda: loaders(), "workers": 2}, ValueError, "Expected `data` to be something"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_words(tmp_path: Path, case: str) -> None:
    changed, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        compared(tmp_path, **changed)


def test_other_settings_in_the_same_folder_are_refused_and_the_same_go_on(tmp_path: Path) -> None:
    compared(tmp_path, seeds=1)
    kept = (tmp_path / "runs.jsonl").read_bytes()
    compared(tmp_path, seeds=1)
    assert (tmp_path / "runs.jsonl").read_bytes() == kept
    for changed in (
        {"trainer": {**TRAINER, "max_epochs": 3}},
        {"methods": {"soft targets": [LogitsDistillation(weight=2.0)]}},
        {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(16, 5))},
        {"module": lambda: LitClassifier(0.5)},
    ):
        with pytest.raises(ValueError, match="to hold runs of the same settings, but got"):
            compared(tmp_path, **changed)


def test_an_error_about_other_settings_shows_where_they_differ_and_is_short(tmp_path: Path) -> None:
    common = {f"setting {number}": f"value {number}" for number in range(100)}
    texts = [str({**common, "lr": lr, "after": list(range(100))}) for lr in (0.25, 0.5)]
    before, settings = ({f"method {number}": text for number in range(40)} for text in texts)

    with pytest.raises(ValueError, match="hold runs of the same settings") as caught:
        check_settings(tmp_path, {**before, "seed": "0"}, {**settings, "seed": "0"})

    words = str(caught.value)
    assert "'lr': 0.25" in words
    assert "'lr': 0.5" in words
    assert "and also method 3, method 4" in words
    assert "seed" not in words
    assert len(words) < 2500


@pytest.mark.parametrize("method", [None, LogitsDistillation()])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        (functools.cache(LitClassifier), AGAIN),
        (with_the_memory_of_a_state, AGAIN),
        (with_a_part_of_the_teacher, SHARED),
    ],
)
def test_one_run_trains_no_weights_of_another_run_or_of_the_teacher(module: Any, words: str, method: Any) -> None:
    before = [value.clone() for value in (*STATE.values(), *TEACHER.state_dict().values())]
    with pytest.raises(ValueError, match=words):
        run_once(module=module, data=loaders, teacher=TEACHER, method=method, metric="val_acc", trainer=TRAINER)
    after = (*STATE.values(), *TEACHER.state_dict().values())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("settings", [{}, {"student": "net"}])
def test_the_module_of_a_run_may_keep_the_teacher_of_all_runs(settings: Any) -> None:
    same = {"data": loaders, "teacher": TEACHER, "method": {"terms": LogitsDistillation(), **settings}}
    runs = [run_once(module=kind, metric="val_acc", trainer=TRAINER, **same) for kind in (WithTeacher, LitClassifier)]
    assert runs[0].metrics == runs[1].metrics


# One run, other processes, the command -------------------------------------------------------------------------------


FILE = {
    "module": {"class_path": "compared.LitClassifier", "init_args": {"dropout": 0.2}},
    "data": {"class_path": "compared.loaders"},
    "teacher": {"class_path": "compared.teacher"},
    "methods": {
        "soft targets": [{"class_path": "lightning_distill.LogitsDistillation"}],
        "DIST": {
            "terms": [
                {
                    "class_path": "lightning_distill.LogitsDistillation",
                    "init_args": {"loss": {"class_path": "lightning_distill.DISTLoss"}},
                }
            ],
            "task_weight": 0.5,
        },
    },
    "metric": "val_acc",
    "seeds": 2,
    "trainer": TRAINER,
    "folder": "results",
}


def command(folder: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    line = [sys.executable, "-W", "ignore", "-m", "lightning_distill", "compare", "compare.yaml", *words]
    environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)


KILLS = """
import os, signal
from distill_core.guidance import records
append = records.ResultsFolder.append
def killed(folder, record):
    append(folder, record)
    if len(folder.runs()) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
records.ResultsFolder.append = killed
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_the_command_goes_on_after_kill_9_also_in_two_processes(tmp_path: Path) -> None:
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(FILE), encoding="utf-8")
    (tmp_path / "sitecustomize").mkdir()
    (tmp_path / "sitecustomize" / "sitecustomize.py").write_text(KILLS, encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path / "sitecustomize", ROOT, ROOT / "tests")))
    stopped = command(tmp_path, environment={"PYTHONPATH": path})
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    first = (tmp_path / "results" / "runs.jsonl").read_bytes()
    assert first.count(b"\n") == 3
    done = command(tmp_path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    file = (tmp_path / "results" / "runs.jsonl").read_bytes()
    assert file.startswith(first)
    assert file.count(b"\n") == 8
    assert "soft targets" in done.stdout
    assert "Not paired" not in done.stdout
    assert done.stdout.endswith("All records: results\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrik": "x"}, "Expected `metrik` to be a known key, but it is not. Closest: 'metric'"),
        ({"module": None}, "Expected `module` to be given"),
        ({"module": {"class_path": "compared.LitClasifier"}}, "has no 'LitClasifier'. Closest: 'LitClassifier'"),
        ({"methods": ["x"]}, "Expected `methods` to be a mapping of names to terms"),
        ({"methods": {"a": [{"class_path": "lightning_distill.LogitsDistilation"}]}}, "methods.a[0]"),
        ({"trainer": {}}, "Expected `trainer` to say how long a run is"),
        ({"folder": 3}, "Expected `folder` to name a folder"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    values = {key: value for key, value in {**FILE, **change}.items() if value is not None}
    monkeypatch.chdir(tmp_path)
    Path("compare.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert distill_core.cli.lightning.main(["compare", "compare.yaml"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert words in error
