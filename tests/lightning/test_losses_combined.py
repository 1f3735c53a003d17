"""Published values of losses that the reference makes from several inputs of the student, and laws of these losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from published import check, entries, leaves, logits
from torch import Tensor, nn

from lightning_distill import (
    AlphaBetaLoss,
    Distiller,
    HardTargetLoss,
    ListwiseKLLoss,
    LogitsDistillation,
    MarginMSELoss,
    MinifinetuningLoss,
    SoftTargetLoss,
    TAIDLoss,
    functional,
)
from lightning_distill.schedules import Progress, Schedule

pytestmark = pytest.mark.tensors


# A class head and a distillation head -----------------------------------------------------------------------------


@entries("deit_hard")
def test_hard_targets_for_the_distillation_head_beside_the_task_loss_of_the_other(entry: dict) -> None:
    tensors, share = leaves(entry), entry["hyperparameters"]["alpha"]
    task = F.cross_entropy(tensors["student_logits"], tensors["labels"])
    distilled = HardTargetLoss()(tensors["student_dist_logits"], tensors["teacher_logits"])

    check((1 - share) * task + share * distilled, entry, tensors)


@entries("deit_soft", "deit_soft_paper")
def test_soft_targets_for_the_distillation_head_are_over_the_number_of_classes_in_the_reference(entry: dict) -> None:
    """Its mean is over the classes too; the paper's, ``deit_soft_paper``, is not."""
    tensors, settings = leaves(entry), entry["hyperparameters"]
    task = F.cross_entropy(tensors["student_logits"], tensors["labels"])
    loss = SoftTargetLoss(temperature=settings["tau"])
    factor = 1 / tensors["teacher_logits"].shape[1] if entry["key"] == "deit_soft" else 1.0
    distilled = factor * loss(tensors["student_dist_logits"], tensors["teacher_logits"])

    check((1 - settings["alpha"]) * task + settings["alpha"] * distilled, entry, tensors)


def test_a_term_compares_the_distillation_head_of_a_student_with_two_heads() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(head(x) for head in self.heads)

    student, teacher, x = TwoHeads(), nn.Linear(4, 3), torch.randn(5, 4)
    distiller = Distiller(student, teacher, LogitsDistillation(HardTargetLoss(), output=(1, None)))

    with distiller.record():
        first, second = student(x)
    distiller.total(0.0 * first.sum()).backward()

    expected = F.cross_entropy(second, teacher(x).argmax(-1))
    assert distiller.parts["distillation_loss"].item() == pytest.approx(expected.item())
    assert (student.heads[0].weight.grad == 0).all()
    assert student.heads[1].weight.grad.abs().max() > 0


# Candidates of a query --------------------------------------------------------------------------------------------


def scores_of(query: Tensor, candidates: Tensor, similarity: str) -> Tensor:
    """Scores of each query's candidates, shape (N, K)."""
    if similarity == "cos":
        query, candidates = F.normalize(query, dim=-1), F.normalize(candidates, dim=-1)
    return torch.einsum("nd,nkd->nk", query, candidates)


@entries("margin_mse")
def test_margins_from_the_embeddings_of_a_dense_retriever(entry: dict) -> None:
    tensors = leaves(entry)
    candidates = torch.cat([tensors["student_positive"][:, None], tensors["student_negatives"]], dim=1)
    student = scores_of(tensors["student_query"], candidates, entry["hyperparameters"]["similarity"])
    if "teacher_scores" in tensors:
        teacher = tensors["teacher_scores"]
    else:  # margins to one negative candidate
        teacher = torch.stack([tensors["teacher_margins"], torch.zeros_like(tensors["teacher_margins"])], dim=1)

    check(MarginMSELoss()(student, teacher), entry, tensors)


@entries("distill_kl")
def test_divergence_over_the_candidates_from_the_embeddings_of_a_dense_retriever(entry: dict) -> None:
    tensors, settings = leaves(entry), entry["hyperparameters"]
    student = scores_of(tensors["student_query"], tensors["student_candidates"], settings["similarity"])
    loss = ListwiseKLLoss(
        student_temperature=settings["student_temperature"], teacher_temperature=settings["teacher_temperature"]
    )

    check(loss(student, tensors["teacher_scores"]), entry, tensors)


