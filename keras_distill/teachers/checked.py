"""Checks of the arguments ``teacher`` and ``teacher_dtype``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.teachers.average import EMATeacher
from keras_distill.teachers.itself import SelfTeacher
from keras_distill.teachers.stored import StoredTeacher, check_single_cache


def as_teachers(teacher: Any, student: keras.Model, averages: Sequence[EMATeacher] | None = None) -> list[Any]:
    """Check the teachers and put them into a list.

    Args:
        teacher: A model, a moving average, the student itself or a cache, several of them, or None; beside an
            :class:`EMATeacher` or a :class:`SelfTeacher` a None stands for a teacher that is set later.
        student: The student, which cannot be its own teacher.
        averages: Moving averages of the student that must be among the teachers, and no others; None allows any.

    Returns:
        The teachers; an empty list for None.

    Raises:
        TypeError: If an entry is not a teacher.
        ValueError: If the list is empty or holds several caches, the teacher is the student, or the averages are not
            these.
    """
    if teacher is None and not averages:
        return []
    several = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not several:
        raise ValueError(
            checks.message("`teacher` to be a model, or a list of at least one", "teacher=[]", "Pass None.")
        )
    moving = [model for model in several if isinstance(model, EMATeacher)]
    if averages is not None and list(map(id, moving)) != list(map(id, averages)):
        expected = "an EMATeacher to be passed to DistillModel or DistillStep when it is made, and to stay its teacher"
        remedy = "Keep it in the list: model.teacher = [model.teacher[0], network]." if averages else ""
        raise ValueError(checks.message(expected, f"{len(averages)} of them before and teacher={teacher!r}", remedy))
    check_single_cache(several)
    in_files = any(isinstance(each, (EMATeacher, SelfTeacher)) for each in several)
    for model in several:
        if isinstance(model, SelfTeacher):
            model.take(student)
        elif not isinstance(model, (EMATeacher, StoredTeacher)) and not (model is None and in_files):
            _check_model(model, student)
    return several


def _check_model(model: Any, student: keras.Model) -> None:
    """Check that a teacher is a model, and not the student.

    Raises:
        TypeError: If it is not a model.
        ValueError: If it is the student.
    """
    if model is student:
        remedy = "Pass a model of its own, such as a copy made by keras.models.clone_model, or SelfTeacher(student)."
        raise ValueError(checks.message("`teacher` to be another model than `student`", "the same model", remedy))
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
