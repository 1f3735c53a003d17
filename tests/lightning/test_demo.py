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

from distill_core.demo_report import FULL, METHODS, SCARCE, Run, closing, table
from lightning_distill.demo import quiet, run
from lightning_distill.demo.digits import UNLABELLED, Classifier, Student, hide_labels, load_digits_data
from lightning_distill.demo.report import prove_plain
from lightning_distill.demo.training import Settings, train_all


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"))


class Second(NamedTuple):
    """Another quick demonstration: its runs, and the state of the process after it."""

    runs: list[Run]
    same_random_state: bool
    threads: int


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Second:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    runs = run(tmp_path_factory.mktemp("second"), quick=True, console=Console(file=io.StringIO()))
    after = Second(runs, torch.equal(torch.get_rng_state(), random_state), torch.get_num_threads())
    torch.set_num_threads(threads)
    return after


def made_up(accuracies: dict[str, list[float]]) -> list[Run]:
    """A teacher's run, and for full labels the students' with these test accuracies by method and seed."""
    students = [
        Run(FULL, method, seed, 10, [0.5, value], value, value, 1.0)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return [Run(FULL, "teacher", 0, 100, [0.9], 0.9, 1.0, 5.0), *students]


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_results_the_plot_and_the_student(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["curves.png", "results.json", "student.pt"]
    assert (outcome.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_folder_is_named_at_the_end(outcome: Outcome) -> None:
    assert outcome.printed.rstrip().endswith(str(outcome.folder))


def test_the_results_hold_a_run_for_the_teacher_and_for_each_setting_and_method(outcome: Outcome) -> None:
    assert list(outcome.results) == ["settings", "runs", "saved_student", "conclusion", "seconds"]
    held = [(result["labels"], result["method"], result["seed"]) for result in outcome.results["runs"]]
    assert held == [(FULL, "teacher", 0), *((labels, method, 0) for labels in (SCARCE, FULL) for method in METHODS)]
    epochs = outcome.results["settings"]["epochs"]
    assert all(len(result["validation_accuracy"]) == epochs for result in outcome.results["runs"])
    assert all(result["step_ms"] > 0 for result in outcome.results["runs"])


def test_the_student_is_at_least_twenty_times_smaller_than_the_teacher(outcome: Outcome) -> None:
    teacher, *students = outcome.runs
    assert all(20 * result.parameters < teacher.parameters for result in students)


def test_the_saved_student_loads_strictly_into_the_bare_network_and_is_as_good_as_it_was(outcome: Outcome) -> None:
    bare = Student().eval()
    bare.load_state_dict(torch.load(outcome.folder / "student.pt", weights_only=True), strict=True)
    images, classes = load_digits_data().test
    with torch.no_grad():
        accuracy = float((bare(images).argmax(1) == classes).double().mean())
    saved = outcome.results["saved_student"]
    trained = next(
        result for result in outcome.runs if (result.labels, result.method) == (saved["labels"], saved["method"])
    )
    assert accuracy == saved["test_accuracy"] == trained.test_accuracy


def test_the_table_has_a_row_for_each_method_and_fits_80_columns(outcome: Outcome) -> None:
    rows = [line.split() for line in outcome.printed.splitlines() if line.split()[1:2] == ["%"]]
    assert [" ".join(row[2:]).split(f" {row_size(row)} ")[0] for row in rows] == ["teacher", *METHODS, *METHODS]
    assert "…" not in outcome.printed


def row_size(row: list[str]) -> str:
    """The number of parameters in a row of the table."""
    return next(word for word in row[2:] if word[0].isdigit())


def test_nothing_but_the_demonstration_itself_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        train_all(load_digits_data(), Settings(seeds=1, epochs=1, teacher_epochs=1), Console(file=io.StringIO()))
    assert capfd.readouterr() == ("", "")


def test_the_global_random_state_and_the_number_of_threads_are_left_alone(second: Second) -> None:
    assert second.same_random_state
    assert second.threads == 2


def test_a_second_demonstration_finds_the_same_accuracies(outcome: Outcome, second: Second) -> None:
    assert [replace(result, step_ms=0.0) for result in second.runs] == [
        replace(result, step_ms=0.0) for result in outcome.runs
    ]


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


@pytest.mark.parametrize(
    ("distilled", "verdict"),
    [
        ([0.7, 0.8], "distilling logits helped: +15.0 points of accuracy (better for 2 of 2 seeds)"),
        ([0.5, 0.5], "distilling logits did harm: -10.0 points of accuracy (better for 0 of 2 seeds)"),
        ([0.6, 0.8], "distilling logits made no clear difference: +10.0 points of accuracy (better for 1 of 2 seeds)"),
    ],
)
def test_the_closing_sentence_follows_from_the_numbers(distilled: list[float], verdict: str) -> None:
    alone = [0.6, 0.6]
    (sentence,) = closing(made_up({"alone": alone, "+ logits": distilled, "+ logits + features": alone}))
    assert sentence.startswith(f"With 100 % of the labels {verdict}; distilling logits and features made no clear")


def test_a_single_seed_is_called_little_proof() -> None:
    sentences = closing(made_up({method: [0.6] for method in METHODS}))
    assert "A single seed proves little" in sentences[-1]


def test_the_student_that_is_saved_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    runs = made_up({method: [0.6] for method in METHODS})
    runs[2].validation_accuracy, runs[3].test_accuracy = [0.8], 1.0
    students = {(result.labels, result.method, result.seed): Student().state_dict() for result in runs[1:]}
    test = (torch.randn(4, 1, 8, 8), torch.arange(4))
    assert prove_plain(tmp_path / "student.pt", runs, students, test)["method"] == "+ logits"


def test_the_table_shows_mean_and_spread_over_the_seeds() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(made_up({method: [0.6, 0.8] for method in METHODS})))
    assert console.file.getvalue().count("70.0 ± 14.1") == 6
