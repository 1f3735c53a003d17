"""Numbers that graphs read, as variables that Keras tracks and saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_distill import backends


@keras.saving.register_keras_serializable(package="keras_distill")
class NumbersState(keras.layers.Layer):
    """Numbers that can change without a new trace: Python decides on them, graphs read copies from variables.

    A subclass implements :meth:`current` and :meth:`take`.

    Args:
        numbers: The first numbers, by name.
        name: Name of the layer.
        **kwargs: Further settings of ``keras.layers.Layer``.

    Attributes:
        variables_by_name: The variables of the numbers.
        numbers_written: The Python numbers that the variables hold.
    """

    def __init__(self, numbers: Mapping[str, float], *, name: str, **kwargs: Any) -> None:
        super().__init__(name=name, autocast=False, **kwargs)
        self.numbers_written = dict(numbers)
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

    def current(self) -> Mapping[str, float]:
        """The numbers that the variables should hold."""
        raise NotImplementedError

    def take(self, numbers: Mapping[str, float]) -> None:
        """Accept the numbers of a file."""
        raise NotImplementedError

    def sync(self) -> None:
        """Write the numbers that have changed into the variables."""
        for name, value in self.current().items():
            if self.numbers_written[name] != value:
                self.variables_by_name[name].assign(value)
                self.numbers_written[name] = value

    def number(self, name: str) -> Any:
        """A number as a scalar tensor."""
        return keras.ops.convert_to_tensor(self.variables_by_name[name])

    def load_own_variables(self, store: Any) -> None:
        """Load the numbers of a file."""
        super().load_own_variables(store)
        for name, variable in self.variables_by_name.items():
            self.numbers_written[name] = backends.same_or_loaded(self.numbers_written[name], variable)
        self.take(self.numbers_written)
