"""Teachers that are not Keras models: any function from NumPy arrays to an array."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_distill import backends, checks
from keras_distill.recording import looks_like


@keras.saving.register_keras_serializable(package="keras_distill")
class CallableTeacher(keras.Model):
    """A teacher that is a function of NumPy arrays: an ONNX session, ``predict_proba``, a torch module.

    Each step calls the function with the batch, on the host. XLA cannot compile such a call on TensorFlow, so it is
    switched off, as Keras does for layers that do not support it.

    Args:
        function: Called with the inputs as arrays, ``(N, ...)``, in the structure of the batch; returns an array
            ``(N, *output_shape)``.
        output_shape: Shape of one example's output, such as ``(10,)`` for ten classes.
        batch_size: The largest number of examples in one call; None passes the whole batch.
        from_probabilities: Whether the function returns probabilities. The teacher then returns their logarithms, which
            are logits, or for a single probability ``(1,)`` its log-odds.
        dtype: Precision of the teacher's output.
        name: Name of the teacher.

    Raises:
        TypeError: If ``function`` cannot be called or a setting has the wrong type.
        ValueError: If a setting is out of range. In a step: if the function returns another number of rows, another
            shape, numbers that are not finite, or no probabilities although ``from_probabilities`` says so; or
            probabilities without ``from_probabilities`` where the loss expects logits.

    Example:
        >>> teacher = CallableTeacher(lambda x: x @ np.eye(2), output_shape=(2,))
        >>> [[float(score) for score in row] for row in teacher(np.array([[3.0, 1.0]]))]
        [[3.0, 1.0]]
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        output_shape: Sequence[int],
        *,
        batch_size: int | None = None,
        from_probabilities: bool = False,
        dtype: str = "float32",
        name: str = "callable_teacher",
    ) -> None:
        argument: Any = function
        if not callable(argument) or isinstance(argument, (keras.layers.Layer, type)):
            remedy = "A Keras model is a teacher itself; of a class, make an object."
            raise TypeError(checks.message("`function` to be a function of arrays", f"{function!r}", remedy))
        sizes = tuple(output_shape) if isinstance(output_shape, (list, tuple)) else ()
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            expected = "`output_shape` to hold the sizes of one example's output, such as (10,)"
            raise ValueError(checks.message(expected, f"output_shape={output_shape!r}"))
        if batch_size is not None:
            checks.integer("batch_size", batch_size)
            checks.positive("batch_size", batch_size)
        checks.boolean("from_probabilities", from_probabilities)
        super().__init__(name=name, dtype=dtype, autocast=False, trainable=False)
        # past Keras' and torch's tracking: a bound method or a torch module would become a part of this model
        object.__setattr__(self, "function", function)
        self.example_shape, self.batch_size, self.from_probabilities = sizes, batch_size, from_probabilities
        self.activation = keras.activations.linear if from_probabilities else None  # a loss may ask for logits
        self.expects_logits = False
        self.supports_jit = keras.backend.backend() != "tensorflow"
        object.__setattr__(self, "_one_at_a_time", threading.Lock())  # replicas run on threads, functions may not
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The function's output for a batch.

        Args:
            inputs: Tensors ``(N, ...)`` in any structure.
            training: Ignored.

        Returns:
            A tensor ``(N, *output_shape)``.
        """
        structure, tensors = inputs, keras.tree.flatten(inputs)

        def on_arrays(*arrays: Any) -> Any:
            return self.answers(keras.tree.pack_sequence_as(structure, [np.array(array) for array in arrays]))

        return backends.on_host(on_arrays, tensors, self.example_shape, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the output."""
        first = input_shape
        while isinstance(first, dict) or (first and isinstance(first[0], (tuple, list, dict))):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        return (first[0], *self.example_shape)

    def answers(self, inputs: Any) -> np.ndarray[Any, Any]:
        """The checked output of the function for arrays.

        Args:
            inputs: Arrays ``(N, ...)``.

        Returns:
            An array ``(N, *output_shape)``.

        Raises:
            ValueError: As for the class.
        """
        rows = len(keras.tree.flatten(inputs)[0])
        size = self.batch_size or max(rows, 1)
        parts = [np.zeros((0, *self.example_shape), self.compute_dtype)]
        for start in range(0, rows, size):
            part = keras.tree.map_structure(lambda array, start=start: array[start : start + size], inputs)
            with self._one_at_a_time:
                output = self.function(part)
            parts.append(self._checked(output, min(size, rows - start)))
        return np.concatenate(parts)

    def _checked(self, output: Any, rows: int) -> np.ndarray[Any, Any]:
        who = f"the function of {self.name!r}"
        if isinstance(output, (list, tuple, dict)) and not np.isscalar(next(iter(output), 0)):
            remedy = "Pass a function that picks one, such as lambda x: session.run(None, {'x': x})[0]."
            raise ValueError(checks.message(f"{who} to return one array", f"a {type(output).__name__}", remedy))
        if np.ma.is_masked(output):
            expected, remedy = f"{who} to return a value everywhere", "Fill them, and pass `mask` to the term."
            raise ValueError(checks.message(expected, "masked entries", remedy))
        array = np.asarray(output)
        if array.dtype.kind not in "fiub":
            raise ValueError(checks.message(f"{who} to return numbers", f"an array of {array.dtype}"))
        expected_shape = (rows, *self.example_shape)
        if array.shape != expected_shape:
            remedy = "Set `output_shape` to the shape of one row; the function must return a row for each input."
            expected = f"{who} to return an array of shape {expected_shape}"
            raise ValueError(checks.message(expected, f"shape {array.shape}", remedy))
        array = array.astype("float64")
        if not np.isfinite(array).all():
            raise ValueError(checks.message(f"{who} to return finite numbers", "NaN or infinity"))
        return (self._logits_of(array, who) if self._takes_probabilities(array, who) else array).astype(
            self.compute_dtype
        )

    def _takes_probabilities(self, array: Any, who: str) -> bool:
        if not self.from_probabilities:
            if self.expects_logits and array.size and looks_like(array) == "softmax":
                expected = f"{who} to return logits, which the loss expects"
                remedy = "Pass from_probabilities=True."
                raise ValueError(checks.message(expected, "rows of probabilities, which sum to 1", remedy))
            return False
        kinds = ("softmax", "sigmoid") if self.example_shape[-1] == 1 else ("softmax",)
        if array.size and looks_like(array) not in kinds:
            expected = f"{who} to return probabilities, rows from 0 to 1 that sum to 1"
            remedy = "Pass from_probabilities=False for logits."
            raise ValueError(checks.message(expected, f"values from {array.min():.3g} to {array.max():.3g}", remedy))
        return True

    def _logits_of(self, array: Any, who: str) -> Any:
        # the smallest normal number of float32: a forest returns exact zeros, whose logarithm must be finite
        tiny = float(np.finfo("float32").tiny)
        logits = np.log(np.maximum(array, tiny))
        return logits - np.log(np.maximum(1.0 - array, tiny)) if self.example_shape[-1] == 1 else logits

    def get_config(self) -> dict[str, Any]:
        """Refused: a file cannot hold the function.

        Raises:
            ValueError: Always.
        """
        expected = f"a teacher that a file can hold, not the function of {self.name!r}"
        remedy = "Save the model without it, and set `model.teacher` after loading."
        raise ValueError(checks.message(expected, "a CallableTeacher", remedy))
