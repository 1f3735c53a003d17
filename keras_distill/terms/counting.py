"""The positions of outputs that count: those that a mask of the inputs marks, and whose label is not to be ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from keras import ops

from keras_distill import checks
from keras_distill.functional.vectors import resized_along
from keras_distill.losses import DistillationLoss
from keras_distill.recording.calls import entry_of_inputs

MaskPlace: TypeAlias = str | int | Callable[[Any], Any]
_HALF = 0.5 - 1e-4  # the mean of a third of the pixels, twice, may be rounded to less


def check_counting(mask: MaskPlace | None, ignore_index: int | None, loss: Any) -> None:
    """Raise if a term cannot leave out the positions that its settings say.

    Args:
        mask: The setting of the term.
        ignore_index: The setting of the term.
        loss: Its loss.

    Raises:
        TypeError: If one of the settings is something else.
        ValueError: If the loss does not return one value for each position.
    """
    if mask is None and ignore_index is None:
        return
    if mask is not None and (isinstance(mask, bool) or not (isinstance(mask, (str, int)) or callable(mask))):
        expected = "`mask` to be a key or an index of the inputs, a function of them, or None"
        raise TypeError(checks.message(expected, f"mask={mask!r}"))
    if ignore_index is not None:
        checks.integer("ignore_index", ignore_index)
    if isinstance(loss, DistillationLoss) and loss.gives != "positions":
        expected = "a loss with one value for each position, with `mask` or `ignore_index`"
        raise ValueError(checks.message(expected, f"a {type(loss).__name__}", "Use one such as SoftTargetLoss."))


def counted_positions(mask: MaskPlace | None, ignore_index: int | None, inputs: Any, labels: Any, logits: Any) -> Any:
    """The positions of logits that count.

    Args:
        mask: Where the inputs keep a mask; positions that are not 0 count.
        ignore_index: Label of positions that do not count.
        inputs: The batch's inputs.
        labels: The labels of these logits, integers.
        logits: Shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.

    Returns:
        A bool tensor, or None if all positions count.

    Raises:
        ValueError: If the inputs or the targets do not hold them.
    """
    kept = []
    if mask is not None:
        remedy = "Pass a key or an index of the inputs, or a function of them."
        marked = entry_of_inputs(inputs, mask, "mask", remedy)
        kept.append(resized_mask(ops.cast(marked, "bool"), logits))
    if ignore_index is not None:
        if labels is None:
            expected = f"labels for a term with ignore_index={ignore_index}"
            raise ValueError(checks.message(expected, "none", "Leave `ignore_index` out."))
        labels = ops.convert_to_tensor(labels)
        if len(labels.shape) == len(logits.shape) and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, axis=-1)
        if len(labels.shape) != len(logits.shape) - 1:
            expected = f"integer labels, one for each position of logits {tuple(logits.shape)}, with `ignore_index`"
            raise ValueError(checks.message(expected, f"labels of shape {tuple(labels.shape)}"))
        kept.append(resized_mask(ops.not_equal(labels, ignore_index), logits))
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else ops.logical_and(*kept)


def without_ignored(labels: Any, ignore_index: int) -> Any:
    """The labels with -1, which stands for no class, for those to ignore: they may be numbers beyond the classes.

    Args:
        labels: Integers.
        ignore_index: The label.
    """
    labels = ops.convert_to_tensor(labels)
    return ops.where(ops.equal(labels, ignore_index), ops.full_like(labels, -1), labels)


def resized_mask(mask: Any, logits: Any) -> Any:
    """A mask of pixels as one of a map's positions; any other mask is returned unchanged.

    A position of a smaller map counts if at least half of its pixels do.

    Args:
        mask: A bool tensor ``(N, H, W)``, or of another shape.
        logits: The map, shape ``(N, H', W', C)``.

    Example:
        >>> mask = ops.array([[[True, False, False, False], [True, False, False, True]]])
        >>> resized_mask(mask, ops.zeros((1, 1, 2, 8)))[0, 0].numpy().tolist()
        [True, False]
    """
    if len(mask.shape) == 4 and mask.shape[-1] == 1:
        mask = ops.squeeze(mask, axis=-1)
    if len(mask.shape) != 3 or len(logits.shape) != 4 or None in (*mask.shape[1:], *logits.shape[1:3]):
        return mask
    if tuple(mask.shape[1:]) == tuple(logits.shape[1:3]):
        return mask
    counted = ops.cast(mask, "float32")
    for axis in (1, 2):
        counted = resized_along(counted, axis, min(mask.shape[axis], logits.shape[axis]))
    counted = counted >= _HALF
    for axis in (1, 2):
        size, map_size = counted.shape[axis], logits.shape[axis]
        if size < map_size:  # the nearest pixel
            nearest = ((np.arange(map_size) + 0.5) * size / map_size).astype("int32")
            counted = ops.take(counted, nearest, axis=axis)
    return counted
