"""Balanced weights: the gradients of single terms and of the task loss, measured in the first steps."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from distill_core.guidance.balance import LIMIT, Balanced, large, median_ratio, unmeasured
from keras_distill import backends, checks

_THREAD = threading.local()
_HALF_SCALE = 2.0**15  # like a loss scale: small gradients of float16 would be 0


@keras.saving.register_keras_serializable(package="keras_distill")
class BalanceState(keras.layers.Layer):
    """The measurements of one balanced weight in one model, as variables that graphs update and files hold.

    Args:
        setting: The weight.
        term: Name of the term.

    Attributes:
        squares: For each measured step the squared norms of the task loss's and of the term's gradient.
        begun: Number of measured steps.
        last: The last of these steps.
        position: Optimizer steps so far, in a loop of the user.
    """

    def __init__(self, setting: Balanced, term: str) -> None:
        super().__init__(name="balance", autocast=False, trainable=False)
        self.setting, self._term = setting, term
        self._fixed: float | None = None
        self.squares = self._variable("squares", (setting.steps, 2), _dtype(), "zeros")
        self.begun = self._variable("begun", (), "int32", "zeros")
        self.last = self._variable("last", (), "int32", keras.initializers.Constant(-1))
        self.position = self._variable("position", (), "int32", "zeros")
        self.built = True

    def _variable(self, name: str, shape: tuple[int, ...], dtype: str, initializer: Any) -> keras.Variable:
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer=initializer, trainable=False, autocast=False,
            aggregation="only_first_replica",
        )  # fmt: skip

    @property
    def measuring(self) -> bool:
        """Whether the weight is not fixed yet."""
        return self._fixed is None

    @property
    def factor(self) -> float:
        """The factor of the share as it is known now; 1 before the first measurement.

        During the measurement it waits for the device.
        """
        if self._fixed is not None:
            return self._fixed
        factor = median_ratio(self._rows())
        return 1.0 if factor is None else factor

    def _rows(self) -> list[list[float]]:
        values = backends.values_of(self.squares.value) if backends.executes_eagerly() else None
        begun = None if values is None else backends.values_of(self.begun.value)
        rows: list[list[float]] = [] if values is None or begun is None else values[: int(begun)].tolist()
        return rows

    def begin(self, position: int) -> None:
        """Fix the weight, if the optimizer has made its steps.

        Args:
            position: Optimizer steps so far.

        Raises:
            ValueError: If no gradient could be measured.
        """
        if self._fixed is not None:
            return
        rows = self._rows()
        if len(rows) == self.setting.steps and int(ops.convert_to_numpy(self.last)) != position:
            factor = median_ratio(rows)
            if factor is None:
                raise ValueError(unmeasured(self._term, rows))
            self._fixed = factor
            if words := large(self._term, factor):
                warnings.warn(words, stacklevel=2)
        self.position.assign(position)

    def add(self, task: Any, term: Any, position: Any = None) -> Any:
        """Add the squared norms of a batch, and compute the factor of the share with them.

        Args:
            task: The squared norm of the task loss's gradient.
            term: The squared norm of the term's gradient.
            position: Optimizer steps so far, an integer scalar; None takes that of :meth:`begin`.

        Returns:
            A scalar, 0 if no step counts yet.
        """
        position = ops.cast(self.position if position is None else position, "int32")
        last, begun = ops.convert_to_tensor(self.last), ops.convert_to_tensor(self.begun)
        row = begun - ops.cast(ops.equal(position, last), "int32")
        is_open = row < self.setting.steps
        chosen = ops.logical_and(ops.equal(ops.arange(self.setting.steps, dtype="int32"), row), is_open)
        both = backends.sum_over_replicas(ops.stack([task, term]))
        squares = ops.convert_to_tensor(self.squares)
        squares = squares + ops.where(ops.expand_dims(chosen, -1), both, ops.zeros_like(squares))
        self.squares.assign(squares)
        self.begun.assign(ops.where(is_open, row + 1, begun))
        self.last.assign(ops.where(is_open, position, last))
        return _median(squares, ops.convert_to_tensor(self.begun))

    def load_own_variables(self, store: Any) -> None:
        """Load the measurements of a file."""
        super().load_own_variables(store)
        self._fixed = None  # `begin` looks whether they are complete


def _dtype() -> str:
    return str(keras.backend.result_type(keras.config.floatx(), "float32"))


def _median(squares: Any, begun: Any) -> Any:
    """The median of the ratios of the steps that count, as :func:`median_ratio` computes it; 0 if no step counts."""
    task, term = ops.unstack(squares, 2, axis=1)
    low, high = ops.minimum(task, term), ops.maximum(task, term)
    # the square roots, since the square of the limit is outside the range of float32; NaN compares as False
    counts = ops.logical_and(ops.sqrt(high) <= ops.sqrt(low) * LIMIT, ops.logical_and(low > 0, ops.isfinite(high)))
    counts = ops.logical_and(counts, ops.arange(squares.shape[0], dtype="int32") < begun)
    unit = ops.ones_like(task)
    logarithms = ops.log(ops.where(counts, task, unit)) - ops.log(ops.where(counts, term, unit))
    ordered = ops.sort(ops.where(counts, logarithms, ops.full_like(task, float("inf"))))
    number = ops.sum(ops.cast(counts, "int32"))
    middle = ops.stack([ops.maximum(number - 1, 0) // 2, number // 2])
    # the steps that do not count are at the end, where nothing is read unless no other step is left
    lower, upper = ops.unstack(ops.take(ordered, ops.minimum(middle, squares.shape[0] - 1)), 2)
    return ops.where(number > 0, ops.exp((lower + upper) / 4), ops.zeros_like(lower))


@contextlib.contextmanager
def taped(needed: bool) -> Iterator[None]:
    """A context in which gradients at inner tensors can be measured: TensorFlow records eager steps for it.

    Args:
        needed: Whether anything is measured.
    """
    if not needed or keras.backend.backend() != "tensorflow" or not backends.executes_eagerly():
        yield
        return
    import tensorflow as tf

    before = getattr(_THREAD, "tape", None)
    with tf.GradientTape(persistent=True) as tape:
        _THREAD.tape = tape
        try:
            yield
        finally:
            _THREAD.tape = before


def measured_weights(
    terms: Sequence[Any], student: Any, values: Mapping[str, Any], task_loss: Any, position: Any
) -> dict[str, Any]:
    """Measure the terms whose weight is not fixed yet.

    Args:
        terms: The terms that work in the step.
        student: The student's call.
        values: Their values without weights, by name.
        task_loss: The task loss without its weight, a scalar; None if it does not count or is not known.
        position: Optimizer steps so far, as in :meth:`BalanceState.add`.

    Returns:
        The weight of each measured term, by name.

    Raises:
        ValueError: If nothing can be compared.
    """
    weights = {}
    for term in terms:
        if term.measuring:
            reference = _reference(term, terms, values) if task_loss is None else task_loss
            squares = _squared_norms(term, student, reference, values[term.name])
            factor = ops.stop_gradient(term.state.balance.add(*squares, position))
            weights[term.name] = factor * ops.cast(term.state.number("share"), factor.dtype)
    return weights


def _reference(term: Any, terms: Sequence[Any], values: Mapping[str, Any]) -> Any:
    for other in terms:
        if "weight" not in other.schedules:
            value = values[other.name]
            return ops.cast(other.state.number("weight"), value.dtype) * value
    expected = f"a task loss, or a term with a number as its weight, that the weight of term {term.name!r} refers to"
    remedy = "Compile a loss, pass losses(..., task_loss=...) in a loop of your own, or pass a number as the weight."
    raise ValueError(checks.message(expected, "none", remedy))


def _squared_norms(term: Any, student: Any, reference: Any, value: Any) -> tuple[Any, Any]:
    """The squared norms of both gradients, at the tensors that the term reads of the student.

    Raises:
        ValueError: If one of the losses does not depend on them.
    """
    place, read = "the student's output", keras.tree.flatten(student.output)
    if term.student_taps:
        place = f"the student's {', '.join(repr(tap.name) for tap in term.student_taps)}"
        read = [student.feature(level) for tap in term.student_taps for level in student.levels(tap)]
    read = list({id(tensor): tensor for tensor in read}.values())
    tensors = [tensor for tensor in read if keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))]
    own = _gradients(value, tensors)
    reached = [tensor for tensor, gradient in zip(tensors, own, strict=True) if gradient is not None]
    of_task = _gradients(reference, reached)
    for loss, gradients in ((f"term {term.name!r}", own), ("the task loss", of_task)):
        if all(gradient is None for gradient in gradients):
            expected = f"{loss} to depend on {place}, where the gradients of a balanced weight are compared"
            raise ValueError(checks.message(expected, "no gradient", "Pass a number as the weight."))
    return _squares(of_task), _squares(own)


def _gradients(loss: Any, tensors: Sequence[Any]) -> list[Any]:
    """The gradient at each tensor, None where the loss does not depend on it."""
    if not tensors:
        return []
    if not any(keras.backend.standardize_dtype(tensor.dtype) == "float16" for tensor in tensors):
        return [None if each is None else ops.cast(each, _dtype()) for each in _plain_gradients(loss, tensors)]
    dtype = _dtype()
    wide = ops.cast(loss, dtype)
    scaled = [None if each is None else ops.cast(each, dtype) for each in _plain_gradients(_HALF_SCALE * wide, tensors)]
    plain = [None if each is None else ops.cast(each, dtype) for each in _plain_gradients(wide, tensors)]
    finite = [ops.all(ops.isfinite(each)) for each in scaled if each is not None]
    fits = ops.all(ops.stack(finite)) if finite else True
    return [
        None if first is None else ops.where(fits, first / _HALF_SCALE, second)
        for first, second in zip(scaled, plain, strict=True)
    ]


def _plain_gradients(loss: Any, tensors: Sequence[Any]) -> list[Any]:
    if keras.backend.backend() == "torch":
        import torch

        if not loss.requires_grad:
            return [None] * len(tensors)
        known = [tensor for tensor in tensors if tensor.requires_grad]
        computed = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=True) if known else ()
        by_id = dict(zip(map(id, known), computed, strict=True))
        return [by_id.get(id(tensor)) for tensor in tensors]
    import tensorflow as tf

    if not tf.executing_eagerly():
        return list(tf.gradients(loss, list(tensors)))
    tape = getattr(_THREAD, "tape", None)
    if tape is None:
        expected = "the student and `losses` to be called inside `with step.watching():` where a weight is balanced"
        raise ValueError(checks.message(expected, "a call outside", "With a train_step of your own, use a graph."))
    with tape.stop_recording():
        return list(tape.gradient(loss, list(tensors)))


def _squares(gradients: Sequence[Any]) -> Any:
    return sum(ops.sum(ops.square(gradient)) for gradient in gradients if gradient is not None)


def check_balanced(terms: Sequence[Any], averages: Sequence[Any]) -> None:
    """Raise if a weight is balanced where it cannot be measured.

    Args:
        terms: The terms of a model.
        averages: The teachers that are moving averages of the student.

    Raises:
        ValueError: If so.
    """
    for term in terms:
        setting = term.schedules.get("weight")
        if not isinstance(setting, Balanced):
            continue
        reason = None
        if keras.backend.backend() == "jax":
            reason = "on JAX, which cannot differentiate at inner tensors"
        elif averages:
            reason = "with an EMATeacher, since the student and its average are equal at first"
        if reason is not None:
            expected = f"the weight of term {term.name!r} to be a number or a schedule {reason}"
            raise ValueError(checks.message(expected, f"weight={setting!r}", "Pass a number."))
