"""Every Keras loss against the oracle, published implementations and its PyTorch namesake; both halves' signatures.

The rows are those of ``cases.py``. A row is walked as soon as ``keras_distill.losses`` has a class of the same name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import numpy as np
import oracle
import pytest
import torch
from cases import CASES
from keras import ops
from keras_loss_cases import (
    KERAS_CASES,
    LAYOUT,
    as_array,
    called,
    class_indices,
    differentiated,
    every_case,
    filled,
    keras_loss,
    logits_cases,
    to_keras,
    to_torch,
)
from loss_case import Golden, LossCase, golden_arrays, golden_index

import keras_distill
import lightning_distill

GOLDEN_ROWS = [
    pytest.param(case, golden, entry, id=f"{entry['key']}-{entry['case']}")
    for case in KERAS_CASES
    for golden in case.golden
    for entry in golden_index(golden.key)
    if golden.cases is None or entry["case"] in golden.cases
]

# Names that only one half has, on purpose. PyTorch's functions on logits take `class_dim`, and all of them
# average on request (`reduction`), because a mean fused with the sum is faster there, and take a `mask`. In Keras masks
# come down with the layers' outputs, and the averaging is the loss object's own; its functions on features give one
# value per position on request instead (`per_position`), to which a mask applies.
PYTORCH_ONLY = {*LAYOUT, "reduction"}
KERAS_ONLY = {"from_logits", "per_position", "reduction", "name", "dtype"}
# On torch, ops.multiply of two float64 tensors is float32: keras.backend.result_type("float64", "float64") says so. JAX
# has no float64 unless the whole process is switched to it.
HAS_FLOAT64 = keras.backend.result_type("float64", "float64") == "float64"
PYTORCH_LOSSES = sorted(set(lightning_distill.losses.__all__))
# Gradients made in the forward pass of the user's own graph: it takes PyTorch's heads.
WITHOUT_NAMESAKE = {"fused_linear_divergence"}
PYTORCH_FUNCTIONS = sorted(set(lightning_distill.functional.__all__) - WITHOUT_NAMESAKE)


@pytest.fixture(autouse=True)
def fresh_keras() -> None:
    """Nothing of what other tests need: no test here trains a model, and each clean-up would take a second."""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@every_case
def test_value_and_gradient_equal_the_oracle(case: LossCase, dtype: str, tolerance: float) -> None:
    if dtype == "float64" and not HAS_FLOAT64:
        pytest.skip("this backend of Keras computes in float32 where two tensors meet")
    student, teacher = case.inputs()

    result = differentiated(keras_loss(case, dtype=dtype), to_keras(case, student), to_keras(case, teacher), dtype)

    gradient = oracle.gradient(lambda moved: case.reference(moved, teacher, student), student)
    assert result.value.shape == ()
    assert result.value_dtype == result.student_dtype == dtype
    assert float(result.value) == pytest.approx(case.reference(student, teacher), rel=tolerance)
    limit = tolerance * np.abs(gradient).max()
    np.testing.assert_allclose(to_torch(case, result.student), gradient, rtol=0, atol=limit)
    assert result.teacher is None


@pytest.mark.parametrize(("case", "golden", "entry"), GOLDEN_ROWS)
def test_value_and_gradient_equal_the_published_implementation(case: LossCase, golden: Golden, entry: dict) -> None:
    dtype = "float64" if HAS_FLOAT64 else "float32"
    arrays = golden_arrays(entry)
    (name,) = entry["student_inputs"]
    settings = golden.settings(entry["hyperparameters"])
    factor = golden.factor(entry["hyperparameters"], arrays[name].shape)
    student = torch.as_tensor(arrays[name]).double().requires_grad_()
    teacher = torch.as_tensor(arrays[name.replace("student", "teacher")]).double()
    doubles = {key: array.astype("float64") for key, array in arrays.items()}
    student_tensor, teacher_tensor = golden.arrange(student, teacher, doubles)

    result = differentiated(
        keras_loss(case, settings, dtype=dtype),
        to_keras(case, student_tensor.detach().numpy(), settings),
        to_keras(case, teacher_tensor.detach().numpy(), settings),
        dtype,
        labels=arrays["targets"].astype("int32") if case.loss.needs_labels else None,
    )
    # The reference's own first operations on the student's tensor run in torch, which differentiates them.
    student_tensor.backward(torch.as_tensor(to_torch(case, result.student, settings)))

    tolerance = entry["tolerance_suggested"][dtype]
    np.testing.assert_allclose(factor * result.value, arrays[golden.value], **tolerance)
    np.testing.assert_allclose(factor * student.grad.numpy(), arrays[f"grad_{name}"], **tolerance)


def layers_of(entry: dict) -> tuple[Callable[[], Any], list[tuple[str, str]]]:
    """A loss for one layer, and the names of the arrays that it is the sum over: student's, teacher's."""
    settings = entry["hyperparameters"]
    if entry["key"] == "minilm_v2_relation":
        heads = settings["relation_heads"]
        return lambda: keras_distill.AttentionRelationLoss(relation_heads=heads), [
            (f"student_{x}", f"teacher_{x}") for x in "qkv"
        ]
    every = settings["teacher_layers"] // settings["student_layers"]
    pairs = [(f"student_att_{i}", f"teacher_att_{i * every + every - 1}") for i in range(settings["student_layers"])]
    return lambda: keras_distill.AttentionMapLoss("mse"), pairs


@pytest.mark.parametrize(
    "entry",
    [entry for key in ("minilm_v2_relation", "tinybert_attention") for entry in golden_index(key)],
    ids=lambda entry: f"{entry['key']}-{entry['case']}",
)
def test_sum_over_layers_equals_the_published_implementation(entry: dict) -> None:
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"]["float32"]
    make, pairs = layers_of(entry)

    results = {first: differentiated(make(), arrays[first], arrays[second]) for first, second in pairs}

    assert set(results) == set(entry["student_inputs"])
    np.testing.assert_allclose(sum(result.value for result in results.values()), arrays["loss"], **tolerance)
    for name, result in results.items():
        np.testing.assert_allclose(result.student, arrays[f"grad_{name}"], **tolerance)


@pytest.mark.parametrize(
    "entry",
    [entry for key in ("mlkd_batch", "mlkd_class") for entry in golden_index(key)],
    ids=lambda entry: f"{entry['key']}-{entry['case']}",
)
def test_parts_of_the_multi_level_loss_equal_the_published_implementation(entry: dict) -> None:
    arrays, settings = golden_arrays(entry), entry["hyperparameters"]
    part = {"mlkd_batch": "batch_correlation", "mlkd_class": "class_correlation"}[entry["key"]]

    class Part:
        needs_labels = False

        def __call__(self, teacher: Any, student: Any) -> Any:
            return getattr(keras_distill.functional, part)(student, teacher, temperature=settings["temperature"])

    result = differentiated(Part(), arrays["student_logits"], arrays["teacher_logits"])

    tolerance = entry["tolerance_suggested"]["float32"]
    np.testing.assert_allclose(result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(result.student, arrays["grad_student_logits"], **tolerance)


RELATIONS = ["inter_class_relation", "intra_class_relation", "batch_correlation", "class_correlation"]


@pytest.mark.parametrize("name", RELATIONS)
def test_functions_that_are_parts_of_a_loss_are_the_same_in_both_halves(name: str) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")

    value = getattr(keras_distill.functional, name)(student, teacher, temperature=2.0)

    expected = getattr(lightning_distill.functional, name)(*map(torch.tensor, (student, teacher)), temperature=2.0)
    np.testing.assert_allclose(as_array(value), expected, rtol=1e-5)


@logits_cases
def test_probabilities_have_the_value_of_their_logits(case: LossCase) -> None:
    student, teacher = (to_keras(case, array).astype("float32") for array in case.inputs())
    of_classes = case.loss.__name__ in ("BinarySoftTargetLoss", "QualityFocalLoss")
    probability = ops.sigmoid if of_classes else ops.softmax
    if case.loss.__name__ == "LogitMSELoss":  # the logits themselves are compared: those that are logarithms
        student, teacher = (as_array(ops.log_softmax(array)).astype("float32") for array in (student, teacher))
    labels = class_indices(teacher)

    value = called(keras_loss(case, from_logits=False), probability(student), probability(teacher), labels)

    assert float(value) == pytest.approx(float(called(keras_loss(case), student, teacher, labels)), rel=1e-4)


def degenerate(array: Any, how: str) -> Any:
    """A feature in PyTorch's layout with what a ReLU or a repeated example makes of it."""
    array = array.astype("float32")
    if how == "an example of zeros":
        array[0] = 0
    elif how == "a channel of zeros":
        array[:, 0] = 0
    elif how == "equal examples":
        array[1] = array[0]
    return array


