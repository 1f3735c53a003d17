"""Base classes of the losses: requirements that a term reads, settings, configs, averaging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import keras

from keras_distill import backends, checks
from keras_distill.functional.inputs import ignored, prepare_labels
from keras_distill.losses.temperature import CurriculumTemperature
from keras_distill.schedules import Schedule, deserialized, first_value, serialized

__all__ = ["DistillationLoss", "FunctionLoss"]


class DistillationLoss(keras.losses.Loss):
    """Base of every loss: a ``keras.losses.Loss`` called with the teacher's tensor, then the student's.

    A subclass stores checked settings and defines ``call(y_true, y_pred)``. Fourteen attributes describe it to a term:

    - ``needs_labels``: ``y_true`` is the pair of the teacher's tensor and the batch's labels.
    - ``channels_must_match``: the two features need the same number of channels, if necessary through an adapter.
    - ``positions_must_match``: the two features need the same positions; a term resizes the teacher's map.
    - ``several_layers``: ``y_true`` and ``y_pred`` are lists of features, one for each layer.
    - ``merges_classes``: it is a divergence between the distributions of a row, also where classes of the row are
      merged, so that a cache of the likeliest classes is enough.
    - ``linear_in_teacher``: its gradient is linear in the teacher's probabilities at temperature 1, so that a cache of
      classes drawn at random gives an unbiased one.
    - ``learned``: :meth:`build` makes parameters in ``layer``. A FeatureDistillation builds a copy of the loss for each
      pair of layers, and treats it as it does adapters.
    - ``reads_teacher``: :meth:`read_teacher` takes numbers from layers of the teacher. Each pair of layers then has a
      copy of the loss too.
    - ``keeps_teacher``: it keeps earlier outputs of its teacher. Each of several teachers then has a copy of its own,
      and a route, with which a teacher has only some examples of the batch, is refused.
    - ``needs_boxes``: ``y_true`` is the pair of the teacher's tensor and the weights of the batch's boxes.
    - ``needs_index``: ``y_true`` is the pair of the teacher's tensor and the row of each example in the training data;
      evaluation leaves the term out.
    - ``learns_temperature``: its temperature may be a CurriculumTemperature.
    - ``class_scores``: both tensors are class scores (logits), so that agreement with the teacher is meaningful.
    - ``gives``: ``"positions"`` if ``call`` returns one value for each position (the shape of the student's tensor
      without its last dimension), ``"examples"`` if it returns one value for each example, ``"batch"`` if it compares
      the examples of a batch and returns a scalar, without sample weights and masks.

    Args:
        name: Name of the loss.
        reduction: How the values are averaged, as for every Keras loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

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
    reads_teacher: ClassVar[bool] = False
    keeps_teacher: ClassVar[bool] = False
    merges_classes: ClassVar[bool] = False
    linear_in_teacher: ClassVar[bool] = False
    needs_boxes: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    class_scores: ClassVar[bool] = False
    learns_temperature: ClassVar[bool] = False
    gives: ClassVar[str] = "positions"
    layer: keras.layers.Layer | None = None
    training: bool | None = None  # whether a step trains; a term sets it on its own copy of a learned loss

    def __init__(self, *, name: str, reduction: str | None = "sum_over_batch_size", dtype: Any = None) -> None:
        # Keras converts all arguments of a loss to its dtype, also labels: in bfloat16 label 301 becomes 300.
        precision = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
        precision = "float32" if precision in ("float16", "bfloat16") else precision
        super().__init__(name=name, reduction=reduction, dtype=precision)
        self.schedules: dict[str, Schedule] = {}
        self._numbers: list[str] = []  # names of settings that may be variables
        self._fixed: list[str] = []  # names of settings that never change

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the parameters of a loss with ``learned = True``.

        Args:
            student: Shape of the student's feature, after the adapter, channels last.
            teacher: Shape of the teacher's feature.

        Raises:
            ValueError: If the loss cannot compare features of these shapes.
        """

    def read_teacher(self, layer_of: Callable[[str | None], keras.layers.Layer]) -> None:
        """Take numbers from layers of the teacher, for a loss with ``reads_teacher = True``; after :meth:`build`.

        Called again for a new teacher. A file of the model keeps what is stored in weights of ``layer``.

        Args:
            layer_of: Returns the teacher's layer of a name; ``None`` is the layer that the term names.

        Raises:
            ValueError: If a layer is not of the kind that the loss reads.
        """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of a batch, a scalar unless ``reduction`` is None."""
        if self.gives != "batch":
            return super().__call__(y_true, y_pred, sample_weight)
        # Keras does not divide a scalar by the number of replicas, whose gradients are summed.
        y_pred = keras.tree.map_structure(backends.without_mask, y_pred)
        return super().__call__(y_true, y_pred) / backends.replicas()

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        numbers = {name: self._serialized(name) for name in self._numbers}
        fixed = {name: getattr(self, name) for name in self._fixed}
        lists = {name: list(value) for name, value in fixed.items() if isinstance(value, tuple)}
        return {**super().get_config(), "dtype": self.dtype, **numbers, **fixed, **lists}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationLoss:
        """The loss that :meth:`get_config` describes."""
        return cls(**deserialized(config))

    @property
    def setting_names(self) -> list[str]:
        """Names of the settings."""
        return [*self._numbers, *self._fixed]

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self._numbers}
        numbers = [
            f"{name}={value if isinstance(value, CurriculumTemperature) else backends.as_float(value)}"
            for name, value in values.items()
        ]
        fixed = [f"{name}={getattr(self, name)!r}" for name in self._fixed]
        return f"{type(self).__name__}({', '.join([*numbers, *fixed])})"

    def _setting(
        self,
        name: str,
        value: float | Schedule | CurriculumTemperature,
        check: Callable[[str, Any], None] = checks.positive,
    ) -> float:
        """Check a setting that may be a schedule, and return its first number.

        A term replaces the setting by a variable, which the schedule sets.
        """
        self._numbers.append(name)
        if not isinstance(value, CurriculumTemperature):
            return float(first_value(name, value, check, self.schedules))
        if name != "temperature" or not self.learns_temperature:
            expected = f"`{name}` of {type(self).__name__} to be a number or a schedule, which it does not learn"
            remedy = "Use a loss such as SoftTargetLoss or DecoupledKDLoss."
            raise TypeError(checks.message(expected, "a CurriculumTemperature", remedy))
        # two losses must not learn one number
        learned = CurriculumTemperature.from_config(value.get_config())
        self.reversal_weight = learned.reversal_weight  # a term's copy of the loss has the present number
        return cast(float, learned)

    def _number(self, name: str) -> Any:
        """The number of a setting; a scalar tensor for a temperature that is learned."""
        value = getattr(self, name)
        if not isinstance(value, CurriculumTemperature):
            return value
        # by its name, since Keras takes only tensors by position, and the number may be 0.0
        return value(reversal_weight=self.reversal_weight)

    def _serialized(self, name: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, CurriculumTemperature):
            return keras.saving.serialize_keras_object(value)
        return serialized(self.schedules.get(name), value)

    def _fix(self, **settings: Any) -> None:
        """Store settings that were checked before, and show them in configs and repr."""
        self._fixed.extend(settings)
        for name, value in settings.items():
            setattr(self, name, value)


