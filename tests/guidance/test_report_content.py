"""The sentences and numbers of a report, from folders with known results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import Page
from results_folder import ALONE, EQUAL, comparison, run, save_predictions, write_comparison, write_folder, write_runs

from distill_core.guidance.comparison import Comparison
from distill_core.guidance.figures import png
from distill_core.guidance.material import facts_of, gather
from distill_core.guidance.report import write_report


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def write_values(folder: Path, values: dict[str, list[float | None]], **changes: Any) -> Path:
    """A folder with values alone: no predictions, no samples, no map of layers."""
    teacher = {"metrics": {"val_acc": 0.95}}
    write_comparison(folder, comparison(tuple(values)) | {"teacher": teacher} | changes)
    runs = [run(method, seed, value) for method, each in values.items() for seed, value in enumerate(each)]
    write_runs(folder, runs)
    return folder


def write_classes(folder: Path, teacher: list[int], alone: list[int], distilled: list[int], labels: list[int]) -> Path:
    """A folder whose models predict these classes, one seed each."""
    write_comparison(folder, comparison((ALONE, "soft targets"), 1))
    names = {"teacher": teacher, "student-alone-0": alone, "soft-targets-0": distilled}
    for name, classes in names.items():
        save_predictions(folder, name, 4 * np.eye(5)[classes], np.array(labels))
    right = {name: float(np.mean(np.equal(classes, labels))) for name, classes in names.items()}
    write_runs(
        folder,
        [
            run(ALONE, 0, right["student-alone-0"], predictions="predictions/student-alone-0.npz"),
            run("soft targets", 0, right["soft-targets-0"], predictions="predictions/soft-targets-0.npz"),
        ],
    )
    return folder


def test_the_verdict_says_yes_with_its_interval(tmp_path: Path) -> None:
    values = {ALONE: [0.70, 0.71, 0.72], EQUAL: [0.75, 0.76, 0.77], "a": [0.80, 0.82, 0.81]}
    words = report(write_values(tmp_path, values)).words("verdict")
    assert "Yes, it helped. a is better than the student alone by" in words
    # differences 10, 11 and 9 points: 10 ± 4.3027 * 1 / sqrt(3)
    assert "by 10.0 ± 2.5 points of val_acc (3 seeds)" in words
    assert "Against the student alone at equal compute it is better by 5.0 ± 2.5." in words


def test_the_verdict_is_that_of_the_comparison(tmp_path: Path) -> None:
    equal = {"ratio": 1.5, "method": "a", "seed": 0, "steps": 150}
    values = {ALONE: [0.70, 0.71, 0.72], EQUAL: [0.75, 0.76, 0.77], "a": [0.80, 0.82, 0.81]}
    folder = write_values(tmp_path, values, equal_compute=equal)
    assert Comparison.read(folder).verdict in report(folder).words("verdict")


@pytest.mark.parametrize(
    ("compute", "limit"),
    [([0.79, 0.83, 0.80], "but not clearly with equal compute"), ([0.90, 0.91, 0.92], "but not with equal compute")],
)
def test_the_verdict_is_limited_by_equal_compute(tmp_path: Path, compute: list[float], limit: str) -> None:
    values = {ALONE: [0.70, 0.71, 0.72], EQUAL: compute, "a": [0.80, 0.82, 0.81]}
    words = report(write_values(tmp_path, values)).words("verdict")
    assert f"Partly: after equal steps, {limit}." in words


@pytest.mark.parametrize(
    ("distilled", "headline"),
    [
        (
            [0.60, 0.62, 0.61],
            "No, it did harm. a is worse than the student alone by 10.0 ± 2.5 points of val_acc",
        ),
        ([0.60, 0.72, 0.81], "Not clearly. a: no clear difference to the student alone, +0.0 ± "),
        ([0.90], "One seed cannot tell. a: +20.0 points of val_acc against the student alone with one seed"),
        ([None, None, None], "No verdict: no run of a method with a teacher has ended with a value of val_acc."),
    ],
)
def test_the_verdict_says_no_or_that_it_cannot_tell(tmp_path: Path, distilled: list[float], headline: str) -> None:
    page = report(write_values(tmp_path, {ALONE: [0.70, 0.71, 0.72], "a": distilled}))
    assert headline in page.words("verdict")


def test_one_seed_has_a_difference_without_an_interval(tmp_path: Path) -> None:
    page = report(write_values(tmp_path, {ALONE: [0.70], "a": [0.80]}, seeds=[0]))
    assert "a: +10.0 points of val_acc against the student alone with one seed" in page.words("verdict")
    assert ["a", "+10.00", "none", "1", "not tested"] in page.rows("differences")


def test_several_methods_have_intervals_that_are_right_together(tmp_path: Path) -> None:
    page = report(write_values(tmp_path, {ALONE: [0.70, 0.71, 0.72], "a": [0.80, 0.82, 0.81], "b": [0.7, 0.7, 0.7]}))
    assert "Yes, it helped. “a” has the best mean of 2 methods." in page.words("verdict")
    assert "right together for all 2 methods (Bonferroni)" in page.words("verdict")
    assert "95 % interval, right together for all 2 methods;" in page.words("differences")


def test_the_compute_of_the_baseline_is_named(tmp_path: Path) -> None:
    equal = {"ratio": 2.314, "method": "a", "seed": 0, "steps": 1000}
    words = report(write_values(tmp_path, {ALONE: [0.7], "a": [0.8]}, equal_compute=equal)).words("measured")
    assert "2.31 times the steps, since a step of “a” takes so much longer" in words


def test_metrics_that_are_not_accuracies_are_plain_numbers(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison((ALONE, "a"), 2, metric="val_loss", mode="min", teacher={}))
    runs = [run(m, s, None, metrics={"val_loss": v + s}) for m, v in ((ALONE, 2.5), ("a", 1.25)) for s in range(2)]
    write_runs(tmp_path, runs)
    page = report(tmp_path)
    assert ["a", "-1.25", "-1.25 to -1.25", "2", "better"] in page.rows("differences")
    assert "lower is better" in page.words()
    assert ["teacher", "not known", "", "", "", ""][:3] in [row[:3] for row in page.rows("results")]


def test_curves_are_described_in_words(tmp_path: Path) -> None:
    page = report(write_values(tmp_path, {ALONE: [0.8, 0.8], "a": [0.9, 0.9]}))
    named = [element.attributes["aria-label"] for element in page.all("svg") if "role" in element.attributes]
    labels = [" ".join(name.split()) for name in named]
    assert "a: val_acc from 45.0 % at epoch 0 to 89.9 % at epoch 9, mean of 2 seeds" in labels


def test_a_test_metric_is_shown_by_the_curves_of_the_validation_set(tmp_path: Path) -> None:
    """Runs are tested once, so that the deciding metric has no curve; the teacher's line is that of the curves."""
    teacher = {"metrics": {"test_acc": 0.99, "val_acc": 0.95}}
    write_comparison(tmp_path, comparison((ALONE, "a"), 2, metric="test_acc", mode="max", teacher=teacher))
    runs = [run(m, s, None, metrics={"test_acc": v}) for m, v in ((ALONE, 0.8), ("a", 0.9)) for s in range(2)]
    write_runs(tmp_path, runs)
    assert all("val_acc" in point for run in runs for point in run["curve"])
    words = report(tmp_path).words("curves")
    assert words.startswith("Curves val_acc, in percent by epoch")
    assert gather(tmp_path).results.teacher_value("val_acc") == 0.95
    assert math.isfinite(facts_of(gather(tmp_path)).still_rising)


