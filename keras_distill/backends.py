"""Functions for differences between the backends for which Keras has no public function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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
    """Whether operations are executed immediately, and not traced into a graph."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.executing_eagerly())
    return bool(keras.backend.backend() == "torch")


def after(tensors: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which the operations of a TensorFlow graph wait for some tensors, also those that do not read them.

    Args:
        tensors: Tensors in any structure; other objects are ignored.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    leaves = tf.nest.flatten(tensors, expand_composites=True)
    # control dependencies are operations of the traced function; its arguments are not, so identities stand for them
    read = [tf.identity(leaf) for leaf in leaves if tf.is_symbolic_tensor(leaf)]
    return tf.control_dependencies(read)  # type: ignore[no-any-return]


def sum_over_replicas(value: Any) -> Any:
    """The sum of a tensor over the replicas that train together; outside ``tf.distribute`` the tensor itself.

    Args:
        value: A scalar, without gradient.

    Returns:
        A scalar.
    """
    if replicas() == 1:
        return value
    import tensorflow as tf

    context = tf.distribute.get_replica_context()  # None while a model is built, outside of the replicas
    return value if context is None else context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def values_of(tensor: Any) -> np.ndarray[Any, Any] | None:
    """The numbers of a tensor, or None while they are not known: in a graph that is being traced, for instance.

    It waits for the device.

    Args:
        tensor: A tensor, an array, a list of numbers, or None.

    Returns:
        An array, or None.
    """
    if isinstance(tensor, keras.KerasTensor) or tensor is None:
        return None
    if not ops.is_tensor(tensor):
        return np.asarray(tensor)
    if keras.backend.backend() == "tensorflow":
        return np.asarray(tensor) if hasattr(tensor, "numpy") else None
    if keras.backend.backend() == "torch":
        return None if tensor.device.type == "meta" else np.asarray(tensor.detach().cpu())
    import jax

    return None if isinstance(tensor, jax.core.Tracer) else np.asarray(tensor)


def check_batch(student: Any, teacher: Any) -> None:
    """Check that both tensors have the same number of examples, if only the running TensorFlow graph knows the sizes.

    Args:
        student: The student's tensor.
        teacher: The teacher's tensor; a single row of it would be broadcast over the batch.
    """
    if keras.backend.backend() == "tensorflow" and None in (student.shape[0], teacher.shape[0]):
        import tensorflow as tf

        words = "Expected student and teacher to return the same number of examples."
        tf.debugging.assert_equal(tf.shape(student)[0], tf.shape(teacher)[0], words)


def within_range(indices: Any, count: int, words: str) -> Any:
    """The indices, checked to be from 0 to ``count - 1``; under XLA and JAX, which have no errors, unchecked.

    Args:
        indices: Integers.
        count: Number of things that they choose from.
        words: The message of the error.

    Returns:
        The indices.

    Raises:
        ValueError: If an index is outside; in a graph an error of TensorFlow with the same words.
    """
    known = values_of(indices)
    if known is not None:
        if ((known < 0) | (known >= count)).any():
            raise ValueError(f"{words} Received: {sorted(set(known.tolist()))}")
    elif keras.backend.backend() == "tensorflow" and not isinstance(indices, keras.KerasTensor):
        import tensorflow as tf

        with tf.control_dependencies([tf.debugging.assert_equal((indices >= 0) & (indices < count), True, words)]):
            return tf.identity(indices)
    return indices


def likeliest(logits: Any) -> Any:
    """The class with the highest score in each row, the first one if several are equal.

    Args:
        logits: Shape ``(N, ..., C)``.

    Returns:
        Class indices, shape ``(N, ...)``.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.argmax(logits, axis=-1)
    import tensorflow as tf

    # ops.argmax first separates -0.0 from 0.0 in several passes, whose time shows in a step of a few milliseconds
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def on_host(function: Callable[..., Any], tensors: Sequence[Any], example_shape: Sequence[int], dtype: str) -> Any:
    """Call a function of NumPy arrays in a step, also in a graph; the result has no gradient.

    Args:
        function: Called with one array for each tensor; returns an array ``(N, *example_shape)`` of this dtype.
        tensors: Tensors ``(N, ...)``, at least one.
        example_shape: Shape of the result without its first dimension.
        dtype: Precision of the result.

    Returns:
        A tensor.
    """
    tensors = [ops.convert_to_tensor(tensor) for tensor in tensors]
    rows = tensors[0].shape[0]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        result = tf.numpy_function(function, tensors, tf.as_dtype(dtype))
        result.set_shape((rows, *example_shape))
        return result
    if keras.backend.backend() == "torch":
        if tensors[0].device.type == "meta":  # Keras infers shapes
            return ops.zeros((rows, *example_shape), dtype)
        return ops.convert_to_tensor(function(*(tensor.detach().cpu().numpy() for tensor in tensors)), dtype)
    import jax

    result_type = jax.ShapeDtypeStruct((rows, *example_shape), dtype)
    return jax.pure_callback(function, result_type, *map(jax.lax.stop_gradient, tensors))


def value_of(variable: keras.Variable) -> Any:
    """A copy of a variable's value, without gradient and without a cast to the precision of a layer.

    On torch a value is changed in place, and on TensorFlow it is the variable itself.

    Args:
        variable: The variable.

    Returns:
        A tensor.
    """
    return ops.stop_gradient(ops.copy(ops.convert_to_tensor(variable, variable.dtype)))


def clear_gradients(variables: Sequence[keras.Variable]) -> None:
    """Drop the gradients that torch keeps on the values of variables.

    Args:
        variables: The variables.
    """
    for variable in variables:
        variable.value.grad = None


def with_mask(tensor: Any, mask: Any) -> Any:
    """Attach a mask to a tensor, which Keras then applies when it averages, as for its own ``ignore_class``.

    Args:
        tensor: Values of a loss.
        mask: True for values that count, same shape.

    Returns:
        The tensor.
    """
    set_keras_mask(tensor, mask)
    return tensor


def without_mask(tensor: Any) -> Any:
    """The same tensor without its mask, which the caller applies itself."""
    if get_keras_mask(tensor) is None:
        return tensor
    # on JAX a reshape to the same shape returns the same object, which still has the mask
    return ops.copy(tensor) if keras.backend.backend() == "jax" else ops.reshape(tensor, ops.shape(tensor))


def zero_gradient(tensors: Sequence[Any]) -> Any:
    """A zero with a gradient of 0 with respect to some tensors, for a step in which nothing else has a gradient.

    Keras raises an error if no variable has a gradient, and so does the backward pass of torch.

    Args:
        tensors: Tensors of any shapes; only floating-point tensors are used.

    Returns:
        A float32 scalar.
    """
    tensors = [ops.convert_to_tensor(tensor) for tensor in tensors]
    total = ops.zeros(())
    for tensor in tensors:
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            total = total + ops.sum(ops.cast(ops.where(False, tensor, ops.zeros_like(tensor)), "float32"))
    return total


def as_float(value: Any) -> float:
    """A number, or a float32 variable as the shortest Python number with the same value: 0.7, not 0.699999988."""
    if isinstance(value, (int, float)):
        return float(value)
    return float(str(np.float32(ops.convert_to_numpy(value))))


def same_or_loaded(known: float, variable: Any) -> float:
    """The known number if a float32 variable still holds it up to rounding, else the variable's value.

    Args:
        known: The number so far, as the user wrote it.
        variable: A scalar variable, which loading a file may have changed.

    Returns:
        The number.
    """
    loaded = as_float(variable)
    return known if np.float32(known) == np.float32(loaded) else loaded
