"""Predictors that are not modules, as teachers of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_distill.teachers.callable_teacher import array_function


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
        self._predict = array_function(predict)
        self.register_buffer("name", torch.tensor(list(name.encode()), dtype=torch.uint8))

    def forward(self, inputs: Tensor) -> Tensor:
        """The predictions, float32.

        Args:
            inputs: The inputs, any shape ``(N, ...)``.

        Raises:
            TypeError: If the predictions are not an array of numbers with a row for each input.
        """
        answer = self._predict(inputs.numpy(force=True))
        predictions = np.asarray(answer)
        if np.ma.is_masked(answer):
            raise TypeError("Expected a prediction everywhere, but got masked entries. Fill them.")
        if predictions.dtype.kind not in "fiu" or not predictions.ndim or len(predictions) != len(inputs):
            raise TypeError(
                f"Expected the predictions to be an array of numbers with a row for each of {len(inputs)} inputs, but"
                f" got {predictions.dtype} of shape {predictions.shape}."
            )
        return torch.as_tensor(predictions.astype("float32"))
