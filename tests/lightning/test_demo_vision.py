"""The demonstration on images: its images, its networks, its files, and that its verdict follows from its numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_demo import Outcome, outcome_of
from rich.console import Console
from rich.progress import Progress

pytest.importorskip("sklearn", reason="the demo takes its images from scikit-learn: install the extra `plots`")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib: install the extra `plots`")

from distill_core.cli.lightning import main
from lightning_distill.demo.vision import QUICK, run
from lightning_distill.demo.vision.images import CLASSES, Images, load_images
from lightning_distill.demo.vision.networks import Student, Transformer, described, pooled, probe
from lightning_distill.demo.vision.report import closing, colors, table
from lightning_distill.demo.vision.training import ALONE, DISTILLED, STUDENTS, TEACHER, UNTRAINED, Results, Run, distil
from lightning_distill.guidance.runs import quiet


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(run, tmp_path_factory.mktemp("demo"), "vision.json")


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images(QUICK.copies, QUICK.digits)


def made_up(shares: dict[str, list[float]]) -> list[Run]:
    """Runs of all methods with two labels, with these shares by method and seed."""
    return [
        Run(method, 2, seed, 10, 5, share)
        for method in (TEACHER, *STUDENTS)
        for seed, share in enumerate(shares.get(method, [0.5, 0.5]))
    ]


# The images ----------------------------------------------------------------------------------------------------------


def test_images_have_colours_from_0_to_1_and_are_the_same_in_every_call(images: Images) -> None:
    again = load_images(QUICK.copies, QUICK.digits)
    for name, count in (("train", 180), ("test", 60)):
        shown, classes = getattr(images, name)
        assert shown.shape == (count, 3, 24, 24)
        assert classes.shape == (count,)
        assert 0 <= shown.min() < 0.1 < 0.9 < shown.max() <= 1
        assert torch.equal(shown, getattr(again, name)[0])


def test_copies_of_a_digit_stand_in_front_of_different_crops() -> None:
    shown, classes = load_images(copies=2, digits=40).train
    assert torch.equal(classes[:30], classes[30:])
    assert (shown[:30] - shown[30:]).abs().mean((1, 2, 3)).min() > 0


def test_more_labels_contain_the_fewer_and_every_class_has_as_many(images: Images) -> None:
    few, more = images.few(2, seed=3), images.few(5, seed=3)
    assert torch.bincount(few[1]).tolist() == [2] * CLASSES
    assert torch.bincount(more[1]).tolist() == [5] * CLASSES
    assert all(any(torch.equal(image, other) for other in more[0]) for image in few[0])
    assert not torch.equal(few[0], images.few(2, seed=4)[0])


# The networks --------------------------------------------------------------------------------------------------------


def test_the_features_of_the_transformer_are_its_patches_in_their_places(images: Images) -> None:
    net, image = Transformer(8, 1).eval(), images.test[0][:1]
    tokens, maps = net.tokens(image), net.features(image)
    assert maps.shape == (1, 8, 6, 6)
    torch.testing.assert_close(maps[0, :, 1, 2], tokens[0, 1 + 6 + 2])


def test_the_student_has_maps_of_the_same_grid(images: Images) -> None:
    net = Student(4)
    assert net.features(images.test[0]).shape == (60, 8, 6, 6)
    assert net(images.test[0]).shape == (60, CLASSES)


def test_features_are_pooled_over_squares_of_four_positions() -> None:
    maps = torch.arange(36.0).view(1, 1, 6, 6)
    assert pooled(maps).tolist() == [[3.5, 5.5, 7.5, 15.5, 17.5, 19.5, 27.5, 29.5, 31.5]]


def test_vectors_of_a_network_do_not_depend_on_its_mode(images: Images) -> None:
    net = Student(4).train()
    first = described(net, images.test[0])
    torch.testing.assert_close(first, described(net.train(), images.test[0]))
    assert first.shape == (60, 9 * 8)


def test_a_linear_classifier_gets_separable_vectors_right_and_others_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(400) % 4
    noise = torch.randn(400, 6, generator=generator)
    clear = noise + 10 * torch.eye(6)[classes]
    assert probe((clear[:200], clear[200:]), (classes[:200], classes[200:])) == 1.0
    assert probe((noise[:200], noise[200:]), (classes[:200], classes[200:])) < 0.4


# The whole -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_results_the_picture_and_the_student(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["vision.json", "vision.png", "vision_student.pt"]
    assert (outcome.folder / "vision.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_saved_student_has_the_accuracy_of_the_table(outcome: Outcome, images: Images) -> None:
    bare = Student(QUICK.student_width)
    bare.load_state_dict(torch.load(outcome.folder / "vision_student.pt", weights_only=True), strict=True)
    few, classes = images.few(5, seed=0)
    share = probe((described(bare, few), described(bare, images.test[0])), (classes, images.test[1]))
    (distilled,) = [result for result in outcome.runs if (result.method, result.labels) == (DISTILLED, 5)]
    assert share == distilled.test
    assert f"{100 * share:.1f}" in outcome.printed


def test_the_table_has_a_row_for_each_method_and_the_students_equal_steps(outcome: Outcome) -> None:
    assert {result.method for result in outcome.runs} == {TEACHER, *STUDENTS}
    lines = outcome.printed.splitlines()
    assert all(any(line.startswith(f"{method} ") for line in lines) for method in (TEACHER, *STUDENTS))
    assert "…" not in outcome.printed
    steps = {result.method: result.steps for result in outcome.runs}
    assert (steps[UNTRAINED], steps[ALONE], steps[DISTILLED]) == (0, QUICK.steps, QUICK.steps)


def test_the_results_hold_settings_runs_and_sentences(outcome: Outcome) -> None:
    assert list(outcome.results) == ["settings", "teacher_accuracy", "runs", "conclusion", "seconds"]
    assert len(outcome.results["runs"]) == 4 * len(QUICK.labels)
    assert all(sentence in outcome.printed for sentence in outcome.results["conclusion"])


def test_every_network_of_the_figure_has_colours_for_its_patches(images: Images) -> None:
    torch.manual_seed(0)
    pictures = colors(Results([], Transformer(8, 1), 0.0, Student(4), Student(4)), images.test[0][:3])
    assert list(pictures) == ["teacher", "distilled", "untrained"]
    assert all(picture.shape == (3, 6, 6, 3) for picture in pictures.values())
    assert all(0 <= picture.min() <= picture.max() <= 1 for picture in pictures.values())


def test_the_distillation_brings_the_maps_closer_to_the_tokens(images: Images) -> None:
    torch.manual_seed(0)
    teacher, untrained = Transformer(8, 1), Student(4)
    with quiet(), Progress(disable=True) as progress:
        distilled = distil(untrained, teacher, images, replace(QUICK, steps=100), 0, progress)
    pictures = colors(Results([], teacher, 0.0, untrained, distilled), images.test[0])
    errors = {name: (picture - pictures["teacher"]).square().mean() for name, picture in pictures.items()}
    assert errors["distilled"] < 0.8 * errors["untrained"]


def test_the_command_finds_the_same_numbers_and_leaves_the_random_state_alone(
    outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert main(["demo", "--task", "vision", "--quick", "--output", str(tmp_path)]) == 0
    assert torch.equal(before, torch.get_rng_state())
    again = json.loads((tmp_path / "vision.json").read_text(encoding="utf-8"))
    assert [result["test"] for result in again["runs"]] == [result.test for result in outcome.runs]
    assert "Digits in front of photos" in capsys.readouterr().out


# The words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distilled", "verdict"),
    [
        ([0.7, 0.6], "better (+15.0 points)"),
        ([0.4, 0.3], "worse (-15.0 points)"),
        ([0.4, 0.7], "not clearly better or worse (+5.0 points)"),
    ],
)
def test_the_closing_sentence_follows_from_the_numbers(distilled: list[float], verdict: str) -> None:
    sentences = closing(made_up({DISTILLED: distilled, UNTRAINED: [0.2, 0.2]}))
    assert len(sentences) == 1
    assert sentences[0].startswith(
        f"With 2 labels of each class the distilled student is {verdict} than the student trained on these labels"
    )
    assert "and better (+" in sentences[0]


def test_a_single_seed_is_called_little_proof() -> None:
    assert "A single seed proves little" in closing(made_up({method: [0.5] for method in (TEACHER, *STUDENTS)}))[-1]


def test_the_table_shows_mean_and_spread_over_the_seeds() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(made_up({method: [0.5, 0.7] for method in (TEACHER, *STUDENTS)}), 60))
    assert console.file.getvalue().count("60.0 ± 14.1") == 4
