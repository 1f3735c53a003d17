"""Geometry of the report's figures: scales, paths and small pictures. The templates draw them as SVG.

The figures are drawn by templates and not by a plotting library, since only inline SVG with the page's own colours
follows a dark or light theme and a narrow window.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

POINTS: Final = 100  # of a curve, so that long trainings do not make a large page


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks.

    Args:
        low: Value at 0.
        high: Value at 1.
        ticks: Round values within.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float], *, count: int = 5, margin: float = 0.05) -> Axis:
        """The axis that holds all finite values.

        Args:
            values: The values.
            count: Number of ticks, about.
            margin: Free share on both sides.

        Example:
            >>> Axis.of([0.61, 0.83]).ticks
            (0.6, 0.65, 0.7, 0.75, 0.8)
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        free = (high - low) * margin if high > low else abs(low) * 0.05 or 1.0
        low, high = low - free, high + free
        step = _round_step((high - low) / count)
        first = math.ceil(low / step - 1e-9)
        ticks = (float(f"{(first + index) * step:.9g}") for index in range(2 * count + 2))
        return cls(low, high, tuple(tick for tick in ticks if tick <= high))

    def share(self, value: float) -> float:
        """The place of a value, 0 at the low end and 1 at the high end; rounded, so that the page stays small."""
        return round((value - self.low) / (self.high - self.low), 4)

    def percent(self, value: float) -> float:
        """The place of a value in percent of the width."""
        return round(100 * self.share(value), 2)


@dataclass(frozen=True)
class Frame:
    """The plotting area of a small panel, in units of its SVG.

    Args:
        width: Width of the panel.
        height: Height of the panel.
        left: Space for the labels of the vertical axis.
        bottom: Space for the labels of the horizontal axis.
        top: Space above.
        right: Space at the right.
    """

    width: float = 180
    height: float = 116
    left: float = 34
    bottom: float = 16
    top: float = 6
    right: float = 12

    def x(self, share: float) -> float:
        """Horizontal place of a share."""
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, share: float) -> float:
        """Vertical place of a share, upwards."""
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)


def path(points: Sequence[tuple[float, float]], frame: Frame) -> str:
    """The path through points; a single point becomes a short line.

    Args:
        points: Shares of the width and height; a pair with NaN interrupts the line.
        frame: The panel.

    Example:
        >>> path([(0, 0), (0.5, 1)], Frame(100, 100, 0, 0, 0, 0))
        'M0 100L50.0 0'
    """
    parts, pen = [], "M"
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(x)} {frame.y(y)}")
        pen = "L"
    return "".join(parts) if len(parts) > 1 else "".join(f"{part}h2" for part in parts)


def area(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], frame: Frame) -> str:
    """The closed path between two lines with finite points."""
    outline = path([*upper, *reversed(lower)], frame)
    return f"{outline}Z" if outline else ""


def thinned(values: Sequence[Any], count: int = POINTS) -> list[Any]:
    """At most ``count`` of the values, the first and the last among them.

    Example:
        >>> thinned(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(values) <= count:
        return list(values)
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def thumbnail(image: NDArray[np.uint8], side: int = 64) -> NDArray[np.uint8]:
    """A picture of at most ``side`` pixels in each direction: means over blocks of pixels.

    Args:
        image: Shape ``(H, W, 3)``.
        side: Greatest height and width.

    Returns:
        Shape ``(H', W', 3)``; rows and columns that do not fill a block are left out.
    """
    block = math.ceil(max(image.shape[:2]) / side)
    if block <= 1:
        return image
    height, width = (max(1, length // block) for length in image.shape[:2])
    cut = image[: height * block, : width * block]
    rows, columns = min(block, cut.shape[0]), min(block, cut.shape[1])
    blocks = cut.reshape(height, rows, width, columns, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    """A picture as the bytes of a PNG file.

    Args:
        image: Shape ``(H, W, 3)``.

    References:
        Portable Network Graphics (second edition), W3C 2003, sections 5 and 10.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with the number of its filter, 0
    rows[:, 1:] = image.reshape(height, 3 * width)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def data_url(image: NDArray[np.uint8]) -> str:
    """A picture as a URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def _round_step(step: float) -> float:
    """The nearest number of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda rounded: abs(math.log(rounded / step)))
