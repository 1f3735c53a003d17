"""The inputs that each model takes of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.recording import Call


def chosen_inputs(model: keras.Model, inputs: Any) -> Any:
    """The inputs that a model declares, taken from a dict that may hold more.

    Without this, Keras would pass the first entry in sorted order to a functional model with a single input, whatever
    the name of that input.

    Args:
        model: The student or the teacher.
        inputs: A batch.

    Returns:
        The entries that the model takes; inputs that are not a dict are returned as they are.

    Raises:
        ValueError: If the dict lacks an input of the model.
    """
    structure = compat.input_structure(model)
    if not isinstance(inputs, dict) or structure is None:
        return inputs
    if isinstance(structure, dict):
        _check_names(model, structure, inputs)
        return {key: inputs[key] for key in structure}
    names: Sequence[str] = [tensor.name for tensor in keras.tree.flatten(structure)]
    if len(names) == len(inputs) == 1:  # whatever their names are, Keras passes it
        return inputs
    _check_names(model, names, inputs)
    return keras.tree.pack_sequence_as(structure, [inputs[name] for name in names])


def _check_names(model: keras.Model, names: Iterable[str], inputs: dict[str, Any]) -> None:
    missing = sorted(set(names) - inputs.keys())
    if not missing:
        return
    expected = f"the inputs to hold {', '.join(map(repr, missing))}, which the model {model.name!r} takes"
    remedy = "Let a batch hold the inputs of both models, or make those of the teacher by `teacher_inputs`."
    raise ValueError(checks.message(expected, ", ".join(map(repr, inputs)) or "an empty dict", remedy))


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
