"""The boxes of a batch, and the size of the images that they are pixels of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.recording.calls import Call, Tap
from lightning_distill.recording.labels import entry_of_batch
from lightning_distill.recording.outputs import tensors_in

BoxPlace = str | int | Callable[[Any], Any] | Tap
_BY_TAP = 'Pass boxes=Tap("transform"), the layer that returns the resized images and their targets.'


def find_boxes(call: Call, place: BoxPlace) -> tuple[list[Tensor], tuple[int, int]]:
    """The boxes of each image of a call, and the images' height and width.

    Args:
        call: The student's call, with the batch.
        place: A key, field name or index in the batch, or a function of the batch, where the network was called with
            images ``(N, C, H, W)``; or a tap on the layer that returns the images and their targets, where the network
            resizes a list of images itself, as the detectors of torchvision do. The boxes of an image are a tensor
            ``(M, 4)``, or the entry ``"boxes"`` of a dict.

    Raises:
        ValueError: If the boxes are not there, or it is not known what images they are pixels of.
    """
    if isinstance(place, Tap):
        value = call.recorded(place)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(
                f"Expected student layer {place.layer!r} to return images and their targets for boxes={place!r}, but"
                f" got {type(value).__name__}. {_BY_TAP}"
            )
        (images, boxes), where = value, f"layer {place.layer!r}"
        images = getattr(images, "tensors", images)
    else:
        if call.batch is None:
            raise ValueError(
                f"Expected a batch for boxes={place!r}, but got none. Call distiller.total(task_loss, batch)."
            )
        boxes, where = entry_of_batch(call.batch, place), "the batch"
        images = next((each for each in tensors_in([call.args, call.kwargs]) if each.ndim == 4), None)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(
            f"Expected the student to be called with images (N, C, H, W) for boxes={place!r}, which are pixels of them,"
            f" but got another input. {_BY_TAP}"
        )
    each_image = _tensors(boxes)
    if each_image is None or len(each_image) != len(images):
        got = type(boxes).__name__ if each_image is None else len(each_image)
        raise ValueError(
            f"Expected {where} to hold boxes (M, 4) for each of {len(images)} images at boxes={place!r}, but got {got}."
            " Pass a key, an index, or a function of the batch that returns a list."
        )
    return each_image, (images.shape[-2], images.shape[-1])


def _tensors(boxes: Any) -> list[Tensor] | None:
    if not isinstance(boxes, (Sequence, Tensor)):
        return None
    each: list[Any] = [entry.get("boxes") if isinstance(entry, Mapping) else entry for entry in boxes]
    return each if all(isinstance(entry, Tensor) for entry in each) else None


def check_pixels(boxes: Sequence[Tensor], image_size: tuple[int, int]) -> None:
    """Raise if boxes can be seen to have another form than the corners in pixels. It waits for the device.

    Args:
        boxes: The boxes of each image. Rows of 0 or of negative numbers are padding.
        image_size: Height and width of the images.

    Raises:
        ValueError: If they are shares of the image, beyond it, or centres with sizes, or not finite.
    """
    corners = torch.cat([each.reshape(-1, 4).float() for each in boxes])
    corners = corners[~(corners <= 0).all(dim=1)]  # NaN stays
    if not len(corners):
        return
    form = None
    if not bool(corners.isfinite().all()):
        form = "a number that is not finite"
    elif float(corners.max()) <= 1 and min(image_size) > 2:
        form = "shares of the image's size"
    elif bool((corners[:, 2:] < corners[:, :2]).any()):
        form = "a right edge left of the left one, or a bottom above the top"
    elif bool((corners[:, 2:] > corners.new_tensor([image_size[1], image_size[0]]) + 1).any()):
        form = f"an edge beyond the image of {image_size[0]} x {image_size[1]} pixels"
    if form is not None:
        raise ValueError(
            f"Expected `boxes` to be left, top, right and bottom in pixels of the student's input, but got {form}."
            " Pass a function of the batch that converts them."
        )
