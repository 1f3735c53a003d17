"""Folders that are incomplete, damaged or strange: the report says so in words, or refuses them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import Page
from results_folder import ALONE, METHODS, comparison, run, write_comparison, write_folder, write_runs

from distill_core.guidance.report import write_report
from distill_core.guidance.results import read_results


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "without comparison.json. Pass the folder that a comparison of methods has written."),
        ("{", "comparison.json to hold JSON"),
        ("[1]", "to hold a mapping, but got list"),
        ('{"format": 2}', "to be 1, but got 2. It was written by another version"),
        ('{"format": 1, "metric": "a", "mode": "max"}', "to have `methods`, but got None"),
        ('{"format": 1, "metric": "a", "mode": "up", "methods": []}', "to be 'max' or 'min', but got 'up'"),
    ],
)
def test_a_folder_without_a_comparison_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "comparison.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^Expected ") as error:
        write_report(tmp_path)
    assert words in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*nowhere', which is not a folder"):
        write_report(tmp_path / "nowhere")


# Said in words --------------------------------------------------------------------------------------------------------


def test_without_any_run_the_page_says_so(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison())
    page = report(tmp_path)
    assert "No verdict: no run of a method with a teacher has ended" in page.words("verdict")
    assert "Not shown. No finished run has recorded val_acc during the training." in page.words("curves")
    assert "runs.jsonl is missing: no run has ended yet." in page.words("measured")


def test_a_torn_last_line_is_named_and_the_others_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, examples=30)
    file = folder / "runs.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[: len(whole) - 40], encoding="utf-8")
    page = report(folder)
    assert "The last line of runs.jsonl is incomplete" in page.words("measured")
    assert len(read_results(folder).runs) == len(METHODS) * 3 - 1
    assert "2 of 3" in page.words("results")


@pytest.mark.parametrize(
    "line", ["not json", "3", '{"method": 1, "seed": 0}', '{"method": "a", "seed": true}', "[" * 9999]
)
def test_a_line_that_is_not_a_record_is_named(tmp_path: Path, line: str) -> None:
    folder = write_folder(tmp_path, examples=30)
    file = folder / "runs.jsonl"
    file.write_text(line + "\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert "Line 1 of runs.jsonl is not the record of a run" in report(folder).words("measured")


def test_the_last_record_of_a_run_counts(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 1))
    write_runs(tmp_path, [run(ALONE, 0, 0.5), run("a", 0, 0.1, error="stopped"), run("a", 0, 0.75)])
    page = report(tmp_path)
    assert "Of a, 1 record of a seed replaced by a later one." in page.words("measured")
    assert ["a", "+25.00", "none", "1", "not tested"] in page.rows("differences")


def test_methods_that_all_failed_are_named_with_their_errors(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 2))
    failed = [run("a", seed, None, error="RuntimeError: out of memory\n  at line 3", curve=[]) for seed in range(2)]
    write_runs(tmp_path, [run(ALONE, 0, 0.5), run(ALONE, 1, 0.6), *failed])
    page = report(tmp_path)
    assert "a, seed 1: RuntimeError: out of memory at line 3" in page.words("measured")
    assert ["a", "none", "0 of 2"] in page.rows("results")
    assert ["a", "none", "none", "0", "not tested"] in page.rows(
        "differences"
    ) or "nothing can be compared" in page.words()
    assert "2 runs failed" in page.words("next")


def test_a_run_whose_metric_is_not_a_number_is_named(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 2))
    values = {ALONE: [0.5, 0.6], "a": [0.9, math.nan]}
    write_runs(tmp_path, [run(method, seed, v) for method, each in values.items() for seed, v in enumerate(each)])
    page = report(tmp_path)
    assert ["a", "90.0 %", "2 of 2, 1 without a number"] in page.rows("results")
    assert "The metric is missing or not a finite number in runs of “a”." in page.words("next")
    assert "nan" not in page.words().lower().split()


def test_a_teacher_without_numbers_is_not_known(tmp_path: Path) -> None:
    write_comparison(
        tmp_path, comparison((ALONE, "a")) | dict.fromkeys(["teacher", "student", "classes", "seeds", "machine"])
    )
    write_runs(tmp_path, [run(ALONE, 0, 0.5), run("a", 0, 0.6)])
    page = report(tmp_path)
    assert "teacher not known" in page.words("verdict")
    assert "The comparison has not stored the models' costs." in page.words("costs")


def test_missing_predictions_leave_their_sections_out_with_a_reason(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 1, teacher={"metrics": {"val_acc": 0.9}, "predictions": None}))
    write_runs(tmp_path, [run(ALONE, 0, 0.5), run("a", 0, 0.6)])
    page = report(tmp_path)
    reason = "Not shown. The comparison has stored no predictions; it does so for classification only."
    for section in ("calibration", "classes", "confusion", "examples"):
        assert reason in page.words(section)
    assert "Accuracy, agreement and divergence need them." in page.words("results")
    assert "No map of layers was made" in page.words("layers")


def test_runs_that_stored_predictions_are_measured_without_the_teachers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, examples=30)
    (folder / "predictions" / "teacher.npz").unlink()
    page = report(folder)
    assert "Predictions of the teacher: predictions/teacher.npz is missing." in page.words("measured")
    assert "Predictions of the teacher and of a distilled method are needed" in page.words("confusion")
    assert len(page.rows("calibration")[1:4]) == 3


def broken(array: Any) -> dict[str, Any]:
    return {"logits": np.zeros((30, 5), np.float32), "labels": np.zeros(30, np.int64)} | array


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (broken({"labels": np.full(30, 5)}), "has labels outside of its 5 classes"),
        (broken({"labels": np.full(30, -100)}), "has labels outside of its 5 classes"),
        (broken({"logits": np.full((30, 5), np.nan)}), "has logits that are not finite"),
        (broken({"logits": np.zeros(30)}), "has logits of shape (30,)"),
        (broken({"logits": np.zeros((0, 5)), "labels": np.zeros(0, int)}), "has logits of shape (0, 5)"),
        (broken({"labels": np.zeros(30)}), "labels of type float64"),
        ({"labels": np.zeros(30, int)}, "has no array logits"),
        (broken({"logits": np.array([{}] * 30)}), "cannot be read (ValueError)"),
        (broken({}), "has other labels than the predictions before it"),
        (b"not an archive", "cannot be read"),
    ],
)
def test_damaged_predictions_are_named(tmp_path: Path, arrays: Any, words: str) -> None:
    folder = write_folder(tmp_path, examples=30)
    file = folder / "predictions" / "soft-targets-1.npz"
    if isinstance(arrays, bytes):
        file.write_bytes(arrays)
    else:
        np.savez(file, **arrays)
    page = report(folder)
    assert "Predictions of soft targets, seed 1: predictions/soft-targets-1.npz" in page.words("measured")
    assert words in page.words("measured")


def test_predictions_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results", examples=30)
    np.savez(tmp_path / "secret.npz", **broken({}))
    content = json.loads((folder / "comparison.json").read_text())
    content["teacher"]["predictions"] = "../secret.npz"
    write_comparison(folder, content)
    assert "'../secret.npz' is not the name of a file within the folder" in report(folder).words("measured")


def test_a_binary_classifier_with_one_score_has_two_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, examples=30)
    np.savez(folder / "predictions" / "teacher.npz", logits=np.array([[2.0], [-2.0]]), labels=np.array([1, 0]))
    predictions = read_results(folder).predictions("predictions/teacher.npz")
    np.testing.assert_array_equal(predictions.logits, [[0, 2], [0, -2]])


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "has neither images nor texts, or no index"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "index": np.arange(2)}, "have shape (2, 4, 4)"),
        ({"images": np.zeros((2, 4, 4, 3)), "index": np.arange(2)}, "type float64"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "index": np.array([0, 30])}, "exceeds the 30 examples"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "index": np.arange(3)}, "an index of shape (3,)"),
        ({"texts": np.zeros(2), "index": np.arange(2)}, "have type float64"),
    ],
)
def test_examples_of_a_wrong_form_are_named(tmp_path: Path, samples: dict[str, Any], words: str) -> None:
    folder = write_folder(tmp_path, examples=30)
    np.savez(folder / "samples.npz", **samples)
    text = report(folder).words("examples")
    assert "Not shown. The examples cannot be shown: " in text
    assert words in text


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"student_layers": ["a"], "teacher_layers": ["b"], "similarity": [[NaN]]}']
)
def test_a_damaged_map_of_layers_is_named(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path, examples=30)
    (folder / "pairs.json").write_text(text, encoding="utf-8")
    page = report(folder)
    assert "pairs.json does not hold a finite similarity" in page.words("measured")
    assert "Not shown. No map of layers was made" in page.words("layers")


def test_a_comparison_without_the_student_alone_has_no_baseline(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison(("a", "b"), 1))
    write_runs(tmp_path, [run("a", 0, 0.5), run("b", 0, 0.6)])
    page = report(tmp_path)
    assert "No verdict: “student alone” and “b” have no finished seed in common." in page.words("verdict")
    assert "nothing can be compared" in page.words("differences")


@pytest.mark.parametrize("value", [1e308, -math.inf, 10**400, "0.9", True, None, [0.9]])
def test_a_value_that_cannot_be_a_metric_is_left_out(tmp_path: Path, value: Any) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 2))
    values = {ALONE: [0.5, 0.6], "a": [0.9, value]}
    runs = [
        run(method, seed, 0.5, metrics={"val_acc": each})
        for method, several in values.items()
        for seed, each in enumerate(several)
    ]
    write_runs(tmp_path, runs)
    assert ["a", "90.0 %", "2 of 2, 1 without a number"] in report(tmp_path).rows("results")


@pytest.mark.parametrize("value", [None, 5, "x", [1], {"metrics": [1], "cost": {"parameters": "x", "bytes": -1}}])
def test_other_parts_of_a_wrong_type_are_not_known(tmp_path: Path, value: Any) -> None:
    names = ["seeds", "machine", "versions", "settings", "classes", "teacher", "student", "command", "commit", "kind"]
    write_comparison(tmp_path, comparison((ALONE, "a"), 1) | dict.fromkeys(names, value))
    write_runs(tmp_path, [run(ALONE, 0, 0.5), run("a", 0, 0.6)])
    page = report(tmp_path)
    assert "framework not known" in page.words("measured")
    assert ["a", "+10.00", "none", "1", "not tested"] in page.rows("differences")


def test_warnings_are_counted(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 2))
    write_runs(tmp_path, [run("a", seed, 0.5, warnings=["slow", f"only {seed}"]) for seed in range(2)])
    words = report(tmp_path).words("measured")
    assert "slow (2 times)" in words
    assert "only 1 (1 time)" in words


def test_without_jinja2_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"The report needs jinja2, which is not installed. .*pip install"):
        write_report(write_folder(tmp_path, examples=30))
