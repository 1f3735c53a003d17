"""All private names of Keras and TensorFlow that this package imports or calls, each with the reason.

tests/keras/test_compat_keras.py tests each of them, so that it fails if a new version of Keras drops one. Two private
methods of Keras are overridden where they belong: ``_symbolic_build`` in learned_parts.py,
``_set_monitor_op`` in callbacks.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras.src import backend as _backend  # compute_output_spec of a plain function; the public one is for operations
from keras.src.backend import get_keras_mask, set_keras_mask  # each backend attaches masks to tensors in another way
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope  # of steps on JAX
from keras.src.backend.common.symbolic_scope import get_symbolic_scope, in_symbolic_scope  # of scratch graphs
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr  # for records
from keras.src.losses.loss import reduce_weighted_values, unscale_loss_for_distribution  # Keras' rule for masks
from keras.src.trainers.compile_utils import MetricsList  # Keras' callbacks read no other container of metrics
from keras.src.trainers.trainer import model_supports_jit  # Keras' own check of the student

__all__ = [
    "MetricsList",
    "additional_loss",
    "compiled_loss",
    "compiled_metrics",
    "computed_in",
    "create_variables",
    "direction",
    "discarded_changes",
    "first_batch",
    "get_keras_mask",
    "get_symbolic_scope",
    "get_tensor_attr",
    "in_symbolic_scope",
    "input_structure",
    "iterations_counter",
    "kept_losses",
    "model_supports_jit",
    "output_spec",
    "raw_iterations",
    "reduce_weighted_values",
    "rematerialized",
    "set_direction",
    "set_keras_mask",
    "set_tensor_attr",
    "sublayers_of",
    "unknown_variables",
    "unscale_loss_for_distribution",
    "untaped",
]


def output_spec(function: Callable[..., Any], *specifications: Any) -> Any:
    """The symbolic outputs of a function for symbolic inputs; no values are computed.

    Args:
        function: The function, which is called with tensors of a scratch graph.
        *specifications: Keras tensors.

    Returns:
        Keras tensors, in the structure of the function's result.
    """
    return _backend.compute_output_spec(function, *specifications)


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs of a built model in their original structure, or None if the model does not know them."""
    if not model.built or not getattr(model, "inputs", None):
        return None
    # functional models store the structure of their inputs, sequential models have a single input
    return getattr(model, "_inputs_struct", model.inputs[0])


def rematerialized(layer: Any) -> bool:
    """Whether a layer's inner tensors are recomputed in the backward pass, so that they have no gradient outside it."""
    mode = getattr(layer, "_remat_mode", None)
    return bool(mode and (mode.mode in ("full", "larger_than") or layer.name in (mode.layer_names or ())))


def sublayers_of(layer: Any) -> list[Any]:
    """The direct sublayers of a layer or a model."""
    return list(layer.layers if isinstance(layer, keras.Model) else getattr(layer, "_layers", []))


def compiled_loss(model: keras.Model, labels: Any, output: Any, sample_weight: Any) -> Any:
    """The loss passed to ``compile``, without the regularisers that ``compute_loss`` adds."""
    return model._compile_loss(labels, output, sample_weight)


def compiled_metrics(model: keras.Model) -> list[Any]:
    """The metrics passed to ``compile``, also before Keras has built them, as one list."""
    compiled = getattr(model, "_compile_metrics", None)
    return keras.tree.flatten([compiled._user_metrics, compiled._user_weighted_metrics]) if compiled is not None else []


def additional_loss(model: keras.Model, loss: Any) -> Any:
    """A regulariser as Keras adds it to the loss, under ``tf.distribute`` divided by the number of replicas."""
    return model._aggregate_additional_loss(loss)


def direction(metric: Any) -> str | None:
    """Whether ``"up"`` or ``"down"`` is better; None if the metric does not say it."""
    better: str | None = getattr(metric, "_direction", None)
    return better


def set_direction(metric: keras.metrics.Metric, direction: str) -> None:
    """Set whether ``"up"`` or ``"down"`` is better, which Keras' callbacks read for ``mode="auto"``."""
    metric._direction = direction


