"""The rows of ``cases.py`` as Keras takes them: channels and classes last, teacher first, no ``class_dim``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import torch
from cases import CASES
from keras import ops
from loss_case import LossCase, labels_of
from numpy.typing import NDArray

from keras_distill import losses

BACKEND = keras.backend.backend()
KERAS_CASES = [case for case in CASES if hasattr(losses, case.loss.__name__)]
every_case = pytest.mark.parametrize("case", KERAS_CASES, ids=[case.name for case in KERAS_CASES])
logits_cases = pytest.mark.parametrize("case", [c for c in KERAS_CASES if c.on_logits], ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
# The settings that PyTorch's losses and functions alone have: Keras is channels-last.
LAYOUT = ("class_dim", "channel_dim")
KINDS = {"weight": "kernel", "bias": "bias"}  # of a layer's variables, in PyTorch and in Keras
# Their four dimensions are heads, queries and keys in both halves, and no map with channels.
NO_MAPS = ("AttentionMapLoss",)


def keras_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A row's settings without those that Keras does not have."""
    return {name: value for name, value in settings.items() if name not in LAYOUT}


def moves(case: LossCase, settings: Mapping[str, Any], rank: int) -> bool:
    """Whether dimension 1 of PyTorch's tensor is the last of Keras'."""
    chosen = [settings[name] for name in LAYOUT if settings.get(name) is not None]
    return 1 in chosen if chosen else rank >= 4 and case.loss.__name__ not in NO_MAPS


def to_keras(case: LossCase, array: NDArray[Any], settings: Mapping[str, Any] | None = None) -> NDArray[Any]:
    """A row's array in Keras' layout."""
    moved = moves(case, case.settings if settings is None else settings, array.ndim)
    return np.moveaxis(array, 1, -1) if moved else array


def to_torch(case: LossCase, array: NDArray[Any], settings: Mapping[str, Any] | None = None) -> NDArray[Any]:
    """A row's array in PyTorch's layout: the inverse of :func:`to_keras`."""
    moved = moves(case, case.settings if settings is None else settings, array.ndim)
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if moved else array


