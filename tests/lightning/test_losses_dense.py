"""Losses on boxes, pixels and layers: published values of several inputs, laws, and the words of their errors."""

from __future__ import annotations

import pytest
import torch
from loss_case import golden_index
from published import check, entries, leaves, logits

from lightning_distill import ActivationBoundaryLoss, LocalizationLoss, SolutionFlowLoss, functional

pytestmark = pytest.mark.tensors


@pytest.mark.parametrize(
    "entry",
    [
        entry
        for key in ("localization_kd", "localization_kd_paper")
        for entry in golden_index(key)
        if "weight" in entry["arrays"]
    ],
    ids=lambda entry: entry["key"],
)
def test_edges_weighted_by_the_score_of_their_box(entry: dict) -> None:
    """The reference takes the mean over the bins too; the paper's, ``localization_kd_paper``, is their sum."""
    tensors, settings = leaves(entry), entry["hyperparameters"]
    student, teacher = (tensors[f"{side}_logits"] for side in ("student", "teacher"))
    bins = student.shape[-1]
    values = functional.localization(student.view(-1, 4, bins), teacher.view(-1, 4, bins), temperature=settings["T"])

    total = (values.flatten() * tensors["weight"]).sum() / settings["avg_factor"] * settings["loss_weight"]

    check(total / bins if entry["key"] == "localization_kd" else total, entry, tensors)


