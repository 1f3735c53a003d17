"""Every public loss where numbers get extreme, and the words of the errors."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from device import DEVICE
from loss_case import LossCase

from lightning_distill import functional, losses
from lightning_distill.losses import (
    AttentionTransferLoss,
    FeatureDistance,
    LogitMSELoss,
    SoftCrossEntropyLoss,
    SoftTargetLoss,
)

pytestmark = pytest.mark.tensors

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
logits_cases = pytest.mark.parametrize("case", [c for c in CASES if c.on_logits], ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)


def value_and_gradient(case: LossCase, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The value, after a check that it and the student's gradient are finite, and that the inputs are unchanged."""
    before = student, teacher
    student, teacher = student.detach().clone().requires_grad_(), teacher.clone()
    value = case.build()(student, teacher)
    value.backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert torch.isfinite(value)
    assert student.grad.dtype == student.dtype
    if case.steep and student.dtype == torch.float16:
        value_and_gradient(case, student.float(), teacher)
    else:
        assert torch.isfinite(student.grad).all()
    return value.detach()


@every_dtype
@every_case
def test_finite_where_all_numbers_are_ten_thousand(case: LossCase, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor(array).sign().to(dtype) * 1e4 for array in case.inputs())

    value_and_gradient(case, student, teacher)


@every_dtype
@logits_cases
def test_finite_for_two_classes_and_one_example_that_disagree(case: LossCase, dtype: torch.dtype) -> None:
    for size in (1.0, 1e4):
        student = torch.tensor([[size, -size]], dtype=dtype)
        if "class_dim" in case.settings:
            student = student[:, :, None, None]
        assert (value_and_gradient(case, student, -student) > 0) == case.knows_classes


@every_case
def test_finite_for_a_batch_of_one(case: LossCase) -> None:
    student, teacher = (torch.tensor(array, dtype=torch.float32)[:1] for array in case.inputs())

    value = value_and_gradient(case, student, teacher)

    # One example has no relation to others: such losses may be zero.
    assert value > 0 or (value > -1e-6 and not case.per_example)


@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678])
@every_dtype
@every_case
def test_finite_where_the_student_is_constant(case: LossCase, dtype: torch.dtype, constant: float) -> None:
    student, teacher = (torch.tensor(array).to(dtype) for array in case.inputs())

    value_and_gradient(case, torch.full_like(student, constant), teacher)
    value_and_gradient(case, student, torch.full_like(teacher, constant))
    value_and_gradient(case, torch.full_like(student, constant), torch.full_like(teacher, constant))


@pytest.mark.parametrize("size", [6e-8, 6e4])
@every_case
def test_finite_at_the_smallest_and_the_largest_float16(case: LossCase, size: float) -> None:
    student, teacher = (torch.tensor(array).sign() * size for array in case.inputs())

    value = case.build()(student.half(), teacher.half())

    assert torch.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_case
def test_half_precision_inputs_are_computed_in_float32(case: LossCase, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor(array).to(dtype) for array in case.inputs())

    value = value_and_gradient(case, student, teacher)

    assert value.dtype == torch.float32
    torch.testing.assert_close(value, case.build()(student.float(), teacher.float()))


@every_case
def test_autocast_does_not_lower_the_precision(case: LossCase) -> None:
    student, teacher = (torch.tensor(array, dtype=torch.float32) for array in case.inputs())

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = case.build()(student, teacher)

    torch.testing.assert_close(value, case.build()(student, teacher))


def test_a_double_teacher_does_not_change_the_dtype_of_the_gradient_of_a_float_student() -> None:
    student = torch.randn(2, 3, requires_grad=True)

    SoftTargetLoss()(student, torch.randn(2, 3, dtype=torch.float64)).backward()

    assert student.grad.dtype == torch.float32


