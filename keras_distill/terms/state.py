"""The state of one term in one model: the numbers that graphs read, and the weights that are trained."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras

from keras_distill import backends, checks


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
class TermState(keras.layers.Layer):
    """Numbers, adapters and learned losses of one term in one model, as a layer that Keras tracks, saves and trains.

    The settings are Python numbers, which decide what is traced. Graphs read copies of them from variables.

    Args:
        term: The owner's copy of the term.

    Attributes:
        variables_by_name: The variables of the numbers.
        numbers_written: The Python numbers that the variables hold.
    """

    def __init__(self, term: Any) -> None:
        super().__init__(name=term.name, autocast=False, trainable=term.trainable)
        self.term, self.numbers_written = term, dict(term.numbers())
        self.variables_by_name = {
            name: self.add_weight(
                name=name,
                shape=(),
                dtype="float32",
                trainable=False,
                autocast=False,
                initializer=keras.initializers.Constant(value),
            )
            for name, value in self.numbers_written.items()
        }
        self.built = True

    def sync(self) -> None:
        """Write the numbers that have changed into the variables."""
        trainable: bool = self.term.trainable
        if super().trainable != trainable:
            self.trainable = trainable
        for name, value in self.term.numbers().items():
            if self.numbers_written[name] != value:
                self.variables_by_name[name].assign(value)
                self.numbers_written[name] = value

    def number(self, name: str) -> Any:
        """A setting as a scalar tensor."""
        return keras.ops.convert_to_tensor(self.variables_by_name[name])

    def adopt(self) -> None:
        """Track the layers and variables that the term has made for its owner, in attributes and in lists."""
        shared = {id(value) for value in vars(self.term._origin).values() if not isinstance(value, keras.layers.Layer)}
        own = {name: value for name, value in vars(self.term).items() if id(value) not in shared and value is not self}
        tracked: set[int] = set()
        for name, value in own.items():
            if isinstance(value, (list, tuple)):
                layers = [part for part in value if isinstance(part, keras.layers.Layer)]
                if layers:
                    setattr(self, f"part_{name}", layers)
                    tracked |= {id(layer) for layer in layers}
        for name, value in own.items():
            if isinstance(value, (keras.layers.Layer, keras.Variable)) and id(value) not in tracked:
                setattr(self, f"part_{name}", value)

    def load_own_variables(self, store: Any) -> None:
        """Load the numbers of a file, and set the term's settings to them."""
        super().load_own_variables(store)
        for name, variable in self.variables_by_name.items():
            self.numbers_written[name] = backends.same_or_loaded(self.numbers_written[name], variable)
            self.term._store(name, self.numbers_written[name])
        self.term._settings.changed()


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