def test_boxes_of_a_map_are_those_of_its_rows() -> None:
    """With a mask of the positions."""
    student, teacher = logits(5, 2, 4 * 3, 2, 2)
    boxes = [bins.unflatten(1, (4, -1)).movedim((1, 2), (-2, -1)) for bins in (student, teacher)]
    mask = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5

    value = LocalizationLoss(3.0, bins=3)(student, teacher, mask=mask)

    expected = functional.soft_target_kl(boxes[0][mask], boxes[1][mask], temperature=3.0, reduction="mean")
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            ((2, 4, 5), (2, 4, 6)),
            r"`student_bins` and `teacher_bins` to have equal shapes, but got .* boxes and bins\.",
        ),
        (
            ((8, 5), (8, 5)),
            r"2 bins or more for each of 4 edges, shape \(N, \.\.\., 4, B\), but got shape \(8, 5\)\. Pass bins",
        ),
        (((2, 20, 4, 3), (2, 20, 4, 1)), r"`student_bins` and `teacher_bins` to have equal shapes"),
        (
            ((2, 12, 5, 5), (2, 12, 5, 5)),
            r"2 bins or more for each of 4 edges, .* but got shape \(2, 12, 5, 5\)\. Pass bins=",
        ),
    ],
    ids=["bins", "rows", "one bin", "map"],
)
def test_bins_that_are_not_those_of_boxes_raise(shapes: tuple[tuple[int, ...], tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LocalizationLoss()(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_masked_pixels_are_as_if_they_were_cut_out_of_every_image(kind: str) -> None:
    student, teacher = logits(6, 3, 4, 2, 3) if kind == "pixels" else logits(6, 3, 6, 4)
    kept = torch.tensor([True, False, True, True, False, True])
    mask = kept.expand(3, 6).view(3, 2, 3) if kind == "pixels" else kept.expand(3, 6)
    flat = [feature.flatten(2).mT if kind == "pixels" else feature for feature in (student, teacher)]

    value = functional.pixel_relation(student, teacher, temperature=0.5, mask=mask)

    expected = functional.pixel_relation(*(feature[:, kept] for feature in flat), temperature=0.5)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "entry", [entry for entry in golden_index("ab") if entry["case"] == "s2"], ids=lambda e: e["case"]
)
def test_activation_boundaries_of_two_layers_are_a_weighted_sum_in_the_reference(entry: dict) -> None:
    """It adds over the units, times 3 / 1000, and halves each layer before the last."""
    tensors = leaves(entry)

    value = 0.0
    for layer, share in enumerate((0.5, 1.0)):
        student, teacher = tensors[f"student_{layer}"], tensors[f"teacher_{layer}"]
        value += share * 3e-3 * student[0].numel() * ActivationBoundaryLoss()(student, teacher)

    check(value, entry, tensors)


def test_the_sign_of_the_student_is_all_that_counts_beyond_the_margin() -> None:
    student, teacher = torch.tensor([[1.5, -40.0, 1.0]]), torch.tensor([[0.01, -7.0, 3.0]])

    assert ActivationBoundaryLoss()(student, teacher) == 0
    assert ActivationBoundaryLoss()(-student, teacher) > 1


@entries("fsp")
def test_flow_between_two_layers_equals_the_published_implementation(entry: dict) -> None:
    """In case s2 the first map is larger: it is averaged down."""
    tensors = leaves(entry)
    student, teacher = ([tensors[f"{side}_{layer}"] for layer in range(2)] for side in ("student", "teacher"))

    check(SolutionFlowLoss()(student, teacher), entry, tensors)


def test_flow_through_three_layers_is_the_sum_of_two_flows() -> None:
    student, teacher = (list(feature.split((2, 3, 4), dim=1)) for feature in logits(7, 2, 9, 3, 3))

    value = functional.solution_flow(student, teacher)

    torch.testing.assert_close(
        value, functional.solution_flow(student[:2], teacher[:2]) + functional.solution_flow(student[1:], teacher[1:])
    )


def test_flow_needs_no_equal_positions_of_student_and_teacher() -> None:
    student, teacher = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 3, 3)

    assert SolutionFlowLoss()([student, student], [teacher, teacher]) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ([(2, 3, 4, 4)], [(2, 3, 4, 4)], r"to be lists of as many features, at least 2, but got 1 and 1\. Name two"),
        ([(2, 3, 4, 4)] * 2, [(2, 3, 4, 4)] * 3, r"to be lists of as many features, at least 2, but got 2 and 3\."),
        ([(2, 3, 4, 4)] * 2, [(2, 3, 4, 4), (2, 5, 4, 4)], r"have equal shapes, but got .* teacher's channels with ad"),
        ([(2, 3), (2, 3)], [(2, 3), (2, 3)], r"to be maps \(N, C, H, W\) or tokens \(N, L, C\) of the same examples"),
        ([(2, 4, 3), (2, 5, 3)], [(2, 4, 3), (2, 4, 3)], r"the same positions, or to be maps .* but got 4 and 5 pos"),
    ],
    ids=["one layer", "lengths", "channels", "vectors", "tokens"],
)
def test_layers_between_which_nothing_flows_raise(student: list, teacher: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SolutionFlowLoss()([torch.ones(shape) for shape in student], [torch.ones(shape) for shape in teacher])


@pytest.mark.parametrize("margin", [0, -1.0])
def test_a_bad_margin_raises(margin: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected `margin` to be greater than 0, but got margin={margin}\."):
        ActivationBoundaryLoss(margin=margin)


def test_edges_and_bins_of_rows_may_share_a_dimension() -> None:
    student, teacher = logits(5, 2, 7, 4 * 3)

    value = LocalizationLoss(bins=3)(student, teacher)

    torch.testing.assert_close(value, LocalizationLoss()(student.view(2, 7, 4, 3), teacher.view(2, 7, 4, 3)))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 12, 4, 4), r"to have 4 bins for each of 4 edges in dimension 1, but got shape \(2, 12, 4, 4\)\."),
        ((2, 12), r"to have 4 bins for each of 4 edges in dimension 1, but got shape \(2, 12\)\."),
    ],
)
def test_other_numbers_of_bins_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LocalizationLoss(bins=4)(torch.ones(shape), torch.ones(shape))


def test_one_bin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `bins` to be at least 2, but got bins=1\."):
        LocalizationLoss(bins=1)


@pytest.mark.parametrize("entry", golden_index("cross_kd"), ids=lambda entry: entry["case"])
def test_quality_focal_loss_equals_the_published_implementation_with_weights_of_places(entry: dict) -> None:
    tensors, settings = leaves(entry), entry["hyperparameters"]
    rows = functional.quality_focal(tensors["student_logits"], tensors["teacher_logits"], power=settings["beta"])

    classes = tensors["student_logits"].shape[1]
    if settings["avg_factor"] is None:
        total = settings["loss_weight"] * rows.mean()
    else:
        weights = tensors["weight"]
        total = settings["loss_weight"] * classes * (rows * weights).sum() / settings["avg_factor"]

    check(total, entry, tensors)