def test_calibration_classes_and_confusion_by_hand(tmp_path: Path) -> None:
    """Ten examples of classes 0 and 1. The student alone says 0 always, and the distilled student errs once."""
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    distilled = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    page = report(write_classes(tmp_path, labels, [0] * 10, distilled, labels))
    confidence = float(np.exp(4) / (np.exp(4) + 4))
    gap = f"{100 * (confidence - 0.5):+.1f}"
    assert ["student alone", f"{100 * (confidence - 0.5):.1f} %", gap] in page.rows("calibration")
    rows = page.rows("classes")
    assert rows[1] == ["class 0", "-20.0", "80.0 %", "100.0 %", "100.0 %", "5"]
    assert rows[2] == ["class 1", "+100.0", "100.0 %", "0.0 %", "100.0 %", "5"]
    assert len(rows) == 3  # classes without examples are left out
    assert ["class 0", "class 1", "1", "1", "0"] in page.rows("confusion")
    assert "differ in 1 of 10 answers (10.0 %). There the teacher is right in 100.0 %" in page.words("confusion")
    assert ["soft targets", "90.0 %", "1 of 1", "90.0 %", "90.0 %"] in [row[:5] for row in page.rows("results")]


def test_examples_show_what_each_model_says(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, [0, 1, 2], [0, 0, 0], [0, 3, 2], [0, 1, 2])
    np.savez(folder / "samples.npz", texts=np.array(["first", "<b>second</b>", "third"]), index=np.arange(3))
    words = report(folder).words("examples")
    assert "<b>second</b> example 1 label class 1 teacher class 1 student class 3" in words
    assert "first" not in words.replace("its first seed", "")


