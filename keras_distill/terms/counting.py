"""The positions that count: those that a mask of the inputs marks, and whose label is not to be ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_distill import checks
from keras_distill.functional.vectors import resized_along
from keras_distill.losses import DistillationLoss
from keras_distill.recording.calls import Call, entry_of_inputs
from keras_distill.terms.loss_term import LossTerm
from keras_distill.terms.weighing import expanded

MaskPlace: TypeAlias = str | int | Callable[[Any], Any]
_HALF = 0.5 - 1e-4  # the mean of a third of the pixels, twice, may be rounded to less


class CountingTerm(LossTerm):
    """A term that can leave out positions, with one rule for outputs and layers.

    Args:
        loss: The loss.
        mask: Where the inputs keep the mask of the positions that count: a key, an index, or a function of the inputs.
        ignore_index: Positions with this label do not count; None reads no labels.
        **kwargs: Settings of :class:`LossTerm`.

    Raises:
        TypeError: If one of the settings is something else, or the term cannot leave out positions.
        ValueError: If the loss does not return one value for each position.
    """

    leaves_out = True  # whether the term takes `mask` and `ignore_index`

    def __init__(
        self, loss: Any, *, mask: MaskPlace | None = None, ignore_index: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(loss, **kwargs)
        if mask is not None or ignore_index is not None:
            if not self.leaves_out:
                received = f"mask={mask!r}, ignore_index={ignore_index!r}"
                raise TypeError(checks.message(f"known settings of {type(self).__name__}", received))
            _check_counting(mask, ignore_index, loss)
        self.mask, self.ignore_index = mask, ignore_index
        self.needs_labels = self.requires.needs_labels or ignore_index is not None

    def counted(self, student: Call, labels: Any, tensor: Any) -> Any:
        """The positions of a tensor that count.

        Args:
            student: The student's call, with the batch's inputs.
            labels: The labels, integers.
            tensor: Outputs or features, shape ``(N, C)``, ``(N, L, C)`` or ``(N, H, W, C)``.

        Returns:
            A bool tensor with the first dimensions of ``tensor``, or None if all positions count.

        Raises:
            ValueError: If the inputs or the targets do not hold them, or they do not fit the tensor.
        """
        kept = []
        if self.mask is not None:
            remedy = "Pass a key or an index of the inputs, or a function of them."
            marked = entry_of_inputs(student.inputs, self.mask, "mask", remedy)
            kept.append(_at_positions(ops.cast(marked, "bool"), tensor, f"mask={self.mask!r}"))
        if self.ignore_index is not None:
            labels = ops.convert_to_tensor(self._single(labels))
            kept.append(_at_positions(ops.not_equal(labels, self.ignore_index), tensor, "labels, with `ignore_index`,"))
        if len(kept) < 2:
            return kept[0] if kept else None
        rank = max(len(each.shape) for each in kept)
        return ops.logical_and(*(expanded(each, rank) for each in kept))

    def labels_of_loss(self, labels: Any) -> Any:
        """The labels with -1, which stands for no class, for those to ignore: they may be numbers beyond the classes.

        Args:
            labels: The labels, integers.

        Raises:
            ValueError: If the loss needs labels, and there are several tensors of them.
        """
        if not self.requires.needs_labels:
            return labels
        if self.ignore_index is None:
            return self._single(labels) if keras.tree.is_nested(labels) else labels
        labels = ops.convert_to_tensor(self._single(labels))
        return ops.where(ops.equal(labels, self.ignore_index), ops.full_like(labels, -1), labels)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        if not self.leaves_out:
            return super().get_config()
        mask = keras.saving.serialize_keras_object(self.mask) if callable(self.mask) else self.mask
        return {**super().get_config(), "mask": mask, "ignore_index": self.ignore_index}

    def _single(self, labels: Any) -> Any:
        """The labels as one tensor.

        Raises:
            ValueError: If there is not exactly one.
        """
        tensors = keras.tree.flatten(labels) if keras.tree.is_nested(labels) else [labels]
        if len(tensors) != 1 or tensors[0] is None:
            received = "none" if tensors in ([], [None]) else f"{len(tensors)} tensors"
            if self.ignore_index is None:
                expected = f"labels for {type(self.loss).__name__} in term {self.name!r}"
                remedy = "Use it in a LogitsDistillation(output=...)."
            else:
                expected = f"labels for a term with ignore_index={self.ignore_index}"
                remedy = "Leave `ignore_index` out." if received == "none" else "Mark the positions by `mask` instead."
            raise ValueError(checks.message(expected, received, remedy))
        return tensors[0]


def _check_counting(mask: MaskPlace | None, ignore_index: int | None, loss: Any) -> None:
    if mask is not None and (isinstance(mask, bool) or not (isinstance(mask, (str, int)) or callable(mask))):
        expected = "`mask` to be a key or an index of the inputs, a function of them, or None"
        raise TypeError(checks.message(expected, f"mask={mask!r}"))
    if ignore_index is not None:
        checks.integer("ignore_index", ignore_index)
    if isinstance(loss, DistillationLoss) and loss.gives != "positions":
        expected = "a loss with one value for each position, with `mask` or `ignore_index`"
        raise ValueError(
            checks.message(expected, f"a {type(loss).__name__}", "Use one such as SoftTargetLoss or 'mse'.")
        )


def _at_positions(mask: Any, tensor: Any, name: str) -> Any:
    """A mask of examples, positions or pixels as one of the first dimensions of a tensor.

    Raises:
        ValueError: If it does not fit them.
    """
    shape = tuple(mask.shape)
    while len(mask.shape) >= len(tensor.shape) > 1 and mask.shape[-1] == 1:
        mask = ops.squeeze(mask, axis=-1)
    mask = resized_mask(mask, tensor)
    positions = tuple(tensor.shape[:-1])
    if len(mask.shape) > len(positions) or checks.shapes_differ(mask.shape, positions[: len(mask.shape)]):
        expected = f"{name} to have one value for each example or position of a tensor {tuple(tensor.shape)}"
        raise ValueError(checks.message(expected, f"shape {shape}", "Pass mask=<a function of the inputs>."))
    return mask


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