@pytest.mark.parametrize("how", ["unchanged", "an example of zeros", "a channel of zeros", "equal examples"])
@every_case
def test_both_halves_compute_the_same_numbers_in_float32(case: LossCase, how: str) -> None:
    student, teacher = case.inputs(seed=3)
    student, teacher = degenerate(student, how), teacher.astype("float32")
    leaf = torch.tensor(student, requires_grad=True)

    result = differentiated(keras_loss(case), to_keras(case, student), to_keras(case, teacher))
    value = case.build()(leaf, torch.tensor(teacher))
    value.backward()

    assert float(result.value) == pytest.approx(value.item(), rel=1e-6, abs=1e-7)
    limit = 1e-5 * leaf.grad.abs().max().item()
    np.testing.assert_allclose(to_torch(case, result.student), leaf.grad.numpy(), rtol=0, atol=limit)


@pytest.mark.parametrize("case", [c for c in KERAS_CASES if c.zero_at_identity], ids=lambda case: case.name)
def test_loss_is_zero_where_student_and_teacher_are_equal(case: LossCase) -> None:
    student = to_keras(case, case.inputs()[0])

    result = differentiated(keras_loss(case), student, student)

    assert float(result.value) == pytest.approx(0, abs=2e-6)
    assert np.abs(result.student).max() == pytest.approx(0, abs=2e-5)


