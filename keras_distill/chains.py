"""Teacher assistants: a chain of models, each taught by the one before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_distill import checks
from keras_distill.cache.builder import teacher_fingerprint
from keras_distill.teachers import CallableTeacher


def assistant_chain(
    teacher: keras.Model,
    students: Sequence[keras.Model],
    train: Callable[[keras.Model, keras.Model], Any],
    folder: str | os.PathLike[str],
) -> keras.Model:
    """Teach the first student, let it teach the second, and so on; each stage is a file in a folder.

    A student may learn more from a model of a size between the two than from a much larger one. If the call is stopped
    and made again, finished stages are read from their files, and the unfinished stage begins again. To continue within
    a stage, use ``keras.callbacks.BackupAndRestore`` in ``train``.

    Args:
        teacher: The first teacher, trained.
        students: The models from the first assistant to the last student, built, with distinct names.
        train: Called as ``train(student, teacher)``; it trains the student in place.
        folder: The stages' files, ``0_<name>.keras`` and so on, are kept here.

    Returns:
        The last student.

    Raises:
        TypeError: If ``train`` cannot be called.
        ValueError: If ``students`` is empty, one is not built, two share a name, or the folder holds the stages of
            another chain.

    Example:
        >>> import tempfile
        >>> def network(width, name):
        ...     layers = [keras.Input((4,)), keras.layers.Dense(width), keras.layers.Dense(3)]
        ...     return keras.Sequential(layers, name=name)
        >>> def train(student, teacher):
        ...     print(teacher.name, "teaches", student.name)
        >>> students = [network(8, "assistant"), network(2, "student")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     assistant_chain(network(32, "teacher"), students, train, folder).name
        teacher teaches assistant
        assistant teaches student
        'student'

    References:
        Mirzadeh et al. (2020). Improved Knowledge Distillation via Teacher Assistant. arXiv:1902.03393.
    """
    _check(students, train)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [student.name for student in students]
    _check_folder(folder / "chain.json", teacher, names)
    for index, student in enumerate(students):
        path = folder / f"{index}_{student.name}.keras"
        if path.exists():
            _read(student, path)
        else:
            train(student, teacher)
            unfinished = folder / f"unfinished_{path.name}"
            student.save(unfinished)
            os.replace(unfinished, path)
        teacher = student
    return teacher


def _check(students: Sequence[keras.Model], train: Any) -> None:
    if not callable(train):
        raise TypeError(checks.message("`train` to be a function of (student, teacher)", f"{train!r}"))
    if not isinstance(students, (list, tuple)) or not students:
        raise ValueError(checks.message("`students` to be a list of at least one model", f"{students!r}"))
    for student in students:
        if not isinstance(student, keras.Model) or not student.built:
            received = f"{student!r}"
            raise ValueError(checks.message("`students` to be models that are built", received, "Add keras.Input."))
    names = [student.name for student in students]
    if len(set(names)) < len(names):
        raise ValueError(checks.message("students with names of their own", f"names {names}", "Pass name=... to them."))


def _check_folder(path: Path, teacher: Any, names: list[str]) -> None:
    """Check that the folder belongs to this chain, or make it so.

    Raises:
        ValueError: If it holds another chain.
    """
    is_function = isinstance(teacher, CallableTeacher)
    chain = {"teacher": None if is_function else teacher_fingerprint(teacher), "students": names}
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(chain), encoding="utf-8")
        os.replace(unfinished, path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != chain:
        part = "students" if before["students"] != names else "teacher"
        expected = f"the folder {str(path.parent)!r} to hold the stages of this chain"
        received = f"students {before['students']}" if part == "students" else "another teacher's weights"
        raise ValueError(checks.message(expected, received, "Pass another folder."))


def _read(student: keras.Model, path: Path) -> None:
    try:
        student.load_weights(path)
    except ValueError as error:
        expected = f"{path.name!r} to hold the weights of student {student.name!r}"
        raise ValueError(checks.message(expected, f"{error}", "Pass another folder.")) from error
