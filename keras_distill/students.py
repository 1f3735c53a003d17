"""Checks of the student that a DistillModel is given, and of what a call written for another library passes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill import checks
from keras_distill.recording import sublayers
from keras_distill.terms import DistillationTerm

_OWN_METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_OF_KERAS_DISTILLATION = {
    "distillation_losses": "Pass `terms`, such as LogitsDistillation() and FeatureDistillation(layer, layer).",
    "distillation_loss": "Pass `terms`, such as LogitsDistillation() and FeatureDistillation(layer, layer).",
    "distillation_loss_weights": "Each term has a `weight`.",
    "student_loss_weight": "It is called `task_weight`.",
}


def check_arguments(given: dict[str, Any]) -> None:
    """Refuse the arguments of ``keras.distillation.Distiller``, whose order is another: the teacher comes first there.

    Args:
        given: Arguments that DistillModel does not have.

    Raises:
        TypeError: If one of them is of that class.
    """
    for name, remedy in _OF_KERAS_DISTILLATION.items():
        if name in given:
            expected = "the arguments of DistillModel, DistillModel(student, teacher, terms)"
            remedy = f"{remedy} The student comes first, unlike in keras.distillation.Distiller(teacher, student)."
            raise TypeError(checks.message(expected, f"{name}={given[name]!r}", remedy))


def check_student(student: Any, teacher: Any) -> None:
    """Refuse a student whose own training would be dropped in silence.

    Args:
        student: What the user passed.
        teacher: What the user passed.

    Raises:
        TypeError: If the student is not a Keras model.
        ValueError: If it has a step or a preprocessor of its own, or the two models were exchanged.
    """
    if not isinstance(student, keras.Model):
        raise TypeError(checks.message("`student` to be a keras.Model", f"a {type(student).__name__}"))
    for name in _OWN_METHODS:
        if getattr(type(student), name) is not getattr(keras.Model, name) or name in vars(student):
            expected = "`student` to be a model that Keras' own steps train"
            remedy = f"Subclass DistillModel and override `task_loss` or `{name}` there; the student only needs `call`."
            received = f"a {type(student).__name__} with a `{name}` of its own, which would not be called"
            raise ValueError(checks.message(expected, received, remedy))
    if getattr(student, "preprocessor", None) is not None:
        expected = "`student` not to have a preprocessor, which would not be called"
        remedy = "Map the data with it, student.preprocessor(x, y), and set `student.preprocessor = None`."
        raise ValueError(checks.message(expected, f"a {type(student.preprocessor).__name__}", remedy))
    if isinstance(teacher, keras.Model) and _exchanged(student, teacher):
        expected = "DistillModel(student, teacher), the student first"
        remedy = "keras.distillation.Distiller takes the teacher first: exchange the two."
        raise ValueError(checks.message(expected, f"student {student.name!r} and teacher {teacher.name!r}", remedy))


def check_term_names(terms: Sequence[DistillationTerm], student: keras.Model) -> None:
    """Refuse terms whose key in the logs is that of an output's own loss.

    Args:
        terms: The terms.
        student: The student.

    Raises:
        ValueError: If two numbers would have one key.
    """
    outputs = list(getattr(student, "output_names", None) or [])
    for term in terms:
        if len(outputs) > 1 and term.name in outputs:
            expected = f"a name for the term {term.name!r} that is not an output of the student"
            received = f"outputs {outputs}, whose losses Keras logs as '<output>_loss'"
            raise ValueError(checks.message(expected, received, "Pass name=... to the term."))


def warn_of_augmentation(student: keras.Model) -> None:
    """Warn of random layers inside the student, whose effect the teacher does not see.

    Args:
        student: The student.
    """
    for path, layer in sublayers(student):
        if type(layer).__module__.startswith("keras.") and type(layer).__name__.startswith(
            ("Random", "AugMix", "MixUp")
        ):
            warnings.warn(
                f"The student augments its inputs in layer {path!r}, and the teacher sees them as they were. Augment"
                " the data before both models, or override `DistillModel.teacher_inputs`.",
                stacklevel=3,
            )
            return


def _exchanged(student: keras.Model, teacher: keras.Model) -> bool:
    """Whether names or flags say that the two models were passed in the order of keras.distillation."""
    swapped = "teacher" in student.name.lower() and "student" in teacher.name.lower()
    return bool(swapped)
