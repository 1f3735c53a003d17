"""Every public loss: value and gradient against the oracle, laws, and how a loss behaves as a module."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from loss_case import LossCase

from lightning_distill import Distiller, FeatureDistillation, LogitsDistillation, functional, losses
from lightning_distill.terms import DistillationTerm

pytestmark = pytest.mark.tensors

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
logits_cases = pytest.mark.parametrize("case", [c for c in CASES if c.on_logits], ids=lambda case: case.name)
softmax_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.on_logits and c.shift_invariant], ids=lambda case: case.name
)
finite_logits = arrays(np.float64, (2, 3, 4), elements=st.floats(-30, 30))


def test_every_public_loss_has_a_row() -> None:
    public = {getattr(losses, name) for name in losses.__all__} - {losses.DistillationLoss}
    kinds = {case.settings["kind"] for case in CASES if case.loss is losses.FeatureDistance}

    assert {case.loss for case in CASES} == public
    assert kinds == set(losses.features.DISTANCES)


def test_every_loss_class_in_the_package_is_public() -> None:
    def subclasses(loss: type) -> set[type]:
        return {loss}.union(*map(subclasses, loss.__subclasses__()))

    defined = {loss for loss in subclasses(losses.DistillationLoss) if "losses" in loss.__module__}
    bases = {base for loss in defined for base in loss.__mro__[1:]}

    assert {loss.__name__ for loss in defined - bases} == {
        name for name in losses.__all__ if name != "DistillationLoss"
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@every_case
def test_value_and_gradient_equal_the_oracle(case: LossCase, dtype: torch.dtype, tolerance: float) -> None:
    student_array, teacher_array = case.inputs()
    student = torch.tensor(student_array, dtype=dtype, requires_grad=True)

    value = case.build()(student, torch.tensor(teacher_array, dtype=dtype))
    value.backward()

    gradient = oracle.gradient(lambda moved: case.reference(moved, teacher_array, student_array), student_array)
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.item() == pytest.approx(case.reference(student_array, teacher_array), rel=tolerance)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=0, atol=tolerance * np.abs(gradient).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["float64", "float32", "float16"])
@every_case
def test_teacher_gets_no_gradient(case: LossCase, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor(array, dtype=dtype, requires_grad=True) for array in case.inputs())

    case.build()(student, teacher).backward()

    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("case", [c for c in CASES if c.per_example], ids=lambda case: case.name)
def test_loss_of_a_batch_is_the_mean_over_its_examples(case: LossCase) -> None:
    student, teacher = (torch.tensor(array) for array in case.inputs())
    loss = case.build()

    one_by_one = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(len(student))]

    torch.testing.assert_close(loss(student, teacher), torch.stack(one_by_one).mean())


@pytest.mark.parametrize("case", [c for c in CASES if c.zero_at_identity], ids=lambda case: case.name)
def test_loss_is_zero_where_student_and_teacher_are_equal(case: LossCase) -> None:
    student = torch.tensor(case.inputs()[0], requires_grad=True)

    value = case.build()(student, student.detach().clone())
    value.backward()

    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
@every_case
def test_loss_is_never_negative(case: LossCase, seed: int, scale: float) -> None:
    student, teacher = case.inputs(seed, scale)

    assert case.build()(torch.tensor(student), torch.tensor(teacher)).item() >= -1e-9


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), shift=st.floats(-100, 100))
@softmax_cases
def test_a_shift_of_all_logits_changes_nothing(case: LossCase, seed: int, shift: float) -> None:
    student, teacher = (torch.tensor(array) for array in case.inputs(seed))
    loss = case.build()

    torch.testing.assert_close(loss(student + shift, teacher - shift), loss(student, teacher), rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(student=finite_logits, teacher=finite_logits, temperature=st.floats(0.5, 20))
def test_soft_cross_entropy_is_the_divergence_plus_the_entropy_of_the_teacher(
    student: oracle.Array, teacher: oracle.Array, temperature: float
) -> None:
    pair = (torch.tensor(student), torch.tensor(teacher))
    entropies = [temperature**2 * oracle.entropy(oracle.softmax(row / temperature)) for row in oracle.rows(teacher, 2)]

    cross_entropy = functional.soft_cross_entropy(*pair, temperature=temperature)
    divergence = functional.soft_target_kl(*pair, temperature=temperature)

    expected = divergence + torch.tensor(entropies, dtype=torch.float64).reshape(2, 3)
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(student=finite_logits, teacher=finite_logits)
def test_soft_cross_entropy_is_least_at_the_teacher(student: oracle.Array, teacher: oracle.Array) -> None:
    student_logits, teacher_logits = torch.tensor(student), torch.tensor(teacher)

    at_teacher = functional.soft_cross_entropy(teacher_logits, teacher_logits)

    assert (functional.soft_cross_entropy(student_logits, teacher_logits) >= at_teacher - 1e-9).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.1, 50))
def test_standardized_logits_ignore_the_scale_of_a_model(seed: int, factor: float) -> None:
    student, teacher = (torch.tensor(array) for array in CASES[0].inputs(seed))
    loss = losses.SoftTargetLoss(standardize=True)

    torch.testing.assert_close(loss(factor * student, teacher), loss(student, teacher), rtol=1e-4, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.1, 50))
@pytest.mark.parametrize("case", [c for c in CASES if c.oracle in (oracle.cosine, oracle.attention_transfer)], ids=str)
def test_normalised_features_ignore_the_scale_of_a_model(case: LossCase, seed: int, factor: float) -> None:
    student, teacher = (torch.tensor(array) for array in case.inputs(seed))

    torch.testing.assert_close(case.build()(factor * student, teacher), case.build()(student, teacher))


@logits_cases
def test_classes_in_the_middle_equal_classes_moved_to_the_end(case: LossCase) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = case.make(**{**case.settings, "class_dim": 1})
    moved = case.make(**{**case.settings, "class_dim": -1})

    torch.testing.assert_close(loss(student, teacher), moved(student.movedim(1, -1), teacher.movedim(1, -1)))


def test_functions_on_logits_give_one_value_per_row() -> None:
    logits = torch.randn(2, 3, 4, 5)

    for function in (functional.soft_target_kl, functional.soft_cross_entropy, functional.logit_mse):
        assert function(logits, logits, class_dim=1).shape == (2, 4, 5)


def test_functions_on_features_give_one_value_per_example() -> None:
    for name in functional.__all__:
        if name.startswith("feature_") or name == "attention_transfer":
            assert getattr(functional, name)(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)).shape == (2,)


def test_functions_take_the_settings_by_keyword_only() -> None:
    # made from boxes, or from several teachers, not from two models
    for name in {*functional.__all__} - {"foreground_weights", *functional.mixtures.__all__}:
        parameters = list(inspect.signature(getattr(functional, name)).parameters.values())
        each = 2 if name == "fused_linear_divergence" else 1  # hidden states and weight of each model
        assert parameters[0].name.startswith("student")
        assert parameters[each].name.startswith("teacher")
        tensors = 2 * each + sum(parameter.name in ("labels", "foreground") for parameter in parameters)
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[tensors:])


@pytest.mark.parametrize("loss", [losses.SoftTargetLoss, losses.SoftCrossEntropyLoss], ids=lambda loss: loss.__name__)
def test_temperature_may_change_while_training(loss: type[losses.DistillationLoss]) -> None:
    student, teacher = (torch.tensor(array) for array in CASES[0].inputs())
    module = loss(temperature=2.0)

    module.temperature = 5.0

    assert type(loss(temperature=3).temperature) is float
    assert module(student, teacher) == loss(temperature=5.0)(student, teacher)


@every_case
def test_module_pickles_copies_and_holds_no_state_but_what_it_learns(case: LossCase) -> None:
    student, teacher = (torch.tensor(array) for array in case.inputs())
    loss = case.build()

    assert pickle.loads(pickle.dumps(loss))(student, teacher) == loss(student, teacher)
    assert copy.deepcopy(loss)(student, teacher) == loss(student, teacher)
    assert bool(loss.state_dict()) == case.loss.learned


@every_case
def test_repr_shows_every_setting(case: LossCase) -> None:
    for name, value in case.settings.items():
        assert f"{name}={value!r}" in repr(case.build())


def test_terms_learn_what_to_hand_over_from_the_class() -> None:
    public = {name: getattr(losses, name) for name in losses.__all__}
    any_channels = {name for name, loss in public.items() if not loss.channels_must_match}
    any_positions = {name for name, loss in public.items() if not loss.positions_must_match}

    of_examples = {
        "CKALoss",
        "CorrelationCongruenceLoss",
        "ProbabilisticTransferLoss",
        "RelationalLoss",
        "SimilarityPreservingLoss",
    }
    # an adapter would mix the candidates of a query, or the bins of an edge
    of_candidates = {"ListwiseKLLoss", "LocalizationLoss", "MarginMSELoss"}
    assert any_channels == {
        "AttentionRelationLoss",
        "AttentionTransferLoss",
        "ContrastiveRepresentationLoss",
        "FactorTransferLoss",
        "NeuronSelectivityLoss",
        "PixelRelationLoss",
        "SimpleRecipeLoss",
        "SoftmaxRegressionLoss",
        "UniversalLogitLoss",
        "VariationalInformationLoss",
        *of_candidates,
        *of_examples,
    }
    assert any_positions == {
        "AttentionRelationLoss",
        "ContrastiveRepresentationLoss",
        "InterChannelCorrelationLoss",
        "SimpleRecipeLoss",
        "SoftmaxRegressionLoss",
        "SolutionFlowLoss",
        *of_candidates,
        *of_examples,
    }
    assert losses.CorrelationCongruenceLoss(kernel="neighbour").channels_must_match
    assert {name for name, loss in public.items() if loss.several_layers} == {"SolutionFlowLoss"}
    assert {name for name, loss in public.items() if loss.learned} == {
        "ContrastiveRepresentationLoss",
        "FactorTransferLoss",
        "FocalGlobalLoss",
        "MaskedGenerativeLoss",
        "QueueSimilarityLoss",
        "SimpleRecipeLoss",
        "SoftmaxRegressionLoss",
        "VariationalInformationLoss",
    }
    assert {name for name, loss in public.items() if loss.needs_index} == {"ContrastiveRepresentationLoss"}
    assert {name for name, loss in public.items() if loss.reads_teacher} == {"MarginReLULoss", "SoftmaxRegressionLoss"}


@every_case
def test_compiled_whole_without_a_graph_break(case: LossCase) -> None:
    student, teacher = (torch.tensor(array) for array in case.inputs())
    torch.compiler.reset()

    compiled = torch.compile(case.build(), backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(student, teacher), case.build()(student, teacher))
    torch.testing.assert_close(compiled(student[:1], teacher[:1]), case.build()(student[:1], teacher[:1]))


def test_compiled_loss_follows_a_changed_temperature() -> None:
    student, teacher = (torch.tensor(array) for array in CASES[0].inputs())
    torch.compiler.reset()
    loss = losses.SoftTargetLoss()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)

    for temperature in (4.0, 3.0, 2.5, 1.0):
        loss.temperature = temperature
        expected = losses.SoftTargetLoss(temperature)(student, teacher)
        torch.testing.assert_close(compiled(student, teacher), expected)


@every_case
def test_no_value_is_read_on_the_host(case: LossCase) -> None:
    # A meta tensor has no values: whatever reads one, which on a GPU would wait for the device, raises.
    student, teacher = (torch.tensor(array, device="meta", requires_grad=True) for array in case.inputs())

    case.build()(student, teacher).backward()

    assert student.grad.shape == student.shape


@every_case
def test_the_teacher_may_have_run_in_inference_mode(case: LossCase) -> None:
    student, teacher = (torch.tensor(array, requires_grad=True) for array in case.inputs())
    with torch.inference_mode():
        teacher = teacher.clone()

    case.build()(student, teacher).backward()

    assert student.grad.isfinite().all()


@pytest.mark.parametrize("term", [LogitsDistillation(F.mse_loss), FeatureDistillation("", "", F.mse_loss)])
def test_so_may_the_teacher_of_a_function_that_is_not_of_the_library(term: DistillationTerm) -> None:
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = F.mse_loss(student(torch.ones(1, 3)), teacher(torch.ones(1, 3)))
    teacher.forward = torch.inference_mode()(teacher.forward)
    with Distiller(student, teacher, term) as distiller:
        with distiller.record():
            student(torch.ones(1, 3))
        total = distiller.total(torch.zeros(()))
    total.backward()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    "distance",
    [functional.feature_mse, functional.feature_l1, functional.feature_smooth_l1, functional.soft_target_kl],
)
def test_the_mean_reduction_is_the_mean_of_the_values_per_example(distance: Callable[..., torch.Tensor]) -> None:
    student, teacher = torch.randn(2, 3, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(distance(student, teacher, reduction="mean"), distance(student, teacher).mean())
    with pytest.raises(ValueError, match="`reduction` to be one of 'none', 'mean', but got reduction='sum'"):
        distance(student, teacher, reduction="sum")
