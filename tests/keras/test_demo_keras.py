"""The demonstration: what it leaves in its folder, what it prints, and that its verdict follows from its numbers."""

from __future__ import annotations

import ast
import io
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from quick_demo import Outcome, outcome_of
from rich.console import Console

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn: install the extra `plots`")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: install the extra `plots`")

from distill_core.demo_report import FULL, METHODS, SCARCE, Run, closing, table
from keras_distill.demo import run
from keras_distill.demo.digits import (
    UNLABELLED,
    hide_labels,
    load_digits_data,
    make_student,
    make_teacher,
    predict,
    shuffled,
)
from keras_distill.demo.report import prove_plain
from keras_distill.demo.training import Settings, _restart

PACKAGES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "lightning_distill")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"))


def made_up(accuracies: dict[str, list[float]]) -> list[Run]:
    """A teacher's run, and for full labels the students' with these test accuracies by method and seed."""
    students = [
        Run(FULL, method, seed, 10, [0.5, value], value, value, 1.0)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return [Run(FULL, "teacher", 0, 100, [0.9], 0.9, 1.0, 5.0), *students]


def trained(outcome: Outcome) -> Run:
    """The run whose student was saved."""
    saved = outcome.results["saved_student"]
    return next(run for run in outcome.runs if (run.labels, run.method) == (saved["labels"], saved["method"]))


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_results_the_plot_and_the_student(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["curves.png", "results.json", "student.keras"]
    assert (outcome.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_folder_is_named_at_the_end(outcome: Outcome) -> None:
    assert outcome.printed.rstrip().endswith(str(outcome.folder))


def test_the_results_hold_a_run_for_the_teacher_and_for_each_setting_and_method(outcome: Outcome) -> None:
    assert list(outcome.results) == ["backend", "settings", "runs", "saved_student", "conclusion", "seconds"]
    held = [(run["labels"], run["method"], run["seed"]) for run in outcome.results["runs"]]
    assert held == [(FULL, "teacher", 0), *((labels, method, 0) for labels in (SCARCE, FULL) for method in METHODS)]
    epochs = outcome.results["settings"]["epochs"]
    assert all(len(run["validation_accuracy"]) == epochs for run in outcome.results["runs"])
    assert all(run["step_ms"] > 0 for run in outcome.results["runs"])


def test_the_student_is_at_least_twenty_times_smaller_than_the_teacher(outcome: Outcome) -> None:
    teacher, *students = outcome.runs
    assert all(20 * student.parameters < teacher.parameters for student in students)


def test_the_saved_student_is_as_good_as_it_was_where_keras_distill_is_absent(outcome: Outcome) -> None:
    images, classes = load_digits_data().test
    np.savez(outcome.folder.parent / "test.npz", images=images, classes=classes)
    code = (
        "import sys; sys.modules['keras_distill'] = None\n"
        "import keras, numpy as np\n"
        "student, data = keras.saving.load_model(sys.argv[1]), np.load(sys.argv[2])\n"
        "scores = keras.ops.convert_to_numpy(student(data['images'], training=False))\n"
        "print((scores.argmax(1) == data['classes']).mean())"
    )
    words = [sys.executable, "-c", code, str(outcome.folder / "student.keras"), str(outcome.folder.parent / "test.npz")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    saved = outcome.results["saved_student"]
    assert float(result.stdout) == saved["test_accuracy"] == trained(outcome).test_accuracy


def test_the_table_has_a_row_for_each_method_and_fits_80_columns(outcome: Outcome) -> None:
    rows = [line.split() for line in outcome.printed.splitlines() if line.split()[1:2] == ["%"]]
    assert [" ".join(row[2:]).split(f" {row_size(row)} ")[0] for row in rows] == ["teacher", *METHODS, *METHODS]
    assert "…" not in outcome.printed


def row_size(row: list[str]) -> str:
    """The number of parameters in a row of the table."""
    return next(word for word in row[2:] if word[0].isdigit())


def test_a_second_demonstration_finds_the_same_and_leaves_the_process_as_it_was(
    outcome: Outcome, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    before = random.getstate(), np.random.get_state()[1].tolist()
    runs = run(tmp_path, quick=True, console=Console(file=io.StringIO()))
    assert [replace(run, step_ms=0.0) for run in runs] == [replace(run, step_ms=0.0) for run in outcome.runs]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert keras.config.image_data_format() == "channels_first"
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "path", ["cli.py", *(f"demo/{name}.py" for name in ("__init__", "digits", "report", "training"))]
)
def test_nothing_of_the_lightning_half_is_imported(path: str) -> None:
    tree = ast.parse((Path(__file__).resolve().parents[2] / "keras_distill" / path).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert named
    assert not {name.split(".")[0] for name in named} & set(PACKAGES)


# Its parts -----------------------------------------------------------------------------------------------------------


def test_the_three_parts_of_the_data_hold_each_image_once() -> None:
    digits = load_digits_data()
    sizes = [len(classes) for _, classes in (digits.train, digits.validation, digits.test)]
    assert sizes == [1000, 297, 500]


def test_a_tenth_of_the_labels_of_each_class_is_kept_and_the_rest_is_left_out() -> None:
    labels = np.arange(10).repeat(20)
    kept = hide_labels(labels, 0.1, seed=3)
    shown = kept != UNLABELLED
    assert np.bincount(kept[shown]).tolist() == [2] * 10
    assert (kept[shown] == labels[shown]).all()


def test_every_epoch_shows_each_image_once_and_in_another_order() -> None:
    first, second = shuffled(7, 2, seed=1).reshape(2, 7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first.tolist() != second.tolist()


def losses_of_a_batch(labels: list[int], seen: int) -> dict[str, float]:
    """The logs of a step on some labels, and what they should hold if the task counts the first ``seen`` only."""
    images, classes = np.random.default_rng(0).random((4, 8, 8, 1), "float32"), np.array(labels)
    settings, teacher = Settings(), make_teacher(0)
    model = settings.model(METHODS[-1], teacher, seed=1)
    settings.compile(model, 0.0, steps=9)
    model.evaluate_distillation = True
    logs = model.evaluate(images, classes, return_dict=True, verbose=0)
    scores = model.student(images, training=False)
    task = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    values = ops.convert_to_numpy(task(np.maximum(classes, 0), scores))
    logs["expected_task"] = float(values[:seen].mean()) if seen else 0.0
    logs["expected_logits"] = float(ops.convert_to_numpy(model.terms[0].loss(teacher(images, training=False), scores)))
    return logs


@pytest.mark.parametrize("labels", [[3, 1, UNLABELLED, UNLABELLED], [UNLABELLED] * 4], ids=["some", "none"])
def test_the_task_loss_is_the_mean_over_the_labelled_images_only_and_the_terms_count_all(labels: list[int]) -> None:
    logs = losses_of_a_batch(labels, sum(label != UNLABELLED for label in labels))
    assert logs["task_loss"] == pytest.approx(logs["expected_task"], rel=1e-5)
    assert logs["logits_loss"] == pytest.approx(logs["expected_logits"], rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + logs["logits_loss"] + logs["deep_loss"], rel=1e-5)


def test_a_model_started_again_trains_as_it_did_when_it_was_new() -> None:
    images, classes = (part[:200] for part in load_digits_data().train)
    settings, teacher = Settings(), make_teacher(0)
    model = settings.model(METHODS[-1], teacher, 1)
    settings.compile(model, settings.student_lr, steps=4)
    results = []
    for _ in range(2):
        model.fit(images, classes, batch_size=100, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
        _restart(model, settings.model(METHODS[-1], teacher, 1))
    for again, expected, start in zip(*reversed(results), model.get_weights(), strict=True):
        np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)
        assert start.size == 1 or not np.allclose(start, expected)


@pytest.mark.parametrize(
    ("distilled", "verdict"),
    [
        ([0.7, 0.8], "distilling logits helped: +15.0 points of accuracy (better for 2 of 2 seeds)"),
        ([0.5, 0.5], "distilling logits did harm: -10.0 points of accuracy (better for 0 of 2 seeds)"),
        ([0.6, 0.8], "distilling logits made no clear difference: +10.0 points of accuracy (better for 1 of 2 seeds)"),
    ],
)
def test_the_closing_sentence_agrees_with_the_numbers(distilled: list[float], verdict: str) -> None:
    alone = [0.6, 0.6]
    (sentence,) = closing(made_up({"alone": alone, "+ logits": distilled, "+ logits + features": alone}))
    assert sentence.startswith(f"With 100 % of the labels {verdict}; distilling logits and features made no clear")


def test_a_single_seed_is_called_little_proof() -> None:
    sentences = closing(made_up({method: [0.6] for method in METHODS}))
    assert "A single seed proves little" in sentences[-1]


def test_the_student_that_is_saved_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    runs = made_up({method: [0.6] for method in METHODS})
    runs[2].validation_accuracy, runs[3].test_accuracy = [0.8], 1.0
    students = {(run.labels, run.method, run.seed): make_student(5).get_weights() for run in runs[1:]}
    images = np.random.default_rng(0).random((4, 8, 8, 1), "float32")
    test = (images, predict(make_student(5), images))
    saved = prove_plain(tmp_path / "student.keras", runs, students, test)
    assert saved["method"] == "+ logits"
    assert saved["test_accuracy"] == 1.0


def test_the_table_shows_mean_and_spread_over_the_seeds() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(made_up({method: [0.6, 0.8] for method in METHODS})))
    assert console.file.getvalue().count("70.0 ± 14.1") == 6
