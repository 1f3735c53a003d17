"""Adapters: learned maps from a student feature's shape to the teacher's."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import keras
import numpy as np
from keras import ops

from distill_core.grids import find_grid, smoothing_matrix
from distill_core.principal import PrincipalComponents
from keras_distill import checks
from keras_distill.functional.vectors import multiplied

Shape = Sequence[int | None]
AdapterFactory = Callable[[tuple[int | None, ...], tuple[int | None, ...]], keras.layers.Layer]
ADAPTERS = ("auto", "pool", "linear", "conv1x1")
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
        adapter: ``"auto"``, ``"pool"``, ``"linear"``, ``"conv1x1"``, None, a layer, or a factory called with both
            shapes.
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
    if adapter in ("auto", "pool"):
        if len(student) != len(teacher) or len(student) < 2:
            expected = (
                f"the features of student layer {layer!r} and its teacher layer to have the same number of dimensions"
            )
            remedy = "Pass adapter=<a layer, or a factory of the two shapes>."
            if 2 in (len(student), len(teacher)) and max(len(student), len(teacher)) in (3, 4):
                remedy = 'Pass adapter="pool", which compares the means over the positions, or name the pooling layer'
                remedy = f"{remedy} that follows, or a layer of the other model that returns positions."
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
        expected = "`adapter` to be 'auto', 'pool', 'linear', 'conv1x1', None, a layer or a factory"
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


class Side(NamedTuple):
    """A feature of one model, as an adapter or a resizing needs it.

    Attributes:
        feature: A map ``(N, H, W, C)``, tokens ``(N, L, C)`` without those that the tap leaves out, or a vector.
        place: The feature, for messages.
        prefix: Number of tokens before the patches; None if it is to be found.
        image: Height and width of the model's images, None if they are unknown.
    """

    feature: Any
    place: str
    prefix: int | None = None
    image: tuple[int, int] | None = None


def aligned(student: Side, teacher: Side, positions: bool = True) -> tuple[Any, Any]:
    """The features of both models in one form, if it is known how to bring them into one.

    Tokens ``(N, L, C)`` beside a map ``(N, H, W, C)``, or beside another number of tokens of an image, become maps of
    their patches. The larger of two such maps is resized to the smaller one, bilinearly with antialiasing. A map of one
    position beside a vector ``(N, C)`` becomes a vector. Other features stay as they are.

    Args:
        student: The student's feature.
        teacher: The teacher's.
        positions: Whether the loss compares positions, so that both features need the same.

    Returns:
        The student's feature and the teacher's.

    Raises:
        ValueError: If the tokens are not the patches of an image, or it is not known how many of them are.
    """
    first, second = student.feature, teacher.feature
    ranks = [len(first.shape), len(second.shape)]
    if sorted(ranks) == [2, 4]:
        return _without_positions(first), _without_positions(second)
    lengths_differ = ranks == [3, 3] and positions and checks.shapes_differ(first.shape[1:2], second.shape[1:2])
    if sorted(ranks) != [3, 4] and not (lengths_differ and student.image is not None):
        return first, second
    first, second = (_as_map(side) if len(side.feature.shape) == 3 else side.feature for side in (student, teacher))
    for axis in (1, 2) if positions else ():
        sizes = first.shape[axis], second.shape[axis]
        if None in sizes:
            expected = f"the height and width of {student.place} and {teacher.place} to be known"
            remedy = "Declare the size of the models' inputs: keras.Input((224, 224, 3))."
            received = f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
            raise ValueError(checks.message(expected, received, remedy))
        first, second = (_shortened(feature, axis, min(sizes)) for feature in (first, second))
    return first, second


def pooled(side: Side) -> Any:
    """The mean of a feature over its positions, shape ``(N, C)``; class and register tokens of an image are left out.

    Args:
        side: The feature.

    Raises:
        ValueError: If it is not known how many tokens of an image are patches.
    """
    feature = _as_map(side) if len(side.feature.shape) == 3 and side.image is not None else side.feature
    return ops.mean(feature, axis=tuple(range(1, len(feature.shape) - 1))) if len(feature.shape) > 2 else feature


def _as_map(side: Side) -> Any:
    """The patches of tokens ``(N, L, C)`` as a map ``(N, H, W, C)``."""
    tokens, channels = side.feature.shape[1:]
    if tokens is None:
        remedy = "Declare the size of the model's inputs: keras.Input((224, 224, 3))."
        received = f"shape {tuple(side.feature.shape)}"
        raise ValueError(checks.message(f"the number of tokens of {side.place} to be known", received, remedy))
    prefix = None if side.prefix is None else 0  # they have been left out already
    grid = find_grid(tokens, side.image, prefix, side.place, checks.message)
    return ops.reshape(side.feature[:, grid.prefix :], (-1, grid.height, grid.width, channels))


def _shortened(feature: Any, axis: int, size: int) -> Any:
    if feature.shape[axis] == size:
        return feature
    return multiplied(smoothing_matrix(feature.shape[axis], size), feature, axis)


def _without_positions(feature: Any) -> Any:
    """A map of one position, as pooling layers return it, as a vector."""
    single = len(feature.shape) == 4 and tuple(feature.shape[1:3]) == (1, 1)
    return ops.squeeze(feature, axis=(1, 2)) if single else feature
