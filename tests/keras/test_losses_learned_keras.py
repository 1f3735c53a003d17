"""Keras losses with parameters: published values, the random mask, and the words of their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import oracle_learned as oracle
import pytest
import torch
import torch.nn.functional as F
from keras import ops
from keras_loss_cases import as_array, differentiated, fill, keras_kernel, variable_of
from learned_golden import parameters_of, widened
from loss_case import golden_arrays, golden_index

from keras_distill import (
    FeatureDistillation,
    LogitsDistillation,
    MaskedGenerativeLoss,
    VariationalInformationLoss,
    functional,
    losses,
)

HAS_FLOAT64 = keras.backend.result_type("float64", "float64") == "float64"
DTYPE = "float64" if HAS_FLOAT64 else "float32"


def last(array: Any) -> np.ndarray[Any, Any]:
    """A map in Keras' layout."""
    return np.moveaxis(np.asarray(array), 1, -1)


def built(loss: Any, *shapes: tuple[int, ...]) -> Any:
    loss.build(*(shapes if len(shapes) == 2 else shapes * 2))
    return loss


def torch_shapes(loss: Any, names: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a loss's parameters as PyTorch has them."""
    shapes = {}
    for name in names:
        shape = tuple(variable_of(loss, name).shape)
        swapped = (*shape[:-3:-1], *shape[:-2])
        shapes[name] = shape if len(shape) < 2 else swapped if len(shape) > 2 else (*swapped, 1, 1)
    return shapes


def parameter_gradients(loss: Any, value: Callable[[], Any], names: Any) -> dict[str, Any]:
    """Gradients of a loss's parameters on whichever backend this process has."""
    variables = [variable_of(loss, name) for name in names]
    if keras.backend.backend() == "torch":
        for variable in variables:
            variable.value.grad = None
        value().backward()
        return {name: variable.value.grad.numpy() for name, variable in zip(names, variables, strict=True)}
    if keras.backend.backend() == "jax":
        import jax

        def value_at(values: Any) -> Any:
            with keras.StatelessScope(zip(variables, values, strict=True)):
                return value()

        gradients = jax.grad(value_at)([variable.value for variable in variables])
        return {name: as_array(gradient) for name, gradient in zip(names, gradients, strict=True)}
    import tensorflow as tf

    with tf.GradientTape() as tape:
        result = value()
    gradients = tape.gradient(result, [variable.value for variable in variables])
    return {name: as_array(gradient) for name, gradient in zip(names, gradients, strict=True)}


def assert_published(entry: dict[str, Any], loss: Any, value: Callable[[Any, Any], Any], prepared: Any) -> None:
    """Value and gradients of the student and of the parameters."""
    arrays, tolerance = golden_arrays(entry), entry["tolerance_suggested"][DTYPE]
    parameters, expected = parameters_of(arrays), parameters_of(arrays, "gradp")
    fill(loss, widened(parameters, torch_shapes(loss, parameters)))
    student = torch.as_tensor(arrays["student_feat"]).requires_grad_()
    student_feature = prepared(student, arrays)

    class Called:
        needs_labels = False

        def __call__(self, teacher: Any, student: Any) -> Any:
            return value(student, teacher)

    result = differentiated(Called(), last(student_feature.detach()), last(arrays["teacher_feat"]), DTYPE)
    student_feature.backward(torch.as_tensor(np.ascontiguousarray(np.moveaxis(result.student, -1, 1))))
    np.testing.assert_allclose(result.value, arrays["loss"], **tolerance)
    np.testing.assert_allclose(student.grad.numpy(), arrays["grad_student_feat"], **tolerance)

    tensors = [
        ops.convert_to_tensor(last(array), dtype=DTYPE) for array in (student_feature.detach(), arrays["teacher_feat"])
    ]
    for name, gradient in parameter_gradients(loss, lambda: value(*tensors), list(expected)).items():
        published = expected[name]
        if name.endswith("weight"):
            published = keras_kernel(published, gradient.ndim)
        np.testing.assert_allclose(gradient[tuple(slice(size) for size in published.shape)], published, **tolerance)


@pytest.mark.parametrize("entry", golden_index("vid"), ids=lambda entry: entry["case"])
def test_variational_information_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    sizes = {name: shape for name, (shape, _) in entry["arrays"].items()}
    student, teacher = ((size[0], *size[2:], size[1]) for size in (sizes["student_feat"], sizes["teacher_feat"]))
    loss = built(VariationalInformationLoss(dtype=DTYPE), student, teacher)

    def pooled(feature: Any, arrays: Any) -> Any:  # the reference pools the larger map of the two
        return F.adaptive_avg_pool2d(feature, arrays["teacher_feat"].shape[2:])

    assert_published(entry, loss, lambda student, teacher: loss(teacher, student), pooled)


@pytest.mark.parametrize("entry", golden_index("mgd"), ids=lambda entry: entry["case"])
def test_masked_generation_equals_the_published_implementation(entry: dict[str, Any]) -> None:
    count, channels, *positions = entry["arrays"]["teacher_feat"][0]
    mask, factor = last(golden_arrays(entry)["mask"]), entry["hyperparameters"]["alpha_mgd"]
    settings = {"mask": entry["hyperparameters"]["mask"], "dtype": DTYPE}
    loss = built(MaskedGenerativeLoss(**settings), (count, *positions, channels))

    def aligned(feature: Any, arrays: Any) -> Any:  # the term's adapter
        if "param_align.weight" not in arrays:
            return feature * 1
        weight, bias = (torch.as_tensor(arrays[f"param_align.{name}"]) for name in ("weight", "bias"))
        return F.conv2d(feature, weight, bias)

    def value(student: Any, teacher: Any) -> Any:
        return factor * ops.mean(functional.masked_generative(student, teacher, generator=loss.layer, mask=mask))

    assert_published(entry, loss, value, aligned)


@pytest.mark.parametrize("variance", [1e-4, 0.5, 5.0, 1e4])
def test_the_first_variance_is_the_configured_one(variance: float) -> None:
    loss = built(VariationalInformationLoss(initial_variance=variance), (None, 3), (None, 4))

    np.testing.assert_allclose(as_array(loss.variance), np.full(4, variance), rtol=1e-5)


def kept(mask: str, shape: tuple[int, ...], ratio: float = 0.3) -> Any:
    """The mask that a loss of this kind draws."""
    loss = built(MaskedGenerativeLoss(mask_ratio=ratio, mask=mask), shape)
    return as_array(ops.broadcast_to(ops.cast(loss._drawn(ops.ones(shape)), "float32"), shape))


@pytest.mark.parametrize("shape", [(4, 40, 40, 3), (4, 1600, 3)], ids=["map", "tokens"])
def test_a_spatial_mask_hides_all_channels_of_a_share_of_the_positions(shape: tuple[int, ...]) -> None:
    mask = kept("spatial", shape)

    assert np.unique(mask).tolist() == [0, 1]
    assert (mask == mask[..., :1]).all()
    assert mask.mean() == pytest.approx(0.7, abs=0.03)
    assert (mask[0] != mask[1]).any()


@pytest.mark.parametrize("shape", [(40, 2, 2, 50), (40, 3, 50), (40, 50)], ids=["map", "tokens", "vector"])
def test_a_channel_mask_hides_a_share_of_the_channels_everywhere(shape: tuple[int, ...]) -> None:
    mask = kept("channel", shape)

    flat = mask.reshape(shape[0], -1, shape[-1])
    assert np.unique(mask).tolist() == [0, 1]
    assert (flat == flat[:, :1]).all()
    assert mask.mean() == pytest.approx(0.7, abs=0.03)
    assert (mask[0] != mask[1]).any()


def test_the_masks_follow_the_global_seed_and_differ_from_step_to_step() -> None:
    student, teacher = (ops.convert_to_tensor(array) for array in np.random.default_rng(0).normal(size=(2, 2, 5, 5, 3)))
    runs = []
    for seed in (1, 2, 1):
        keras.utils.set_random_seed(seed)
        loss = built(MaskedGenerativeLoss(), (2, 5, 5, 3))
        fill(loss, {f"generator.{index}.weight": np.full((3, 3, 3, 3), 0.1) for index in (0, 2)})
        runs.append([as_array(loss(teacher, student)).item() for _ in range(3)])

    assert runs[0] == runs[2] != runs[1]
    assert len(set(runs[0])) == 3


def test_evaluation_does_not_draw_masks() -> None:
    loss = built(MaskedGenerativeLoss(mask_ratio=0.9), (2, 5, 3))
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 5, 3)).astype("float32")
    weights = {f"generator.{index}.weight": variable_of(loss, f"generator.{index}.weight") for index in (0, 2)}
    parameters = {name: np.moveaxis(as_array(weight), (-1, -2), (0, 1)) for name, weight in weights.items()}
    parameters |= {f"generator.{index}.bias": np.zeros(3) for index in (0, 2)}
    loss.training = False
    value = as_array(loss(teacher, student)).item()
    loss.training = True

    assert value == pytest.approx(oracle.masked_generative(student, teacher, parameters=parameters), rel=1e-5)
    assert as_array(loss(teacher, student)).item() != value


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: VariationalInformationLoss(initial_variance=0.0),
            ValueError,
            r"`initial_variance` to be at least 0\.0001\. Received",
        ),
        (
            lambda: VariationalInformationLoss(initial_variance="5"),
            TypeError,
            r"`initial_variance` to be an int or a float\. Received",
        ),
        (
            lambda: MaskedGenerativeLoss(mask_ratio=1.0),
            ValueError,
            r"`mask_ratio` to be at least 0 and less than 1\. Received",
        ),
        (
            lambda: MaskedGenerativeLoss(mask="spacial"),
            ValueError,
            r"`mask` to be one of 'spatial', 'channel'\. Closest",
        ),
    ],
)
def test_bad_settings_raise_in_the_constructor(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("loss", [VariationalInformationLoss, MaskedGenerativeLoss], ids=lambda loss: loss.__name__)
def test_a_loss_that_is_not_built_raises(loss: type[losses.DistillationLoss]) -> None:
    with pytest.raises(ValueError, match=r"Expected the loss to be built before it is called\. .*Call loss\.build\("):
        loss()(ops.ones((2, 4, 4, 3)), ops.ones((2, 4, 4, 3)))


@pytest.mark.parametrize("loss", [VariationalInformationLoss, MaskedGenerativeLoss], ids=lambda loss: loss.__name__)
def test_features_of_unequal_dimensions_raise(loss: type[losses.DistillationLoss]) -> None:
    for shapes in (((None, 3, 4), (None, 3, 4, 4)), ((None,), (None,))):
        with pytest.raises(
            ValueError, match=r"the same number of dimensions, 2 to 5\. Pass adapter=<a layer>\. Received: \(N"
        ):
            built(loss(), *shapes)


def test_a_spatial_mask_of_vectors_raises() -> None:
    with pytest.raises(ValueError, match=r"have positions for mask='spatial'\. Pass mask='channel'\. Received: shape"):
        built(MaskedGenerativeLoss(), (None, 3))


@pytest.mark.parametrize("name", ["variational_information", "masked_generative"])
def test_a_learned_part_of_the_wrong_shape_raises_instead_of_broadcasting(name: str) -> None:
    arguments = {
        "variational_information": {"mean": lambda feature: feature[:, :1], "variance": ops.ones(3)},
        "masked_generative": {"generator": lambda feature: feature[:, :1]},
    }[name]

    with pytest.raises(ValueError, match=r"\(student\)` and `teacher` to have equal shapes.*\(2, 1\) and \(2, 3\)"):
        getattr(functional, name)(ops.ones((2, 3)), ops.ones((2, 3)), **arguments)


def test_variances_that_do_not_fit_the_channels_raise() -> None:
    with pytest.raises(ValueError, match=r"`variance` to have one value for each of the teacher's 3 channels"):
        functional.variational_information(ops.ones((2, 3)), ops.ones((2, 3)), mean=ops.relu, variance=ops.ones(1))


def test_a_learned_loss_on_logits_is_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"`loss` to have no parameters of its own\. Use it in a FeatureDistillation"):
        LogitsDistillation(VariationalInformationLoss())
    with pytest.raises(ValueError, match=r"Expected `loss` not to be built yet\. Pass a new loss: the term"):
        FeatureDistillation("a", "b", built(VariationalInformationLoss(), (None, 3)))
