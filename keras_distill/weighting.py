"""Sample weights and masks: what a batch says about how much each example and each position counts."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.losses import DistillationLoss, FunctionLoss


def weighted_loss(
    loss: keras.losses.Loss, student: Any, teacher: Any, *, sample_weight: Any = None, mask: Any = None
) -> Any:
    """A loss of the student's tensor from the teacher's, with weights and a mask.

    Masked positions do not count, and the mean is that over the others. As everywhere in Keras, the weighted values
    are divided by the number of values and not by the sum of the weights.

    Args:
        loss: Called with the teacher's tensor, then the student's.
        student: The student's tensor ``(N, ..., C)``, or a list of them.
        teacher: The teacher's tensor or list, and the labels in a pair with it where the loss needs them.
        sample_weight: Weight of each example, shape ``(N,)``, or of each position.
        mask: True where a position counts, shape ``(N, L)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If the weights fit neither the examples nor the positions.
    """
    gives = loss.gives if isinstance(loss, DistillationLoss) else "positions"
    if gives == "batch":
        sample_weight = None
    if mask is not None and gives != "positions":
        # what is computed from a whole example sees zeros at its masked positions, in both models
        student, teacher = keras.tree.map_structure(lambda tensor: _masked(tensor, mask), (student, teacher))
        mask = None
    if isinstance(loss, FunctionLoss):  # only its values tell their shape
        values = loss.call(teacher, student)
        rank, sizes = len(values.shape), tuple(values.shape)
        if rank == 0:
            return values / backends.replicas()  # nothing to weigh: the function took the mean itself
        return _Given(name="given")(ops.zeros_like(values), values, fitted_weights(sample_weight, mask, rank, sizes))
    first = keras.tree.flatten(student)[0]
    sizes = tuple(first.shape)[:1] if gives == "examples" else tuple(first.shape)[:-1]
    return loss(teacher, student, sample_weight=fitted_weights(sample_weight, mask, len(sizes), sizes))


def fitted_weights(sample_weight: Any, mask: Any, rank: int, sizes: tuple[int | None, ...]) -> Any:
    """Weights in the shape of a loss's values, the mask among them.

    Args:
        sample_weight: Weight of each example or position, or None.
        mask: True where a position counts, or None.
        rank: Number of dimensions of the values.
        sizes: Shape of the values, as far as it is known.

    Returns:
        Weights with ``rank`` dimensions, or None.

    Raises:
        ValueError: If the weights fit neither the examples nor the positions.
    """
    weights = None
    if sample_weight is not None:
        weights = ops.cast(sample_weight, "float32")
        shape = tuple(weights.shape)
        while len(shape) > 1 and shape[-1] == 1:
            weights, shape = ops.squeeze(weights, axis=-1), shape[:-1]
        if len(shape) > rank or checks.shapes_differ(shape, sizes[: len(shape)]):
            expected = f"`sample_weight` to have one weight for each example, or for each of the values {sizes}"
            raise ValueError(checks.message(expected, f"shape {tuple(sample_weight.shape)}"))
        weights = _expanded(weights, rank)
    if mask is not None:
        kept = ops.cast(mask, "float32")
        # Keras' own rule: the mean over what is not masked, although the sum is divided by the number of all values
        kept = kept * ops.divide_no_nan(ops.cast(ops.size(kept), "float32"), ops.sum(kept))
        kept = _expanded(kept, rank)
        weights = kept if weights is None else weights * kept
    return weights


class _Given(keras.losses.Loss):
    """Values that are there already, averaged as Keras averages."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


def _expanded(weights: Any, rank: int) -> Any:
    for _ in range(rank - len(weights.shape)):
        weights = ops.expand_dims(weights, axis=-1)
    return weights


def _masked(tensor: Any, mask: Any) -> Any:
    if len(tensor.shape) < len(mask.shape):
        return tensor
    return tensor * _expanded(ops.cast(mask, tensor.dtype), len(tensor.shape))
