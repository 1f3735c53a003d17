"""Targets with the teacher's outputs, so that the teacher does not have to run while the student trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_distill import checks
from keras_distill.recording import Call, Tap, looks_like


class DistillTargets(NamedTuple):
    """The targets of a batch: its labels and the teacher's outputs.

    Attributes:
        labels: The labels for the compiled loss and metrics; None for unlabelled data. In a ``PyDataset`` or a
            generator use an array of shape ``(N, 0)`` instead of None, which TensorFlow does not accept there.
        teacher: The teacher's output. If terms read features of the teacher too, it is a dict
            ``{"output": output, "features": {layer: feature}}``, with the keys of the taps as names.
            ``DistillModel.teacher_targets`` makes either. From a cache of the likeliest classes the output is a
            :class:`keras_distill.functional.top_k.TopK`.

    Example:
        >>> DistillTargets(labels=[1], teacher=[[0.5, 2.0]]).labels
        [1]
    """

    labels: Any
    teacher: Any


def carries_features(answer: Any) -> bool:
    """Whether the teacher's part of the targets is a dict of an output and features, and not an output alone."""
    return isinstance(answer, dict) and answer.keys() == {"output", "features"}


def weights_of(sample_weight: Any) -> Any:
    """The sample weights of the labels; for arrays Keras repeats the weights for every part of the targets.

    Args:
        sample_weight: The batch's sample weights.

    Returns:
        The weights in the structure of the labels, or None.
    """
    if not isinstance(sample_weight, DistillTargets):
        return sample_weight
    if sample_weight.labels is not None:
        return sample_weight.labels
    return next(iter(keras.tree.flatten(sample_weight.teacher)), None)


def stored_targets(labels: Any, call: Call, taps: Sequence[Tap]) -> DistillTargets:
    """Targets with the outputs of a teacher's call.

    Args:
        labels: Labels, or None.
        call: The teacher's call.
        taps: Places whose features are stored.

    Returns:
        The targets.
    """
    if not taps and not carries_features(call.output):
        return DistillTargets(labels, call.output)
    features = {level.key: call.feature(level) for tap in taps for level in call.levels(tap)}
    return DistillTargets(labels, {"output": call.output, "features": features})


def split_targets(targets: Any) -> tuple[Any, Call | None]:
    """Split targets into labels and the teacher's call.

    Args:
        targets: The batch's ``y``.

    Returns:
        The labels, and the teacher's outputs as a call, or None if the targets do not hold them.
    """
    if not isinstance(targets, DistillTargets):
        return targets, None
    labels, answer = targets
    shape = getattr(labels, "shape", None)
    if shape is not None and len(shape) == 2 and shape[-1] == 0:  # unlabelled data
        labels = None
    if answer is None:
        return labels, None
    if not carries_features(answer):
        return labels, Call(answer, who="teacher")
    return labels, Call(answer["output"], features=dict(answer["features"]), who="teacher")


def targets_of_outputs(labels: Any, output: Any, terms: Sequence[Any]) -> Any:
    """The targets of the compiled loss: without boxes that terms alone read, since Keras refuses further entries.

    Args:
        labels: The batch's labels, or its sample weights.
        output: The student's output.
        terms: The terms.

    Returns:
        The labels without the entries of boxes that are not the student's outputs. If a function finds the boxes in a
        dict, the entries of named outputs alone.
    """
    places = [term.boxes for term in terms if getattr(term, "boxes", None) is not None]
    several = isinstance(output, (dict, list, tuple))
    if isinstance(labels, dict):
        own = set(output) if isinstance(output, dict) else set()
        own_alone = bool(own) and any(map(callable, places))
        taken: Any = {key for key in labels if key not in own and (own_alone or key in places)}
        rest: Any = {key: value for key, value in labels.items() if key not in taken}
        entries = list(rest.values())
    elif isinstance(labels, (list, tuple)) and len(labels) > (len(output) if several else 1):
        taken = {place % len(labels) for place in places if isinstance(place, int)}
        rest = entries = [value for index, value in enumerate(labels) if index not in taken]
    else:
        return labels
    if not taken:
        return labels
    return rest if several or len(entries) != 1 else entries[0]


class EpochData(keras.utils.PyDataset):
    """A data set whose batches depend on the epoch, which ``DistillModel.fit`` sets.

    Attributes:
        epoch: The epoch, counted from 0.
        in_fit: Whether ``fit`` sets the epoch now.
    """

    epoch: int = 0
    in_fit: bool = False

    def end_fit(self) -> None:
        """Set the epoch back to 0 after a training."""
        self.in_fit, self.epoch = False, 0


def check_class_weight(class_weight: Any, targets: Any, data: Any) -> None:
    """Refuse ``class_weight`` together with :class:`DistillTargets`, which Keras takes for the targets of two outputs.

    Args:
        class_weight: The argument of ``fit``.
        targets: The ``y`` argument of ``fit``.
        data: The ``x`` argument of ``fit``.

    Raises:
        ValueError: If both are passed.
    """
    if not class_weight:
        return
    parts = [targets]
    if isinstance(data, keras.utils.PyDataset):
        parts += data[0]
    elif isinstance(specification := getattr(data, "element_spec", None), tuple):
        parts += specification
    if any(isinstance(part, DistillTargets) for part in parts):
        expected = "`class_weight` to be None if the targets hold the teacher's outputs"
        remedy = "Pass the weight of each example's class in `sample_weight`."
        raise ValueError(checks.message(expected, f"class_weight={class_weight!r}", remedy))


def check_stored_logits(terms: Sequence[Any], targets: Any, data: Any) -> None:
    """Refuse stored outputs that look like probabilities if a loss expects logits.

    Args:
        terms: The terms.
        targets: The ``y`` argument of ``fit``.
        data: The ``x`` argument of ``fit``.

    Raises:
        ValueError: If the rows lie in [0, 1] and sum to 1. If they only lie in [0, 1], a warning is issued.
    """
    if isinstance(data, EpochData) and len(data):
        targets = next((part for part in data[0] if isinstance(part, DistillTargets)), None)
    if not isinstance(targets, DistillTargets):
        return
    _, call = split_targets(targets)
    on_logits = [term for term in terms if getattr(getattr(term, "loss", None), "from_logits", None) is True]
    output = None if call is None else call.output
    if not on_logits or not isinstance(output, np.ndarray) or output.ndim < 2:
        return
    # about a thousand rows, spread over all of them, are enough to tell
    kind = looks_like(output[:: max(1, len(output) // 1000)])
    if kind == "softmax":
        expected = f"the teacher's outputs in `DistillTargets` to be logits for {type(on_logits[0].loss).__name__}"
        remedy = (
            "Store logits, or np.log of the probabilities; or pass a loss with from_logits=False to a softmax student."
        )
        raise ValueError(checks.message(expected, "rows of probabilities, which sum to 1", remedy))
    if kind == "sigmoid" and output.any():
        warnings.warn(
            "The teacher's outputs in `DistillTargets` all lie from 0 to 1, as probabilities do, and the loss of term"
            f" {on_logits[0].name!r} takes them for logits.",
            stacklevel=3,
        )
