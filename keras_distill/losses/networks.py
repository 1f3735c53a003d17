"""The small networks that losses learn: layers one after the other, one kind for every number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import keras
from keras import ops

from keras_distill import checks

_CONVOLUTIONS: Final[dict[int, Any]] = {3: keras.layers.Conv1D, 4: keras.layers.Conv2D, 5: keras.layers.Conv3D}


@keras.saving.register_keras_serializable(package="keras_distill")
class Network(keras.layers.Layer):
    """Layers one after the other."""

    def __init__(self, layers: Sequence[keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = list(layers)
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Build the layers one after the other."""
        for part in self.parts:
            part.build(shape)
            shape = part.compute_output_shape(shape)
        self.built = True

    def call(self, feature: Any) -> Any:
        """The last layer's output."""
        for part in self.parts:
            feature = part(feature)
        return feature


@keras.saving.register_keras_serializable(package="keras_distill")
class BatchNormalized(keras.layers.Layer):
    """A convolution of maps without bias, and a batch normalisation with the statistics of the batch, always.

    Args:
        channels: Channels of its output.
        kernel: Width and height of the convolution.
        **kwargs: Settings of a layer.
    """

    def __init__(self, channels: int, kernel: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        settings = {"use_bias": False, "padding": "same", "data_format": "channels_last", "dtype": self.dtype}
        self.convolution = keras.layers.Conv2D(channels, kernel, **settings)
        self.channels = channels

    def build(self, shape: Any) -> None:
        """Build the convolution, and make the scale and the shift."""
        self.convolution.build(shape)
        self.scale = self.add_weight(name="scale", shape=(self.channels,), initializer="ones", dtype=self.dtype)
        self.shift = self.add_weight(name="shift", shape=(self.channels,), initializer="zeros", dtype=self.dtype)
        self.built = True

    def call(self, feature: Any) -> Any:
        """The normalised map."""
        mapped = self.convolution(feature)
        mean = ops.mean(mapped, axis=(0, 1, 2), keepdims=True)
        variance = ops.mean(ops.square(mapped - mean), axis=(0, 1, 2), keepdims=True)
        return (mapped - mean) / ops.sqrt(variance + 1e-5) * self.scale + self.shift


def wide_layer(rank: int, channels: int | None, activation: Any, dtype: Any) -> keras.layers.Layer:
    """A convolution of width 3; for vectors, which have no positions, a dense layer."""
    if rank == 2:
        return keras.layers.Dense(channels, activation, dtype=dtype)
    settings = {"padding": "same", "data_format": "channels_last", "activation": activation, "dtype": dtype}
    return _CONVOLUTIONS[rank](channels, 3, **settings)


def check_ranks(student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
    """Raise if no layer fits the two features.

    Raises:
        ValueError: If their numbers of dimensions differ, or are not 2 to 5.
    """
    if len(student) != len(teacher) or not 2 <= len(student) <= 5:
        expected = "`student` and `teacher` to have the same number of dimensions, 2 to 5"
        received = f"{tuple(student)} and {tuple(teacher)}"
        raise ValueError(checks.message(expected, received, "Pass adapter=<a layer>."))


def built(layer: Any) -> Any:
    """The part of a loss that its ``build`` has made.

    Raises:
        ValueError: If it has not been made.
    """
    if layer is None:
        remedy = "Call loss.build(student.shape, teacher.shape) once, or use the loss in a FeatureDistillation."
        raise ValueError(checks.message("the loss to be built before it is called", "no parameters", remedy))
    return layer


def linear_classifier(
    layer_of: Callable[[str | None], keras.layers.Layer], name: str | None, channels: int | None
) -> keras.layers.Dense:
    """The Dense layer of a teacher that takes features with so many channels.

    Args:
        layer_of: Returns the teacher's layer of a name; ``""`` is the whole model.
        name: Name of the classifier; ``None`` takes the only Dense layer that fits.
        channels: Channels of the feature.

    Returns:
        The layer.

    Raises:
        ValueError: If no layer fits, or several do.
    """

    def fits(layer: Any) -> bool:
        return isinstance(layer, keras.layers.Dense) and layer.built and layer.kernel.shape[0] == channels

    layer = layer_of("" if name is None else name)
    if fits(layer):
        return layer
    if name is not None or not isinstance(layer, keras.Model):
        expected = f"the teacher's classifier to be a Dense layer of {channels} inputs, the channels of its feature"
        remedy = "Name the Dense layer, and the feature that goes into it."
        raise ValueError(checks.message(expected, f"a {type(layer).__name__}, classifier={name!r}", remedy))
    fitting = [inner for inner in _inner_layers(layer) if fits(inner)]
    if len(fitting) != 1:
        expected = f"the teacher to have one Dense layer of {channels} inputs, the channels of its feature"
        remedy = "Pass classifier=<the name of the layer behind the feature>."
        names = ", ".join(inner.name for inner in fitting) or "none"
        raise ValueError(checks.message(expected, f"{len(fitting)}: {names}", remedy))
    return fitting[0]


def _inner_layers(layer: Any) -> Iterator[Any]:
    """The layers of a model and of the models in it."""
    for inner in getattr(layer, "layers", ()):
        yield inner
        yield from _inner_layers(inner)
