"""Infer the shapes and facts of a model's tensors, without computing them and without changing the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from keras_distill import checks, compat
from keras_distill.recording.calls import Call
from keras_distill.recording.facts import Facts
from keras_distill.recording.recorder import Recorder


def symbolic(inputs: Any) -> Any:
    """Keras tensors of the same shapes and precisions, in the same structure.

    Args:
        inputs: Tensors, or their specifications.

    Returns:
        The Keras tensors.
    """
    return keras.tree.map_structure(
        lambda tensor: keras.KerasTensor(tensor.shape, dtype=keras.backend.standardize_dtype(tensor.dtype)), inputs
    )


def probed(recorder: Recorder, inputs: Any) -> Call:
    """A call of the recorder's model with symbolic tensors, which have shapes, precisions and facts.

    Args:
        recorder: The recorder of the student or the teacher.
        inputs: Tensors, or their specifications, in the structure that the model takes.

    Returns:
        The call.

    Raises:
        ValueError: If the model does not take these inputs.
    """
    specification = symbolic(inputs)
    model, recorded = recorder.model, dict[str, Any]()

    def run(tensors: Any) -> Any:
        if not model.built:
            model(tensors, training=False)  # building may run the layers once more
        with recorder.watching(infer=True):
            output = model(tensors, training=False)
        call = recorder.call_of(output, recorder.record_of(output))
        results = {"output": call.output, "runs": list(call.runs.values())}
        facts = [call.facts.get(id(leaf), Facts()) for leaf in keras.tree.flatten(results)]
        recorded.update(call=call, facts=facts)
        return results

    try:
        results = compat.output_spec(run, specification)
    except Exception as error:  # a model that does not take the inputs raises whatever its layers raise
        shapes = keras.tree.map_structure(lambda tensor: tuple(tensor.shape), specification)
        expected = f"the {recorder.who} {model.name!r} to take inputs of shape {shapes}"
        remedy = "Wrap it in a model that does, such as keras.Sequential([Input, Resizing, model])."
        remedy = f"{remedy} For a teacher, `DistillModel.teacher_inputs` may be overridden."
        if isinstance(error, (ValueError, TypeError)) and not str(error).startswith("Expected"):
            raise ValueError(checks.message(expected, f"{type(error).__name__}: {error}", remedy)) from error
        raise
    call: Call = recorded["call"]
    # `output_spec` has replaced the tensors of the scratch graph, whose ids are the keys of the facts
    facts = dict(zip(map(id, keras.tree.flatten(results)), recorded["facts"], strict=True))
    runs = dict(zip(call.runs, results["runs"], strict=True))
    return replace(call, output=results["output"], runs=runs, facts=facts)
