"""The few things that differ between the backends of Keras and that Keras has no public function for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask  # the only way to a mask that serves all backends
from keras.src.backend.common.stateless_scope import get_stateless_scope


def replicas() -> int:
    """Number of replicas that train together, 1 outside ``tf.distribute``.

    Each replica's loss is divided by it, because the gradients of all are summed.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def no_gradient() -> contextlib.AbstractContextManager[Any]:
    """A context that keeps the backend from remembering a forward pass for the backward pass."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()  # graphs hold what a gradient asks for, and the teacher's answers have none
    import torch

    return torch.no_grad()


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


def unless_zero(weights: Sequence[Any], work: Callable[[], Any], zeros: Any) -> Any:
    """What some work gives, or zeros, without the work, where all of its weights are 0 when the graph runs.

    Args:
        weights: Scalars, at least one.
        work: Gives tensors; it changes no variable.
        zeros: Zeros of the same shapes, nested as the work's.

    Returns:
        As ``zeros``, in their precision.
    """
    needed = functools.reduce(ops.logical_or, [ops.not_equal(weight, 0.0) for weight in weights])

    def worked() -> Any:
        with _discarding_changes():
            return keras.tree.map_structure(lambda value, zero: ops.cast(value, zero.dtype), work(), zeros)

    return ops.cond(needed, worked, lambda: zeros)


@contextlib.contextmanager
def _discarding_changes() -> Iterator[None]:
    """Keeps what a model changes in itself within a branch of JAX, which can hand on results alone."""
    if keras.backend.backend() != "jax":
        yield
        return
    outer = get_stateless_scope()
    with keras.StatelessScope() as scope:
        if outer is not None:
            scope.state_mapping.update(outer.state_mapping)
        yield


def zero_of(tensors: Sequence[Any], dtype: Any) -> Any:
    """A zero whose gradient with respect to some tensors is 0.

    A constant would have none, of which Keras warns, and where no tensor has one torch refuses the backward pass.

    Args:
        tensors: Of any shapes; those that are no floating point tensors are left out.
        dtype: Precision of the zero.

    Returns:
        A scalar.
    """
    floats = [tensor for tensor in tensors if keras.backend.is_float_dtype(tensor.dtype)]
    nothing = [ops.where(False, tensor, ops.zeros_like(tensor)) for tensor in map(ops.convert_to_tensor, floats)]
    return sum((ops.cast(ops.sum(tensor), dtype) for tensor in nothing), ops.zeros((), dtype))


def first_batch(batches: Any) -> Any:
    """The first batch of what ``fit`` goes over, as Keras itself looks at it before it trains.

    Args:
        batches: Keras' iterator over an epoch.

    Returns:
        Inputs, labels and weights, as the data has them.
    """
    _, _, block = next(iter(batches))
    return block[0] if isinstance(block, (list, tuple)) else next(block)


def as_float(value: Any) -> float:
    """A number or a float32 variable as the shortest Python number that it stands for: 0.7, not 0.699999988."""
    if isinstance(value, (int, float)):
        return float(value)
    exact, single = getattr(value, "exact", None), np.float32(ops.convert_to_numpy(value))
    return float(exact if exact is not None and np.float32(exact) == single else str(single))
