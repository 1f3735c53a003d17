"""The few things that differ between the backends of Keras and that Keras has no public function for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.compat import get_keras_mask, set_keras_mask


def replicas() -> int:
    """Number of replicas that train together, 1 outside ``tf.distribute``.

    Each replica's loss is divided by it, because the gradients of all are summed.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def executes_eagerly() -> bool:
    """Whether operations are executed as Python reaches them, and not traced into a graph for later."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.executing_eagerly())
    return bool(keras.backend.backend() == "torch")


def check_batch(student: Any, teacher: Any) -> None:
    """A check, where only the running graph knows the sizes, that both tensors have equally many examples.

    Args:
        student: The student's tensor.
        teacher: The teacher's: a single row would be broadcast over the batch.
    """
    if keras.backend.backend() == "tensorflow" and None in (student.shape[0], teacher.shape[0]):
        import tensorflow as tf

        words = "Expected student and teacher to give equally many examples."
        tf.debugging.assert_equal(tf.shape(student)[0], tf.shape(teacher)[0], words)


def likeliest(logits: Any) -> Any:
    """The class of the highest score in each row, the first of several.

    Args:
        logits: Shape ``(N, ..., C)``.

    Returns:
        Class indices, shape ``(N, ...)``.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.argmax(logits, axis=-1)
    import tensorflow as tf

    # Keras' own tells -0.0 from 0.0 first, in a few passes that show on a step of some milliseconds
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def mask_of(tensor: Any) -> Any:
    """The mask that Keras' layers have handed down with a tensor, or None."""
    return get_keras_mask(tensor)


def with_mask(tensor: Any, mask: Any) -> Any:
    """The same tensor with a mask that Keras takes into account where it averages, as its own ``ignore_class`` does.

    Args:
        tensor: Values of a loss.
        mask: True where a value counts, same shape.

    Returns:
        The tensor.
    """
    set_keras_mask(tensor, mask)
    return tensor


def without_mask(tensor: Any) -> Any:
    """The same numbers without the mask, for a computation that treats the mask itself."""
    if mask_of(tensor) is None:
        return tensor
    # JAX gives the same object back where the shape is, and with it the mask
    return ops.copy(tensor) if keras.backend.backend() == "jax" else ops.reshape(tensor, ops.shape(tensor))


def zero_gradient(tensors: Sequence[Any]) -> Any:
    """A zero whose gradient with respect to some tensors is 0, where nothing else has a gradient.

    Keras refuses a step in which no variable has a gradient, and torch its backward pass.

    Args:
        tensors: Of any shapes; those that are not floating-point tensors are left out.

    Returns:
        A float32 scalar.
    """
    tensors = [ops.convert_to_tensor(tensor) for tensor in tensors]
    floats = [one for one in tensors if keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype))]
    nothing = [ops.sum(ops.cast(ops.where(False, one, ops.zeros_like(one)), "float32")) for one in floats]
    return sum(nothing, ops.zeros(()))


def as_float(value: Any) -> float:
    """A number or a float32 variable as the shortest Python number that it stands for: 0.7, not 0.699999988."""
    if isinstance(value, (int, float)):
        return float(value)
    return float(str(np.float32(ops.convert_to_numpy(value))))


def same_or_loaded(known: float, variable: Any) -> float:
    """A number as the user wrote it where a float32 variable holds the same, since float32 has no 1/3, else its value.

    Args:
        known: The number so far.
        variable: A scalar variable that a file may have changed.
    """
    loaded = as_float(variable)
    return known if np.float32(known) == np.float32(loaded) else loaded
