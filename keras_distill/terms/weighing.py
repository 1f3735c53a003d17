"""Apply masks, ignored labels and sample weights, by the same rule for every loss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks, compat
from keras_distill.losses import DistillationLoss, FunctionLoss


def weigh(
    loss: keras.losses.Loss,
    student: Any,
    teacher: Any,
    *,
    labels: Any = None,
    needs_labels: bool = False,
    masks: Sequence[Any] = (),
    counted: Any = None,
    sample_weight: Any = None,
) -> Any:
    """The masked and weighted mean of a loss between the student's tensor and the teacher's.

    A position counts if neither mask hides it and, for a loss that needs labels, its label is a class: not negative and
    not the loss's ``ignore_index``. At all other positions both tensors are set to 0 before the loss is computed, so
    that the gradient is exactly 0, and the mean leaves them out as Keras leaves out masked positions.

    Args:
        loss: The loss.
        student: The student's tensor ``(N, ..., C)``, or a list of them.
        teacher: The teacher's tensor or list.
        labels: The batch's labels.
        needs_labels: Whether the loss needs them.
        masks: True where a position counts, shape ``(N, L)``; entries may be None.
        counted: A further mask, which the user has asked for, of the first dimensions of the tensors.
        sample_weight: Weight of each example, shape ``(N,)``, or of each position.

    Returns:
        A scalar; under ``tf.distribute`` divided by the number of replicas.

    Raises:
        ValueError: If the weights fit neither the examples nor the positions, or a loss has no values for the positions
            of ``counted``.
    """
    first = keras.tree.flatten(student)[0]
    kept = [ops.cast(mask, "bool") for mask in masks if mask is not None and len(mask.shape) < len(first.shape)]
    kept += [] if counted is None else [counted]
    if needs_labels and labels is not None:
        labels, classes = _classes(labels, first, getattr(loss, "ignore_index", None))
        if classes is not None:
            kept.append(classes)
    rank = max((len(mask.shape) for mask in kept), default=0)
    mask = functools.reduce(ops.logical_and, [expanded(mask, rank) for mask in kept]) if kept else None
    if mask is not None:
        student, teacher = keras.tree.map_structure(lambda tensor: zeroed(tensor, mask), (student, teacher))
    target = (teacher, labels) if needs_labels else teacher
    values_per = loss.gives if isinstance(loss, DistillationLoss) else "positions"
    missing = needs_labels and labels is None and isinstance(loss, DistillationLoss)
    if values_per == "batch" or missing:  # without labels the loss raises its own error
        return loss(target, student)
    target, student = in_precision(loss, (target, student))
    values = loss.call(target, student)
    if counted is not None and len(values.shape) < len(counted.shape):
        expected = "a loss with one value for each position, with `mask` or `ignore_index`"
        raise ValueError(checks.message(expected, f"values of shape {tuple(values.shape)}"))
    if not len(values.shape):
        return values / backends.replicas()  # the loss has taken the mean itself
    if values_per == "examples":
        mask = None
    own_mask = compat.get_keras_mask(values)  # False for rows that the loss itself leaves out
    if own_mask is not None:
        mask = own_mask if mask is None else ops.logical_and(mask, ops.cast(own_mask, "bool"))
    rank, sizes = len(values.shape), tuple(values.shape)
    dtype = keras.backend.result_type(values.dtype, "float32")
    weights = _fitted(sample_weight, rank, sizes)
    if mask is not None:
        fits = len(mask.shape) <= rank
        mask = ops.broadcast_to(expanded(mask, rank), ops.shape(values)) if fits else None
        if weights is not None:  # on torch Keras multiplies them by the mask in place
            weights = ops.copy(ops.broadcast_to(weights, ops.shape(values)))
    reduced = compat.reduce_weighted_values(
        ops.cast(values, dtype), sample_weight=weights, mask=mask, reduction=loss.reduction, dtype=dtype
    )
    return scalar(reduced)


def token_mean(
    values: Any, counts: Any, weights: Any = None, *, by_sequence: bool = False, by_weight: bool = False
) -> Any:
    """The weighted mean of the tokens that count, over all replicas together.

    Args:
        values: One value for each token, shape ``(B, T)``.
        counts: True where a token counts, same shape.
        weights: Factor of each token, shape ``(B, T)`` or ``(B, 1)``, or None.
        by_sequence: Whether each sequence is averaged first.
        by_weight: Whether the divisor is the sum of the weights, not the number of tokens.

    Returns:
        A scalar, 0 if no token counts. Its sum over the replicas of ``tf.distribute`` is the mean over the tokens of
        all of them, so that it must not be divided by their number.

    Example:
        >>> values, counts = ops.array([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]]), ops.array([[1, 1, 1], [1, 0, 0]])
        >>> float(token_mean(values, counts)), float(token_mean(values, counts, by_sequence=True))
        (2.5, 3.0)
    """
    counts, dtype = ops.cast(counts, "bool"), keras.backend.result_type(values.dtype, "float32")
    values = ops.where(counts, ops.cast(values, dtype), 0.0)
    shares = ops.cast(counts, dtype)
    if weights is not None:
        weights = ops.cast(weights, dtype)
        values, shares = values * weights, shares * weights if by_weight else shares
    if by_sequence:
        divisors = ops.sum(shares, axis=1)
        values, shares = ops.sum(values, axis=1) / _not_zero(divisors), ops.cast(divisors > 0, dtype)
    return ops.sum(values) / _not_zero(backends.sum_over_replicas(ops.sum(shares)))


def row_weights(logits: Any, masks: Sequence[Any], sample_weight: Any) -> Any:
    """The weight of each row of logits, 0 where a mask hides it.

    Args:
        logits: Shape ``(N, ..., C)``, or ``(N,)``.
        masks: True where a row counts, shape ``(N, L)``; entries may be None.
        sample_weight: Weight of each example, shape ``(N,)``, or of each row.

    Returns:
        A float32 tensor ``(N, ...)``, or None if all rows count alike.

    Raises:
        ValueError: If the weights fit neither the examples nor the rows.
    """
    rank = max(len(logits.shape) - 1, 1)
    kept = [ops.cast(mask, "float32") for mask in masks if mask is not None and len(mask.shape) <= rank]
    factors = [expanded(mask, rank) for mask in kept]
    if sample_weight is not None:
        factors.append(_fitted(sample_weight, rank, tuple(logits.shape)[:rank]))
    # Keras divides by the sum of the weights: one weight for several rows must stand there for each of them
    return ops.broadcast_to(functools.reduce(ops.multiply, factors), ops.shape(logits)[:rank]) if factors else None


def weights_of_examples(sample_weight: Any) -> Any:
    """The weights of the examples, for terms on layers, which belong to all outputs of a model.

    For arrays Keras repeats the weights of the examples for every output. Weights that differ between the outputs are
    those of their labels; the examples then count alike.

    Args:
        sample_weight: The batch's weights, one tensor or nested like the outputs; or None.

    Returns:
        A tensor, or None if the examples count alike.

    Example:
        >>> first, second = ops.array([2.0, 0.0]), ops.array([1.0, 0.0])
        >>> for weights in ({"a": first, "b": first}, [first, second]):
        ...     print(ops.convert_to_numpy(weights_of_examples(weights)))
        [2. 0.]
        [1. 1.]
    """
    if not keras.tree.is_nested(sample_weight):
        return sample_weight
    leaves = keras.tree.flatten(sample_weight)
    if not leaves or any(leaf is None for leaf in leaves):
        return None
    first, *others = (ops.convert_to_tensor(leaf) for leaf in leaves)
    if any(len(other.shape) != len(first.shape) or checks.shapes_differ(other.shape, first.shape) for other in others):
        return None
    equal = [ops.all(ops.equal(first, ops.cast(other, first.dtype))) for other in others]
    return ops.where(ops.all(ops.stack(equal)), first, ops.ones_like(first)) if equal else first


def scalar(value: Any) -> Any:
    """The mean of values, under ``tf.distribute`` divided by the number of replicas; a scalar is returned unchanged."""
    value = ops.convert_to_tensor(value)
    return value if not len(value.shape) else ops.mean(value) / backends.replicas()


def _not_zero(divisor: Any) -> Any:
    return ops.where(divisor > 0, divisor, ops.ones_like(divisor))


def _classes(labels: Any, student: Any, ignore_index: int | None) -> tuple[Any, Any]:
    """The labels, with 0 for those that are not classes, and a mask of the classes; None for one-hot labels."""
    labels = ops.convert_to_tensor(labels)
    shape, scores = tuple(labels.shape), tuple(student.shape)
    if len(shape) == len(scores) and shape[-1] == 1 and scores[-1] != 1:
        labels = ops.squeeze(labels, axis=-1)
    if len(labels.shape) != len(scores) - 1:
        return labels, None
    classes = labels >= 0
    if ignore_index is not None:
        classes = ops.logical_and(classes, ops.not_equal(labels, ignore_index))
    return ops.where(classes, labels, ops.zeros_like(labels)), classes


def _fitted(sample_weight: Any, rank: int, sizes: tuple[int | None, ...]) -> Any:
    """The weights with as many dimensions as the values."""
    if sample_weight is None:
        return None
    weights = ops.cast(sample_weight, "float32")
    shape = tuple(weights.shape)
    while len(shape) > 1 and shape[-1] == 1:
        weights, shape = ops.squeeze(weights, axis=-1), shape[:-1]
    if len(shape) > rank or checks.shapes_differ(shape, sizes[: len(shape)]):
        expected = f"`sample_weight` to have one weight for each example, or for each of the values {sizes}"
        raise ValueError(checks.message(expected, f"shape {tuple(sample_weight.shape)}"))
    return expanded(weights, rank)


def expanded(tensor: Any, rank: int) -> Any:
    """The tensor with dimensions of size 1 appended, up to this rank."""
    for _ in range(rank - len(tensor.shape)):
        tensor = ops.expand_dims(tensor, axis=-1)
    return tensor


def zeroed(tensor: Any, mask: Any) -> Any:
    """The tensor with zeros at the positions that do not count."""
    if len(tensor.shape) < len(mask.shape):
        return tensor
    return ops.where(expanded(mask, len(tensor.shape)), tensor, ops.zeros_like(tensor))


def in_precision(loss: keras.losses.Loss, tensors: Any) -> Any:
    """Cast floating-point tensors to the precision of a loss of Keras, as the loss's ``__call__`` does.

    Args:
        loss: The loss; those of this library choose their own precision.
        tensors: Tensors in any structure.

    Returns:
        The tensors in the same structure.
    """
    if isinstance(loss, (DistillationLoss, FunctionLoss)):
        return tensors

    def cast(tensor: Any) -> Any:
        is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
        return ops.cast(tensor, loss.dtype) if is_float else tensor

    return keras.tree.map_structure(cast, tensors)