def keras_loss(case: LossCase, settings: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The namesake of a row's loss, with the row's settings or others, and Keras' own options."""
    settings = keras_settings(case.settings if settings is None else settings)
    return filled(case, getattr(losses, case.loss.__name__)(**settings, **options))


def filled(case: LossCase, loss: Any) -> Any:
    """The same loss, with the row's parameters if it learns any."""
    if case.parameters is not None:
        loss.build(*(to_keras(case, np.empty(shape)).shape for shape in case.shapes))
        fill(loss, case.parameters)
    if case.classifier is not None:
        layer = keras.layers.Dense(len(case.classifier), dtype=loss.dtype)
        layer.build((None, case.classifier.shape[1]))
        layer.kernel.assign(case.classifier.T)
        loss.read_teacher(lambda name: layer)
    return loss


def fill(loss: Any, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Set a learned loss's parameters, given by the names and in the layout of PyTorch's state_dict."""
    for name, array in parameters.items():
        variable = variable_of(loss, name)
        is_kernel = name.endswith("weight")
        variable.assign(keras_kernel(array, len(variable.shape)) if is_kernel else array.reshape(variable.shape))


def variable_of(loss: Any, name: str) -> keras.Variable:
    """A parameter by its name in PyTorch, where the functions between the layers count too: mean.2 is the second."""
    if "." not in name:
        return getattr(loss.layer, name)
    first, *index, kind = name.split(".")
    if first.endswith("embedding"):
        return getattr(getattr(loss.layer, first), KINDS[kind])
    if first.endswith("context"):
        part = getattr(getattr(loss.layer, first), *index)
        return getattr(part, {"weight": "gamma", "bias": "beta"}[kind] if index == ["norm"] else KINDS[kind])
    network = getattr(loss.layer, first, loss.layer)  # a loss of several networks has them as attributes
    return getattr(network.parts[int(*index) // 2], KINDS[kind])


def keras_kernel(weight: NDArray[Any], rank: int) -> NDArray[Any]:
    """A kernel in Keras' layout; where Keras has a dense layer, PyTorch's kernel of one position is its matrix."""
    kernel = np.moveaxis(weight, (0, 1), (-1, -2))
    return kernel.reshape(kernel.shape[-rank:])


def class_indices(teacher: NDArray[Any]) -> NDArray[np.int32]:
    """The labels that PyTorch's generic tests use, for a teacher in Keras' layout."""
    return labels_of(torch.tensor(np.asarray(teacher, dtype="float64")), -1).numpy().astype("int32")


def layers_of(feature: Any) -> list[Any]:
    """The two layers that PyTorch's generic tests make from one feature."""
    feature = ops.convert_to_tensor(feature)
    half = -(-feature.shape[-1] // 2)
    return [feature[..., :half], feature[..., half:]]


def called(loss: Any, student: Any, teacher: Any, labels: Any = None) -> Any:
    """The value of a loss, in its own order of arguments."""
    if getattr(loss, "several_layers", False):
        return loss(layers_of(teacher), layers_of(student))
    if getattr(loss, "needs_boxes", False):
        return loss((teacher, ops.where(ops.convert_to_tensor(teacher)[..., 0] > 0, 0.25, 0.0)), student)
    if getattr(loss, "needs_index", False):
        rows = ops.argmax(ops.convert_to_tensor(teacher), axis=-1)  # the same as in PyTorch's generic tests
        return loss((teacher, rows if len(teacher.shape) == 2 else ops.zeros_like(rows[:, 0, 0])), student)
    if not loss.needs_labels:
        return loss(teacher, student)
    labels = class_indices(as_array(teacher)) if labels is None else labels
    return loss((teacher, ops.convert_to_tensor(labels)), student)


@dataclass(frozen=True)
class Result:
    """A value and the gradients of both models' tensors; None for a missing gradient."""

    value: NDArray[Any]
    student: NDArray[Any] | None
    teacher: NDArray[Any] | None
    value_dtype: str
    student_dtype: str | None


def differentiated(loss: Any, student: Any, teacher: Any, dtype: str = "float32", labels: Any = None) -> Result:
    """Value and gradients of a loss on NumPy arrays in Keras' layout, on whichever backend this process has."""
    first, second = (ops.cast(ops.convert_to_tensor(array), dtype) for array in (student, teacher))
    if loss.needs_labels and labels is None:
        labels = class_indices(teacher)
    return DIFFERENTIATED[BACKEND](lambda student, teacher: called(loss, student, teacher, labels), first, second)


def _with_tensorflow(function: Callable[[Any, Any], Any], student: Any, teacher: Any) -> Result:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch((student, teacher))
        value = function(student, teacher)
    return _result(value, *tape.gradient(value, (student, teacher)))


def _with_torch(function: Callable[[Any, Any], Any], student: Any, teacher: Any) -> Result:
    student, teacher = (tensor.detach().clone().requires_grad_() for tensor in (student, teacher))
    value = function(student, teacher)
    value.backward()
    return _result(value, student.grad, teacher.grad)


def _with_jax(function: Callable[[Any, Any], Any], student: Any, teacher: Any) -> Result:
    import jax

    value, gradients = jax.value_and_grad(function, argnums=(0, 1))(student, teacher)
    # JAX returns zeros for the missing gradient of the teacher.
    return _result(value, gradients[0], gradients[1] if ops.any(gradients[1] != 0) else None)


DIFFERENTIATED = {"tensorflow": _with_tensorflow, "torch": _with_torch, "jax": _with_jax}


def _result(value: Any, student: Any, teacher: Any) -> Result:
    standardized = keras.backend.standardize_dtype
    arrays = (None if tensor is None else as_array(tensor) for tensor in (student, teacher))
    dtype = None if student is None else standardized(student.dtype)
    return Result(as_array(value), *arrays, standardized(value.dtype), dtype)


def as_array(tensor: Any) -> NDArray[np.float64]:
    """A tensor of the backend as float64: NumPy itself has no bfloat16."""
    tensor = ops.convert_to_tensor(tensor)
    widened = ops.cast(tensor, "float32") if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16" else tensor
    return ops.convert_to_numpy(ops.stop_gradient(widened)).astype("float64")
