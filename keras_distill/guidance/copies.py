"""Copies of the arguments of a DistillModel, so that nothing is carried from one run to the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import keras

from keras_distill.terms import DistillationTerm
from keras_distill.terms.loss_term import copied
from keras_distill.terms.state import layer_copy


def copied_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of the arguments.

    Copies of Keras' own, which save and load an object, need registered classes and named functions.

    Args:
        settings: The arguments.

    Returns:
        The copy.
    """
    copies: dict[int, Any] = {}
    for leaf in keras.tree.flatten(dict(settings)):
        parts = keras.tree.flatten(list(vars(leaf).values())) if isinstance(leaf, DistillationTerm) else [leaf]
        for part in parts:
            if isinstance(part, keras.losses.Loss):
                copies[id(part)] = copied(part)
            elif isinstance(part, keras.metrics.Metric):
                copies[id(part)] = type(part).from_config(part.get_config())
            elif isinstance(part, keras.layers.Layer):
                copies[id(part)] = layer_copy(part, part.get_weights() if part.built else None, "a method")
    return copy.deepcopy(dict(settings), copies)