@every_case
def test_values_have_the_shape_that_the_class_announces(case: LossCase) -> None:
    student, teacher = (to_keras(case, array).astype("float32") for array in case.inputs())
    loss = keras_loss(case, reduction=None)

    shape = tuple(called(loss, student, teacher).shape)

    assert shape == {"positions": student.shape[:-1], "examples": student.shape[:1], "batch": ()}[loss.gives]


@every_case
def test_a_config_round_trip_restores_the_loss(case: LossCase) -> None:
    student, teacher = (ops.convert_to_tensor(to_keras(case, array), dtype="float32") for array in case.inputs())
    loss = keras_loss(case)

    config = keras.saving.serialize_keras_object(loss)
    again = filled(case, keras.saving.deserialize_keras_object(config))

    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
    assert as_array(called(again, student, teacher)) == as_array(called(loss, student, teacher))


@pytest.mark.parametrize("case", [c for c in KERAS_CASES if hasattr(keras_loss(c), "temperature")], ids=str)
def test_temperature_may_be_a_variable(case: LossCase) -> None:
    student, teacher = (to_keras(case, array) for array in case.inputs())
    loss, variable = keras_loss(case), keras.Variable(1.0, dtype="float32")
    expected = differentiated(keras_loss(case, {**case.settings, "temperature": 3.0}), student, teacher)

    loss.temperature = variable
    variable.assign(3.0)
    result = differentiated(loss, student, teacher)

    assert float(result.value) == pytest.approx(float(expected.value), rel=1e-6)
    np.testing.assert_allclose(result.student, expected.student, rtol=1e-5, atol=1e-7)
    assert loss.get_config()["temperature"] == 3.0


def traced(case: LossCase, xla: bool) -> Callable[[int], None]:
    """A check of so many examples by a trace whose batch size is unknown."""
    import tensorflow as tf

    loss = keras_loss(case)
    arrays = [to_keras(case, array).astype("float32") for array in case.inputs()]
    arrays += [class_indices(arrays[1])] if loss.needs_labels else []
    signature = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in arrays]
    function = tf.function(lambda *tensors: called(loss, *tensors), input_signature=signature, jit_compile=xla)

    def check(examples: int) -> None:
        batch = [tf.constant(array[:examples]) for array in arrays]
        np.testing.assert_allclose(function(*batch), called(loss, *batch), rtol=1e-5, atol=1e-6)

    return check


@pytest.mark.tensorflow
@every_case
def test_one_trace_serves_batches_of_any_size(case: LossCase) -> None:
    check = traced(case, xla=False)

    for examples in (len(case.inputs()[0]), 1):
        check(examples)


@pytest.mark.tensorflow
@pytest.mark.parametrize("case", {case.loss: case for case in KERAS_CASES}.values(), ids=lambda case: case.name)
def test_xla_compiles_every_loss(case: LossCase) -> None:
    traced(case, xla=True)(len(case.inputs()[0]))


