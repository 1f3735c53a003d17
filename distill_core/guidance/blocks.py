"""The parts of a report's section. Each names the macro of the template that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from distill_core.guidance.figures import Frame


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Marks:
    """A row of a chart: places in percent of the width.

    Args:
        dots: Single values.
        interval: Both ends of a line, or None.
        bar: Both ends of a bar, or None.
        centre: The mean, or None.
        tone: "better", "worse" or empty.
    """

    dots: Sequence[float] = ()
    interval: tuple[float, float] | None = None
    bar: tuple[float, float] | None = None
    centre: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: The row's header.
        cells: The other cells.
        marks: The drawing of the row, or None.
        strong: Whether the row stands out.
        tints: Strength of the cells' background from 0 to 1; empty for none.
    """

    name: str
    cells: Sequence[str]
    marks: Marks | None = None
    strong: bool = False
    tints: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """A table, with a drawing in each row if it has an axis.

    Args:
        caption: The caption.
        columns: The headers; the first is that of the rows' names.
        rows: The rows.
        chart: Header of the drawings' column, which is the second; empty without drawings.
        ticks: Places in percent and labels of the axis.
        lines: Places in percent of vertical lines, and their class of style.
        folded: Text to click on, if the table is closed at first; empty for an open table.
        words: Whether the cells hold sentences rather than numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    chart: str = ""
    ticks: Sequence[tuple[float, str]] = ()
    lines: Sequence[tuple[float, str]] = ()
    folded: str = ""
    words: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Panel:
    """A small figure.

    Args:
        title: The title above.
        label: The figure in words, for a screen reader.
        frame: The plotting area.
        x_ticks: Places and labels of the horizontal axis.
        y_ticks: Places and labels of the vertical axis.
        areas: Closed paths and their class of style.
        lines: Paths and their class of style.
        cells: Left, top, width, height and opacity of rectangles.
        note: A line below the title.
        grid: Whether the ticks of the vertical axis have lines.
    """

    title: str
    label: str
    frame: Frame
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    areas: Sequence[tuple[str, str]] = ()
    lines: Sequence[tuple[str, str]] = ()
    cells: Sequence[tuple[float, float, float, float, float]] = ()
    note: str = ""
    grid: bool = True


@dataclass(frozen=True)
class Panels:
    """Small figures side by side.

    Args:
        caption: Text below all of them.
        panels: The figures.
        legend: Class of style and name of each line.
        wide: Whether the figures are large.
    """

    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = False
    kind: ClassVar[str] = "panels"


@dataclass(frozen=True)
class Example:
    """An example of the validation set.

    Args:
        number: Its place in the validation set.
        image: The picture as a URL that holds it, or an empty string.
        text: The text, or an empty string.
        answers: Who says which class: the label, the teacher and the student.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
    """

    number: int
    image: str
    text: str
    answers: Sequence[tuple[str, str]]
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Examples:
    """Examples side by side."""

    examples: Sequence[Example]
    kind: ClassVar[str] = "examples"


@dataclass(frozen=True)
class Steps:
    """A numbered list of actions, each with its reason and the name of its rule."""

    steps: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "steps"


@dataclass(frozen=True)
class Lines:
    """A list of short texts under a heading."""

    title: str
    lines: Sequence[str]
    kind: ClassVar[str] = "lines"


Block = Text | Table | Panels | Examples | Steps | Lines


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Args:
        name: Its anchor.
        title: Its heading.
        lead: How to read it, in a sentence or two.
        blocks: Its parts.
        absent: The reason if there is nothing to show; the section then holds this sentence only.
    """

    name: str
    title: str
    lead: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)
    absent: str = ""
