"""Laws of the losses that compare relations, and of those on normalised features."""

from __future__ import annotations

import oracle_features
import pytest
import torch

from lightning_distill import functional, losses

RELATIONS = [
    losses.CKALoss(),
    losses.CorrelationCongruenceLoss(),
    losses.ProbabilisticTransferLoss(),
    losses.RelationalLoss(),
    losses.SimilarityPreservingLoss(),
]
every_relation = pytest.mark.parametrize("loss", RELATIONS, ids=lambda loss: type(loss).__name__)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_relation
def test_rotation_and_scale_of_the_student_change_nothing(loss: losses.DistillationLoss) -> None:
    student, teacher = features(5, 4), features(5, 7, seed=1)
    rotation = torch.linalg.qr(features(4, 4, seed=2)).Q

    torch.testing.assert_close(loss(3.0 * student @ rotation, teacher), loss(student, teacher), rtol=1e-6, atol=1e-9)


@every_relation
def test_order_of_the_examples_changes_nothing(loss: losses.DistillationLoss) -> None:
    student, teacher, order = features(5, 4), features(5, 7, seed=1), torch.tensor([3, 1, 4, 0, 2])

    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@pytest.mark.parametrize("loss", [losses.CKALoss(), losses.RelationalLoss()], ids=lambda loss: type(loss).__name__)
def test_shift_of_all_examples_changes_nothing(loss: losses.DistillationLoss) -> None:
    student, teacher = features(5, 4), features(5, 7, seed=1)

    torch.testing.assert_close(loss(student + features(4, seed=2), teacher), loss(student, teacher))


def test_probabilistic_transfer_is_zero_with_next_to_no_gradient_at_the_teacher() -> None:
    student = features(5, 4).requires_grad_()

    value = losses.ProbabilisticTransferLoss()(student, student.detach().clone())
    value.backward()

    assert value.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("shape", [(3, 4, 2, 9), (3, 9, 2, 2)], ids=["fewer channels", "fewer positions"])
def test_neuron_selectivity_is_the_same_whichever_products_are_smaller(shape: tuple[int, ...]) -> None:
    student, teacher = features(*shape), features(shape[0], 5, *shape[2:], seed=1)
    units = [torch.nn.functional.normalize(f.flatten(2), dim=2) for f in (student, teacher)]
    kernels = [torch.einsum("bip,bjp->bij", a, b).square().mean((1, 2)) for a in units for b in units]

    value = functional.neuron_selectivity(student, teacher)

    torch.testing.assert_close(value, kernels[0] + kernels[3] - 2 * kernels[1])


def test_distances_beyond_the_quadratic_part_of_the_huber_function_equal_the_oracle() -> None:
    student, teacher = features(5, 4), features(5, 7, seed=1)
    student[2] += 100  # its distances are 2.5 times the mean

    value = functional.relational_distance(student, teacher)

    expected = oracle_features.relational(student.numpy(), teacher.numpy(), distance_weight=1.0, angle_weight=0.0)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_duplicated_examples_have_finite_gradients() -> None:
    student = features(3, 4).float().repeat(2, 1).requires_grad_()

    losses.RelationalLoss()(student, features(6, 5, seed=1).float()).backward()

    assert torch.isfinite(student.grad).all()


@every_relation
def test_unequal_numbers_of_examples_raise(loss: losses.DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"to have equally many examples and one inner .* but got \(2, 3\) and \(4, 3\)"
    ):
        loss(torch.ones(2, 3), torch.ones(4, 3))


def test_relational_loss_rejects_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"Expected `distance_weight` or `angle_weight` to be greater than 0"):
        losses.RelationalLoss(0.0, 0.0)
    with pytest.raises(ValueError, match=r"Expected `angle_weight` to be at least 0, but got angle_weight=-1"):
        losses.RelationalLoss(angle_weight=-1)


def test_correlation_congruence_rejects_an_unknown_kernel() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `kernel` to be one of 'gaussian', 'neighbour', but got kernel='rbf'"
    ):
        losses.CorrelationCongruenceLoss("rbf")
