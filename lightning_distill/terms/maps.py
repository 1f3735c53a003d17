"""Maps (N, C, H, W) of different sizes, the masks of their positions, and the levels of feature pyramids."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses import DistillationLoss
from lightning_distill.recording import Call, Tap


def reads_maps(loss: Any) -> bool:
    """Whether a loss takes features of four dimensions for maps ``(N, C, H, W)``, and not for rows of channels.

    Args:
        loss: The loss.

    Example:
        >>> from lightning_distill.losses import SoftTargetLoss
        >>> reads_maps(SoftTargetLoss()), reads_maps(SoftTargetLoss(class_dim=-1))
        (True, False)
    """
    return all(getattr(loss, name, None) in (None, 1, -3) for name in ("class_dim", "channel_dim"))


def warn_of_channels_last(student: Tensor, teacher: Tensor, layer: str) -> None:
    """Warn of two features that look like maps with the channels last, whose channels would be resized like a width.

    Args:
        student: The student's feature, shape ``(N, C, H, W)``.
        teacher: The teacher's.
        layer: Name of the student's layer.
    """
    (_, first, second, last), other = student.shape, tuple(teacher.shape)
    if other[1:3] == (first, second) and other[3] != last and first == second:
        warnings.warn(
            f"Expected maps (N, C, H, W) at student layer {layer!r} and its teacher layer, but the shapes"
            f" {tuple(student.shape)} and {other} look like maps with their channels last. Pass"
            f" Tap({layer!r}, layout='channels_last') for both.",
            stacklevel=2,
        )


def resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's map at the student's height and width: averaged down, interpolated up."""
    size = student.shape[-2:]
    if teacher.shape[-2:] == size:
        return teacher
    smaller = (min(teacher.shape[-2], size[0]), min(teacher.shape[-1], size[1]))
    teacher = F.adaptive_avg_pool2d(teacher, smaller)
    return teacher if smaller == size else F.interpolate(teacher, size, mode="bilinear", align_corners=False)


def resized_mask(mask: Tensor | None, feature: Tensor, loss: Any = None) -> Tensor | None:
    """A mask ``(N, H, W)`` of the labels' pixels as one of a map's positions; any other mask is returned unchanged.

    A position of a smaller map counts if at least half of its pixels do.

    Args:
        mask: A bool tensor, or ``None``.
        feature: The map, shape ``(N, C, H', W')``.
        loss: The loss. A mask ``(N, C, H')`` is left to a user's function, which may read rows of channels; to another
            loss it is one of pixels if their height and width are in the proportion of the map's.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[True, False, False, False], [True, False, False, True]]])
        >>> resized_mask(mask, torch.zeros(1, 8, 1, 2))
        tensor([[[ True, False]]])
    """
    if mask is None or mask.ndim != 3 or feature.ndim != 4 or mask.shape == _positions(feature):
        return mask
    size = feature.shape[-2:]
    alike = mask.shape[-2] * size[1] == mask.shape[-1] * size[0]
    if mask.shape == feature.shape[:3] and not (alike and isinstance(loss, DistillationLoss)):
        return mask
    smaller = (min(mask.shape[-2], size[0]), min(mask.shape[-1], size[1]))
    counted = F.adaptive_avg_pool2d(mask.float().unsqueeze(1), smaller) >= 0.5
    if smaller != size:
        counted = F.interpolate(counted.float(), size, mode="nearest-exact") > 0
    return counted.squeeze(1)


def check_normalisable(feature: Tensor, term: str) -> None:
    """Raise if each channel of a batch has one number alone, of which batch normalisation takes no statistics.

    Args:
        feature: The feature that is normalised, shape ``(N, C)`` or ``(N, C, H, W)``.
        term: Name of the term.

    Raises:
        ValueError: If so.
    """
    if feature.numel() == feature.shape[1]:
        raise ValueError(
            f"Expected more than one number of each channel in a batch for term {term!r}, which normalises by the"
            f" statistics of the batch, but got shape {tuple(feature.shape)}. Leave out a last batch of one example:"
            " DataLoader(..., drop_last=True)."
        )


def _positions(feature: Tensor) -> tuple[int, ...]:
    return (feature.shape[0], *feature.shape[2:])


def paired_levels(student: Call, student_tap: Tap, teacher: Call, teacher_tap: Tap) -> list[tuple[Tap, Tap]]:
    """The pairs of levels of two pyramids: by name if both are dicts, else in order.

    Args:
        student: The student's call.
        student_tap: The student's pyramid, a tap with ``output="*"``.
        teacher: The call that holds the teacher's.
        teacher_tap: The teacher's pyramid.

    Raises:
        ValueError: If the two do not have the same levels.
    """
    students, teachers = student.levels(student_tap), teacher.levels(teacher_tap)
    names = [[_name(tap) for tap in taps] for taps in (students, teachers)]
    named = all(isinstance(name, str) for name in (*names[0], *names[1]))
    if len(students) != len(teachers) or (named and set(names[0]) != set(names[1])):
        raise ValueError(
            f"Expected student layer {student_tap.layer!r} and teacher layer {teacher_tap.layer!r} to return the same"
            f" levels for output='*', but got {names[0]} and {names[1]}. Name the levels to compare:"
            f" [Tap({student_tap.layer!r}, output={names[0][0]!r}), ...]."
        )
    if named:
        by_name = dict(zip(names[1], teachers, strict=True))
        teachers = [by_name[name] for name in names[0]]
    return [*zip(students, teachers, strict=True)]


def _name(tap: Tap) -> object:
    return tap.output[-1] if isinstance(tap.output, tuple) else tap.output
