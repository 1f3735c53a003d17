"""The runs of a comparison, its folder, its table and its verdict, without a framework."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_comparison import Fake, missing_metric, plan

from distill_core.guidance.comparison import Comparison, EqualCompute
from distill_core.guidance.driver import MissingMetricError, Task, carry_out, checked_seeds
from distill_core.guidance.records import (
    ALONE,
    EQUAL_COMPUTE,
    ResultsFolder,
    check_names,
    described,
    file_name,
    write_predictions,
    write_samples,
)
from distill_core.guidance.run_records import RunRecord
from distill_core.locks import locked
from distill_core.store import CacheError

ROOT = Path(__file__).parents[2]


def made_up(values: dict[str, dict[int, float]], mode: str = "max", **further: Any) -> Comparison:
    """A comparison with these metrics by method and seed."""
    runs = [
        RunRecord(method, seed, {"acc": value}, seconds=1.5, steps=10)
        for method, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    methods = [method for method in values if method not in (ALONE, EQUAL_COMPUTE)]
    seeds = tuple(values[ALONE])
    return Comparison(Path("folder"), "acc", mode, seeds, tuple(methods), tuple(runs), **further)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


# The runs ------------------------------------------------------------------------------------------------------------


def test_the_student_alone_runs_at_equal_steps_and_at_the_compute_of_the_most_expensive_method(tmp_path: Path) -> None:
    fake = Fake()
    comparison = carry_out(plan(tmp_path), fake)
    assert {(task.method, task.seed) for task in fake.done} == {
        (method, seed) for method in (ALONE, EQUAL_COMPUTE, "a", "b") for seed in range(3)
    }
    assert comparison.equal_compute is not None
    assert (comparison.equal_compute.ratio, comparison.equal_compute.method) == (pytest.approx(2.0), "b")
    assert {task.steps for task in fake.done if task.method == EQUAL_COMPUTE} == {200}
    assert {task.steps for task in fake.done if task.method != EQUAL_COMPUTE} == {None}


def test_distillation_that_costs_nothing_leaves_the_student_alone_as_many_steps(tmp_path: Path) -> None:
    comparison = carry_out(plan(tmp_path), Fake(costs={"a": 0.9, "b": 0.8}))
    assert comparison.equal_compute is not None
    assert (comparison.equal_compute.ratio, comparison.equal_compute.steps) == (1.0, 100)


def test_only_runs_of_the_first_seed_are_evaluated_twice(tmp_path: Path) -> None:
    fake = Fake()
    carry_out(plan(tmp_path), fake)
    assert {task.seed for task in fake.done if task.examined} == {0}


def test_the_folder_has_the_format_that_reports_read(tmp_path: Path) -> None:
    carry_out(plan(tmp_path, facts=lambda: {"kind": "lightning", "classes": None}), Fake())
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["methods"] == [ALONE, EQUAL_COMPUTE, "a", "b"]
    assert (content["metric"], content["mode"], content["seeds"]) == ("acc", "max", [0, 1, 2])
    assert content["kind"] == "lightning"
    assert len(content["fingerprint"]) == 32
    assert content["settings"]["trainer"] == "ten epochs"
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {"method", "seed", "metrics", "seconds", "steps", "epochs", "step_seconds", "curve", "error", "predictions"}
    assert len(lines) == 12
    assert all(keys | {"warnings"} <= line.keys() for line in lines)


def test_the_same_call_again_makes_no_run_and_finds_the_same(tmp_path: Path) -> None:
    first, fake = carry_out(plan(tmp_path), Fake()), Fake()
    second = carry_out(plan(tmp_path), fake)
    assert fake.done == []
    assert str(second) == str(first) == str(Comparison.read(tmp_path))


def test_more_seeds_go_on_with_the_runs_of_the_folder(tmp_path: Path) -> None:
    carry_out(plan(tmp_path), Fake())
    fake = Fake()
    comparison = carry_out(plan(tmp_path, seeds=[0, 1, 2, 3]), fake)
    assert {(task.method, task.seed) for task in fake.done} == {(m, 3) for m in (ALONE, EQUAL_COMPUTE, "a", "b")}
    assert len(comparison.runs) == 16


def test_other_settings_are_refused_in_words(tmp_path: Path) -> None:
    carry_out(plan(tmp_path), Fake())
    with pytest.raises(ValueError, match="same settings, but got trainer: ten epochs there, two epochs in this call"):
        carry_out(plan(tmp_path, settings={"trainer": "two epochs"}), Fake())
    with pytest.raises(ValueError, match=r"methods: \['a', 'b'\] there, \['a'\] in this call"):
        carry_out(plan(tmp_path, methods=["a"]), Fake())


def test_without_resuming_other_settings_start_again(tmp_path: Path) -> None:
    carry_out(plan(tmp_path), Fake())
    fake = Fake()
    carry_out(plan(tmp_path, settings={"trainer": "two epochs"}, resume=False), fake)
    assert len(fake.done) == 12


def test_a_folder_without_a_finished_run_takes_other_settings(tmp_path: Path) -> None:
    with pytest.raises(MissingMetricError):
        carry_out(plan(tmp_path), missing_metric)
    carry_out(plan(tmp_path, settings={"trainer": "two epochs"}), Fake())


def test_two_comparisons_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CacheError, match="another process is comparing there"):
        carry_out(plan(tmp_path), Fake())


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(ValueError, match="to be a comparison of format 1, but got"):
        carry_out(plan(tmp_path), Fake())
    (tmp_path / "comparison.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"comparison.json to hold JSON, but got .*Pass another folder"):
        carry_out(plan(tmp_path), Fake())
    with pytest.raises(ValueError, match="Expected `folder` to hold a comparison"):
        Comparison.read(tmp_path / "nothing")


# Stops and failures --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_comparison_that_was_killed_goes_on_without_repeating_a_finished_run(tmp_path: Path, at: int) -> None:
    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tests" / "fake_comparison.py"), str(tmp_path), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)

    assert run(at).returncode == -signal.SIGKILL
    file = tmp_path / "runs.jsonl"
    if file.exists():  # as if it had been killed while it wrote a line
        file.write_bytes(file.read_bytes() + b'{"method": "a", "se')
    again = run(0)
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    carry_out(plan(whole), Fake())
    assert len(json.loads(again.stdout)) == 12 - (at - 1)
    assert file.read_bytes() == (whole / "runs.jsonl").read_bytes()
    assert str(Comparison.read(tmp_path)) == str(Comparison.read(whole))


def test_a_wrong_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    carry_out(plan(tmp_path), Fake())
    file = tmp_path / "runs.jsonl"
    file.write_text("nonsense\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs.jsonl to hold records of runs, but got .* in line 1"):
        carry_out(plan(tmp_path), Fake())


def test_a_run_that_failed_is_named_and_its_pair_left_out(tmp_path: Path) -> None:
    comparison = carry_out(plan(tmp_path), Fake(errors={("a", 1): "RuntimeError: out of memory"}))
    assert "a failed with seed 1 (RuntimeError: out of memory): its pairs are left out." in comparison.verdict
    assert comparison.difference("a").count == 2  # type: ignore[union-attr]
    assert comparison.difference("b").count == 3  # type: ignore[union-attr]
    assert "(2 seeds)" in comparison.verdict


def test_an_exception_of_a_later_seed_is_a_failed_run_and_the_others_go_on(tmp_path: Path) -> None:
    comparison = carry_out(plan(tmp_path), Fake(errors={(ALONE, 2): RuntimeError("no memory")}))
    assert "student alone failed with seed 2 (RuntimeError: no memory)" in comparison.verdict
    assert comparison.difference("a").count == 2  # type: ignore[union-attr]


def test_an_exception_of_the_first_seed_is_raised_and_earlier_runs_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="layer9"):
        carry_out(plan(tmp_path), Fake(errors={("b", 0): KeyError("layer9")}))
    fake = Fake()
    carry_out(plan(tmp_path), fake)
    assert (ALONE, 0) not in {(task.method, task.seed) for task in fake.done}


def test_a_failed_run_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    carry_out(plan(tmp_path), Fake(errors={("a", 1): "RuntimeError: no memory"}))
    fake = Fake()
    comparison = carry_out(plan(tmp_path), fake)
    assert [(task.method, task.seed) for task in fake.done] == [("a", 1)]
    assert "failed" not in comparison.verdict


def test_the_compute_is_measured_with_the_next_seed_if_every_method_failed_with_the_first(tmp_path: Path) -> None:
    fake = Fake(errors={("a", 0): "X: y", ("b", 0): "X: y"})
    comparison = carry_out(plan(tmp_path), fake)
    assert comparison.equal_compute is not None
    assert comparison.equal_compute.seed == 1
    assert len(comparison.values(EQUAL_COMPUTE)) == 3


def test_without_any_finished_method_nothing_is_compared_and_said_so(tmp_path: Path) -> None:
    errors = {(method, seed): "X: y" for method in "ab" for seed in range(3)}
    comparison = carry_out(plan(tmp_path), Fake(errors=errors))
    assert "a: not compared, since no seed has a run of it and one of the student alone." in comparison.verdict
    assert comparison.equal_compute is None


def test_runs_in_other_processes_are_those_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    several = carry_out(plan(tmp_path / "several", workers=2), Fake())
    single = carry_out(plan(tmp_path / "single"), Fake())
    assert str(several) == str(single)
    assert several.runs == single.runs


# The verdict ---------------------------------------------------------------------------------------------------------


def test_a_better_method_is_called_better_by_points_with_its_interval() -> None:
    comparison = made_up({ALONE: by_seed(0.5, 0.6, 0.7), "a": by_seed(0.61, 0.71, 0.82)})
    # differences 0.11, 0.11, 0.12: mean 11.33, margin 4.3027 * 0.5774 / sqrt(3) = 1.43
    assert comparison.verdict == "a is better than the student alone by 11.3 ± 1.4 points of acc (3 seeds)."


def test_a_worse_method_is_called_worse() -> None:
    comparison = made_up({ALONE: by_seed(0.61, 0.71, 0.82), "a": by_seed(0.5, 0.6, 0.7)})
    assert comparison.verdict == "a is worse than the student alone by 11.3 ± 1.4 points of acc (3 seeds)."


def test_of_a_loss_less_is_better_and_is_not_written_in_points() -> None:
    comparison = made_up({ALONE: by_seed(0.61, 0.71, 0.82), "a": by_seed(0.5, 0.6, 0.7)}, mode="min")
    assert comparison.verdict == "a is better than the student alone by 0.113 ± 0.014 acc (3 seeds)."
    worse = made_up({ALONE: by_seed(2.0, 3.0, 4.0), "a": by_seed(12.0, 13.0, 15.0)}, mode="min")
    assert worse.verdict == "a is worse than the student alone by 10.3 ± 1.4 acc (3 seeds)."


def test_an_interval_with_0_has_no_clear_difference() -> None:
    comparison = made_up({ALONE: by_seed(0.5, 0.6, 0.7), "a": by_seed(0.55, 0.58, 0.72)})
    assert comparison.verdict.startswith("a: no clear difference to the student alone, +1.7 ± ")


def test_the_second_half_of_the_verdict_compares_at_equal_compute() -> None:
    equal = {"ratio": 1.5, "method": "a", "seed": 0, "steps": 15}
    values = {ALONE: by_seed(0.5, 0.6, 0.7), EQUAL_COMPUTE: by_seed(0.7, 0.8, 0.91), "a": by_seed(0.61, 0.71, 0.82)}
    comparison = made_up(values, equal_compute=EqualCompute(**equal))
    expected = " Against the student alone at equal compute (1.50 times the steps) it is worse by 9.0 ± 0.0."
    assert comparison.verdict.endswith(expected)
    unclear = made_up({**values, EQUAL_COMPUTE: by_seed(0.5, 0.8, 0.9)}, equal_compute=EqualCompute(**equal))
    assert "(1.50 times the steps) the difference is not clear, -2.0 ± " in unclear.verdict


def test_one_seed_is_said_to_prove_little_and_has_no_interval() -> None:
    comparison = made_up({ALONE: by_seed(0.5), "a": by_seed(0.61)})
    assert comparison.verdict == (
        "a: +11.0 points of acc against the student alone with one seed, which has no interval and proves little: take"
        " several seeds."
    )
    assert "±" not in comparison.table


def test_a_random_evaluation_is_said() -> None:
    comparison = made_up({ALONE: by_seed(0.5, 0.6), "a": by_seed(0.61, 0.71)})
    runs = (replace(comparison.runs[0], random=0.02), *comparison.runs[1:])
    verdict = replace(comparison, runs=runs).verdict
    assert "The evaluation is random: two evaluations of the same weights (student alone) differ by 2 points" in verdict


@pytest.mark.parametrize(
    ("changes", "things"), [({"student": "y"}, "initial weights"), ({"batches": ["q"]}, "batches")]
)
def test_runs_that_began_otherwise_are_said_not_to_be_paired(changes: dict[str, Any], things: str) -> None:
    comparison = made_up({ALONE: by_seed(0.5, 0.6), "a": by_seed(0.61, 0.71)})
    runs = tuple(replace(run, student="x", batches=["p"]) for run in comparison.runs)
    assert "Not paired" not in replace(comparison, runs=runs).verdict
    other = (*runs[:-1], replace(runs[-1], **changes))
    assert f"Not paired: with the same seed a had other {things} than" in replace(comparison, runs=other).verdict


def test_a_longer_run_is_paired_in_the_epochs_that_both_have() -> None:
    comparison = made_up({ALONE: by_seed(0.5, 0.6), "a": by_seed(0.61, 0.71)})
    runs = tuple(replace(run, batches=["p", "q", "r"][: 2 + (run.method == "a")]) for run in comparison.runs)
    assert "Not paired" not in replace(comparison, runs=runs).verdict


def test_the_correction_for_several_methods_widens_the_intervals() -> None:
    values = {ALONE: by_seed(0.5, 0.6, 0.7), "a": by_seed(0.61, 0.71, 0.82)}
    single, double = made_up(values), made_up({**values, "b": by_seed(0.5, 0.6, 0.7)})
    assert double.difference("a").margin > 1.3 * single.difference("a").margin  # type: ignore[union-attr, operator]
    assert "right together for all 2 methods (Bonferroni)" in double.table
    assert "Bonferroni" not in single.table


def test_the_table_has_a_row_for_each_method_and_fits_a_terminal(tmp_path: Path) -> None:
    table = carry_out(plan(tmp_path), Fake()).table
    rows = [line.split("  ")[0] for line in table.splitlines() if " ± " in line]
    assert rows == [ALONE, "", "a", "b"]
    assert "  at equal compute" in table
    assert max(map(len, table.splitlines())) <= 80
    assert table.startswith("acc in %: means of 3 seeds, with intervals of 95%")


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [0, -1, True, [], [1, 1], [0.5], ["a"], "12", [2**32]])
def test_wrong_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(ValueError, match="Expected `seeds` to be a number of seeds, or distinct whole numbers from 0"):
        checked_seeds(seeds)


def test_seeds_are_a_number_or_a_list() -> None:
    assert checked_seeds(3) == [0, 1, 2]
    assert checked_seeds([7, 4]) == [7, 4]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "at least one method"),
        (["  "], "to have names"),
        ([ALONE], "distinct names, but got 'student alone' beside 'student alone'"),
        (["a b", "a-b"], "distinct names, but got 'a-b' beside 'a b'"),
        (["Teacher"], "distinct names"),
    ],
)
def test_wrong_names_of_methods_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_names(names)


def test_records_with_numbers_that_are_not_finite_are_json(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.append(RunRecord("a", 0, {"acc": float("nan"), "loss": float("inf")}))
    line = (tmp_path / "runs.jsonl").read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=pytest.fail)["metrics"] == {"acc": None, "loss": None}
    assert folder.runs()["a", 0].metrics == {"acc": None, "loss": None}


def test_predictions_and_samples_are_written_in_the_documented_form(tmp_path: Path) -> None:
    name = write_predictions(tmp_path, file_name("Soft targets", 3), np.eye(3), [0, 1, 2])
    assert name == "predictions/soft-targets-3.npz"
    with np.load(tmp_path / name) as arrays:
        assert (arrays["logits"].dtype, arrays["labels"].dtype) == (np.float32, np.int64)
    assert write_samples(tmp_path, np.linspace(-1, 1, 250 * 4).reshape(250, 2, 2, 1)) == "samples.npz"
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["images"].shape == (200, 2, 2, 3)
        assert (arrays["images"].min(), arrays["images"].max()) == (0, 255)
        assert arrays["index"].tolist() == list(range(200))
    assert write_samples(tmp_path, np.zeros((5, 2, 2, 4))) is None
    assert write_samples(tmp_path, ()) is None


def test_a_setting_in_words_does_not_depend_on_addresses() -> None:
    class Thing:
        def __init__(self) -> None:
            self.patience, self.other = 3, object()

    assert described(Thing()) == described(Thing())
    assert "'patience': 3" in described([Thing()])
    assert described({"f": described, "n": 1.5}) == "{'f': distill_core.guidance.records.described, 'n': 1.5}"


def test_a_task_says_how_many_steps_it_has() -> None:
    assert Task("a", 0) == Task("a", 0, steps=None, examined=False)
