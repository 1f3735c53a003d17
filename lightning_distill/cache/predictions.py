"""Predictors that are not modules, as teachers of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SMALLEST = 1e-7  # of the probabilities whose logarithms are taken


class Predictor(nn.Module):
    """A function of arrays as a module without parameters.

    Args:
        predict: A function from an array to an array, an ONNX session, or an estimator with scikit-learn's API.
        name: Its name, which is a part of the teacher's fingerprint.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> Predictor(lambda x: 2 * x, "double")(torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    name: Tensor

    def __init__(self, predict: Any, name: str) -> None:
        super().__init__()
        self._predict = _function(predict)
        self.register_buffer("name", torch.tensor(list(name.encode()), dtype=torch.uint8))

    def forward(self, inputs: Tensor) -> Tensor:
        """The predictions, float32.

        Args:
            inputs: The inputs, any shape ``(N, ...)``.

        Raises:
            TypeError: If the predictions are not an array of numbers with a row for each input.
        """
        predictions = np.asarray(self._predict(inputs.numpy(force=True)))
        if predictions.dtype.kind not in "fiu" or not predictions.ndim or len(predictions) != len(inputs):
            raise TypeError(
                f"Expected the predictions to be an array of numbers with a row for each of {len(inputs)} inputs, but"
                f" got {predictions.dtype} of shape {predictions.shape}."
            )
        return torch.as_tensor(predictions.astype("float32"))


def _function(predict: Any) -> Any:
    if hasattr(predict, "predict_proba"):
        return lambda inputs: _logarithms(predict.predict_proba(inputs))
    if hasattr(predict, "run") and hasattr(predict, "get_inputs"):
        (place, *others) = predict.get_inputs()
        if others:
            raise TypeError(
                f"Expected an ONNX session with one input, but got {[place.name, *(other.name for other in others)]}."
                " Pass a function that feeds them."
            )
        return lambda inputs: predict.run(None, {place.name: inputs})[0]
    if hasattr(predict, "predict"):
        return predict.predict
    if callable(predict):
        return predict
    raise TypeError(
        f"Expected `predict` to be a function, an ONNX session or an estimator, but got a {type(predict).__name__}."
    )


def _logarithms(probabilities: Any) -> Any:
    if isinstance(probabilities, list):  # of several outputs, which scikit-learn returns one by one
        raise TypeError(
            "Expected `predict_proba` to return one array, but got several. Pass a function that picks one."
        )
    return np.log(np.maximum(probabilities, _SMALLEST))
