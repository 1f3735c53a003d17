"""The demonstration: what it leaves in its folder, what it prints, and that its verdict follows from its numbers."""

from __future__ import annotations

import ast
import io
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from quick_demo import Outcome, outcome_of
from rich.console import Console

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn: install the extra `plots`")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: install the extra `plots`")

from distill_core.demo_report import FULL, METHODS, SCARCE, best_run
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.run_records import RunRecord
from keras_distill import DistillModel
from keras_distill.demo import run
from keras_distill.demo.digits import (
    UNLABELLED,
    hide_labels,
    load_digits_data,
    make_student,
    make_teacher,
    predict,
)
from keras_distill.demo.report import prove_plain
from keras_distill.demo.training import Settings

PACKAGES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "lightning_distill")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"), "labels-10/comparison.json")


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_comparisons_the_plot_and_the_student(outcome: Outcome) -> None:
    names = sorted(path.name for path in outcome.folder.iterdir())
    assert names == ["curves.png", "labels-10", "labels-100", "student.keras"]
    assert (outcome.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_folder_is_named_at_the_end(outcome: Outcome) -> None:
    assert outcome.printed.rstrip().endswith(str(outcome.folder))


def test_both_comparisons_have_a_run_of_each_method(outcome: Outcome) -> None:
    assert list(outcome.runs) == [SCARCE, FULL]
    for comparison in outcome.runs.values():
        assert [run.method for run in comparison.runs] == [ALONE, EQUAL_COMPUTE, *METHODS]
        assert all(run.error is None and len(run.curve) >= 2 for run in comparison.runs)
        assert "Not paired" not in comparison.verdict


def test_the_student_is_at_least_twenty_times_smaller_than_the_teacher(outcome: Outcome) -> None:
    student, teacher = (outcome.results[name]["cost"]["parameters"] for name in ("student", "teacher"))
    assert 20 * student < teacher


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
    assert float(result.stdout) == pytest.approx(best_run(outcome.runs[SCARCE]).metrics["test_accuracy"])


def test_tables_and_verdicts_are_printed_and_the_tables_are_not_cut(outcome: Outcome) -> None:
    for comparison in outcome.runs.values():
        assert comparison.table in outcome.printed
        assert comparison.verdict in outcome.printed
    assert "…" not in outcome.printed


def test_a_second_demonstration_finds_the_same_and_leaves_the_process_as_it_was(
    outcome: Outcome, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    before = random.getstate(), np.random.get_state()[1].tolist()
    comparisons = run(tmp_path, quick=True, console=Console(file=io.StringIO()))
    for share, comparison in comparisons.items():
        for method in (ALONE, *METHODS):  # at equal compute the number of steps is measured
            assert comparison.values(method) == outcome.runs[share].values(method)
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


def losses_of_a_batch(labels: list[int], seen: int) -> dict[str, float]:
    """The logs of a step on some labels, and what they should hold if the task counts the first ``seen`` only."""
    images, classes = np.random.default_rng(0).random((4, 8, 8, 1), "float32"), np.array(labels)
    settings, teacher = Settings(), make_teacher()
    model = DistillModel(make_student(), teacher, settings.methods()[METHODS[-1]])
    model.compile(**settings.compiled(0.0, steps=9))
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


def test_the_student_that_is_saved_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    runs = [
        RunRecord(
            method,
            0,
            {"val_accuracy": value, "test_accuracy": float(method == ALONE)},
            weights=f"{index}.weights.h5",
        )
        for index, (method, value) in enumerate({ALONE: 0.6, METHODS[0]: 0.8, METHODS[1]: 0.7}.items())
    ]
    student = make_student()
    student.save_weights(tmp_path / "1.weights.h5")
    images = np.random.default_rng(0).random((4, 8, 8, 1), "float32")
    comparison = Comparison(tmp_path, "test_accuracy", "max", (0,), METHODS, tuple(runs))
    proved = prove_plain(tmp_path / "student.keras", comparison, (images, predict(student, images)))
    assert METHODS[0] in proved
    assert "it reaches 100.0 % on the test images" in proved