@logits_cases
def test_logits_of_unequal_shapes_raise_instead_of_broadcasting(case: LossCase) -> None:
    student = ops.convert_to_tensor(to_keras(case, case.inputs()[0]))
    words = r"Expected `student_logits` and `teacher_logits` to have equal shapes\. Both .* Received: \(.*\) and \(1, "

    with pytest.raises(ValueError, match=words):
        called(keras_loss(case), student, student[:1])


def shared_parameters(function: Callable[..., Any], without: set[str]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of every parameter that both halves must have, in order."""
    parameters = inspect.signature(function).parameters.values()
    without = {*without, "args", "kwargs"}  # of a module without a constructor of its own
    return [(each.name, each.kind, each.default) for each in parameters if each.name not in without]


@pytest.mark.parametrize("name", PYTORCH_LOSSES)
def test_every_pytorch_loss_has_a_namesake_with_the_same_settings(name: str) -> None:
    keras_loss, torch_loss = getattr(keras_distill.losses, name), getattr(lightning_distill.losses, name)
    base = lightning_distill.losses.DistillationLoss

    assert name in keras_distill.losses.__all__
    if torch_loss is not base:
        assert getattr(keras_distill, name) is keras_loss
        assert name in keras_distill.__all__
        assert shared_parameters(keras_loss, KERAS_ONLY) == shared_parameters(torch_loss, PYTORCH_ONLY)
    for attribute in base.__annotations__:
        assert getattr(keras_loss, attribute) == getattr(torch_loss, attribute), attribute


@pytest.mark.parametrize("name", PYTORCH_FUNCTIONS)
def test_every_pytorch_function_has_a_namesake_with_the_same_parameters(name: str) -> None:
    keras_function, torch_function = (
        getattr(keras_distill.functional, name),
        getattr(lightning_distill.functional, name),
    )

    # Its own mask is part of the formula.
    without = PYTORCH_ONLY if name == "masked_generative" else {*PYTORCH_ONLY, "mask"}

    assert name in keras_distill.functional.__all__
    assert shared_parameters(keras_function, KERAS_ONLY) == shared_parameters(torch_function, without)


def test_keras_has_no_loss_and_no_function_that_pytorch_lacks() -> None:
    # A plain function is a loss already in PyTorch; in Keras it has to become a `keras.losses.Loss`.
    assert set(keras_distill.losses.__all__) - set(PYTORCH_LOSSES) == {"FunctionLoss"}
    assert set(keras_distill.functional.__all__) <= set(PYTORCH_FUNCTIONS)


@every_case
def test_keras_options_come_last_and_by_keyword_only(case: LossCase) -> None:
    parameters = inspect.signature(getattr(keras_distill.losses, case.loss.__name__)).parameters
    options = ["from_logits", "reduction", "name", "dtype"] if case.on_logits else ["reduction", "name", "dtype"]

    assert list(parameters)[-len(options) :] == options
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in options)
    assert parameters["reduction"].default == "sum_over_batch_size"


def table(package: ModuleType) -> set[tuple[str, ...]]:
    """Rows of the table in a package's docstring: paper, class, functions."""
    _, body = re.split(r"=+ +=+ +=+\n.*\n=+ +=+ +=+\n", package.__doc__ or "", maxsplit=1)
    rows = body.split("\n====", maxsplit=1)[0].splitlines()
    return {tuple(re.split(r" {2,}|(?<=\)) (?=functional)|(?<=Loss) (?=functional)", row)) for row in rows}


def test_the_tables_of_both_packages_are_the_same() -> None:
    assert table(keras_distill) == table(lightning_distill)


def test_every_row_of_cases_is_walked_on_keras() -> None:
    assert [case.name for case in KERAS_CASES] == [case.name for case in CASES]


@pytest.mark.tensorflow
def test_neuron_selectivity_serves_maps_whose_channels_are_not_known() -> None:
    import tensorflow as tf

    loss = keras_distill.NeuronSelectivityLoss()
    traced = tf.function(
        lambda student, teacher: loss(teacher, student), input_signature=2 * [tf.TensorSpec((None, 3, 3, None))]
    )
    student, teacher = (np.random.default_rng(seed).normal(size=(2, 3, 3, 4)).astype("float32") for seed in (0, 1))
    assert float(traced(student, teacher)) == pytest.approx(float(loss(teacher, student)), rel=1e-5)
