"""Grids of patches: where the tokens of an image model lie in its input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_core.checks import message

# DINOv2 and DINOv3 have a class token and four registers; models with more name them
MOST_PREFIX_TOKENS = 5


class Grid(NamedTuple):
    """The place of an image's tokens.

    Attributes:
        prefix: Number of tokens before the patches: class and register tokens.
        height: Number of rows of patches.
        width: Number of patches in a row.
    """

    prefix: int
    height: int
    width: int


@lru_cache
def find_grid(
    tokens: int,
    image: tuple[int, int] | None,
    prefix: int | None,
    place: str,
    message: Callable[..., str] = message,
) -> Grid:
    """The grid of a sequence of tokens.

    A patch covers the same number of pixels in both directions, so a grid has the proportions of the image. If the
    number of prefix tokens is not given, it is found: the grid must then divide the image exactly, and have at least
    four patches.

    Args:
        tokens: Number of tokens.
        image: Height and width of the network's input; None allows square grids alone.
        prefix: Number of tokens before the patches; None tries 0 to 5.
        place: The feature, for messages.
        message: Makes the text of an error.

    Returns:
        The grid.

    Raises:
        ValueError: If no grid or several have this number of tokens.

    Example:
        >>> find_grid(201, (224, 224), None, "feature 'blocks.11'")
        Grid(prefix=5, height=14, width=14)
    """
    counts = range(MOST_PREFIX_TOKENS + 1) if prefix is None else [prefix]
    grids = [Grid(count, *size) for count in counts for size in _sizes(tokens - count, image, exact=prefix is None)]
    if len(grids) == 1:
        return grids[0]
    shown = "an input of unknown size" if image is None else f"an input of {image[0]} x {image[1]} pixels"
    expected = f"the {tokens} tokens of {place} to be the patches of an image, after {_words(prefix)}"
    if not grids:
        remedy = "Pass Tap(layer, prefix_tokens=<number of class and register tokens>), or name another layer."
        if prefix is not None:
            remedy = "Correct `prefix_tokens`, or name another layer."
        raise ValueError(message(expected, f"no grid of this size and the proportions of {shown}", remedy))
    listed = " and ".join(f"{grid.height} x {grid.width} after {grid.prefix} tokens" for grid in grids)
    # only without `prefix`: a larger patch never leaves more rows nor columns
    remedy = "Pass Tap(layer, prefix_tokens=<number of class and register tokens>)."
    raise ValueError(message(expected, f"several grids for {shown}: {listed}", remedy))


def _words(prefix: int | None) -> str:
    if prefix is None:
        return f"0 to {MOST_PREFIX_TOKENS} class and register tokens"
    return f"{prefix} prefix token{'' if prefix == 1 else 's'}"


def _sizes(patches: int, image: tuple[int, int] | None, exact: bool) -> list[tuple[int, int]]:
    """The grids of a number of patches: those that divide the image, or else those that leave a rest at its edges."""
    if patches < (4 if exact else 1):
        return []
    if image is None:
        side = math.isqrt(patches)
        return [(side, side)] if side * side == patches else []
    height, width = image
    pixels = range(1, min(image) + 1)
    dividing = {(height // size, width // size) for size in pixels if height % size == 0 and width % size == 0}
    fitting = [grid for grid in dividing if grid[0] * grid[1] == patches]
    if fitting or exact:
        return fitting
    cut = {(height // size, width // size) for size in pixels}
    return sorted(grid for grid in cut if grid[0] * grid[1] == patches)


def smoothing_matrix(size: int, smaller: int) -> NDArray[np.float64]:
    """The matrix that resizes a line of numbers to a smaller one, bilinearly with antialiasing.

    Each new number is a mean of the old ones around its centre, with weights that fall linearly to 0 over the width of
    a new number.

    Args:
        size: Length of the line.
        smaller: The new length, at most ``size``.

    Returns:
        Shape ``(smaller, size)``; the rows sum to 1.

    Example:
        >>> smoothing_matrix(4, 2).round(3)
        array([[0.429, 0.429, 0.143, 0.   ],
               [0.   , 0.143, 0.429, 0.429]])
    """
    scale = size / smaller
    centres = (np.arange(smaller)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(size)[None, :] + 0.5 - centres) / scale)
    matrix: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return matrix
