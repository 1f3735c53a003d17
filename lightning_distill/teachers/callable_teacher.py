"""Teachers that are not modules: functions, ONNX sessions, estimators, models of other frameworks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.recording import first_tensor, map_tensors
from lightning_distill.recording.outputs import tensors_in
from lightning_distill.teachers.route import rows_of

SMALLEST = 1e-7  # of the probabilities whose logarithms are taken


class CallableTeacher(nn.Module):
    """Anything that can be called, as a teacher: it gets the student's inputs and returns class scores.

    It may be a function, an ``onnxruntime.InferenceSession`` with one input, an estimator with scikit-learn's API (its
    ``predict_proba``, else its ``predict``), a Keras model, a call to a server. It runs without gradients and has no
    layers for terms to read. It is called in every step; for a slow one see :meth:`TeacherCache.from_predictions`.

    Args:
        function: Called with the arguments of the student, returns scores with a row for each example, ``(N, ...)``.
        arrays: Whether it takes and returns NumPy arrays instead of tensors. Always so for sessions and estimators.
        batch_size: The most examples in one call; ``None`` calls it with the whole batch.
        device: Where its inputs are moved, such as ``"cuda:1"``; ``None`` leaves them. Its scores are moved back.
        from_probabilities: Whether it returns probabilities, ``(N, ..., C)``, whose logarithms are taken, not below
            that of 1e-7: the logarithms are logits with the same softmax. Always so for ``predict_proba``, which sorts
            the classes.

    Raises:
        TypeError: If ``function`` cannot be called.
        ValueError: If a setting is not as above.

    Example:
        >>> teacher = CallableTeacher(lambda x: x / x.sum(1, keepdims=True), arrays=True, from_probabilities=True)
        >>> teacher(torch.tensor([[1.0, 3.0]])).softmax(-1)
        tensor([[0.2500, 0.7500]])
    """

    def __init__(
        self,
        function: Any,
        *,
        arrays: bool = False,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        from_probabilities: bool = False,
    ) -> None:
        super().__init__()
        checks.boolean("arrays", arrays)
        checks.boolean("from_probabilities", from_probabilities)
        if batch_size is not None:
            checks.integer("batch_size", batch_size)
            checks.positive("batch_size", batch_size)
        if isinstance(function, nn.Module):
            raise TypeError(
                f"Expected `function` not to be a module, but got {type(function).__name__}. Pass it as the teacher"
                " itself, which freezes it and sets eval mode."
            )
        self._function, on_arrays = array_function(function, "function"), takes_arrays(function)
        self.arrays, self.batch_size = arrays or on_arrays, batch_size
        self.device = checks.device("device", device)
        if self.device is not None and self.arrays:
            raise ValueError(
                "Expected `device` to be None for a function of arrays, which are on the CPU, but got"
                f" device={str(self.device)!r}. Let the function move them."
            )
        self.from_probabilities = from_probabilities and not hasattr(function, "predict_proba")
        self._checked = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The scores, on the device of the inputs, in float32 or, for inputs in it, float64.

        Raises:
            TypeError: If the function does not return one array, or tensor, of floating point numbers.
            ValueError: If it does not return a row for each example, or the scores are NaN, infinite or, where they
                should be, not probabilities.
        """
        first = first_tensor(args, kwargs)
        number = len(first) if first.ndim else 1
        size = self.batch_size or number
        parts = []
        for start in range(0, max(number, 1), size):
            rows = torch.arange(start, min(start + size, number), device=first.device)
            whole = len(rows) == number
            part = (args, kwargs) if whole else rows_of((args, kwargs), rows, number)
            parts.append(self._scores(part[0], part[1], len(rows)))
        scores = parts[0] if len(parts) == 1 else torch.cat(parts)
        # the host need not wait for the device more than once
        if scores.device.type == "cpu" or not self._checked:
            self._check_values(scores)
            self._checked = True
        if self.from_probabilities:
            scores = scores.clamp(min=SMALLEST).log()
        wide = any(tensor.dtype == torch.float64 for tensor in tensors_in((args, kwargs)))
        return scores.to(device=first.device, dtype=torch.float64 if wide else torch.float32)

    def extra_repr(self) -> str:
        """Settings."""
        name = getattr(self._function, "__qualname__", type(self._function).__name__)
        return f"{name}, arrays={self.arrays}, batch_size={self.batch_size}"

    def _scores(self, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Tensor:
        args, kwargs = map_tensors((args, kwargs), _as_array if self.arrays else self._moved)
        output = self._function(*args, **kwargs)
        if self.arrays:
            output = _as_tensor(output)
        elif isinstance(output, Tensor):
            output = output.clone()  # its memory may be the inputs', or that of the next call's scores
        else:
            arrays = " Pass arrays=True for a function of NumPy arrays." if isinstance(output, np.ndarray) else ""
            raise TypeError(
                f"Expected the teacher's function to return a tensor, but got {type(output).__name__}.{arrays}"
                " Return the scores alone."
            )
        if not output.is_floating_point():
            raise TypeError(
                f"Expected the teacher's function to return scores of classes, floating point numbers, but got"
                f" {output.dtype}. Return logits, or probabilities with from_probabilities=True, and not the classes."
            )
        if output.ndim == 0 or len(output) != number:
            raise ValueError(
                f"Expected the teacher's function to return a row for each of {number} examples, but got shape"
                f" {tuple(output.shape)}."
            )
        return output

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _check_values(self, scores: Tensor) -> None:
        if not bool((scores < float("inf")).all()):  # minus infinity is a class that is forbidden
            raise ValueError(
                "Expected the teacher's function to return finite scores, but got NaN or infinity. Look at its inputs."
            )
        if not self.from_probabilities:
            return
        sums = scores.float().sum(-1)
        if scores.ndim < 2 or bool((scores < 0).any()) or bool(((sums - 1).abs() > 1e-2).any()):
            raise ValueError(
                "Expected the teacher's function to return probabilities that sum to 1 over the last dimension, but it"
                " does not. Leave out from_probabilities=True if they are logits."
            )


def takes_arrays(function: Any) -> bool:
    """Whether it is an ONNX session or an estimator with scikit-learn's API."""
    is_estimator = hasattr(function, "predict_proba") or (hasattr(function, "predict") and not callable(function))
    return is_estimator or _is_session(function)


def array_function(predict: Any, argument: str = "predict") -> Callable[..., Any]:
    """The function itself, or the one that an ONNX session or an estimator predicts logits with.

    Args:
        predict: A function, a session or an estimator.
        argument: Name of the user's argument, for the message.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(predict, type):
        raise TypeError(
            f"Expected `{argument}` to be a function, an ONNX session or an estimator, but got the class"
            f" {predict.__name__}."
        )
    if hasattr(predict, "predict_proba"):
        return functools.partial(_log_probabilities, predict)
    if _is_session(predict):
        (place, *others) = predict.get_inputs()
        if others:
            raise TypeError(
                f"Expected an ONNX session with one input, but got {[place.name, *(other.name for other in others)]}."
                " Pass a function that feeds them."
            )
        return functools.partial(_run_session, predict, place.name)
    if callable(predict):
        function: Callable[..., Any] = predict
        return function
    if hasattr(predict, "predict"):
        method: Callable[..., Any] = predict.predict
        return method
    raise TypeError(
        f"Expected `{argument}` to be a function, an ONNX session or an estimator, but got a {type(predict).__name__}."
    )


def _is_session(predict: Any) -> bool:
    return hasattr(predict, "run") and hasattr(predict, "get_inputs")


def _run_session(session: Any, place: str, inputs: Any) -> Any:
    return session.run(None, {place: inputs})[0]


def _log_probabilities(estimator: Any, inputs: Any) -> Any:
    probabilities = estimator.predict_proba(inputs)
    if isinstance(probabilities, list):  # of several outputs, which scikit-learn returns one by one
        raise TypeError(
            "Expected `predict_proba` to return one array, but got several. Pass a function that picks one."
        )
    return np.log(np.maximum(probabilities, SMALLEST))


def _as_array(tensor: Tensor) -> Any:
    """A copy of a tensor: a function may change its arrays in place, which the tensor's version would not tell."""
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
    return np.array(tensor.numpy(force=True))


def _as_tensor(output: Any) -> Tensor:
    """An array, or what NumPy can turn into one.

    Raises:
        TypeError: If it is not one array of numbers.
    """
    if isinstance(output, (list, tuple, dict)):
        raise TypeError(
            f"Expected the teacher's function to return one array, but got a {type(output).__name__} of {len(output)}."
            " Pass a function that picks one."
        )
    if np.ma.is_masked(output):
        raise TypeError(
            "Expected the teacher's function to return a value everywhere, but got masked entries. Fill them, and pass"
            " `mask` to the term."
        )
    array = output.numpy(force=True) if isinstance(output, Tensor) else np.asarray(output)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"Expected the teacher's function to return an array of numbers, but got {array.dtype}.")
    # in the machine's order of bytes, and without the negative strides of a reversed array, which torch refuses
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
