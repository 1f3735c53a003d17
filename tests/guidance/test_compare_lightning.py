"""`compare` on LightningModules: pairing, equal compute, metrics, files, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compared import SOFT, TRAINER, DataModule, LitClassifier, compared, loaders, teacher
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, random_split

from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from lightning_distill import (
    Balanced,
    DistillCallback,
    DISTLoss,
    FeatureDistillation,
    LogitsDistillation,
    TeacherCache,
)
from lightning_distill.guidance import run_once


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


@pytest.mark.slow
def test_balanced_weights_are_measured_in_each_run_also_in_several_processes(tmp_path: Path) -> None:
    terms = [LogitsDistillation(weight="balanced"), FeatureDistillation("body", "body", weight=Balanced(0.5, steps=3))]
    settings: dict[str, Any] = {"methods": {"balanced": terms}, "save_weights": True}
    single, several = (compared(tmp_path / str(count), workers=count, **settings) for count in (1, 2))
    weights: list[float] = []
    for first, second in zip(*(_runs(each, "balanced") for each in (single, several)), strict=True):
        expected, got = (
            torch.load(result.folder / run.weights) for result, run in ((single, first), (several, second))
        )
        assert all(torch.equal(value, got[name]) for name, value in expected.items())
        weights.append(first.metrics["distill/body_weight"])
        assert second.metrics["distill/body_weight"] == weights[-1]
    assert weights[0] != weights[1]


def _runs(result: Comparison, method: str) -> list[Any]:
    return sorted((run for run in result.runs if run.method == method), key=lambda run: run.seed)


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


def test_a_schedule_by_epochs_stretches_with_the_steps(tmp_path: Path) -> None:
    class Scheduled(LitClassifier):
        def configure_optimizers(self) -> Any:
            self.epochs = self.trainer.max_epochs
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]

    kept = Kept(Scheduled)
    comparison = compared(tmp_path, module=kept, seeds=1)
    equal = comparison.equal_compute
    assert equal is not None
    trained = [module.epochs for module in kept.modules if module.seen]
    assert trained == [2, 2, math.ceil(2 * equal.ratio)]
    assert [run.steps for run in comparison.runs if run.method == EQUAL_COMPUTE] == [equal.steps]


def test_lazy_layers_are_compared_like_others(tmp_path: Path) -> None:
    def lazy() -> LitClassifier:
        module = LitClassifier()
        module.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
        return module

    comparison = compared(tmp_path, module=lazy, seeds=1)
    assert all(run.error is None for run in comparison.runs)


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


@pytest.mark.parametrize("stages", [("fit",), ("fit", "validate")])
@pytest.mark.parametrize("make", [lambda kind: kind, lambda kind: kind()])
def test_a_data_module_that_splits_its_data_has_one_split_for_each_seed(
    tmp_path: Path, stages: tuple[str, ...], make: Callable[[Any], Any]
) -> None:
    splits = []

    class Splits(DataModule):
        def setup(self, stage: str) -> None:
            if stage in stages:
                self.parts = random_split(loaders()[0].dataset, [24, 16])
                splits.append(self.parts[1].indices)

        def train_dataloader(self) -> Any:
            return DataLoader(self.parts[0], 8, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.parts[1], 8)

    data = make(Splits)
    comparison = compared(tmp_path, data=data)
    assert all(run.error is None for run in comparison.runs)
    assert "Not paired" not in comparison.verdict
    assert len({tuple(split) for split in splits}) == 2
    assert "setup" not in vars(data) or isinstance(data, type)


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
