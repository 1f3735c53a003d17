"""Requirements of a loss: the inputs and settings that a term must provide."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Requires:
    """Requirements of a loss, read from its attributes of the same names.

    Args:
        needs_labels: The batch's labels are the third argument.
        channels_must_match: Both features need the same number of channels, if necessary through an adapter.
        positions_must_match: Both features need the same positions; a term resizes the teacher's map.
        several_layers: The two arguments are lists of features, one for each layer.
        merges_classes: The loss is a divergence between the distributions of a row that also holds where classes are
            merged, so that a cache of the likeliest classes is enough.
        linear_in_teacher: Its gradient is linear in the teacher's probabilities at temperature 1, so that classes drawn
            at random give an unbiased one.
        learned: The loss has parameters of its own, made once the shapes are known.
        reads_teacher: The loss takes numbers from layers of the teacher, before it is built.
        keeps_teacher: The loss keeps earlier outputs of its teacher: each of several teachers needs a copy of its own.
        needs_boxes: The foreground weights of the batch's boxes are the third argument.
        needs_index: The row of each example in the data set is the third argument.
        class_scores: Both arguments are class scores (logits), so that agreement with the teacher is meaningful.

    Example:
        >>> class WithLabels:
        ...     needs_labels = True
        >>> Requires.of(WithLabels()).needs_labels, Requires.of(len).needs_labels
        (True, False)
    """

    needs_labels: bool = False
    channels_must_match: bool = True
    positions_must_match: bool = True
    several_layers: bool = False
    merges_classes: bool = False
    linear_in_teacher: bool = False
    learned: bool = False
    reads_teacher: bool = False
    keeps_teacher: bool = False
    needs_boxes: bool = False
    needs_index: bool = False
    class_scores: bool = False

    @classmethod
    def of(cls, loss: Any) -> Requires:
        """The requirements of a loss: one of this project, or a user's function or object that sets some attributes."""
        return cls(**{field.name: bool(getattr(loss, field.name, field.default)) for field in fields(cls)})
