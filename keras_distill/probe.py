"""What a model gives for inputs of some shape, found without computing anything and without changing anything."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.taps import Call, Place, Recorder, reports, sublayers


def probed(recorder: Recorder, inputs: Any) -> Call:
    """A call of the recorder's model with symbolic tensors: shapes, precisions and the structure of the output.

    Args:
        recorder: Of the student or the teacher.
        inputs: Tensors, or their specifications, as the model takes them.

    Returns:
        The call; where a softmax or a sigmoid came last, its output says so as a Keras tensor does.
    """
    specification = keras.tree.map_structure(
        lambda tensor: keras.KerasTensor(tensor.shape, dtype=keras.backend.standardize_dtype(tensor.dtype)), inputs
    )
    probe = _Probe(recorder)
    answer = probe.compute_output_spec(specification)
    output = keras.tree.pack_sequence_as(probe.structure, keras.tree.flatten(answer["output"]))
    for tensor, squashed in zip(keras.tree.flatten(output), probe.squashed, strict=True):
        tensor._keras_logits = tensor if squashed else None
    return Call(output, dict(zip(probe.places, answer["runs"], strict=True)), who=recorder.who)


class _Probe(keras.Operation):
    """A forward pass as an operation: Keras works out what an operation returns without running it."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.places: list[Place] = []
        self.squashed: list[bool] = []
        self.structure: Any = None

    def call(self, inputs: Any) -> dict[str, Any]:
        if not self.recorder.model.built:
            self.recorder.model(inputs, training=False)  # building may run the layers once more
        ends = [layer for _, layer in sublayers(self.recorder.model) if _squashes(layer)]
        seen: dict[tuple[int, str], list[Any]] = {(id(layer), "output"): [] for layer in ends}
        with reports(ends, seen):
            call = self.recorder.forward(inputs, training=False)
        probabilities = [tensor for outputs in seen.values() for tensor in outputs]
        self.places = list(call.runs)
        self.structure = keras.tree.map_structure(lambda tensor: 0, call.output)
        self.squashed = [
            getattr(one, "_keras_logits", None) is not None or any(one is other for other in probabilities)
            for one in keras.tree.flatten(call.output)
        ]
        return {"output": call.output, "runs": list(call.runs.values())}


def _squashes(layer: Any) -> bool:
    """Whether a layer ends in a softmax or a sigmoid; JAX's tensors cannot carry Keras' own note of it."""
    activations = (keras.activations.softmax, keras.activations.sigmoid)
    return isinstance(layer, keras.layers.Softmax) or getattr(layer, "activation", None) in activations
