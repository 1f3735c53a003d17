"""Laws, edges and errors of the further losses on the models' outputs that no other loss shares."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_distill import functional, losses

pytestmark = pytest.mark.tensors

seeds = st.integers(0, 10_000)


def logits(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher


@given(seed=seeds)
def test_reverse_divergence_is_the_forward_one_with_the_models_exchanged(seed: int) -> None:
    student, teacher = logits(seed, 3, 4)

    forward = functional.soft_target_kl(teacher, student, temperature=1.0)
    torch.testing.assert_close(functional.reverse_kl(student, teacher), forward)


@given(seed=seeds, beta=st.floats(0.01, 0.99))
def test_generalized_jsd_is_bounded_by_the_entropy_of_the_mixing(seed: int, beta: float) -> None:
    student, teacher = logits(seed, 3, 4)

    value = functional.generalized_jsd(10 * student, 10 * teacher, beta=beta)

    assert (value <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-9).all()


@given(seed=seeds)
def test_generalized_jsd_at_one_half_is_symmetric(seed: int) -> None:
    student, teacher = logits(seed, 3, 4)

    torch.testing.assert_close(
        functional.generalized_jsd(student, teacher), functional.generalized_jsd(teacher, student)
    )


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_generalized_jsd_over_its_weight_tends_to_the_divergence_that_its_end_stands_for(beta: float) -> None:
    student, teacher = logits(0, 3, 4)

    near = functional.generalized_jsd(student, teacher, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(
        near, functional.generalized_jsd(student, teacher, beta=round(beta)), rtol=1e-3, atol=1e-6
    )


@given(seed=seeds, skew=st.floats(0.01, 0.99))
def test_skew_divergences_are_at_most_minus_the_logarithm_of_the_skew(seed: int, skew: float) -> None:
    student, teacher = (10 * tensor for tensor in logits(seed, 3, 4))

    for function in (functional.skew_kl, functional.skew_reverse_kl):
        assert (function(student, teacher, skew=skew) <= -math.log(skew) + 1e-9).all()


def test_without_skew_the_divergences_are_the_plain_ones() -> None:
    student, teacher = logits(0, 3, 4)

    forward = functional.soft_target_kl(student, teacher, temperature=1.0)
    torch.testing.assert_close(functional.skew_kl(student, teacher, skew=0.0), forward)
    reverse = functional.reverse_kl(student, teacher)
    torch.testing.assert_close(functional.skew_reverse_kl(student, teacher, skew=0.0), reverse)


def test_total_variation_of_certain_models_that_disagree_is_one() -> None:
    value = functional.total_variation(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))

    assert value.tolist() == [1.0]


@given(seed=seeds)
def test_total_variation_bounds_the_divergence_from_below(seed: int) -> None:
    student, teacher = logits(seed, 3, 4)

    # Pinsker's inequality.
    bound = 2 * functional.total_variation(student, teacher).square()
    assert (functional.reverse_kl(student, teacher) >= bound - 1e-12).all()


@pytest.mark.parametrize("function", [functional.reverse_kl, functional.generalized_jsd, functional.total_variation])
def test_divergences_have_no_factor_of_the_temperature(function: object) -> None:
    student, teacher = logits(0, 3, 4)

    torch.testing.assert_close(function(student, teacher, temperature=2.0), function(student / 2, teacher / 2))


def test_relations_of_rows_and_of_columns_are_the_two_parts_of_the_dist_loss() -> None:
    student, teacher = logits(0, 4, 5)

    inter = functional.inter_class_relation(student, teacher, temperature=2.0)
    intra = functional.intra_class_relation(student, teacher, temperature=2.0)

    assert inter.shape == (4,)
    torch.testing.assert_close(inter.mean(), losses.DISTLoss(2.0, inter_weight=1.0, intra_weight=0.0)(student, teacher))
    torch.testing.assert_close(intra, losses.DISTLoss(2.0, inter_weight=0.0, intra_weight=1.0)(student, teacher))


def test_dist_is_next_to_zero_with_next_to_no_gradient_at_the_teacher() -> None:
    student = logits(0, 4, 5)[0].requires_grad_()

    value = losses.DISTLoss()(student, student.detach().clone())
    value.backward()

    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_soft_targets_are_least_at_the_teacher_where_they_are_its_entropy(temperature: float) -> None:
    teacher = logits(0, 4, 5)[1]
    student = teacher.clone().requires_grad_()

    value = losses.BinarySoftTargetLoss(temperature)(student, teacher)
    value.backward()

    entropies = torch.distributions.Bernoulli(logits=teacher / temperature).entropy()
    torch.testing.assert_close(value.detach(), temperature**2 * entropies.mean())
    assert student.grad.abs().max() < 1e-12


def test_weighted_soft_labels_have_no_gradient_at_the_teacher() -> None:
    teacher = logits(0, 4, 5)[1]
    student = teacher.clone().requires_grad_()

    losses.WeightedSoftLabelLoss()(student, teacher, torch.tensor([0, 4, 2, 1])).backward()

    assert student.grad.abs().max() < 1e-12


def test_divergences_give_one_value_per_row() -> None:
    student, teacher = logits(0, 2, 3, 4, 5)
    for name in ("reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "total_variation"):
        assert getattr(functional, name)(student, teacher, class_dim=1).shape == (2, 4, 5)


def test_compiled_divergences_follow_a_changed_share() -> None:
    student, teacher = logits(0, 3, 4)
    for loss, setting in ((losses.GeneralizedJSDLoss(), "beta"), (losses.SkewKLLoss(), "skew")):
        torch.compiler.reset()
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        for share in (0.5, 0.3, 0.2, 0.0):
            setattr(loss, setting, share)
            torch.testing.assert_close(compiled(student, teacher), type(loss)(**{setting: share})(student, teacher))


@pytest.mark.parametrize(
    ("loss", "settings", "error", "words"),
    [
        ("GeneralizedJSDLoss", {"beta": 1.5}, ValueError, r"Expected `beta` to be from 0 to 1, but got beta=1\.5\."),
        ("GeneralizedJSDLoss", {"beta": "1"}, TypeError, r"Expected `beta` to be an int or a float, but got beta='1'"),
        ("SkewKLLoss", {"skew": 1.0}, ValueError, r"Expected `skew` to be at least 0 and less than 1, but got skew=1"),
        ("SkewKLLoss", {"skew": -0.1}, ValueError, r"Expected `skew` to be at least 0 and less .* but got skew=-0\.1"),
        ("SkewKLLoss", {"reverse": 1}, TypeError, r"Expected `reverse` to be True or False, but got reverse=1\."),
        ("ReverseKLLoss", {"temperature": 0}, ValueError, r"Expected `temperature` to be greater than 0, but got"),
        ("TotalVariationLoss", {"class_dim": 0}, ValueError, r"Expected `class_dim` to be other than the batch"),
    ],
)
def test_bad_settings_raise_in_the_constructor(loss: str, settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(losses, loss)(**settings)


LABELLED = {"DecoupledKDLoss", "MinifinetuningLoss", "NormalizedKDLoss", "WeightedSoftLabelLoss"}
labelled_losses = pytest.mark.parametrize("name", sorted(LABELLED))


def test_the_losses_that_need_labels_say_so() -> None:
    assert {name for name in losses.__all__ if getattr(losses, name).needs_labels} == LABELLED


@given(seed=seeds, temperature=st.floats(0.5, 10))
def test_decoupled_parts_weighted_as_in_the_paper_make_the_plain_divergence(seed: int, temperature: float) -> None:
    student, teacher = logits(seed, 1, 5)
    others = 1 - (teacher / temperature).softmax(dim=-1)[0, 2].item()

    value = functional.decoupled_kd(
        student, teacher, torch.tensor([2]), nontarget_weight=others, temperature=temperature
    )

    torch.testing.assert_close(value, functional.soft_target_kl(student, teacher, temperature=temperature))


def test_decoupled_loss_of_two_classes_is_the_plain_divergence() -> None:
    student, teacher = logits(0, 4, 2)

    value = functional.decoupled_kd(student, teacher, torch.tensor([0, 1, 1, 0]))

    torch.testing.assert_close(value, functional.soft_target_kl(student, teacher))


@labelled_losses
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_for_every_label_where_the_models_are_certain(name: str, classes: int, dtype: torch.dtype) -> None:
    extreme = (torch.eye(classes) * 2e4 - 1e4).to(dtype)
    student = extreme.repeat_interleave(classes**2, 0).requires_grad_()
    teacher = extreme.repeat_interleave(classes, 0).repeat(classes, 1)
    labels = torch.arange(classes).repeat(classes**2)

    value = getattr(losses, name)()(student, teacher, labels)
    value.backward()

    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@given(seed=seeds)
def test_normalized_others_do_not_depend_on_the_logit_of_the_target(seed: int) -> None:
    student, teacher = logits(seed, 1, 5)
    labels = torch.tensor([3])
    moved = student + 7 * torch.eye(5, dtype=torch.float64)[3]

    def others(logits: torch.Tensor) -> torch.Tensor:
        plain = functional.normalized_kd(logits, teacher, labels, nontarget_weight=0.0)
        return functional.normalized_kd(logits, teacher, labels, temperature=2.0) - plain

    torch.testing.assert_close(others(moved), others(student))


def test_soft_labels_weigh_nothing_where_the_student_is_certain_and_right() -> None:
    student = torch.tensor([[100.0, 0.0], [0.0, 100.0]])

    value = functional.weighted_soft_labels(student, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))

    assert value[0].item() == 0
    assert value[1].item() > 0


@labelled_losses
def test_labels_may_be_narrow_integers_and_stand_beside_dense_maps(name: str) -> None:
    student, teacher = logits(0, 2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, 1]], [[1, 0], [0, 2]]])
    loss = getattr(losses, name)

    dense = loss(class_dim=1)(student, teacher, labels.to(torch.uint8))
    rows = loss()(*(tensor.movedim(1, -1).reshape(-1, 3) for tensor in (student, teacher)), labels.flatten())

    torch.testing.assert_close(dense, rows)


@labelled_losses
@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.ones(2, 3), TypeError, r"Expected `labels` to hold class indices, but got a tensor of torch\.float32\."),
        (torch.ones(2, dtype=torch.bool), TypeError, r"`labels` to hold class indices, but got .* Pass class indices;"),
        (torch.ones(2, 3, dtype=torch.int64), ValueError, r"one class .* shape \(2,\), but got shape \(2, 3\)\. Pass"),
        ([0, 1], TypeError, r"Expected `labels` to be a tensor of class indices, but got a list\."),
    ],
    ids=["mixed", "bools", "one-hot", "list"],
)
def test_labels_that_are_not_class_indices_raise(name: str, labels: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(losses, name)()(torch.ones(2, 3), torch.zeros(2, 3), labels)


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        ("DecoupledKDLoss", "target_weight"),
        ("DecoupledKDLoss", "nontarget_weight"),
        ("NormalizedKDLoss", "nontarget_weight"),
    ],
)
def test_negative_weights_raise(loss: str, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{setting}` to be at least 0, but got {setting}=-1"):
        getattr(losses, loss)(**{setting: -1})
