"""Checks of the arguments ``teacher`` and ``teacher_dtype``."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_distill import checks
from keras_distill.teachers.average import EMATeacher


def as_teachers(teacher: Any, student: keras.Model, *, moving: bool = False) -> list[Any]:
    """Check the teachers and put them into a list.

    Args:
        teacher: A model, several, or None.
        student: The student, which cannot be its own teacher.
        moving: Whether the teacher may be an :class:`EMATeacher`.

    Returns:
        The models; an empty list for None.

    Raises:
        TypeError: If an entry is not a Keras model.
        ValueError: If the list is empty, or the teacher is the student.
    """
    if teacher is None:
        return []
    several = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not several:
        raise ValueError(
            checks.message("`teacher` to be a model, or a list of at least one", "teacher=[]", "Pass None.")
        )
    averages = [model for model in several if isinstance(model, EMATeacher)]
    if averages and (len(several) > 1 or not moving):
        place = "beside other teachers" if len(several) > 1 else "here"
        expected = "an EMATeacher to be the only teacher, passed to DistillModel or DistillStep when it is made"
        raise ValueError(checks.message(expected, f"{averages[0]!r} {place}"))
    for model in () if averages else several:
        if not isinstance(model, keras.Model):
            remedy = ""
            if isinstance(model, str):
                remedy = "Load a file with keras.models.load_model."
            elif isinstance(model, keras.layers.Layer):
                remedy = "Wrap the layer: keras.Sequential([layer])."
            elif callable(model):
                remedy = "Wrap a function of arrays: CallableTeacher(function, output_shape=(10,))."
            expected = "`teacher` to be a keras.Model or None"
            raise TypeError(checks.message(expected, f"a {type(model).__name__}", remedy))
        if model is student:
            remedy = "Pass a model of its own, such as a copy made by keras.models.clone_model."
            raise ValueError(checks.message("`teacher` to be another model than `student`", "the same model", remedy))
    return several


def checked_dtype(dtype: Any) -> str | None:
    """The name of a floating-point precision.

    Args:
        dtype: A name, a NumPy type, or None.

    Returns:
        The name, or None.

    Raises:
        ValueError: If ``dtype`` is not a floating-point precision.

    Example:
        >>> checked_dtype("bfloat16")
        'bfloat16'
    """
    if dtype is None:
        return None
    with contextlib.suppress(ValueError, TypeError):
        name = str(keras.backend.standardize_dtype(dtype))
        if keras.backend.is_float_dtype(name):
            return name
    expected = "`teacher_dtype` to be a floating-point precision such as 'bfloat16'"
    raise ValueError(checks.message(expected, f"teacher_dtype={dtype!r}"))