def test_standardized_constant_row_gets_the_gradient_of_centred_logits() -> None:
    student = torch.full((1, 4), 3.0, requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 0.0, 5.0]])

    SoftTargetLoss(temperature=1.0, standardize=True)(student, teacher).backward()

    z_scores = (teacher - teacher.mean()) / teacher.std()
    torch.testing.assert_close(student.grad, 0.25 - z_scores.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        SoftTargetLoss(standardize=True),
        losses.DISTLoss(),
        losses.PearsonFeatureLoss(),
        losses.FeatureMapTransferLoss(),
        losses.CKALoss(),
        losses.RelationalLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_student_that_is_constant_up_to_rounding_counts_as_constant(loss: losses.DistillationLoss) -> None:
    """The means of 11 or 12 times 0.7 are not 0.7: what is left must not be divided by its own size."""
    teacher = torch.randn(11, 12)
    results = []
    for constant in (0.7, 0.0):
        student = torch.full((11, 12), constant, requires_grad=True)
        value = loss(student, teacher)
        value.backward()
        results.append((value.detach(), student.grad))

    torch.testing.assert_close(*results)
    assert results[0][1].abs().max() < 1


def test_zero_vector_counts_as_orthogonal_and_is_pulled_along_the_teacher() -> None:
    student = torch.zeros(1, 2, requires_grad=True)

    value = FeatureDistance("cosine")(student, torch.tensor([[3.0, 4.0]]))
    value.backward()

    assert value.item() == 1
    torch.testing.assert_close(student.grad, torch.tensor([[-0.6, -0.8]]))


def test_attention_transfer_survives_large_powers() -> None:
    loss = AttentionTransferLoss(p=12.0)
    student = (1e4 * torch.randn(2, 3, 4, 5)).requires_grad_()

    loss(student, 1e-4 * torch.randn(2, 8, 4, 5)).backward()

    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0


def test_attention_of_a_weak_example_survives_beside_a_strong_one() -> None:
    loss = AttentionTransferLoss(p=12.0)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    student = student * torch.tensor([1e4, 1e-2]).view(2, 1, 1, 1)

    alone = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]

    torch.testing.assert_close(loss(student, teacher), torch.stack(alone).mean())


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_attention_transfer_ignores_an_extreme_scale(size: float) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5)

    torch.testing.assert_close(
        AttentionTransferLoss()(size * student, teacher), AttentionTransferLoss()(student, teacher)
    )


