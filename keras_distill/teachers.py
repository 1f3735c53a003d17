"""Teachers: models that run in inference mode and without gradient."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.recording import Call, Recorder, Tap, sublayers


class LiveTeacher:
    """A teacher that runs on each batch.

    Args:
        model: The teacher; its weights and flags are not changed.
        taps: The places to read.
        dtype: Precision that it computes in; None keeps the model's own.

    Raises:
        ValueError: If a tap does not name one layer of the model.
    """

    def __init__(self, model: keras.Model, taps: Iterable[Tap], dtype: str | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.recorder = Recorder(model, taps, "teacher")
        self._layers: list[Any] = []  # all layers, once the model is built

    def answer(self, inputs: Any) -> Call:
        """Run the teacher without gradient.

        Args:
            inputs: The teacher's inputs; a dict may hold more than the teacher takes.

        Returns:
            The call.
        """
        inputs = chosen_inputs(self.model, inputs)
        layers = self._layers or [self.model, *(layer for _, layer in sublayers(self.model))]
        stateful = any(getattr(layer, "stateful", False) for layer in layers)
        if stateful and not self.model.built:
            self.model(inputs, training=False)
        self._layers = layers if self.model.built else []
        unchanged = compat.discarded_changes() if stateful else contextlib.nullcontext()
        with compat.untaped(), unchanged, compat.computed_in(layers, self.dtype):
            call = self.recorder.forward(inputs, training=False)
        return call.without_gradient()


def as_teachers(teacher: Any, student: keras.Model) -> list[keras.Model]:
    """Check the teachers and put them into a list.

    Args:
        teacher: A model, several, or None.
        student: The student, which cannot be its own teacher.

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
    for model in several:
        if not isinstance(model, keras.Model):
            remedy = "Wrap a layer or a function: keras.Sequential([layer])." if callable(model) else ""
            if isinstance(model, str):
                remedy = "Load a file with keras.models.load_model."
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


def chosen_inputs(model: keras.Model, inputs: Any) -> Any:
    """The inputs that a model declares, taken from a dict that may hold more.

    Without this, Keras would pass the first entry in sorted order to a functional model with a single input, whatever
    the name of that input.

    Args:
        model: The student or the teacher.
        inputs: A batch.

    Returns:
        The entries that the model takes; inputs that are not a dict are returned as they are.
    """
    structure = compat.input_structure(model)
    if not isinstance(inputs, dict) or structure is None:
        return inputs
    if isinstance(structure, dict):
        return {key: inputs[key] for key in structure if key in inputs}
    names: Sequence[str] = [tensor.name for tensor in keras.tree.flatten(structure)]
    if all(name in inputs for name in names):
        return keras.tree.pack_sequence_as(structure, [inputs[name] for name in names])
    return inputs


def joint_inputs(inputs: Any, teachers: Sequence[keras.Model]) -> Any:
    """The student's symbolic inputs, together with named inputs that only a teacher has: a batch holds both.

    Args:
        inputs: The student's symbolic inputs in their structure.
        teachers: The teachers.

    Returns:
        A dict if a teacher has further inputs, else ``inputs``.
    """
    if not isinstance(inputs, (dict, keras.KerasTensor)):
        return inputs
    structures = [compat.input_structure(model) for model in teachers]
    of_teachers = {name: tensor for named in structures if isinstance(named, dict) for name, tensor in named.items()}
    of_student = inputs if isinstance(inputs, dict) else {inputs.name: inputs}
    return {**of_teachers, **of_student} if of_teachers.keys() - of_student.keys() else inputs


def checked_hook(argument: Any, method: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function that makes the teacher's inputs.

    Args:
        argument: The argument ``teacher_inputs``.
        method: The method of that name that a subclass overrides, or None.

    Returns:
        One of them, or None.

    Raises:
        TypeError: If the argument cannot be called.
        ValueError: If there are two.
    """
    if argument is not None and (not callable(argument) or isinstance(argument, type)):
        expected = "`teacher_inputs` to be a function of the batch's inputs, or None"
        remedy = "Pass Normalize.between(student=(mean, std), teacher=(mean, std)), or a function."
        raise TypeError(checks.message(expected, f"teacher_inputs={argument!r}", remedy))
    if argument is not None and method is not None:
        expected = "`teacher_inputs` to be None in a subclass that overrides the method of this name"
        raise ValueError(checks.message(expected, f"teacher_inputs={argument!r}", "Use one of the two."))
    return method if argument is None else argument


def with_call(hook: Callable[..., Any], inputs: Any, call: Call) -> Any:
    """Call the user's ``teacher_inputs`` with the inputs and, if it takes a second argument, the student's call."""
    kinds = [parameter.kind for parameter in inspect.signature(hook).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_call = inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in positional for kind in kinds) > 1
    return hook(inputs, call) if takes_call else hook(inputs)
