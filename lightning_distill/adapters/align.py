"""Features of two kinds in one form: tokens as maps, maps of two sizes in the smaller, everything as vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distill_core.grids import find_grid
from lightning_distill.recording import Call, Tap

Side = tuple[Call, Tap, Tensor]  # the call, the tap, and the feature that it reads


def aligned(student: Side, teacher: Side, positions: bool = True) -> tuple[Tensor, Tensor]:
    """The features of both sides in one form, if it is known how to bring them into one.

    Tokens ``(N, L, D)`` beside a map ``(N, C, H, W)``, or beside another number of tokens of an image, become maps
    ``(N, D, H, W)`` of their patches. The larger of two such maps is resized to the smaller one, bilinearly with
    antialiasing, so that no values are made up between patches. A map of one position beside a vector ``(N, D)``
    becomes a vector. Other features stay as they are.

    Args:
        student: The student's call, tap and feature.
        teacher: The teacher's.
        positions: Whether the loss compares positions, so that both features need the same.

    Returns:
        The student's feature and the teacher's.

    Raises:
        ValueError: If the tokens are not the patches of an image, or it is not known how many of them are.
    """
    features = student[2], teacher[2]
    ranks = [feature.ndim for feature in features]
    if sorted(ranks) == [2, 4]:
        return _pooled_maps(features)
    lengths_differ = ranks == [3, 3] and positions and features[0].shape[1] != features[1].shape[1]
    if sorted(ranks) != [3, 4] and not (lengths_differ and student[0].image_size is not None):
        return features
    maps = [_as_map(side) if side[2].ndim == 3 else side[2] for side in (student, teacher)]
    return _in_the_smaller(*maps) if positions else (maps[0], maps[1])


def pooled(side: Side, other: Side) -> Tensor:
    """The mean of a feature over its positions, shape ``(N, D)``; class and register tokens of an image are left out.

    Args:
        side: The call, the tap and the feature.
        other: The other network's, which tells whether stored answers are those to images.

    Raises:
        ValueError: If it is not known how many tokens of an image are patches.
    """
    call, _, feature = side
    stored = not (call.args or call.kwargs)
    if feature.ndim == 3 and (other[0] if stored else call).image_size is not None:
        feature = _as_map(side)
    if feature.ndim <= 2:
        return feature
    return feature.mean(dim=1) if feature.ndim == 3 else feature.flatten(2).mean(dim=2)


def _as_map(side: Side) -> Tensor:
    """The patches of tokens ``(N, L, D)`` as a map ``(N, D, H, W)``."""
    call, tap, tokens = side
    prefix = None if tap.prefix_tokens is None else 0  # the tap has left them out already
    place = f"{call.who} feature {tap.layer!r}"
    grid = find_grid(tokens.shape[1], call.image_size, prefix, place)
    return tokens[:, grid.prefix :].transpose(1, 2).reshape(len(tokens), -1, grid.height, grid.width)


def _in_the_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps with the smaller of their heights and the smaller of their widths."""
    size = [min(sizes) for sizes in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return _resized(student, size), _resized(teacher, size)


def _resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    if list(feature.shape[-2:]) == list(size):
        return feature
    wide = feature.float() if feature.dtype.itemsize < 4 else feature
    return F.interpolate(wide, tuple(size), mode="bilinear", antialias=True).to(feature.dtype)


def _pooled_maps(features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Maps of one position, as pooling layers return them, as vectors."""
    first, second = (feature.flatten(1) if feature.shape[2:].numel() == 1 else feature for feature in features)
    return first, second
