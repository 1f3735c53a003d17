"""Laws of the losses that compare relations, and of those on normalised features."""

from __future__ import annotations

import oracle_features
import pytest
import torch

from lightning_distill import functional, losses

pytestmark = pytest.mark.tensors

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


@pytest.mark.parametrize("seed", range(5))
def test_duplicated_examples_coincide_in_spite_of_rounding(seed: int) -> None:
    student, teacher = features(3, 4, seed=seed).repeat(2, 1), features(6, 5, seed=9)

    value = losses.RelationalLoss()(student.float(), teacher.float())

    expected = oracle_features.relational(student.numpy(), teacher.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_probabilistic_transfer_of_opposite_examples_survives_cosines_below_minus_one() -> None:
    for seed in range(50):
        vector = features(1, 1000, seed=seed).float()
        student = torch.cat([vector, -1.7 * vector]).requires_grad_()

        value = losses.ProbabilisticTransferLoss()(student, features(2, 3).float())
        value.backward()

        assert torch.isfinite(value)
        assert torch.isfinite(student.grad).all()


def test_relations_keep_their_digits_far_from_the_origin() -> None:
    student, teacher = features(5, 4).float() + 1000, features(5, 7, seed=1).float()

    for loss in (losses.RelationalLoss(), losses.CKALoss()):
        torch.testing.assert_close(loss(student, teacher), loss(student.double(), teacher.double()).float())


def test_float64_features_that_differ_in_the_tenth_digit_are_not_constant() -> None:
    student, teacher = features(5, 4), features(5, 7, seed=1)

    torch.testing.assert_close(
        losses.CKALoss()(1 + 1e-9 * student, teacher), losses.CKALoss()(student, teacher), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", [(3, 5, 2, 3), (3, 6, 5)], ids=["map", "tokens"])
def test_correlations_of_channels_ignore_scale_and_rotation_of_the_positions(shape: tuple[int, ...]) -> None:
    student, teacher = features(*shape), features(*shape, seed=1)
    rotation = torch.linalg.qr(features(6, 6, seed=2)).Q
    rotated = rotation @ student if len(shape) == 3 else (student.flatten(2) @ rotation).view(shape)

    loss = losses.InterChannelCorrelationLoss()
    torch.testing.assert_close(loss(3.0 * rotated, teacher), loss(student, teacher))


@pytest.mark.parametrize(
    "loss",
    [
        losses.NeuronSelectivityLoss(),
        losses.PatientLoss(),
        losses.PearsonFeatureLoss(),
        losses.FeatureMapTransferLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_normalised_features_ignore_the_scale_of_the_student(loss: losses.DistillationLoss) -> None:
    student, teacher = features(3, 5, 2, 3), features(3, 5, 2, 3, seed=1)

    # up to the 1e-6 beside the deviation in Pearson's
    torch.testing.assert_close(loss(30.0 * student, teacher), loss(student, teacher), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "loss", [losses.PearsonFeatureLoss(), losses.FeatureMapTransferLoss()], ids=lambda loss: type(loss).__name__
)
def test_shift_of_all_numbers_of_the_student_changes_no_score(loss: losses.DistillationLoss) -> None:
    student, teacher = features(3, 5, 2, 3), features(3, 5, 2, 3, seed=1)

    torch.testing.assert_close(loss(student + 7, teacher), loss(student, teacher))


@every_relation
def test_unequal_numbers_of_examples_raise(loss: losses.DistillationLoss) -> None:
    with pytest.raises(
        ValueError, match=r"to have the same number of examples and one inner .* but got \(2, 3\) and \(4, 3\)"
    ):
        loss(torch.ones(2, 3), torch.ones(4, 3))


def test_relational_loss_rejects_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"Expected `distance_weight` or `angle_weight` to be greater than 0"):
        losses.RelationalLoss(distance_weight=0.0, angle_weight=0.0)
    with pytest.raises(ValueError, match=r"Expected `angle_weight` to be at least 0, but got angle_weight=-1"):
        losses.RelationalLoss(angle_weight=-1)


def test_correlation_congruence_rejects_an_unknown_kernel() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `kernel` to be one of 'gaussian', 'neighbour', but got kernel='rbf'"
    ):
        losses.CorrelationCongruenceLoss(kernel="rbf")


@pytest.mark.parametrize("name", ["SimilarityPreservingLoss", "InterChannelCorrelationLoss"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_relations_of_products_ignore_an_extreme_scale(name: str, size: float) -> None:
    """The squares of the products would leave float32."""
    student, teacher = features(2, 3, 4, 5).float(), features(2, 3, 4, 5, seed=1).float()
    loss = getattr(losses, name)()

    torch.testing.assert_close(loss(size * student, teacher), loss(student, teacher))
