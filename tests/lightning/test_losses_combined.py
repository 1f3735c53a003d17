"""Published values of losses that the reference makes from several inputs of the student, and laws of these losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loss_case import golden_arrays, golden_index
from torch import Tensor, nn

from lightning_distill import (
    AlphaBetaLoss,
    Distiller,
    HardTargetLoss,
    ListwiseKLLoss,
    LogitsDistillation,
    MarginMSELoss,
    SoftTargetLoss,
    functional,
)

pytestmark = pytest.mark.tensors


def entries(*keys: str) -> pytest.MarkDecorator:
    rows = [pytest.param(entry, id=f"{entry['key']}-{entry['case']}") for key in keys for entry in golden_index(key)]
    return pytest.mark.parametrize("entry", rows)


def leaves(entry: dict) -> dict[str, Tensor]:
    tensors = {name: torch.as_tensor(array) for name, array in golden_arrays(entry).items()}
    for name in entry["student_inputs"]:
        tensors[name].requires_grad_()
    return tensors


def check(value: Tensor, entry: dict, tensors: dict[str, Tensor], **tolerance: float) -> None:
    """The value and the gradient of each of the student's inputs."""
    value.backward()
    tolerance = tolerance or entry["tolerance_suggested"]["float64"]
    torch.testing.assert_close(value.detach(), tensors["loss"], **tolerance)
    for name in entry["student_inputs"]:
        torch.testing.assert_close(tensors[name].grad, tensors[f"grad_{name}"], **tolerance)


def logits(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    student, teacher = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher


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
