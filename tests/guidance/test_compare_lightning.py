"""`compare` on LightningModules: pairing, equal compute, metrics, files, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from compared import TRAINER, DataModule, LitClassifier, loaders, teacher
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import distill_core.cli.lightning
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from lightning_distill import (
    DistillCallback,
    DistillModule,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    TeacherCache,
    compare,
)
from lightning_distill.guidance import run_once

ROOT = Path(__file__).parents[2]
SOFT = {"soft targets": [LogitsDistillation()]}


def compared(folder: Path, **changed: Any) -> Comparison:
    settings: dict[str, Any] = {"module": LitClassifier, "data": loaders, "teacher": teacher(), "methods": SOFT}
    settings |= {"metric": "val_acc", "seeds": 2, "trainer": TRAINER, "folder": folder, "progress": False}
    return compare(**{**settings, **changed})


class Kept:
    """Makes modules, and keeps them with their initial weights."""

    def __init__(self, make: Callable[[], LitClassifier] = LitClassifier) -> None:
        self.make, self.modules = make, list[LitClassifier]()
        self.starts: list[dict[str, torch.Tensor]] = []

    def __call__(self) -> LitClassifier:
        module = self.make()
        self.modules.append(module)
        self.starts.append({name: value.clone() for name, value in module.state_dict().items()})
        return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    methods = {
        **SOFT,
        "with features": {
            "terms": [LogitsDistillation(DISTLoss()), FeatureDistillation("body", "body", "mse")],
            "task_weight": 0.5,
        },
    }
    return compared(tmp_path_factory.mktemp("whole"), methods=methods, classes=list("abcde"), save_weights=True)


# The ten lines -------------------------------------------------------------------------------------------------------


def test_every_method_and_the_student_alone_twice_run_with_every_seed(whole: Comparison) -> None:
    expected = {(m, s) for m in (ALONE, EQUAL_COMPUTE, "soft targets", "with features") for s in (0, 1)}
    assert {(run.method, run.seed) for run in whole.runs} == expected
    assert all(run.error is None and 0 <= run.metrics["val_acc"] <= 1 for run in whole.runs)
    assert whole.verdict.startswith("soft targets")
    assert "Not paired" not in whole.verdict
    assert "random" not in whole.verdict


def test_the_folder_describes_the_machine_the_costs_and_the_teacher(whole: Comparison) -> None:
    content = json.loads((whole.folder / "comparison.json").read_text(encoding="utf-8"))
    assert (content["kind"], content["classes"], content["machine"]["device"]) == ("lightning", list("abcde"), "cpu")
    assert content["versions"]["torch"] == torch.__version__
    student, its_teacher = content["student"]["cost"], content["teacher"]
    assert student["parameters"] == sum(weight.numel() for weight in LitClassifier().net.parameters())
    # 3x3 convolutions of 1 to 2 maps of 16 places and of 2 to 4 maps of 4 places, and a head of 4 to 5
    assert student["multiply_adds"] == 9 * 2 * 16 + 9 * 2 * 4 * 4 + 4 * 5
    assert student["bytes"] > 4 * student["parameters"]
    assert student["latency_seconds"] > 0
    assert its_teacher["metrics"] == {"val_acc": 1.0}  # the labels are its own answers
    assert its_teacher["cost"]["parameters"] > student["parameters"]


def test_predictions_of_all_models_are_on_the_validation_set_in_its_order(whole: Comparison) -> None:
    images, labels = loaders()[1].dataset.tensors  # type: ignore[attr-defined]
    with np.load(whole.folder / "predictions" / "teacher.npz") as arrays:
        np.testing.assert_allclose(arrays["logits"], teacher().eval()(images).detach(), rtol=1e-5)
        assert arrays["labels"].tolist() == labels.tolist()
    run = next(run for run in whole.runs if run.method == "with features" and run.seed == 1)
    bare = LitClassifier()
    bare.load_state_dict(torch.load(whole.folder / str(run.weights), weights_only=True))
    with np.load(whole.folder / str(run.predictions)) as arrays, torch.no_grad():
        np.testing.assert_allclose(arrays["logits"], bare.eval().net(images), rtol=1e-4, atol=1e-5)
        accuracy = float((arrays["logits"].argmax(1) == arrays["labels"]).mean())
    assert accuracy == pytest.approx(run.metrics["val_acc"])


def test_the_curve_has_a_point_for_each_validation(whole: Comparison) -> None:
    run = next(run for run in whole.runs if run.method == "soft targets")
    assert [(point["epoch"], point["step"]) for point in run.curve] == [(0, 5), (1, 10)]
    assert all({"val_acc", "distill/loss"} <= point.keys() for point in run.curve)
    assert (run.steps, run.epochs) == (10, 2)
    assert 0 < run.step_seconds < run.seconds


# Pairing -------------------------------------------------------------------------------------------------------------


def test_equal_seeds_have_equal_weights_and_batches_and_other_seeds_have_others(tmp_path: Path) -> None:
    kept = Kept()
    compared(tmp_path, module=kept, methods=SOFT)
    made = list(zip(kept.starts, kept.modules, strict=True))
    trained = [(start, torch.cat(module.seen)) for start, module in made if module.seen]
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    by_run = {(line["method"], line["seed"]): pair for line, pair in zip(lines, trained, strict=True)}
    for seed in (0, 1):
        start, seen = by_run[ALONE, seed]
        for method in (EQUAL_COMPUTE, "soft targets"):
            other_start, other_seen = by_run[method, seed]
            assert all(torch.equal(start[name], other_start[name]) for name in start)
            assert torch.equal(seen, other_seen[: len(seen)])
    assert not torch.equal(by_run[ALONE, 0][1], by_run[ALONE, 1][1])
    assert not torch.equal(by_run[ALONE, 0][0]["net.head.weight"], by_run[ALONE, 1][0]["net.head.weight"])


def test_a_method_without_effect_gives_the_student_alone_exactly(tmp_path: Path) -> None:
    comparison = compared(tmp_path, methods={"nothing": [LogitsDistillation(weight=0.0)]}, save_weights=True, seeds=1)
    for seed in (0,):
        alone, nothing = (
            torch.load(comparison.folder / f"weights/{name}-{seed}.pt", weights_only=True)
            for name in ("student-alone", "nothing")
        )
        assert all(torch.equal(alone[name], nothing[name]) for name in alone)


def test_random_numbers_that_a_method_draws_do_not_change_the_next_epochs_order(tmp_path: Path) -> None:
    def noisy(inputs: Any) -> Any:
        torch.rand(7)
        return inputs

    comparison = compared(tmp_path, methods={"noisy": {"teacher_inputs": noisy}}, trainer={**TRAINER, "max_epochs": 3})
    assert "Not paired" not in comparison.verdict
    alone, other = (next(run for run in comparison.runs if run.method == name) for name in (ALONE, "noisy"))
    assert alone.batches == other.batches
    assert len(set(alone.batches)) == 3


def test_loaders_that_are_shared_by_all_runs_shuffle_by_the_seed(tmp_path: Path) -> None:
    train, val = loaders()
    own = DataLoader(train.dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    comparison = compared(tmp_path, data=(own, val))
    assert "Not paired" not in comparison.verdict
    assert len({run.batches[0] for run in comparison.runs}) == 2


def test_data_that_differ_between_the_runs_are_noticed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def data() -> Any:
        train, val = loaders()
        return DataLoader(train.dataset, 8, shuffle=True, generator=generator), val

    assert "Not paired: with the same seed" in compared(tmp_path, data=data).verdict


def test_weights_that_do_not_come_from_the_global_generators_are_noticed(tmp_path: Path) -> None:
    count = iter(range(1000))

    def make() -> LitClassifier:
        module = LitClassifier()
        nn.init.constant_(module.net.head.bias, float(next(count)))
        return module

    assert "had other initial weights than the student alone" in compared(tmp_path, module=make).verdict


def test_an_adapter_module_and_callbacks_are_not_carried_from_run_to_run(tmp_path: Path) -> None:
    adapter = nn.Conv2d(4, 8, 1)
    before = adapter.weight.detach().clone()
    stop = EarlyStopping("val_acc", mode="max", patience=1)
    method = {"features": [FeatureDistillation("body", "body", "mse", adapter=adapter)]}
    compared(tmp_path, methods=method, trainer={**TRAINER, "callbacks": stop}, seeds=1)
    assert torch.equal(adapter.weight, before)
    assert stop.best_score.isinf()


def test_the_generators_and_the_teacher_are_left_as_they_were(tmp_path: Path) -> None:
    its_teacher, state, threads = teacher().train(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    weights = {name: value.clone() for name, value in its_teacher.state_dict().items()}
    compared(tmp_path, teacher=its_teacher, seeds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == threads
    assert its_teacher.training
    assert all(weight.requires_grad for weight in its_teacher.parameters())
    assert all(torch.equal(weights[name], value) for name, value in its_teacher.state_dict().items())


# Equal compute -------------------------------------------------------------------------------------------------------


def test_an_expensive_teacher_gives_the_student_alone_more_steps(tmp_path: Path) -> None:
    import time

    class SlowTeacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.03)
            return self.net(images)

    comparison = compared(tmp_path, teacher=SlowTeacher(), seeds=1)
    equal = comparison.equal_compute
    assert equal is not None
    assert equal.ratio > 1.5
    longer = next(run for run in comparison.runs if run.method == EQUAL_COMPUTE)
    assert longer.steps == equal.steps == round(10 * equal.ratio)


def test_a_cached_teacher_trains_like_the_live_one(tmp_path: Path) -> None:
    plain, val = loaders()
    cache = TeacherCache.build(teacher(), plain.dataset, tmp_path / "cache", progress=False)
    methods = {**SOFT, "cached": {"teacher": cache, "terms": [LogitsDistillation()]}}
    comparison = compared(
        tmp_path / "results", methods=methods, data=lambda: (DataLoader(plain.dataset, 8, shuffle=True), val)
    )
    assert "Not paired" not in comparison.verdict
    assert comparison.values("cached") == pytest.approx(comparison.values("soft targets"))


# Metrics, data and failures ------------------------------------------------------------------------------------------


def test_a_metric_that_is_not_there_is_an_error_at_the_first_run_that_lists_the_others(tmp_path: Path) -> None:
    kept = Kept()
    with pytest.raises(ValueError, match=r"one of 'val_acc', but got metric='val_accuracy'\. Log it in"):
        compared(tmp_path, module=kept, metric="val_accuracy")
    assert sum(bool(module.seen) for module in kept.modules) == 1


def test_a_data_module_may_be_an_object_or_a_class_and_its_test_is_a_metric_too(tmp_path: Path) -> None:
    as_class = compared(tmp_path / "class", data=DataModule, metric="test_acc", seeds=1)
    as_object = compared(tmp_path / "object", data=DataModule(), metric="test_acc", seeds=1)
    assert as_class.values(ALONE) == as_object.values(ALONE)
    assert {"val_acc", "test_acc"} <= as_class.runs[0].metrics.keys()


def test_a_function_of_the_seed_gets_the_seed_of_the_run(tmp_path: Path) -> None:
    seeds = []

    def data(seed: int) -> Any:
        seeds.append(seed)
        return loaders()

    compared(tmp_path, data=data, seeds=[4, 7])
    assert set(seeds) == {0, 4, 7}  # 0 for the description of the folder


def test_a_run_that_breaks_in_the_middle_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    class Breaks(LitClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            distils = any(isinstance(callback, DistillCallback) for callback in self.trainer.callbacks)
            if distils and len(self.seen) == 3 and next(breaks):
                raise RuntimeError("the cable is out")
            return super().training_step(batch, batch_idx)

    breaks = iter([False, True, False])  # with the second seed
    verdict = (comparison := compared(tmp_path, module=Breaks, seeds=3)).verdict
    assert "soft targets failed with seed 1 (RuntimeError: the cable is out): its pairs are left out" in verdict
    assert comparison.difference("soft targets").count == 2  # type: ignore[union-attr]


def test_a_training_that_diverges_is_a_failed_run(tmp_path: Path) -> None:
    class Diverges(LitClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(float("nan")))

    comparison = compared(tmp_path, module=Diverges, metric="val_loss", mode="min", seeds=1)
    assert "student alone failed with seed 0 (val_loss is nan)" in comparison.verdict


def test_a_random_evaluation_is_noticed(tmp_path: Path) -> None:
    class Random(LitClassifier):
        def accuracy(self, batch: Any) -> Any:
            return torch.rand(())

    assert "The evaluation is random" in compared(tmp_path, module=Random, seeds=1).verdict


# Refusals ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no length": ({"trainer": {"accelerator": "cpu"}}, ValueError, "Expected `trainer` to say how long a run is"),
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


def test_other_settings_in_the_same_folder_are_refused_and_the_same_go_on(whole: Comparison, tmp_path: Path) -> None:
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


# One run, other processes, the command -------------------------------------------------------------------------------


def test_one_run_alone_is_that_of_the_comparison_and_writes_nothing(
    whole: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = run_once(
        module=LitClassifier, data=loaders, teacher=teacher(), method=[LogitsDistillation()], metric="val_acc", seed=1,
        trainer=TRAINER,
    )  # fmt: skip
    of_comparison = next(run for run in whole.runs if (run.method, run.seed) == ("soft targets", 1))
    assert record.metrics == of_comparison.metrics
    assert (record.student, record.batches) == (of_comparison.student, of_comparison.batches)
    assert list(tmp_path.iterdir()) == []
    alone = run_once(module=LitClassifier, data=loaders, metric="val_acc", trainer=TRAINER)
    assert alone.metrics["val_acc"] == whole.values(ALONE)[0]


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
