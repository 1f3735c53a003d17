"""A causal Keras model of a few parameters, ragged batches, and the loss written token by token to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_nets import numpy_of

from keras_distill import DistillModel, DistillStep, SequenceDistillation

VOCABULARY, IGNORED = 13, -100
SEQUENCES = ([5, 3, 8, 2, 7], [4, 9], [6, 1, 1, 12])
CLOSE: dict[str, Any] = {"rel": 2e-5, "abs": 1e-7}
Rows = dict[str, np.ndarray[Any, Any]]


@keras.saving.register_keras_serializable(package="keras_token_nets")
class CausalMean(keras.layers.Layer):
    """Position t sees the mean of the embeddings up to t that are not padding."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, rows: Any, padding: Any = None, mask: Any = None) -> Any:
        counted = mask if padding is None else padding
        shares = ops.ones_like(rows[..., :1]) if counted is None else ops.cast(counted, rows.dtype)[..., None]
        return ops.cumsum(rows * shares, axis=1) / ops.maximum(ops.cumsum(shares, axis=1), 1.0)


def causal(
    width: int = 5, seed: int = 0, vocabulary: int = VOCABULARY, *, kind: str = "dict", dtype: Any = None, **last: Any
) -> keras.Model:
    """A language model.

    Args:
        width: Width of its hidden layer.
        seed: Seed of its weights.
        vocabulary: Number of columns of its logits.
        kind: ``"dict"`` reads token_ids and padding_mask; ``"masked"`` reads tokens, with 0 as padding; ``"plain"``
            reads tokens without padding.
        dtype: Precision of the layers.
        **last: Settings of the last layer.
    """
    generator = np.random.default_rng(seed)
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    padding = keras.Input((None,), dtype="int32", name="padding_mask")
    embedding = keras.layers.Embedding(vocabulary, width, mask_zero=kind == "masked", dtype=dtype, name="embedding")
    rows = embedding(tokens)
    seen = CausalMean(dtype=dtype)(rows, padding) if kind == "dict" else CausalMean(dtype=dtype)(rows)
    hidden = keras.layers.Dense(width, "tanh", dtype=dtype, name="body")(seen)
    logits = keras.layers.Dense(vocabulary, dtype=dtype, name="lm_head", **last)(hidden)
    inputs = {"token_ids": tokens, "padding_mask": padding} if kind == "dict" else tokens
    model = keras.Model(inputs, logits, name=f"causal_{seed}")
    model.set_weights([generator.normal(size=weight.shape).astype("float32") for weight in model.weights])
    return model


def padded(sequences: Sequence[Sequence[int]] = SEQUENCES, side: str = "right", length: int | None = None) -> Rows:
    """The tokens and their padding mask, filled with 0, and the labels, filled with IGNORED."""
    length = max(map(len, sequences)) if length is None else length
    rows: dict[str, list[list[int]]] = {"token_ids": [], "padding_mask": [], "labels": []}
    for sequence in sequences:
        for name, values, filler in (
            ("token_ids", list(sequence), 0),
            ("padding_mask", [1] * len(sequence), 0),
            ("labels", list(sequence), IGNORED),
        ):
            filled = [filler] * (length - len(sequence))
            rows[name].append(values + filled if side == "right" else filled + values)
    return {name: np.array(values, "int32") for name, values in rows.items()}


def split(rows: Rows) -> tuple[Rows, Any]:
    """The inputs and the labels."""
    return {name: array for name, array in rows.items() if name != "labels"}, rows["labels"]


def divergence(student: Any, teacher: Any) -> Any:
    """Kullback-Leibler divergence of every position at temperature 1, in float64."""
    logs = []
    for logits in (student, teacher):
        shifted = np.asarray(logits, "float64") - np.max(logits, axis=-1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return (np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1)


def every(student: keras.Model, teacher: keras.Model, inputs: Any) -> Any:
    """The divergence of every position of a batch."""
    tensors = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    return divergence(*(numpy_of(network(tensors)) for network in (student, teacher)))


def by_sequence(
    student: keras.Model, teacher: keras.Model, sequences: Sequence[Sequence[int]] = SEQUENCES
) -> list[list[float]]:
    """The divergences of each sequence by itself and without padding, token by token."""
    values = []
    for sequence in sequences:
        inputs, _ = split(padded([sequence]))
        if not isinstance(student.input, dict):
            inputs = inputs["token_ids"]
        positions = every(student, teacher, inputs)[0]
        values.append([float(positions[place]) for place in range(len(sequence) - 1)])
    return values


def mean(values: Sequence[Sequence[float]]) -> float:
    """The mean over all tokens of all sequences."""
    flat = [value for of_sequence in values for value in of_sequence]
    return sum(flat) / len(flat)


def models(kind: str = "dict", **settings: Any) -> tuple[keras.Model, keras.Model]:
    return causal(kind=kind, **settings), causal(7, 1, kind=kind, **settings)


def value_of(networks: Any, inputs: Any, labels: Any = None, term: Any = None, sample_weight: Any = None) -> float:
    """The value of a term in a step without a model around it."""
    step = DistillStep(*networks, term or SequenceDistillation())
    tensors = [
        keras.tree.map_structure(ops.convert_to_tensor, part) if part is not None else None
        for part in (inputs, labels, sample_weight)
    ]
    with step.watching():
        output = step.student(tensors[0] if not isinstance(tensors[0], dict) else chosen(step.student, tensors[0]))
    return float(step.losses(output, *tensors)["distillation_loss"])


def chosen(model: keras.Model, inputs: dict[str, Any]) -> Any:
    return {name: inputs[name] for name in model.input} if isinstance(model.input, dict) else inputs


def trained(
    networks: Any, x: Any, y: Any, term: Any = None, sample_weight: Any = None, **compiled: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Logs of one batch in `fit`, and the gradients of the student's weights by their paths."""
    student = networks[0]
    before = [numpy_of(weight) for weight in student.trainable_variables]
    model = DistillModel(*networks, term or SequenceDistillation(), task_weight=0.0)
    compiled = {"optimizer": keras.optimizers.SGD(1.0), "jit_compile": False, **compiled}
    model.compile(**compiled)
    history = model.fit(x, y, sample_weight=sample_weight, batch_size=64, shuffle=False, verbose=0).history
    after = [numpy_of(weight) for weight in student.trainable_variables]
    names = [variable.path for variable in student.trainable_variables]
    gradients = {name: old - new for name, old, new in zip(names, before, after, strict=True)}
    student.set_weights(before)
    return {name: values[0] for name, values in history.items()}, gradients