@pytest.mark.parametrize("function", [functional.margin_mse, functional.listwise_kl], ids=lambda each: each.__name__)
def test_a_number_added_to_all_scores_of_a_query_changes_nothing(function: object) -> None:
    student, teacher = logits(0, 4, 5)

    torch.testing.assert_close(function(student + 7, teacher - 3), function(student, teacher))


def test_a_candidate_that_is_impossible_to_both_models_is_left_out() -> None:
    student, teacher = logits(1, 3, 4)
    padding = torch.full((3, 1), -math.inf, dtype=torch.float64)

    padded = functional.listwise_kl(torch.cat([student, padding], 1), torch.cat([teacher, padding], 1))
    torch.testing.assert_close(padded, functional.listwise_kl(student, teacher))


@pytest.mark.parametrize("loss", [MarginMSELoss(), ListwiseKLLoss()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((4, 5), (4, 6)), r"`student_scores` and `teacher_scores` to have equal shapes, but got .* same candidates\."),
        (((20, 1), (20, 1)), r"a row for each query with 2 candidates or more, shape \(N, K\), but got .* Reshape the"),
        (((20,), (20,)), r"a row for each query with 2 candidates or more, shape \(N, K\), but got shape \(20,\)\."),
    ],
    ids=["unequal", "one candidate", "flat"],
)
def test_scores_that_are_not_rows_of_candidates_raise(
    loss: nn.Module, shapes: tuple[tuple[int, ...], tuple[int, ...]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
def test_a_temperature_of_a_list_of_candidates_is_greater_than_zero(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be greater than 0, but got {name}=0\."):
        ListwiseKLLoss(**{name: 0})


# The alpha-beta divergence ----------------------------------------------------------------------------------------


def test_alpha_beta_divergence_holds_the_divergences_that_are_named_after_others() -> None:
    student, teacher = logits(2, 4, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)

    for exponents, expected in (
        ((1.0, 0.0), functional.soft_target_kl(student, teacher, temperature=1.0)),
        ((0.0, 1.0), functional.reverse_kl(student, teacher)),
        ((1.0, 1.0), 0.5 * (p - q).square().sum(-1)),
        ((0.5, 0.5), 2 * (p.sqrt() - q.sqrt()).square().sum(-1)),
    ):
        alpha, beta = exponents
        torch.testing.assert_close(functional.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta), expected)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.6), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0)])