def test_feature_without_inner_dimensions_is_compared_number_by_number() -> None:
    values = functional.feature_l1(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0]))

    assert values.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.0, ValueError, r"Expected `temperature` to be greater than 0, but got temperature=0\.0\."),
        (-1, ValueError, r"Expected `temperature` to be greater than 0, but got temperature=-1\."),
        (float("nan"), ValueError, r"Expected `temperature` to be finite, but got temperature=nan\."),
        (float("inf"), ValueError, r"Expected `temperature` to be finite, but got temperature=inf\."),
        (True, TypeError, r"Expected `temperature` to be an int or a float, but got temperature=True\."),
        ("4", TypeError, r"Expected `temperature` to be an int or a float, but got temperature='4'\."),
        (None, TypeError, r"Expected `temperature` to be an int or a float, but got temperature=None\."),
    ],
)
@pytest.mark.parametrize("loss", [SoftTargetLoss, SoftCrossEntropyLoss], ids=lambda loss: loss.__name__)
def test_a_bad_temperature_raises_in_the_constructor(
    loss: type[SoftTargetLoss], value: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        loss(temperature=value)


def test_a_bad_temperature_set_while_training_raises_in_the_step() -> None:
    loss = SoftTargetLoss()
    loss.temperature = 0.0

    with pytest.raises(ValueError, match=r"Expected `temperature` to be greater than 0, but got temperature=0\.0\."):
        loss(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (
            {"class_dim": 0},
            ValueError,
            r"Expected `class_dim` to be other than the batch dimension, but got class_dim=0",
        ),
        ({"class_dim": 1.0}, TypeError, r"Expected `class_dim` to be an int, but got class_dim=1\.0\."),
        ({"standardize": "no"}, TypeError, r"Expected `standardize` to be True or False, but got standardize='no'\."),
    ],
)
def test_bad_settings_of_soft_targets_raise(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SoftTargetLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"kind": "mes"}, ValueError, r"Expected `kind` to be one of 'mse', .* but got kind='mes'\. Closest: 'mse'\."),
        ({"kind": 2}, TypeError, r"Expected `kind` to be one of 'mse', .* but got kind=2\."),
        (
            {"kind": "l1", "channel_dim": 1},
            ValueError,
            r"Expected `channel_dim` to be None for kind='l1', but got channel_dim=1",
        ),
        ({"kind": "kl", "channel_dim": 0}, ValueError, r"Expected `channel_dim` to be other than the batch dimension"),
    ],
)
def test_bad_settings_of_a_feature_distance_raise(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FeatureDistance(**settings)


def test_attention_transfer_rejects_powers_below_one() -> None:
    with pytest.raises(ValueError, match=r"Expected `p` to be at least 1, but got p=0\.5\."):
        AttentionTransferLoss(p=0.5)


@logits_cases
def test_logits_of_unequal_shapes_raise_instead_of_broadcasting(case: LossCase) -> None:
    student = torch.tensor(case.inputs()[0])
    words = r"Expected `student_logits` and `teacher_logits` to have equal shapes, but got \(.*\) and \(1, .*\)\. Both"

    with pytest.raises(ValueError, match=words):
        case.build()(student, student[:1])


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1", "cosine", "kl"])
def test_features_of_unequal_shapes_raise_instead_of_broadcasting(kind: str) -> None:
    words = r"Expected `student` and `teacher` to have equal shapes, but got \(2, 3\) and \(2, 1\)\. Map .* adapter\."

    with pytest.raises(ValueError, match=words):
        FeatureDistance(kind)(torch.ones(2, 3), torch.ones(2, 1))


@pytest.mark.parametrize(
    "shapes",
    [((2, 3, 4, 4), (2, 3, 2, 2)), ((2, 3, 4, 4), (1, 3, 4, 4)), ((2, 3), (2, 3)), ((2, 3, 1, 1), (2, 5, 1, 1))],
    ids=str,
)
def test_attention_of_unequal_or_too_few_positions_raises(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    words = r"Expected .* the same examples and positions, with more than one .* but got \(2, 3.* Resize the teacher's"

    with pytest.raises(ValueError, match=words):
        AttentionTransferLoss()(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("loss", [SoftTargetLoss(), SoftCrossEntropyLoss()], ids=lambda loss: type(loss).__name__)
def test_a_softmax_over_a_single_class_raises_instead_of_teaching_nothing(loss: SoftTargetLoss) -> None:
    words = r"Expected `student_logits` to have at least 2 classes at class_dim=-1, but got shape \(4, 1\)\. Use Binary"

    with pytest.raises(ValueError, match=words):
        loss(torch.ones(4, 1), torch.ones(4, 1))


def test_a_softmax_over_a_single_channel_raises() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `student` to have at least 2 channels at dimension 1, but got shape"
    ):
        FeatureDistance("kl")(torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3))


def test_a_single_score_per_example_fits_the_mean_squared_difference() -> None:
    assert LogitMSELoss()(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])).item() == 2.5


@pytest.mark.parametrize(
    ("shape", "class_dim", "words"),
    [
        ((4,), -1, r"Expected `student_logits` to have a batch dimension and a class dimension, but got shape \(4,\)"),
        ((4, 3), 2, r"Expected `class_dim` to be a dimension of a tensor of 2 dimensions, but got class_dim=2"),
        (
            (4, 3),
            -2,
            r"Expected `class_dim` to be other than the batch dimension, but got class_dim=-2 for a tensor of 2",
        ),
    ],
)
def test_a_class_dimension_the_logits_lack_raises(shape: tuple[int, ...], class_dim: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogitMSELoss(class_dim=class_dim)(torch.ones(shape), torch.ones(shape))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (
            torch.ones(2, 3, dtype=torch.int64),
            r"Expected `teacher_logits` to be a floating .* got a tensor of torch.int64",
        ),
        ((torch.ones(2, 3),), r"Expected `teacher_logits` to be a floating point tensor, but got a tuple\."),
    ],
    ids=["integers", "tuple"],
)
def test_a_value_that_is_not_a_floating_point_tensor_raises(teacher: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        SoftTargetLoss()(torch.ones(2, 3), teacher)


KINDS = ["soft_target_kl", "soft_cross_entropy", "reverse_kl", "generalized_jsd", "skew_kl", "total_variation"]


@pytest.mark.parametrize("divergence", KINDS)
def test_a_batch_without_rows_has_no_values(divergence: str) -> None:
    student = torch.zeros(0, 5, requires_grad=True)

    values = getattr(functional, divergence)(student, torch.zeros(0, 5))
    values.sum().backward()

    assert values.shape == (0,)
    assert student.grad.shape == (0, 5)
