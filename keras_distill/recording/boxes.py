"""The boxes of a batch, and the size of the images that they are pixels of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from keras import ops

from keras_distill import checks
from keras_distill.recording.calls import Call, image_size
from keras_distill.recording.taps import Tap, entry_at

BoxPlace: TypeAlias = str | int | Callable[[Any], Any] | Tap
_PLACES = "Pass a key or an index of the targets, a key of the inputs, or a function of the targets."


def boxes_of_call(place: BoxPlace, student: Call, labels: Any) -> tuple[Any, tuple[int, int]]:
    """The boxes of each image, and the height and width of the images that they are pixels of.

    Args:
        place: As for :func:`find_boxes`, or a tap on the layer of the student that returns images and their boxes: a
            pair of the two, or a dict of ``"images"`` and ``"bounding_boxes"`` or ``"boxes"``. The boxes are a tensor
            or the entry ``"boxes"`` of a dict.
        student: The student's call.
        labels: The batch's targets, or None.

    Raises:
        ValueError: If they are not there, have another form, or it is not known which images they belong to.
    """
    if not isinstance(place, Tap):
        return find_boxes(place, student.inputs, labels), size_of_images(student)
    value = student.recorded(place)
    images, boxes = _images_and_boxes(value)
    size = image_size(images)
    if size is None or boxes is None:
        expected = f"student layer {place.name!r} to return images of a known size and their boxes"
        received = f"a dict of {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        remedy = "Return {'images': ..., 'boxes': ...}, or a pair of the two."
        raise ValueError(checks.message(expected, received, remedy))
    return _checked(boxes, f"boxes={place!r}"), size


def _images_and_boxes(value: Any) -> tuple[Any, Any]:
    """The two parts of a layer's output, None if it has others."""
    if isinstance(value, dict):
        value = value.get("images"), value.get("bounding_boxes", value.get("boxes"))
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None, None
    images, boxes = value
    return images, boxes.get("boxes") if isinstance(boxes, dict) else boxes


def find_boxes(place: str | int | Callable[[Any], Any], inputs: Any, labels: Any) -> Any:
    """The boxes of each image of a batch.

    Args:
        place: A key or an index of the targets, a key of the inputs where the targets do not have it, or a function of
            the targets.
        inputs: The batch's inputs.
        labels: The batch's targets, or None.

    Returns:
        Boxes ``(N, M, 4)``, with the same number of rows for each image.

    Raises:
        ValueError: If they are not there, or have another form.
    """
    value = place(labels) if callable(place) else entry_at(labels, [place])
    if value is None and isinstance(place, str):
        value = entry_at(inputs, [place])
    if value is None:
        received = f"the keys {sorted(labels)}" if isinstance(labels, dict) else f"a {type(labels).__name__}"
        expected = f"the targets to hold the boxes of each image at boxes={place!r}"
        raise ValueError(checks.message(expected, "no targets" if labels is None else received, _PLACES))
    if hasattr(value, "to_tensor"):  # a ragged tensor
        remedy = "Pad them: boxes.to_tensor(-1.0). Rows without an area do not count."
        raise ValueError(checks.message("as many rows of boxes for each image", f"a {type(value).__name__}", remedy))
    return _checked(value, f"boxes={place!r}")


def _checked(value: Any, name: str) -> Any:
    """The boxes as a tensor ``(N, M, 4)``."""
    boxes = ops.convert_to_tensor(value)
    if len(boxes.shape) != 3 or boxes.shape[-1] != 4:
        expected = f"{name} to be left, top, right and bottom of each box, shape (N, M, 4)"
        remedy = "Pad them to the same number of rows for each image: rows without an area do not count."
        raise ValueError(checks.message(expected, f"shape {tuple(boxes.shape)}", remedy))
    return boxes


def size_of_images(student: Call) -> tuple[int, int]:
    """Height and width of the images that the student was called with.

    Args:
        student: The student's call.

    Raises:
        ValueError: If they are unknown.
    """
    if student.image is None:
        expected = "the student to be called with images of a known height and width, which boxes are pixels of"
        remedy = "Pass images (N, H, W, C) of one size: dataset.batch(...), or keras.Input((224, 224, 3))."
        raise ValueError(checks.message(expected, "another input", remedy))
    return student.image


def check_pixels(boxes: Any, image_size: tuple[int, int]) -> bool:
    """Raise if boxes can be seen to have another form than the corners in pixels.

    Args:
        boxes: An array ``(N, M, 4)``. Rows of 0 or of negative numbers are padding.
        image_size: Height and width of the images.

    Returns:
        Whether there were boxes, not padding alone.

    Raises:
        ValueError: If they are shares of the image, beyond it, or centres with sizes, or not finite.
    """
    corners = np.asarray(boxes, "float64").reshape(-1, 4)
    corners = corners[~(corners <= 0).all(axis=1)]  # NaN stays
    if not len(corners):
        return False
    form = None
    if not np.isfinite(corners).all():
        form = "a number that is not finite"
    elif corners.max() <= 1 and min(image_size) > 2:
        form = "shares of the image's size"
    elif (corners[:, 2:] < corners[:, :2]).any():
        form = "a right edge left of the left one, or a bottom above the top"
    elif (corners[:, 2:] > np.array([image_size[1], image_size[0]]) + 1).any():
        form = f"an edge beyond the image of {image_size[0]} x {image_size[1]} pixels"
    if form is not None:
        expected = "`boxes` to be left, top, right and bottom in pixels of the student's input"
        raise ValueError(checks.message(expected, form, "Pass a function of the targets that converts them."))
    return True