def test_alpha_beta_divergence_has_no_jump_at_its_limits(alpha: float, beta: float) -> None:
    student, teacher = logits(3, 4, 5)

    near = functional.alpha_beta_divergence(student, teacher, alpha=alpha + 1e-5, beta=beta + 1e-5)
    at = functional.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    torch.testing.assert_close(near, at, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_exponents_are_finite_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be finite, but got {name}=inf\."):
        AlphaBetaLoss(**{name: math.inf})
    with pytest.raises(TypeError, match=rf"Expected `{name}` to be an int or a float, but got {name}='1'\."):
        AlphaBetaLoss(**{name: "1"})


# A target that moves ----------------------------------------------------------------------------------------------


@entries("taid", "taid_paper")
def test_interpolated_divergence_is_the_published_cross_entropy_without_the_entropy_of_the_target(entry: dict) -> None:
    tensors = leaves(entry)
    tensors["loss"] = tensors.get("loss_true_kl", tensors["loss"])  # the paper's, stored beside the reference's own

    value = functional.interpolated_kl(
        tensors["student_logits"],
        tensors["teacher_logits"],
        interpolation=float(tensors["t"]),
        mask=tensors["mask"] != 0,
        reduction="mean",
    )

    check(value, entry, tensors)


@entries("taid", "taid_paper")
def test_the_ramp_is_the_line_that_the_published_schedule_never_falls_below(entry: dict) -> None:
    """Its adaptive update, which is left out, moves ahead of the line."""
    tensors, settings = leaves(entry), entry["hyperparameters"]
    ramp = TAIDLoss(start=settings["t_start"], end=settings["t_end"]).schedules["interpolation"]

    for step, share in zip(tensors["update_global_steps"][1:], tensors["update_t_after"][1:], strict=True):
        line = ramp.at(Progress(fraction=float(step) / settings["num_train_steps"]))
        expected = settings["t_start"] + (settings["t_end"] - settings["t_start"]) * step / settings["num_train_steps"]
        assert line == pytest.approx(float(expected))
        assert line <= share + 1e-12


def test_the_share_of_the_teacher_grows_with_the_training_and_is_logged() -> None:
    student, teacher, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    distiller = Distiller(student, teacher, LogitsDistillation(TAIDLoss(start=0.2, end=0.8)), task_weight=0.0)

    for fraction, share in ((0.0, 0.2), (0.5, 0.5), (1.0, 0.8)):
        distiller.advance(0, epoch=0, fraction=fraction)
        with distiller.record():
            output = student(x)
        value = distiller.total(output.sum())
        expected = functional.interpolated_kl(output, teacher(x), interpolation=share, reduction="mean")
        torch.testing.assert_close(value, expected)
        assert distiller.terms[0].loss.interpolation == pytest.approx(share)


def test_a_number_takes_the_place_of_the_ramp() -> None:
    loss = TAIDLoss()
    loss.interpolation = 0.7
    assert loss.schedules == {}
    loss.interpolation = Schedule(lambda step: 0.5, over="steps")
    assert loss.interpolation == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 0.0}, r"Expected `start` to be greater than 0, but got start=0\.0\."),
        ({"end": 1.5}, r"Expected `end` to be from 0 to 1, but got end=1\.5\."),
        ({"over": "steps"}, r"Expected `duration` to be given in steps, but got duration=None\."),
        ({"duration": 0}, r"Expected `duration` to be greater than 0, but got duration=0\."),
        ({"over": "weeks"}, r"Expected `over` to be one of 'steps', 'epochs', 'fraction', but got over='weeks'\."),
    ],
)
def test_a_bad_ramp_raises(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TAIDLoss(**settings)


def test_no_gradient_passes_through_the_target() -> None:
    student, teacher = logits(4, 3, 5)
    student.requires_grad_()

    functional.interpolated_kl(student, teacher, interpolation=0.6).sum().backward()

    target = (0.4 * student.detach() + 0.6 * teacher).softmax(-1)
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - target)


# A teacher that is corrected --------------------------------------------------------------------------------------


@entries("mft")
def test_corrected_targets_are_the_published_ones_up_to_the_number_in_their_divisors(entry: dict) -> None:
    tensors, settings = leaves(entry), entry["hyperparameters"]
    student, teacher = (tensors[f"{side}_logits"].flatten(0, -2) for side in ("student", "teacher"))
    loss = MinifinetuningLoss(settings["temperature"], threshold=settings["threshold"])

    check(loss(student, teacher, tensors["labels"]), entry, tensors, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label", [0, 1, 2], ids=["right", "wrong", "far away"])
def test_the_label_leads_by_the_threshold_in_a_corrected_target(label: int) -> None:
    teacher = torch.tensor([[0.5, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)

    functional.minifinetuning(student, teacher, torch.tensor([label]), threshold=0.2).sum().backward()

    corrected = 1 / 3 - student.grad[0]
    rest = [index for index in range(3) if index != label]
    # over the teacher's own choice; where that is the label, over its probability before
    lead = corrected[label] - (corrected[0] if label else 0.5)
    assert lead.item() == pytest.approx(0.2)
    ratio = teacher[0, rest].exp()
    torch.testing.assert_close(corrected[rest] / corrected[rest].sum(), ratio / ratio.sum())


def test_a_teacher_that_is_certain_of_the_label_leaves_the_cross_entropy() -> None:
    student = torch.randn(2, 3)
    teacher = torch.tensor([[200.0, 0.0, 0.0], [2.5, 0.0, 0.0]])  # certain, and surer than 1 - threshold

    value = functional.minifinetuning(student, teacher, torch.tensor([0, 0]), threshold=0.5)

    torch.testing.assert_close(value, F.cross_entropy(student, torch.tensor([0, 0]), reduction="none"))


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_bad_threshold_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected `threshold` to be .* but got threshold={threshold}"):
        MinifinetuningLoss(threshold=threshold)
