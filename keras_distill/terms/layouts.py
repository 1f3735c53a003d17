"""What the axes of a feature mean, and one arrangement for each kind: features last."""

from __future__ import annotations

from typing import Any, Final

import keras
from keras import ops

from keras_distill.recording import Facts, Tap

# The kind of feature that each layout is once it is arranged.
KINDS: Final[dict[str | None, str]] = {
    "channels_last": "map",
    "channels_first": "map",
    "tokens": "tokens",
    "heads": "tokens",
    "scores": "scores",
}


def known_layout(tap: Tap, tensor: Any, facts: Facts) -> str | None:
    """The layout of a feature: the tap's, or the one that the model's layers say it has.

    Args:
        tap: The place.
        tensor: The feature.
        facts: What is known of it.

    Returns:
        One of ``LAYOUTS``, or None where nobody says.
    """
    if tap.layout is not None:
        return tap.layout
    return facts.layout if len(tensor.shape) >= 3 else None


def arranged(feature: Any, layout: str | None) -> Any:
    """The feature with its features last: channels of maps at the end, heads of tokens merged.

    Args:
        feature: As the layer returned it.
        layout: Meaning of its axes; None leaves it as it is but for Keras' own image format.

    Returns:
        A map ``(N, ..., C)``, tokens ``(N, L, C)``, or the feature itself.
    """
    if layout is None and len(feature.shape) >= 4:
        layout = keras.config.image_data_format()
    if layout == "channels_first":
        return ops.moveaxis(feature, 1, -1)
    if layout == "heads" and len(feature.shape) == 4:
        _, length, heads, width = feature.shape
        return ops.reshape(feature, (-1, ops.shape(feature)[1] if length is None else length, heads * width))
    return feature
