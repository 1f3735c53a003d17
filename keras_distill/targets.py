"""Targets that carry the teacher's outputs, so that the teacher need not run while the student trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from keras_distill.taps import Call


class DistillTargets(NamedTuple):
    """The targets of a batch: its labels and what the teacher gave for it.

    Attributes:
        labels: What the compiled loss and metrics compare the student with; None for unlabelled data.
        teacher: The teacher's output; or ``{"output": output, "features": {layer: feature}}`` where terms read
            features of the teacher too, which are named by the keys of their taps. ``DistillModel.teacher_targets``
            makes either. From a cache of the likeliest classes the output is a
            :class:`keras_distill.functional.top_k.TopK`.

    Example:
        >>> DistillTargets(labels=[1], teacher=[[0.5, 2.0]]).labels
        [1]
    """

    labels: Any
    teacher: Any


def carries_features(answer: Any) -> bool:
    """Whether what the targets carry of the teacher is an output with features, and not an output alone."""
    return isinstance(answer, dict) and answer.keys() == {"output", "features"}


def weights_of(sample_weight: Any) -> Any:
    """Sample weights of the labels; for arrays Keras gives every part of the targets the same ones.

    Args:
        sample_weight: What the data gives.

    Returns:
        The weights in the structure of the labels, or None.
    """
    if not isinstance(sample_weight, DistillTargets):
        return sample_weight
    if sample_weight.labels is not None:
        return sample_weight.labels
    return next(iter(keras.tree.flatten(sample_weight.teacher)), None)


def split_targets(targets: Any) -> tuple[Any, Call | None]:
    """Labels and the teacher's call, if the targets carry one.

    Args:
        targets: What the data gives as ``y``.

    Returns:
        The labels, and the teacher's outputs as a call, or None.
    """
    if not isinstance(targets, DistillTargets):
        return targets, None
    answer = targets.teacher
    if answer is None:
        return targets.labels, None
    if not carries_features(answer):
        return targets.labels, Call(answer, who="teacher")
    return targets.labels, Call(answer["output"], features=dict(answer["features"]), who="teacher")
