"""The demonstration: what it leaves in its folder, what it prints, and that its verdict follows from its numbers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from quick_demo import Outcome, outcome_of
from rich.console import Console

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn: install the extra `plots`")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: install the extra `plots`")

from distill_core.demo_report import FOLDERS, FULL, METHODS, SCARCE, best_run
from distill_core.guidance.comparison import Comparison
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.run_records import RunRecord
from lightning_distill.demo import QUICK, run
from lightning_distill.demo.digits import UNLABELLED, Classifier, Student, hide_labels, load_digits_data
from lightning_distill.demo.report import prove_plain
from lightning_distill.demo.training import compared, trained_teacher
from lightning_distill.guidance.runs import quiet


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"), "labels-10/comparison.json")


class Second(NamedTuple):
    """Another quick demonstration: its comparisons, and the state of the process after it."""

    comparisons: dict[str, Comparison]
    same_random_state: bool
    threads: int


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Second:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    comparisons = run(tmp_path_factory.mktemp("second"), quick=True, console=Console(file=io.StringIO()))
    after = Second(comparisons, torch.equal(torch.get_rng_state(), random_state), torch.get_num_threads())
    torch.set_num_threads(threads)
    return after


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_comparisons_the_plot_and_the_student(outcome: Outcome) -> None:
    names = sorted(path.name for path in outcome.folder.iterdir())
    assert names == ["curves.png", "labels-10", "labels-100", "student.pt"]
    assert (outcome.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_folder_is_named_at_the_end(outcome: Outcome) -> None:
    assert outcome.printed.rstrip().endswith(str(outcome.folder))


def test_both_comparisons_have_a_run_of_each_method(outcome: Outcome) -> None:
    assert list(outcome.runs) == [SCARCE, FULL]
    for share, comparison in outcome.runs.items():
        assert [run.method for run in comparison.runs] == [ALONE, EQUAL_COMPUTE, *METHODS]
        assert all(run.error is None and len(run.curve) >= 2 for run in comparison.runs)
        assert "Not paired" not in comparison.verdict
        assert str(Comparison.read(outcome.folder / FOLDERS[share])) == str(comparison)


def test_the_student_is_at_least_twenty_times_smaller_than_the_teacher(outcome: Outcome) -> None:
    student, teacher = (outcome.results[name]["cost"]["parameters"] for name in ("student", "teacher"))
    assert 20 * student < teacher


def test_the_saved_student_loads_strictly_into_the_bare_network_and_is_as_good_as_it_was(outcome: Outcome) -> None:
    bare = Student().eval()
    bare.load_state_dict(torch.load(outcome.folder / "student.pt", weights_only=True), strict=True)
    images, classes = load_digits_data().test
    with torch.no_grad():
        accuracy = float((bare(images).argmax(1) == classes).double().mean())
    best = best_run(outcome.runs[SCARCE])
    assert accuracy == pytest.approx(best.metrics["test_accuracy"])
    reached = f"{100 * accuracy:.1f} % on the test images, and {100 * accuracy:.1f} % when it was trained."
    assert f"Loaded strictly into the bare network it reaches {reached}" in outcome.printed


def test_tables_and_verdicts_are_printed_and_the_tables_are_not_cut(outcome: Outcome) -> None:
    for comparison in outcome.runs.values():
        assert comparison.table in outcome.printed
        assert comparison.verdict in outcome.printed
    assert "with one seed, which has no interval and proves little" in outcome.printed
    assert "…" not in outcome.printed


def test_nothing_but_the_demonstration_itself_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines, digits, settings = [], load_digits_data(), replace(QUICK, epochs=1, teacher_epochs=1, batch_size=200)
    with quiet():
        compared(digits, settings, trained_teacher(digits, settings), tmp_path, lines.append)
    assert capfd.readouterr() == ("", "")
    assert len(lines) == 8
    assert lines[0].startswith("10 % of the labels, student alone, seed 0: test_accuracy ")


def test_the_global_random_state_and_the_number_of_threads_are_left_alone(second: Second) -> None:
    assert second.same_random_state
    assert second.threads == 2


def test_a_second_demonstration_finds_the_same_accuracies(outcome: Outcome, second: Second) -> None:
    for share, comparison in second.comparisons.items():
        for method in (ALONE, *METHODS):  # at equal compute the number of steps is measured
            assert comparison.values(method) == outcome.runs[share].values(method)


# Its parts -----------------------------------------------------------------------------------------------------------


def test_the_three_parts_of_the_data_hold_each_image_once() -> None:
    digits = load_digits_data()
    sizes = [len(classes) for _, classes in (digits.train, digits.validation, digits.test)]
    assert sizes == [1000, 297, 500]


def test_a_tenth_of_the_labels_of_each_class_is_kept_and_the_rest_is_left_out() -> None:
    labels = torch.arange(10).repeat_interleave(20)
    kept = hide_labels(labels, 0.1, seed=3)
    shown = kept != UNLABELLED
    assert torch.equal(kept[shown].bincount(), torch.full((10,), 2))
    assert torch.equal(kept[shown], labels[shown])


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated() -> None:
    module = Classifier(Student(), 0.1)
    loss = module.training_step([torch.randn(4, 1, 8, 8), torch.full((4,), UNLABELLED)], 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in module.parameters() if parameter.grad is not None)


def test_the_loss_is_the_mean_over_the_labelled_images_only() -> None:
    module = Classifier(Student().eval(), 0.1)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, UNLABELLED, 1, UNLABELLED])
    expected = torch.nn.functional.cross_entropy(module.net(images[[0, 2]]), labels[[0, 2]])
    torch.testing.assert_close(module.training_step([images, labels], 0), expected)


def made_up(validation: dict[str, float], folder: Path) -> Comparison:
    """A comparison with these validation accuracies; the student alone has the best test accuracy."""
    runs = [
        RunRecord(method, 0, {"val_accuracy": value, "test_accuracy": float(method == ALONE)}, weights=f"{index}.pt")
        for index, (method, value) in enumerate(validation.items())
    ]
    return Comparison(folder, "test_accuracy", "max", (0,), METHODS, tuple(runs))


def test_the_student_that_is_saved_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    comparison = made_up({ALONE: 0.6, METHODS[0]: 0.8, METHODS[1]: 0.7}, tmp_path)
    torch.save(Classifier(Student(), 0.1).state_dict(), tmp_path / "1.pt")
    test = (torch.randn(4, 1, 8, 8), torch.arange(4))
    assert METHODS[0] in prove_plain(tmp_path / "student.pt", comparison, test)
    Student().load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
