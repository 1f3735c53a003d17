"""Checks of the student, and of arguments that were meant for ``keras.distillation``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_distill import checks
from keras_distill.ensemble import Ensemble
from keras_distill.recording import sublayers
from keras_distill.step import DistillStep
from keras_distill.teachers import EMATeacher, SelfTeacher, StoredTeacher
from keras_distill.terms import DistillationTerm

_OWN_METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_OF_KERAS_DISTILLATION = {
    "distillation_losses": "Pass `terms`, such as LogitsDistillation() and FeatureDistillation(layer, layer).",
    "distillation_loss": "Pass `terms`, such as LogitsDistillation() and FeatureDistillation(layer, layer).",
    "distillation_loss_weights": "Each term has a `weight`.",
    "student_loss_weight": "It is called `task_weight`.",
}


def check_arguments(unknown: dict[str, Any]) -> None:
    """Refuse the arguments of ``keras.distillation.Distiller``, which takes the teacher first.

    Args:
        unknown: Arguments that DistillModel does not have.

    Raises:
        TypeError: If one of them is an argument of that class.
    """
    for name, remedy in _OF_KERAS_DISTILLATION.items():
        if name in unknown:
            expected = "the arguments of DistillModel, DistillModel(student, teacher, terms)"
            remedy = f"{remedy} The student comes first, unlike in keras.distillation.Distiller(teacher, student)."
            raise TypeError(checks.message(expected, f"{name}={unknown[name]!r}", remedy))


def check_student(student: Any, teacher: Any) -> None:
    """Refuse a student with custom training code, which DistillModel would silently not run.

    Args:
        student: The ``student`` argument.
        teacher: The ``teacher`` argument.

    Raises:
        TypeError: If the student is not a Keras model.
        ValueError: If it has a custom step or a preprocessor, or the two models were exchanged.
    """
    if not isinstance(student, keras.Model):
        raise TypeError(checks.message("`student` to be a keras.Model", f"a {type(student).__name__}"))
    for name in _OWN_METHODS:
        if getattr(type(student), name) is not getattr(keras.Model, name) or name in vars(student):
            expected = "`student` to be a model that is trained by Keras' own steps"
            remedy = f"Subclass DistillModel and override `task_loss` or `{name}` there; the student only needs `call`."
            received = f"a {type(student).__name__} with a custom `{name}`, which would not be called"
            raise ValueError(checks.message(expected, received, remedy))
    if getattr(student, "preprocessor", None) is not None:
        expected = "`student` not to have a preprocessor, which would not be called"
        remedy = "Map the data with it, student.preprocessor(x, y), and set `student.preprocessor = None`."
        raise ValueError(checks.message(expected, f"a {type(student.preprocessor).__name__}", remedy))
    if isinstance(teacher, keras.Model) and "teacher" in student.name.lower() and "student" in teacher.name.lower():
        expected = "DistillModel(student, teacher), the student first"
        remedy = "keras.distillation.Distiller takes the teacher first: exchange the two."
        raise ValueError(checks.message(expected, f"student {student.name!r} and teacher {teacher.name!r}", remedy))


def check_trained(step: DistillStep) -> None:
    """Check that a term trains the student.

    If a term reads frozen layers, its adapter still learns and its loss falls, but the student does not change.

    Args:
        step: The step, built.

    Raises:
        ValueError: If every term reads frozen layers that have only frozen layers before them.
    """
    taps = [tap for term in step.terms for tap in term.trained_taps or (None,)]
    behind = [None if tap is None else step.behind.get(tap.key) for tap in taps]
    if all(layers and not any(layer.trainable_variables for layer in layers) for layers in behind):
        names = ", ".join(repr(tap.name) for tap in taps if tap is not None)
        expected = "a term, or a loss on labels, that trains the student"
        remedy = "Unfreeze a layer, name one after the frozen ones, or pass a loss to `compile`."
        raise ValueError(checks.message(expected, f"terms on {names} alone, frozen with all layers before", remedy))


def check_saved(save_teacher: bool, teacher: Any) -> None:
    """Refuse ``save_teacher`` with a teacher that files hold in any case.

    Args:
        save_teacher: Whether files contain the teacher.
        teacher: The ``teacher`` argument.

    Raises:
        ValueError: If the teacher is an :class:`EMATeacher` or a :class:`SelfTeacher`, or a cache is among several.
    """
    if save_teacher and isinstance(teacher, EMATeacher):
        expected = "`save_teacher` to be False with an EMATeacher, whose average is saved in any case"
        raise ValueError(checks.message(expected, "save_teacher=True", "Leave it out."))
    if save_teacher and isinstance(teacher, SelfTeacher):
        expected = "`save_teacher` to be False with a SelfTeacher, which is the student"
        raise ValueError(checks.message(expected, "save_teacher=True", "Leave it out."))
    several = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    if save_teacher and any(isinstance(each, StoredTeacher) for each in several):
        expected = "`save_teacher` to be False with a TeacherCache, which has a folder of its own"
        raise ValueError(checks.message(expected, "save_teacher=True", "Leave it out."))


def check_term_names(terms: Sequence[DistillationTerm], student: keras.Model) -> None:
    """Refuse terms whose key in the logs would be that of the loss of an output.

    Args:
        terms: The terms.
        student: The student.

    Raises:
        ValueError: If a term has the name of one of several outputs.
    """
    outputs = list(getattr(student, "output_names", None) or [])
    for term in terms:
        if len(outputs) > 1 and term.name in outputs:
            expected = f"a name for the term {term.name!r} that is not an output of the student"
            received = f"outputs {outputs}, whose losses Keras logs as '<output>_loss'"
            raise ValueError(checks.message(expected, received, "Pass name=... to the term."))


def check_route(ensemble: Ensemble, data: Any) -> None:
    """Check the teachers that a route names in arrays: under XLA a step cannot raise an error.

    Args:
        ensemble: The teachers.
        data: The ``x`` argument of ``fit``; other data than arrays are left alone.

    Raises:
        ValueError: If the route names a teacher that does not exist.
    """
    arrays = isinstance(data, (dict, list, tuple, np.ndarray)) and all(
        isinstance(part, np.ndarray) for part in keras.tree.flatten(data)
    )
    if ensemble.mix.route is not None and ensemble.size and arrays:
        ensemble.mix.teacher_of(data, ensemble.size, None)


def warn_of_augmentation(student: keras.Model) -> None:
    """Warn of random layers in the student: the teacher gets the inputs without their augmentation.

    Args:
        student: The student.
    """
    for path, layer in sublayers(student):
        if type(layer).__module__.startswith("keras.") and type(layer).__name__.startswith(
            ("Random", "AugMix", "MixUp")
        ):
            warnings.warn(
                f"The student augments its inputs in layer {path!r}, but the teacher gets them unaugmented. Augment"
                " the data before both models, or override `DistillModel.teacher_inputs`.",
                stacklevel=3,
            )
            return
