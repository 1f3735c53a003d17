"""The state of one term in one model: the numbers that graphs read, and the weights that are trained."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_distill import checks
from keras_distill.balancing import BalanceState
from keras_distill.schedules import Balanced
from keras_distill.states import NumbersState

_LAYER_WEIGHTS = "layer_weights"


class Settings(dict[str, Any]):
    """The assignable settings of a term, shared by the copies of all its owners.

    Attributes:
        owners: The states that are updated when a setting changes.
        first: Returns the state of the first owner, or None if it no longer exists.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.owners: weakref.WeakSet[TermState] = weakref.WeakSet()
        self.first: Callable[[], TermState | None] = lambda: None

    def add(self, owner: TermState) -> None:
        """Update an owner's state from now on when a setting changes."""
        self.owners.add(owner)
        if self.first() is None:
            self.first = weakref.ref(owner)

    def changed(self) -> None:
        """Update the states of all owners."""
        for owner in list(self.owners):
            owner.sync()


@keras.saving.register_keras_serializable(package="keras_distill")
class TermState(NumbersState):
    """Numbers, adapters and learned losses of one term in one model, as a layer that Keras tracks, saves and trains.

    Args:
        term: The owner's copy of the term.

    Attributes:
        balance: The measurements of a balanced weight; None for another weight.
        left_out: Number of weights in the last file that was loaded that belong to layers the term has not made yet.
    """

    left_out = 0

    def __init__(self, term: Any) -> None:
        super().__init__(term.numbers(), name=term.name, trainable=term.trainable)
        self.term = term
        setting = term.schedules.get("weight")
        self.balance = BalanceState(setting, term.name) if isinstance(setting, Balanced) else None

    def current(self) -> Mapping[str, float]:
        """The settings of the term."""
        numbers: Mapping[str, float] = self.term.numbers()
        return numbers

    def take(self, numbers: Mapping[str, float]) -> None:
        """Set the term's settings to the numbers of a file."""
        for name, value in numbers.items():
            if self.balance is None or name != "weight":  # which follows from the share
                self.term._store("weight" if name == "share" else name, value)
        self.term._settings.changed()

    def save_own_variables(self, store: Any) -> None:
        """Save the numbers, and how many weights the layers of the term have."""
        super().save_own_variables(store)
        store[_LAYER_WEIGHTS] = np.array(self._layer_weights())

    def load_own_variables(self, store: Any) -> None:
        """Load the numbers of a file, and note the weights of layers that the term has not made yet."""
        numbers = {key: store[key] for key in store.keys()}  # noqa: SIM118 - Keras' stores are not dicts
        in_file = int(np.array(numbers.pop(_LAYER_WEIGHTS, 0)))  # files of earlier versions do not say
        self.left_out = 0 if self.term.built else max(in_file - self._layer_weights(), 0)
        super().load_own_variables(numbers)

    def _layer_weights(self) -> int:
        return sum(len(layer.weights) for layer in self._layers if layer is not self.balance)

    def sync(self) -> None:
        """Write the settings that have changed into the variables."""
        trainable: bool = self.term.trainable
        if super().trainable != trainable:
            self.trainable = trainable
        super().sync()

    def adopt(self) -> None:
        """Track the layers and variables that the term has made for its owner, in attributes and in lists."""
        shared = {id(value) for value in vars(self.term._origin).values() if not isinstance(value, keras.layers.Layer)}
        tracked: set[int] = set()
        for prefix, part in self.term.parts():
            own = {name: value for name, value in vars(part).items() if id(value) not in shared and value is not self}
            for name, value in own.items():
                layers = [layer for layer in value if isinstance(layer, keras.layers.Layer)] if _is_list(value) else []
                if layers and not {id(layer) for layer in layers} <= tracked:
                    setattr(self, f"{prefix}_{name}", layers)
                    tracked |= {id(layer) for layer in layers}
            for name, value in own.items():
                if isinstance(value, (keras.layers.Layer, keras.Variable)) and id(value) not in tracked:
                    setattr(self, f"{prefix}_{name}", value)
                    tracked.add(id(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def layer_copy(layer: keras.layers.Layer, weights: Any, who: str) -> keras.layers.Layer:
    """A copy of a layer, with its settings.

    Args:
        layer: The layer.
        weights: Weights of the copy; None leaves it unbuilt.
        who: The term that the layer belongs to, for messages.

    Returns:
        The copy.

    Raises:
        ValueError: If the layer cannot be copied.
    """
    try:
        copy = type(layer).from_config(layer.get_config())
        if weights is not None:
            copy.build_from_config(layer.get_build_config())
            copy.set_weights(weights)
    except Exception as error:  # a custom layer's own code runs here, which may raise anything
        expected = f"layer {layer.name!r} of {who} to be a layer that can be copied: another model trains it already"
        remedy = "Implement the layer's `get_config`, or pass a factory that makes a layer from the two shapes."
        raise ValueError(checks.message(expected, f"{type(error).__name__}: {error}", remedy)) from error
    copy.trainable = layer.trainable
    return copy