def raw_iterations(optimizer: Any) -> tuple[int, int]:
    """Number of batches that an optimizer has processed, and how many it accumulates for one step."""
    counter, accumulated = iterations_counter(optimizer)
    # a sum is a plain number, also of a variable that has a copy on each replica; NumPy warns of variables
    return int(keras.ops.add(counter, 0)), accumulated


def iterations_counter(optimizer: Any) -> tuple[keras.Variable, int]:
    """The variable that counts the batches of an optimizer, and how many it accumulates for one step."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer._iterations, optimizer.gradient_accumulation_steps or 1


def unknown_variables(optimizer: Any, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """The trainable variables that an optimizer does not know, and refuses to train; none of one that is not built."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or not optimizer.built:
        return []
    known = optimizer._trainable_variables_indices
    return [variable for variable in variables if optimizer._var_key(variable) not in known]


def first_batch(batches: Any) -> Any:
    """The first batch of an epoch, which Keras itself reads in this way before it trains.

    Args:
        batches: Keras' iterator over an epoch.

    Returns:
        Inputs, labels and weights in the structure of the data.
    """
    _, _, block = next(iter(batches))
    return block[0] if isinstance(block, (list, tuple)) else next(block)


def create_variables(model: keras.Model, batch: Any) -> None:
    """Create the variables of a compiled model's optimizer and metrics before its first training step on TensorFlow.

    TensorFlow traces a step a second time if the first trace has created a variable. Keras itself creates them ahead
    on JAX and under ``tf.distribute``. A mistake in the model or the data is left to the step, whose message is better.

    Args:
        model: The model, whose layers are built.
        batch: Arrays, tensors or specifications of them, as Keras passes a batch to a step.
    """
    if keras.backend.backend() != "tensorflow":
        return
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step warns too
        model._symbolic_build(data_batch=batch)


def untaped() -> contextlib.AbstractContextManager[Any]:
    """A context in which the backend does not record a forward pass for gradients.

    TensorFlow has no public function for this: only the tape can stop itself, and ``train_step`` does not share it.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.eager import record

        return record.stop_recording()  # type: ignore[no-any-return]
    return contextlib.nullcontext()


@contextlib.contextmanager
def discarded_changes(values: Sequence[tuple[keras.Variable, Any]] = ()) -> Iterator[None]:
    """A context that discards assignments to variables, so that a stateful teacher does not change.

    Args:
        values: Pairs of a variable and a tensor that layers read in its place.
    """
    outer = get_stateless_scope() if in_stateless_scope() else None
    with keras.StatelessScope(values) as scope:
        if outer is not None:
            scope.state_mapping = {**outer.state_mapping, **scope.state_mapping}
        yield


@contextlib.contextmanager
def kept_losses(layers: Sequence[Any]) -> Iterator[None]:
    """A context after which the layers have their losses of the last call again: each call of a model clears them.

    Args:
        layers: The layers.
    """
    losses = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in layers]
    try:
        yield
    finally:
        for layer, values, ids in losses:
            layer._losses[:] = values
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)


@contextlib.contextmanager
def computed_in(layers: Sequence[Any], dtype: str | None) -> Iterator[None]:
    """A context in which some layers compute in another precision; their variables do not change.

    Args:
        layers: The layers.
        dtype: A precision of floating-point numbers; None changes nothing.
    """
    if dtype is None:
        yield
        return
    policy = f"mixed_{dtype}" if dtype in ("bfloat16", "float16") else dtype
    changed = []
    try:
        for layer in layers:
            plain = type(layer.dtype_policy) is keras.dtype_policies.DTypePolicy
            if plain and keras.backend.is_float_dtype(layer.compute_dtype):
                changed.append((layer, layer.dtype_policy))
                layer.dtype_policy = policy
        with _backend.AutocastScope(dtype):  # Keras opens none if variables and computation have one precision
            yield
    finally:
        for layer, before in changed:
            layer.dtype_policy = before
