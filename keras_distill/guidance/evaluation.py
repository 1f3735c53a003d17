"""The predictions and the cost of Keras models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_distill.guidance.costs import costs
from keras_distill.guidance.data import batches_of

_SAMPLES = 200


@keras.saving.register_keras_serializable(package="keras_distill")
class Answers(keras.Model):
    """A model that answers as another does, to be compiled without changing that one.

    Args:
        model: The other model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(name="answers")
        self._answer = [lambda inputs: model(inputs, training=False)]  # not tracked as a layer
        self.built = True

    def build(self, input_shape: Any) -> None:
        """No-op: the other model is built."""

    def call(self, inputs: Any) -> Any:
        """The other model's output in inference mode."""
        return self._answer[0](inputs)


def predictions_of(model: keras.Model, data: Any, batch_size: int) -> tuple[Any, Any] | None:
    """The logits and labels of a classifier on data.

    Args:
        model: The model.
        data: Arrays, or a data set of batches.
        batch_size: Number of examples in a batch of arrays.

    Returns:
        Logits ``(N, C)`` and labels ``(N,)``; the logarithms of outputs that are probabilities. None if these are not
        the outputs of a classifier.
    """
    outputs, labels = [], []
    for x, y, _ in batches_of(data, batch_size):
        output = model(x, training=False)
        if keras.tree.is_nested(output) or len(output.shape) != 2 or y is None or keras.tree.is_nested(y):
            return None
        output = np.asarray(keras.ops.convert_to_numpy(output))
        label = np.asarray(keras.ops.convert_to_numpy(y))
        if label.shape == output.shape and output.shape[1] > 1:  # one-hot
            label = label.argmax(axis=1)
        label = label.reshape(len(label), -1)
        if label.shape != (len(output), 1) or (label != np.round(label)).any():
            return None
        outputs.append(output.astype(np.float32))
        labels.append(label[:, 0].astype(np.int64))
    if not outputs:
        return None
    logits, classes = np.concatenate(outputs), np.concatenate(labels)
    if classes.min() < 0 or classes.max() >= max(logits.shape[1], 2):
        return None
    return _as_logits(logits), classes


def _as_logits(outputs: Any) -> Any:
    """Outputs as logits: probabilities are recognized, since those of a row are from 0 to 1 and sum to 1."""
    if outputs.min() < 0 or outputs.max() > 1:
        return outputs
    safe = np.clip(outputs, 1e-7, 1.0)
    if outputs.shape[1] == 1:
        return np.log(safe) - np.log(np.clip(1 - outputs, 1e-7, 1.0))
    return np.log(safe) if np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3) else outputs


def first_images(data: Any) -> Any:
    """The first images of data ``(N, H, W, C)``; an empty tuple if the inputs are not images."""
    images: list[Any] = []
    for x, *_ in batches_of(data, _SAMPLES):
        if keras.tree.is_nested(x) or len(x.shape) != 4:
            return ()
        images.append(np.asarray(keras.ops.convert_to_numpy(x)))
        if sum(map(len, images)) >= _SAMPLES:
            break
    if not images:
        return ()
    joined = np.concatenate(images)
    return joined if keras.config.image_data_format() == "channels_last" else joined.transpose(0, 2, 3, 1)


def cost_of(model: Any, data: Any) -> dict[str, Any] | None:
    """The cost of a model for one example.

    Args:
        model: The model.
        data: Arrays, or a data set of batches, whose first example is taken.

    Returns:
        The costs of :func:`~keras_distill.guidance.costs.costs`; None of a teacher that is not a Keras model.
    """
    if not isinstance(model, keras.Model):
        return None
    return costs(model, keras.tree.map_structure(lambda array: array[:1], next(batches_of(data, 1))[0]))
