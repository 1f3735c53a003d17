"""The meaning of a feature's axes, and their order for the losses, with channels last."""

from __future__ import annotations

from typing import Any, Final

import keras
from keras import ops

from keras_distill import checks
from keras_distill.losses import AttentionMapLoss, AttentionRelationLoss, FeatureDistance
from keras_distill.recording import Call, Facts, Tap

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


def widened(feature: Any) -> Any:
    """The feature, cast to float32 if it is in half precision: 1e4 squared overflows float16."""
    narrow = keras.backend.standardize_dtype(feature.dtype) in ("float16", "bfloat16")
    return ops.cast(feature, "float32") if narrow else feature


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


def layouts_of_pair(
    taps: tuple[Tap, Tap],
    student: tuple[Call, Any],
    teacher: tuple[Call, Any],
    *,
    loss: Any,
    positions: bool,
    adapter: Any,
) -> list[str | None]:
    """The layouts of a pair of features, None if unknown.

    Args:
        taps: The places.
        student: The student's call and feature.
        teacher: The teacher's call and feature.
        loss: The loss that compares them.
        positions: Whether it compares positions, so that both features need the same.
        adapter: The setting of the term.

    Returns:
        The student's layout and the teacher's.

    Raises:
        ValueError: If an unknown layout matters, or the layouts do not fit each other or the loss.
    """
    layouts = [
        known_layout(tap, tensor, call.facts_of(tensor))
        for tap, (call, tensor) in zip(taps, (student, teacher), strict=True)
    ]
    shapes = [tuple(tensor.shape) for _, tensor in (student, teacher)]
    ranks = [len(shape) for shape in shapes]
    if layouts[1] is None and taps[1].key in teacher[0].features and ranks[0] == ranks[1]:
        layouts[1] = layouts[0]  # stored features have no layout: assume the student's
    declared = _declared_layout(loss)
    for side in (0, 1):
        if layouts[side] is None and ranks[side] == 4:
            layouts[side] = declared
    unknown = [tap.name for tap, layout, rank in zip(taps, layouts, ranks, strict=True) if not layout and rank >= 4]
    if unknown:
        # an adapter of the last axis is safe if the positions agree; resizing, or a loss over some axes, is not
        moved = checks.shapes_differ(shapes[0][1:-1], shapes[1][1:-1])
        elementwise = isinstance(loss, FeatureDistance) and loss.kind in ("mse", "l1", "smooth_l1")
        equal = not checks.shapes_differ(shapes[0][1:], shapes[1][1:])
        plain = keras.config.image_data_format() == "channels_last" or (elementwise and equal)
        custom = not isinstance(adapter, (str, type(None)))  # a custom adapter may change positions too
        if (moved and positions and not custom) or not plain:
            expected = f"the meaning of the axes of {' and '.join(map(repr, unknown))} to be known"
            remedy = f'Pass Tap({unknown[0]!r}, layout=...): "channels_last", "channels_first", "heads" or "scores".'
            raise ValueError(checks.message(expected, f"shapes {shapes[0]} and {shapes[1]}", remedy))
    kinds = [KINDS.get(layout) for layout in layouts]
    mixes = adapter in ("auto", "pool") and set(kinds) == {"tokens", "map"}
    if all(kinds) and kinds[0] != kinds[1] and not mixes:
        expected = f"student feature {taps[0].name!r} and teacher feature {taps[1].name!r} to be of one kind"
        remedy = "If a layout is wrong, pass Tap(layout=...)."
        raise ValueError(checks.message(expected, f"{layouts[0]} and {layouts[1]}", remedy))
    implied_kind = KINDS.get(declared)
    if implied_kind == "scores" and any(kind not in (None, implied_kind) for kind in kinds):
        expected = f"two attention maps for {type(loss).__name__}"
        raise ValueError(checks.message(expected, f"{layouts[0]} and {layouts[1]}", 'Tap("mha", output=1) is one.'))
    return layouts


def _declared_layout(loss: Any) -> str | None:
    """The layout of four dimensions that a loss implies."""
    if isinstance(loss, AttentionMapLoss):
        return "scores"
    return "heads" if isinstance(loss, AttentionRelationLoss) else None
