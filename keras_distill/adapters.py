"""Adapters: learned maps from a student feature's shape to the teacher's."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, Final

import keras
import numpy as np

from distill_core.principal import PrincipalComponents
from keras_distill import checks

Shape = Sequence[int | None]
AdapterFactory = Callable[[tuple[int | None, ...], tuple[int | None, ...]], keras.layers.Layer]
ADAPTERS = ("auto", "linear", "conv1x1")
# Convolutions by the number of dimensions of a feature.
_CONVOLUTIONS: Final[dict[int, Any]] = {3: keras.layers.Conv1D, 4: keras.layers.Conv2D, 5: keras.layers.Conv3D}


def make_adapter(
    adapter: str | keras.layers.Layer | AdapterFactory | None,
    student: Shape,
    teacher: Shape,
    layer: str,
    *,
    maps: bool | None = None,
) -> keras.layers.Layer | None:
    """Make and build the adapter between two features with channels last.

    Args:
        adapter: ``"auto"``, ``"linear"``, ``"conv1x1"``, None, a layer, or a factory called with both shapes.
        student: Shape of the student's feature, ``(N, ..., C_s)``.
        teacher: Shape of the teacher's feature, ``(N, ..., C_t)``.
        layer: Name of the student's layer, for messages.
        maps: Whether the features are maps; with None, features of four or more dimensions are.

    Returns:
        A layer, or None if the feature is used unchanged.

    Raises:
        ValueError: If the shapes do not fit the kind of adapter, or the name is unknown.
        TypeError: If ``adapter`` has another type, or the factory does not return a layer.

    Example:
        >>> make_adapter("auto", (None, 7, 7, 4), (None, 7, 7, 8), "block").filters
        8
    """
    student, teacher = tuple(student), tuple(teacher)
    maps = len(student) >= 4 if maps is None else maps
    if adapter == "auto":
        if len(student) != len(teacher) or len(student) < 2:
            expected = (
                f"the features of student layer {layer!r} and its teacher layer to have the same number of dimensions"
            )
            remedy = "Pass adapter=<a layer, or a factory of the two shapes>."
            raise ValueError(checks.message(f"{expected}, 2 or more", f"{student} and {teacher}", remedy))
        if student[-1] == teacher[-1]:
            return None
        adapter = "conv1x1" if maps else "linear"
    if adapter is None:
        return None
    if isinstance(adapter, str):
        checks.one_of("adapter", adapter, ADAPTERS)
        made = _linear(teacher) if adapter == "linear" else _convolution(student, teacher, layer)
    elif isinstance(adapter, keras.layers.Layer):
        made = adapter
    elif callable(adapter) and not isinstance(adapter, type):
        made = adapter(student, teacher)
        if not isinstance(made, keras.layers.Layer):
            raise TypeError(checks.message("`adapter` to make a layer", f"a {type(made).__name__}"))
    else:
        expected = "`adapter` to be 'auto', 'linear', 'conv1x1', None, a layer or a factory"
        raise TypeError(checks.message(expected, f"adapter={adapter!r}"))
    if not made.built:
        made.build(student)
    return made


def _linear(teacher: Shape) -> keras.layers.Layer:
    # float32 under every policy: a feature of 1e4 times a weight overflows float16
    return keras.layers.Dense(teacher[-1], name="adapter", dtype="float32")


def _convolution(student: Shape, teacher: Shape, layer: str) -> keras.layers.Layer:
    if len(student) not in _CONVOLUTIONS:
        expected = f"the feature of student layer {layer!r} to have 3 to 5 dimensions for adapter='conv1x1'"
        raise ValueError(checks.message(expected, f"{tuple(student)}", "Pass adapter='linear'."))
    kind = _CONVOLUTIONS[len(student)]
    return kind(teacher[-1], 1, name="adapter", dtype="float32", data_format="channels_last")


@keras.saving.register_keras_serializable(package="keras_distill")
class PCAProjection:
    """An adapter whose output starts as the teacher's mean plus its principal components, weighted by the student.

    The student's numbers are then the coordinates of the teacher's features in their principal components, which is the
    best start that a student with fewer dimensions has. The adapter is trained like any other.

    Args:
        features: Features of the teacher for some items, ``(N, D)``, with more rows than the student has dimensions.

    Raises:
        ValueError: If ``features`` has another shape, or numbers that are not finite. When the adapter is made, if it
            has too few rows or other dimensions than the teacher's layer.

    Example:
        >>> embeddings = np.random.default_rng(0).normal(size=(100, 8))  # of the teacher
        >>> PCAProjection(embeddings)((None, 3), (None, 8)).units
        8

    References:
        Kim et al. 2023, arXiv:2301.12005 (projection of the student's embeddings); deviation: the start.
    """

    def __init__(self, features: Any) -> None:
        self._principal = PrincipalComponents(keras.ops.convert_to_numpy(features))

    def __call__(self, student: Shape, teacher: Shape) -> keras.layers.Layer:
        """The adapter between features ``(N, ..., D)`` of these shapes."""
        width, teacher_width = student[-1], teacher[-1]
        if width is None or teacher_width is None:
            expected = "the features of both networks to have a fixed width"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        weights = self._principal.weights(width, teacher_width)
        adapter = _linear(teacher)
        adapter.build(tuple(student))
        adapter.set_weights([weights, self._principal.mean])
        return adapter

    def get_config(self) -> dict[str, Any]:
        """The components, so that a copy starts from them too."""
        return {name: base64.b64encode(values.tobytes()).decode() for name, values in vars(self._principal).items()}

    @classmethod
    def from_config(cls, config: dict[str, str]) -> PCAProjection:
        """The projection that :meth:`get_config` describes."""
        projection, principal = cls.__new__(cls), PrincipalComponents.__new__(PrincipalComponents)
        mean, components = (np.frombuffer(base64.b64decode(config[name]), "float32") for name in ("mean", "components"))
        principal.mean, principal.components = mean, components.reshape(-1, len(mean))
        projection._principal = principal
        return projection
