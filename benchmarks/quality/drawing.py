"""The drawing of the table of all losses, as SVG: ``python -m benchmarks.quality.page`` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from distill_core.guidance.statistics import Estimate

WIDTH, LEFT, PANEL, GAP, TOP, LINE = 440, 182, 118, 14, 42, 16
LOWEST, HIGHEST = -10.0, 17.0  # points; a value beyond them is written as a number
TICKS = (-10, 0, 10)
COLOURS = {1: "var(--teacher)", 0: "currentColor", -1: "var(--worse)"}
STYLE = (
    "<style>.way{color:#1f2328;--teacher:#0b6e4f;--worse:#b3261e}"
    "@media(prefers-color-scheme:dark){.way{color:#e6edf3;--teacher:#5fd3a8;--worse:#ff9c94}}</style>"
)


class Gains(Protocol):
    """A row of the table: its method, and its gains by task."""

    @property
    def method(self) -> str: ...

    @property
    def gains(self) -> dict[str, Estimate | None]: ...


def drawing(rows: Sequence[Gains], tasks: Sequence[str]) -> str:
    """A line for each loss and a panel for each task: the mean and its interval, in points against the student alone.

    Args:
        rows: The rows of the table, in their order.
        tasks: Two of its tasks.
    """
    height = TOP + LINE * len(rows) + 8
    text = f"Gain of each loss against the student alone, on {' and '.join(tasks)}; the table has the numbers"
    parts = [STYLE, f"<title>{text}</title>"]
    for number, task in enumerate(tasks):
        left = LEFT + number * (PANEL + GAP)
        parts.append(_text(left + PANEL / 2, 14, task, "middle", "bold"))
        for tick in TICKS:
            x = _place(tick, left)
            dashes = "" if tick == 0 else ' stroke-dasharray="2 4"'
            parts.append(
                f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 6}" stroke="currentColor"'
                f' stroke-opacity="0.4"{dashes}/>'
            )
            parts.append(_text(x, 30, f"{tick:+d}" if tick else "0", "middle"))
    for number, row in enumerate(rows):
        y = TOP + LINE * number + LINE / 2
        parts.append(_text(LEFT - 8, y + 4, row.method, "end"))
        for place, task in enumerate(tasks):
            gain = row.gains[task]
            if gain is not None:
                parts += _gain(gain, LEFT + place * (PANEL + GAP), y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="way" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' role="img" aria-label="{text}">{"".join(parts)}</svg>\n'
    )


def _place(points: float, left: float) -> float:
    return left + PANEL * (min(max(points, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)


def _gain(gain: Estimate, left: float, y: float) -> Iterator[str]:
    """The mean as a disc if it is clear and as a ring if not, and the interval as a line."""
    colour, points, margin = COLOURS[gain.sign], 100 * gain.mean, 100 * (gain.margin or 0.0)
    if points < LOWEST:
        yield _text(left, y + 4, f"◂ {points:.1f}", "start", colour=colour)
        return
    yield (
        f'<line x1="{_place(points - margin, left):.1f}" y1="{y}" x2="{_place(points + margin, left):.1f}" y2="{y}"'
        f' stroke="{colour}" stroke-width="1.5"/>'
    )
    fill = colour if gain.sign else "var(--color-background-primary, Canvas)"
    yield f'<circle cx="{_place(points, left):.1f}" cy="{y}" r="3.5" fill="{fill}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal", colour: str = "currentColor") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-family="sans-serif"'
        f' font-size="11.5" font-weight="{weight}">{text}</text>'
    )
