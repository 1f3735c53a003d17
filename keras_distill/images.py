"""Images that are normalised for the student, made into the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from distill_core.checks import Checks
from distill_core.normalization import Normalization
from keras_distill import checks


@keras.saving.register_keras_serializable(package="keras_distill")
class Normalize(Normalization):
    """Subtracts a mean from images ``(N, H, W, C)``, divides by a standard deviation, and resizes them.

    For ``teacher_inputs``: ``Normalize.between(student=(mean, std), teacher=(mean, std), size=224)`` undoes the
    student's normalisation and applies the teacher's. Sizes change bilinearly with antialiasing. The channels are where
    ``keras.config.image_data_format()`` says. The images may be the only input, the first of several, or an entry
    ``"pixel_values"`` of a dict.

    Args:
        mean: The means that are subtracted, one for each channel.
        std: The standard deviations that are divided by, as many.
        size: Height and width of the result: a number for both, a pair, or None to leave the size as it is.

    Raises:
        TypeError: If a setting has another type.
        ValueError: If the lengths differ, a standard deviation is not greater than 0, or a size is not a whole number
            of pixels.

    Example:
        >>> student, teacher = ([0.5, 0.5], [0.5, 0.25]), ([0.5, 0.25], [0.25, 0.25])
        >>> ops.convert_to_numpy(Normalize.between(student, teacher)(ops.ones((1, 1, 1, 2)))).ravel()
        array([2., 2.], dtype=float32)
    """

    checks: ClassVar[Checks] = Checks(checks.message)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "size": None if self.size is None else list(self.size),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Normalize:
        """The object that :meth:`get_config` describes."""
        return cls(**config)

    def _channel_axis(self) -> int:
        return -1 if keras.config.image_data_format() == "channels_last" else 1

    def _changed(self, images: Any) -> Any:
        checks.floating("images", images)
        dtype = keras.backend.result_type(images.dtype, "float32")
        mean, std = (ops.convert_to_tensor(self._along(values), dtype=dtype) for values in (self.mean, self.std))
        changed = (ops.cast(images, dtype) - mean) / std
        if self.size is not None and self._size_of(images) != self.size:
            changed = ops.image.resize(changed, self.size, interpolation="bilinear", antialias=True)
        return ops.cast(changed, images.dtype)

    def _along(self, values: Sequence[float]) -> list[Any]:
        """Values of the channels in a shape that broadcasts to images."""
        return list(values) if self._channel_axis() == -1 else [[[value]] for value in values]

    def _size_of(self, images: Any) -> tuple[int | None, ...]:
        first = 1 if self._channel_axis() == -1 else 2
        return tuple(images.shape[first : first + 2])
