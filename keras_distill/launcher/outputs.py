"""Logits or probabilities: the kind of a model's output, by its last layer."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill import checks


def ends_in_softmax(model: Any) -> bool | None:
    """Whether a model returns probabilities of a softmax.

    Args:
        model: Any model; a sequential or functional model may end in another model.

    Returns:
        True or False; None if it is not known, as for a model whose ``call`` is written by hand.

    Example:
        >>> layers = keras.layers
        >>> ends_in_softmax(keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")]))
        True
        >>> ends_in_softmax(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
        False
    """
    last = _last(model)
    if last is None:
        return None
    if isinstance(last, keras.Model):
        return ends_in_softmax(last)
    if isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax:
        return True
    return type(last).__name__ == "Softmax"  # keras.ops.softmax in a functional model


def _last(model: Any) -> Any:
    """The last operation of a model that changes values; None if it is not known or the model has several outputs."""
    if isinstance(model, keras.Sequential):
        return next((layer for layer in reversed(model.layers) if not _keeps_values(layer)), None)
    names = model.output_names if hasattr(model, "operations") else []
    if len(names) != 1:
        return None
    last = next((operation for operation in model.operations if operation.name == names[0]), None)
    while last is not None and _keeps_values(last):
        last = _before(model, last)
    return last


def _before(model: Any, operation: Any) -> Any:
    """The operation whose output an operation reads, or None."""
    try:
        read = operation.input
        return next((other for other in model.operations if other.output is read), None)
    except (AttributeError, ValueError):  # an operation is used several times
        return None


def _keeps_values(operation: Any) -> bool:
    """Whether an operation returns the values that it reads, such as a reshape or a cast to float32."""
    kinds = (keras.layers.Reshape, keras.layers.Flatten, keras.layers.Identity)
    plain = isinstance(operation, keras.layers.Activation) and operation.activation is keras.activations.linear
    return plain or isinstance(operation, kinds)


def check_alike(student: Any, teacher: Any) -> bool:
    """Whether both models return logits.

    Args:
        student: The student.
        teacher: The teacher, or None.

    Returns:
        False where both end in a softmax; True otherwise.

    Raises:
        ValueError: If one of them ends in a softmax and the other in logits.
    """
    ends = {"student": ends_in_softmax(student), "teacher": None if teacher is None else ends_in_softmax(teacher)}
    if True in ends.values() and False in ends.values():
        softmax, logits = sorted(ends, key=lambda who: not ends[who])
        expected = "student and teacher to return outputs of one kind"
        received = f"a {softmax} that ends in a softmax and a {logits} that does not"
        remedy = f"Put a keras.layers.Softmax() behind the {logits}, or leave out that of the {softmax}."
        raise ValueError(checks.message(expected, received, remedy))
    return True not in ends.values()
