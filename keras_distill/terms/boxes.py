"""The boxes of a batch in terms on feature maps: their checks, and the weights of the positions."""

from __future__ import annotations

from typing import Any

from distill_core.requires import Requires
from keras_distill import backends, checks
from keras_distill.functional.detection import foreground_weights
from keras_distill.recording import Call, Tap
from keras_distill.recording.boxes import BoxPlace, boxes_of_call, check_pixels, find_boxes


def check_boxes(boxes: Any, loss: Any, requires: Requires) -> None:
    """Raise if a term does not say where a batch keeps the boxes that its loss needs, or says so for another loss.

    Args:
        boxes: The setting of the term.
        loss: The loss.
        requires: Its requirements.

    Raises:
        TypeError: If ``boxes`` is something else.
        ValueError: If the loss needs boxes and has no place for them, or cannot have any.
    """
    name = type(loss).__name__
    if boxes is None:
        if requires.needs_boxes:
            expected = f"`boxes` to say where the targets keep their boxes, which {name} needs"
            remedy = "Pass a key or an index of the targets, a key of the inputs, or a function of the targets."
            raise ValueError(checks.message(expected, "boxes=None", remedy))
        return
    if isinstance(boxes, bool) or not (isinstance(boxes, (str, int, Tap)) or callable(boxes)):
        expected = "`boxes` to be a key, an index, a function of the targets, a Tap, or None"
        raise TypeError(checks.message(expected, f"boxes={boxes!r}"))
    for unfit, reason in (
        (requires.several_layers, "several layers at once"),
        (requires.needs_index, "whole examples"),
    ):
        if unfit:
            expected = f"`boxes` to be None for {name}, which compares {reason}"
            raise ValueError(checks.message(expected, f"boxes={boxes!r}", "Use a loss on single layers."))


def check_batch(boxes: BoxPlace, inputs: Any, labels: Any, size: tuple[int, int] | None) -> bool:
    """Check the values of a batch's boxes, if they are known, and say whether there were any.

    Args:
        boxes: Where the batch keeps them.
        inputs: The batch's inputs.
        labels: Its targets.
        size: Height and width of the student's images, if they are known.

    Raises:
        ValueError: If they can be seen to have another form than corners in pixels.
    """
    if isinstance(boxes, Tap):  # its boxes are known only when the student is called
        return False
    values = backends.values_of(find_boxes(boxes, inputs, labels))
    return values is not None and size is not None and check_pixels(values, size)


def box_weights(boxes: BoxPlace, student: Call, labels: Any, feature: Any, name: str) -> Any:
    """The weight of each position of a map, 0 outside all boxes.

    Args:
        boxes: Where the batch keeps its boxes.
        student: The student's call.
        labels: The batch's targets.
        feature: The map, channels last.
        name: Name of the term, for messages.

    Returns:
        Shape ``(N, H, W)``.

    Raises:
        ValueError: If the feature is not a map of a known size, or the boxes are those of other images.
    """
    shape = tuple(feature.shape)
    if len(shape) != 4 or None in shape[1:3]:
        expected = f"term {name!r} to compare maps (N, H, W, C) of a known size, since it has boxes"
        raise ValueError(checks.message(expected, f"a feature of shape {shape}", "Name another layer."))
    corners, image = boxes_of_call(boxes, student, labels)
    if isinstance(boxes, Tap) and (values := backends.values_of(corners)) is not None:
        check_pixels(values, image)
    if checks.shapes_differ(tuple(corners.shape)[:1], shape[:1]):
        expected = f"boxes for each of {shape[0]} images"
        raise ValueError(checks.message(expected, f"boxes of shape {tuple(corners.shape)}"))
    backends.check_batch(feature, corners)
    return foreground_weights(corners, image, shape[1:3])
