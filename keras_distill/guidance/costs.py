"""Costs of a model: size, operations and time for one example."""

from __future__ import annotations

import math
import re
import statistics
import time
from typing import Any, Final

import keras

from keras_distill import checks

_WARM_UP: Final = 3
_REPEATS: Final = 50
_SECONDS: Final = 1.0  # at most, for all repeats together
# TensorFlow's products, and parts of the names of others whose operations are not known here.
_CONVOLUTIONS: Final = ("Conv2D", "Conv3D", "DepthwiseConv2dNative")
_TRANSPOSED: Final = ("Conv2DBackpropInput", "Conv3DBackpropInputV2")
_MATRICES: Final = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
_OPAQUE: Final = re.compile("Conv|MatMul|Einsum|Rnn|RNN|LSTM|GRU|PartitionedCall|While|If$|Case|Xla|PyFunc")
_HARMLESS: Final = re.compile("ConjugateTranspose|Conver")


def costs(model: keras.Model, example: Any) -> dict[str, int | float | None]:
    """Measure what a model costs for one example.

    Args:
        model: The model.
        example: Its input for one example, with a batch dimension of 1: an array, or a list or dict of arrays.

    Returns:
        - ``parameters``: number of weights, those that are not trained among them.
        - ``multiply_adds``: multiply-add operations of matrix products and convolutions; None if the model has
          operations that cannot be counted, such as loops, and on other backends than TensorFlow.
        - ``bytes``: size of the weights.
        - ``latency_seconds``: median duration of ``model.predict_on_batch``.
        - ``memory_bytes``: None, since it is not known.

    Raises:
        TypeError: If ``model`` is not a Keras model.
        ValueError: If the example has another batch dimension than 1.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> measured = costs(model, np.zeros((1, 3), "float32"))
        >>> measured["parameters"], measured["bytes"]
        (8, 32)
    """
    if not isinstance(model, keras.Model):
        raise TypeError(checks.message("`model` to be a keras.Model", f"model={type(model).__name__}"))
    for leaf in keras.tree.flatten(example):
        shape = tuple(getattr(leaf, "shape", ()))
        if shape[:1] != (1,):
            remedy = "Pass a slice of a batch, such as x[:1]."
            raise ValueError(checks.message("`example` to hold one example", f"an array of shape {shape}", remedy))
    model.predict_on_batch(example)  # builds the model
    return {
        "parameters": int(model.count_params()),
        "multiply_adds": _multiply_adds(model, example),
        "bytes": sum(map(_bytes, model.weights)),
        "latency_seconds": _latency(model, example),
        "memory_bytes": None,
    }


def _bytes(weight: keras.Variable) -> int:
    bits = re.search(r"\d+", keras.backend.standardize_dtype(weight.dtype))
    return int(math.prod(weight.shape)) * (int(bits[0]) // 8 if bits else 1)  # bool has no digits


def _latency(model: keras.Model, example: Any) -> float:
    durations: list[float] = []
    for call in range(_WARM_UP + _REPEATS):
        started = time.perf_counter()
        model.predict_on_batch(example)  # returns NumPy arrays, so that it waits for the device
        if call >= _WARM_UP:
            durations.append(time.perf_counter() - started)
        if sum(durations) > _SECONDS:
            break
    return statistics.median(durations)


def _multiply_adds(model: keras.Model, example: Any) -> int | None:
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, example)
    graph = tf.function(lambda: model(inputs, training=False)).get_concrete_function().graph
    counts = [_of_operation(operation) for operation in graph.get_operations()]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _of_operation(operation: Any) -> int | None:
    """The multiply-adds of an operation of a TensorFlow graph; 0 if it is not a product, None if they are not known."""
    kind = operation.type
    shapes = [tensor.shape for tensor in operation.inputs]
    if kind in (*_CONVOLUTIONS, *_TRANSPOSED, *_MATRICES, "Einsum"):
        output = operation.outputs[0].shape
        if not all(shape.is_fully_defined() for shape in [*shapes, output]):
            return None
        if kind == "Einsum":
            return _of_einsum(operation.get_attr("equation").decode(), shapes)
        if kind in _CONVOLUTIONS:
            channels = shapes[1][-1] * (shapes[1][-2] if kind == "DepthwiseConv2dNative" else 1)
            return int(math.prod(output) // channels * math.prod(shapes[1]))
        if kind in _TRANSPOSED:  # as the convolution whose gradient it is
            return int(math.prod(shapes[2]) // shapes[1][-1] * math.prod(shapes[1]))
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        return int(math.prod(output) * shapes[0][-2 if transposed else -1])
    return None if _OPAQUE.search(_HARMLESS.sub("", kind)) else 0


def _of_einsum(equation: str, shapes: list[Any]) -> int | None:
    """The product of all dimensions that the equation names; None if it leaves some to an ellipsis."""
    if "." in equation:
        return None
    terms = equation.partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())
