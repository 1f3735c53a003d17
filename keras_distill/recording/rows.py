"""The row of each example of a batch in the data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.recording.calls import Call, entry_of_inputs

IndexPlace: TypeAlias = str | int | Callable[[Any], Any]
ROWS = ":rows"  # the key of the rows among the features of a cache; no layer has such a key
_REMEDY = (
    "Pass the inputs as a dict, with the row of each example under a key, and index=<that key>; or train on a cache"
    " with features, which knows the rows."
)


def found_rows(
    place: IndexPlace | None, student: Call, teacher: Call, size: int, examples: Sequence[int | None]
) -> Any:
    """The row of each example in the data set.

    Args:
        place: A key or an index of the batch's inputs, or a function of them; None asks the cache.
        student: The student's call, with the batch's inputs.
        teacher: The teacher's call.
        size: Number of rows.
        examples: The number of examples, None if only the running graph knows it.

    Returns:
        Integers, shape ``(N,)``.

    Raises:
        ValueError: If the rows are not known, not one integer for each example, or outside of the data set. Under XLA
            and JAX, which have no errors, the last is not checked.
    """
    if place is None:
        rows = teacher.features.get(ROWS)
        if rows is None:
            expected = "`index` to say where the inputs keep the row of each example in the data set"
            raise ValueError(checks.message(expected, "index=None", _REMEDY))
    else:
        rows = entry_of_inputs(student.inputs, place, "rows", _REMEDY)
    rows = ops.convert_to_tensor(rows)
    if len(rows.shape) == 2 and rows.shape[-1] == 1:
        rows = ops.squeeze(rows, axis=-1)
    dtype = keras.backend.standardize_dtype(rows.dtype)
    if len(rows.shape) != 1 or not keras.backend.is_int_dtype(dtype) or checks.shapes_differ(rows.shape, examples):
        expected = "`index` to give the row of each example in the data set, integers of shape (N,)"
        raise ValueError(checks.message(expected, f"{dtype} of shape {tuple(rows.shape)}", _REMEDY))
    words = f"Expected `index` to be rows of the data set, 0 to {size - 1}: `size` is the length of the training data."
    return backends.within_range(ops.cast(rows, "int32"), size, words)