class FormulaLoss(DistillationLoss):
    """Base of the losses that are one function of :mod:`keras_distill.functional`, with settings of equal names.

    Args:
        name: Name of the loss.
        reduction: How the values are averaged.
        dtype: Precision of the computation.
    """

    _formula: ClassVar[Callable[..., Any]]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Values of the function, of the shape that ``gives`` describes."""
        return self._values(y_pred, y_true)

    def _values(self, *tensors: Any, **settings: Any) -> Any:
        own = {name: self._number(name) for name in self.setting_names}
        return type(self)._formula(*tensors, **own, **settings)


class LogitsLoss(FormulaLoss):
    """Base of the losses on logits, whose classes are the last dimension, as everywhere in Keras.

    Args:
        from_logits: Whether the models return logits; if False they return probabilities, whose logarithm is taken.
        name: Name of the loss.
        reduction: How the values are averaged.
        dtype: Precision of the computation.
    """

    def __init__(self, *, from_logits: bool, name: str, reduction: str | None, dtype: Any) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.boolean("from_logits", from_logits)
        self._fix(from_logits=from_logits)


class LabelledLoss(LogitsLoss):
    """Base of the losses on logits that look at the label's class: ``y_true`` is (teacher_logits, labels).

    Rows whose label is negative or ``ignore_index`` do not count: their value is 0, and the mean leaves them out.

    Args:
        ignore_index: A label of rows that do not count, in addition to negative labels.
        **options: Options of every loss on logits.
    """

    needs_labels: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True

    def __init__(self, *, ignore_index: int, **options: Any) -> None:
        super().__init__(**options)
        checks.integer("ignore_index", ignore_index)
        self._fix(ignore_index=int(ignore_index))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The loss of a batch, a scalar unless ``reduction`` is None."""
        if not isinstance(y_true, (tuple, list)) or len(y_true) != 2 or y_true[1] is None:
            got = "a pair without labels" if isinstance(y_true, (tuple, list)) else f"a {type(y_true).__name__}"
            remedy = f"{type(self).__name__} needs the batch's labels; a term of DistillModel passes them."
            raise ValueError(checks.message("`y_true` to be the pair (teacher_logits, labels)", got, remedy))
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits, masked where the label is ignored."""
        teacher, labels = y_true
        values = self._values(y_pred, teacher, labels)
        counts = keras.ops.logical_not(ignored(prepare_labels(labels, values[..., None]), self.ignore_index))
        return backends.with_mask(values, counts)


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
