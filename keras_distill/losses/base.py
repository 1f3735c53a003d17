"""What all losses share: the attributes by which a term knows how to call them, and how they are averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras

from keras_distill import backends, checks
from keras_distill.schedules import Schedule, deserialized, first_value, serialized


class DistillationLoss(keras.losses.Loss):
    """Base of every loss: a ``keras.losses.Loss`` called with the teacher's tensor, then the student's.

    A subclass stores checked settings and defines ``call(y_true, y_pred)``. Seven attributes tell a term what it is:

    - ``needs_labels``: ``y_true`` is the pair of the teacher's tensor and the batch's labels.
    - ``channels_must_match``: the two features need the same number of channels, if necessary through an adapter.
    - ``positions_must_match``: the two features need the same positions; a term resizes the teacher's map.
    - ``several_layers``: ``y_true`` and ``y_pred`` are lists of features, one for each layer.
    - ``merges_classes``: it is a divergence between the distributions of a row, also where classes of the row are
      merged, so that a cache of the likeliest classes is enough.
    - ``learned``: :meth:`build` makes parameters in ``layer``. A FeatureDistillation builds a copy of the loss for each
      pair of layers, and treats it as it does adapters.
    - ``gives``: ``"positions"`` where ``call`` returns one value for each position (the shape of the student's tensor
      without its last dimension), ``"examples"`` where it returns one for each example, ``"batch"`` where it compares
      the examples of a batch and returns a scalar, to which neither sample weights nor masks apply.

    Args:
        name: Name of the loss.
        reduction: How the values are averaged, as for every Keras loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Example:
        >>> class LargestDifference(DistillationLoss):
        ...     def call(self, y_true, y_pred):
        ...         return keras.ops.max(keras.ops.abs(y_pred - y_true), axis=-1)
        >>> teacher, student = keras.ops.array([[4.0, 2.0], [0.0, 1.0]]), keras.ops.array([[1.0, 2.0], [0.0, 0.0]])
        >>> float(LargestDifference(name="largest")(teacher, student))
        2.0
    """

    needs_labels: ClassVar[bool] = False
    channels_must_match: ClassVar[bool] = True
    positions_must_match: ClassVar[bool] = True
    several_layers: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    merges_classes: ClassVar[bool] = False
    gives: ClassVar[str] = "positions"
    layer: keras.layers.Layer | None = None
    training: bool | None = None  # whether a step trains: a term tells its own copy of a learned loss

    def __init__(self, *, name: str, reduction: str | None = "sum_over_batch_size", dtype: Any = None) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.schedules: dict[str, Schedule] = {}
        self._settings: list[str] = []

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the parameters of a loss with ``learned = True``.

        Args:
            student: Shape of the student's feature, after the adapter, channels last.
            teacher: Shape of the teacher's feature.

        Raises:
            ValueError: If the loss cannot compare features of these shapes.
        """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of a batch, a scalar unless ``reduction`` is None."""
        if self.gives != "batch":
            return super().__call__(y_true, y_pred, sample_weight)
        # Keras leaves a scalar as it is: on several replicas, whose gradients are summed, it would count several times.
        y_pred = keras.tree.map_structure(backends.without_mask, y_pred)
        return super().__call__(y_true, y_pred) / backends.replicas()

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        settings = {name: serialized(self.schedules.get(name), getattr(self, name)) for name in self._settings}
        return {**super().get_config(), "dtype": self.dtype, **settings}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationLoss:
        """The loss that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    def _setting(
        self, name: str, value: float | Schedule, check: Callable[[str, Any], None] = checks.positive
    ) -> float:
        """A setting that may be a schedule, whose numbers pass a check: the number that it has at first.

        A term puts a variable in its place, which the schedule sets.
        """
        self._settings.append(name)
        return first_value(name, value, check, self.schedules)


@keras.saving.register_keras_serializable(package="keras_distill")
class FunctionLoss(keras.losses.Loss):
    """A plain function of the two tensors as a loss.

    Args:
        function: Called with ``(student, teacher)``; or, if its first two parameters are named ``y_true`` and
            ``y_pred``, in that order, as Keras' own functions are. It returns a tensor, whose mean is the loss.
        name: Name of the loss; ``None`` takes the function's.

    Raises:
        TypeError: If ``function`` cannot be called, or is a class.

    Example:
        >>> loss = FunctionLoss(lambda student, teacher: keras.ops.square(student - 2.0 * teacher))
        >>> float(loss(keras.ops.array([[1.0, 1.0]]), keras.ops.array([[3.0, 2.0]])))
        0.5
    """

    def __init__(self, function: Any, name: str | None = None) -> None:
        super().__init__(name=name or getattr(function, "__name__", type(function).__name__))
        if isinstance(function, type) or not callable(function):
            got = f"the class {function.__name__}" if isinstance(function, type) else f"loss={function!r}"
            remedy = f"Pass an instance: {function.__name__}(...)." if isinstance(function, type) else ""
            raise TypeError(checks.message("`loss` to be a loss object or a function", got, remedy))
        self.function = function
        self._keras_order = _parameters(function)[:2] == ["y_true", "y_pred"]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Values of the function, of any shape."""
        return self.function(y_true, y_pred) if self._keras_order else self.function(y_pred, y_true)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor; the function has to be registered with Keras to be saved."""
        return {"function": keras.saving.serialize_keras_object(self.function), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FunctionLoss:
        """The loss that :meth:`get_config` describes."""
        return cls(keras.saving.deserialize_keras_object(config["function"]), name=config["name"])


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in functions may have no signature
        return []
