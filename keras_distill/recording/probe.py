"""Shapes and facts of a model's tensors, found without computing anything and without changing anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.recording.calls import Call
from keras_distill.recording.facts import Facts
from keras_distill.recording.recorder import Recorder


def probed(recorder: Recorder, inputs: Any) -> Call:
    """A call of the recorder's model with symbolic tensors: shapes, precisions, and what its layers say of them.

    Args:
        recorder: Of the student or the teacher.
        inputs: Tensors, or their specifications, as the model takes them.

    Returns:
        The call.

    Raises:
        ValueError: If the model does not take these inputs.
    """
    specification = keras.tree.map_structure(
        lambda tensor: keras.KerasTensor(tensor.shape, dtype=keras.backend.standardize_dtype(tensor.dtype)), inputs
    )
    model, beside = recorder.model, dict[str, Any]()

    def run(symbolic: Any) -> Any:
        if not model.built:
            model(symbolic, training=False)  # building may run the layers once more
        with recorder.watching(infer=True):
            output = model(symbolic, training=False)
        call = recorder.call_of(output, recorder.record_of(output))
        tensors = {"output": call.output, "runs": list(call.runs.values())}
        facts = [call.facts.get(id(leaf), Facts()) for leaf in keras.tree.flatten(tensors)]
        beside.update(call=call, facts=facts)
        return tensors

    try:
        tensors = compat.output_spec(run, specification)
    except Exception as error:
        shapes = keras.tree.map_structure(lambda tensor: tuple(tensor.shape), specification)
        expected = f"the {recorder.who} {model.name!r} to take inputs of shape {shapes}"
        remedy = "Wrap it in a model that does, such as keras.Sequential([Input, Resizing, model])."
        remedy = f"{remedy} For a teacher, `DistillModel.teacher_inputs` may be overridden."
        if isinstance(error, (ValueError, TypeError)) and not str(error).startswith("Expected"):
            raise ValueError(checks.message(expected, f"{type(error).__name__}: {error}", remedy)) from error
        raise
    call: Call = beside["call"]
    known = dict(zip(map(id, keras.tree.flatten(tensors)), beside["facts"], strict=True))
    runs = dict(zip(call.runs, tensors["runs"], strict=True))
    return replace(call, output=tensors["output"], runs=runs, facts=known)