def test_examples_may_be_a_part_of_the_validation_set(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, [0, 1, 2], [0, 0, 0], [0, 3, 4], [0, 1, 2])
    np.savez(folder / "samples.npz", images=np.zeros((1, 40, 30, 3), np.uint8), index=np.array([2]))
    page = report(folder)
    assert "example 2 label class 2 teacher class 2 student class 4" in page.words("examples")
    (image,) = page.all("img")
    assert (image.attributes["width"], image.attributes["height"]) == ("30", "40")


def test_costs_have_the_student_as_a_fraction_of_the_teacher(tmp_path: Path) -> None:
    rows = report(write_folder(tmp_path, examples=20)).rows("costs")
    assert ["teacher", "67,754", "813,048", "271 kB", "1.36 ms", "not known"] in rows
    assert ["student / teacher", "1/46.2", "1/46.2", "1/46.2", "1/46.2", ""] in rows
    assert ["soft targets", "7 ms", "100", "12.5 s"] in rows


def test_the_origin_of_the_numbers_is_named(tmp_path: Path) -> None:
    words = report(write_folder(tmp_path, examples=20)).words("measured")
    facts = ["lightning-distill compare config.yaml", "0, 1, 2", "processor x86_64", "torch 2.13.0", "temperature=4.0"]
    for fact in facts:
        assert fact in words


def test_advice_follows_from_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    facts = facts_of(gather(folder))
    assert (facts.seeds, facts.best, facts.verdict, facts.failed) == (3, "soft targets", "better", 0)
    assert facts.size_ratio == pytest.approx(67_754 / 1_466)
    assert facts.step_ratio == pytest.approx(0.007 / 0.004)
    assert facts.agreement > facts.agreement_alone
    assert "Run the teacher once and keep its outputs in a cache." in report(folder).words("next")


def test_a_rising_curve_is_measured_by_its_last_fifth(tmp_path: Path) -> None:
    write_values(tmp_path, {ALONE: [0.5], "a": [1.0]})
    # ten epochs of 1 - 0.5 ** (e + 1): from 0.5 to 1 - 2 ** -10, of which the last two epochs bring 2 ** -8 - 2 ** -10
    expected = (2**-8 - 2**-10) / (0.5 - 2**-10)
    assert facts_of(gather(tmp_path)).still_rising == pytest.approx(expected)


def test_the_harmed_class_is_that_with_the_greatest_loss(tmp_path: Path) -> None:
    labels = [0] * 20 + [1] * 20 + [2] * 5
    distilled = [0] * 20 + [1] * 15 + [0] * 5 + [0] * 5
    folder = write_classes(tmp_path, [0] * 45, labels, distilled, labels)
    assert facts_of(gather(folder)).harmed == ("class 1", 0.25, True)


def test_a_picture_has_the_bytes_of_a_png_file() -> None:
    pillow = pytest.importorskip("PIL.Image")
    import io

    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(pillow.open(io.BytesIO(png(image)))), image)
