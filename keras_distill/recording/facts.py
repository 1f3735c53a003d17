"""Facts about the tensors of a model: the meaning of their axes, their last activation, the layers behind them."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_KEEPS_VALUES = (
    keras.layers.Reshape,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.Dropout,
    keras.layers.Identity,
)
_POINTWISE = ("Add", "Subtract", "Multiply", "Relu", "Gelu", "Silu", "Sigmoid", "Tanh", "Maximum", "Where", "Cast")
_DATA_FORMATS = ("channels_last", "channels_first")


class Facts(NamedTuple):
    """Facts about a tensor; None stands for unknown.

    Attributes:
        layout: Meaning of its axes, one of ``LAYOUTS`` (see :class:`Tap`).
        end: Its last activation: ``"softmax"``, ``"sigmoid"`` or ``"linear"`` (logits).
        behind: The layers with weights that computed it.
    """

    layout: str | None = None
    end: str | None = None
    behind: tuple[Any, ...] | None = None

    @property
    def probabilities(self) -> bool:
        """Whether the tensor holds probabilities."""
        return self.end in ("softmax", "sigmoid")


def facts_of(layer: Any, parent: Any, facts: dict[int, Facts], args: Any, output: Any) -> dict[int, Facts]:
    """Facts about a layer's outputs, from its own settings or, if it keeps their shape, from its inputs.

    Args:
        layer: A layer or another operation of Keras.
        parent: The layer in whose call it ran, or None.
        facts: The facts so far, by the id of a tensor.
        args: The arguments of the layer's call.
        output: The layer's output.

    Returns:
        The facts about each tensor of the output, by its id.
    """
    tensors = [leaf for leaf in keras.tree.flatten(output) if hasattr(leaf, "shape")]
    inputs = [leaf for leaf in keras.tree.flatten(args) if hasattr(leaf, "shape")]
    known = [facts.get(id(leaf), Facts()) for leaf in inputs]
    behind = _behind(layer, known)
    made: dict[int, Facts] = {}
    for index, tensor in enumerate(tensors):
        inner = facts.get(id(tensor), Facts())  # a nested model returns the tensors of inner layers
        layout = inner.layout or _layout(layer, parent, index, tensor, inputs, known)
        made[id(tensor)] = Facts(
            layout, inner.end or _end(layer, known), behind if inner.behind is None else inner.behind
        )
    return made


def _layout(layer: Any, parent: Any, index: int, tensor: Any, inputs: list[Any], known: list[Facts]) -> str | None:
    rank = len(tensor.shape)
    if getattr(layer, "data_format", None) in _DATA_FORMATS and rank >= 3:
        return str(layer.data_format)
    if isinstance(layer, _ATTENTION):
        return "scores" if index == 1 else "tokens"
    if isinstance(parent, _ATTENTION) and rank == 4:
        return "scores" if isinstance(layer, (keras.layers.Softmax, keras.layers.Dropout)) else "heads"
    if isinstance(layer, (keras.layers.Embedding, keras.layers.RNN)) and rank == 3:
        return "tokens"
    if index or not (isinstance(layer, keras.layers.Layer) or type(layer).__name__ in _POINTWISE):
        return None
    shape = tuple(tensor.shape)[1:]
    kept = [fact.layout for fact, leaf in zip(known, inputs, strict=True) if tuple(leaf.shape)[1:] == shape]
    handed_on = next((layout for layout in kept if layout), None)
    if handed_on is None and isinstance(layer, keras.layers.Concatenate):
        layouts = {fact.layout for fact in known}
        handed_on = layouts.pop() if len(layouts) == 1 else None
    if handed_on is None and isinstance(layer, keras.layers.Dense) and known:
        handed_on = known[0].layout if known[0].layout in ("tokens", "channels_last") else None
    return handed_on


def _end(layer: Any, known: list[Facts]) -> str | None:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    activation = getattr(getattr(layer, "activation", None), "__name__", None)
    passes = isinstance(layer, keras.layers.Activation) and activation == "linear"
    if isinstance(layer, _KEEPS_VALUES) or passes:
        return known[0].end if known else None
    name = str(activation or type(layer).__name__).lower()
    return name if name in ("softmax", "sigmoid", "linear") else None


def _behind(layer: Any, known: list[Facts]) -> tuple[Any, ...] | None:
    """The layers behind an output; None if an input was computed by anything but layers."""
    if not known or any(fact.behind is None for fact in known):
        return None
    own = [layer] if isinstance(layer, keras.layers.Layer) and layer.variables else []
    layers = [*own, *(other for fact in known for other in fact.behind or ())]
    return tuple({id(other): other for other in layers}.values())


def looks_like(values: Any, axis: int = -1) -> str:
    """Guess from their values whether stored outputs are probabilities or logits.

    Args:
        values: Outputs of a teacher.
        axis: The axis of the classes.

    Returns:
        ``"softmax"`` if every row lies in [0, 1] and sums to 1, ``"sigmoid"`` if every row lies in [0, 1], else
        ``"logits"``.

    Example:
        >>> looks_like([[0.25, 0.75]]), looks_like([[0.5, 0.25]]), looks_like([[2.0, -1.0]])
        ('softmax', 'sigmoid', 'logits')
    """
    values = np.asarray(values, "float32")
    if not values.size or np.isinf(values).any() or not np.isfinite(values).any():
        return "logits"
    finite = values[np.isfinite(values).all(axis)] if values.ndim > 1 else values[np.isfinite(values)]
    if not finite.size or finite.min() < 0 or finite.max() > 1:
        return "logits"
    # in half precision the sums differ from 1 by up to about 0.01
    several = values.ndim > 1 and values.shape[axis] > 1
    return "softmax" if several and np.allclose(finite.sum(axis), 1, atol=1e-2) else "sigmoid"
