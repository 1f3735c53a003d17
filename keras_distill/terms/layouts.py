"""The meaning of a feature's axes, and their order for the losses, with channels last."""

from __future__ import annotations

from typing import Any, Final

import keras
from keras import ops

from keras_distill import checks
from keras_distill.recording import Facts, Tap

# The kind of feature that each layout becomes when it is arranged.
KINDS: Final[dict[str | None, str]] = {
    "channels_last": "map",
    "channels_first": "map",
    "tokens": "tokens",
    "heads": "tokens",
    "scores": "scores",
}


def known_layout(tap: Tap, tensor: Any, facts: Facts) -> str | None:
    """The layout of a feature: the tap's own, or the one that follows from the model's layers.

    Args:
        tap: The place.
        tensor: The feature.
        facts: The facts about the feature.

    Returns:
        One of ``LAYOUTS``, or None if it is unknown.
    """
    if tap.layout is not None:
        return tap.layout
    return facts.layout if len(tensor.shape) >= 3 else None


def arranged(feature: Any, layout: str | None) -> Any:
    """Put the channels of maps last, and merge the heads of tokens into one axis.

    Args:
        feature: The feature as the layer returned it.
        layout: Meaning of its axes. None stands for ``keras.config.image_data_format()`` if the feature has 4 or more
            dimensions; otherwise the feature is returned unchanged.

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


def without_prefix(tap: Tap, feature: Any, place: str) -> Any:
    """Tokens without those that a tap leaves out.

    Args:
        tap: The place.
        feature: The arranged feature.
        place: The feature, for messages.

    Returns:
        The feature.

    Raises:
        ValueError: If it has another number of dimensions, or fewer tokens.
    """
    if tap.prefix_tokens is None:
        return feature
    if len(feature.shape) != 3 or (feature.shape[1] is not None and feature.shape[1] <= tap.prefix_tokens):
        expected = f"{place} to have more than {tap.prefix_tokens} tokens, shape (N, L, C)"
        raise ValueError(checks.message(expected, f"shape {tuple(feature.shape)}", "Correct `prefix_tokens`."))
    return feature[:, tap.prefix_tokens :]
