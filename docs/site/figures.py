"""Drawings of what a loss compares, as SVG that follows the colours of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable

WIDTH, HEIGHT = 420, 150
TEACHER, STUDENT = "var(--teacher)", "var(--student)"
SHOWN = [0.55, 0.25, 0.12, 0.05, 0.03]  # probabilities, or strengths, of the teacher
GUESSED = [0.35, 0.2, 0.25, 0.12, 0.08]


def figure(kind: str) -> str:
    """The drawing of a kind.

    Args:
        kind: A key of ``KINDS``.

    Returns:
        An ``<svg>`` element with a description for those who do not see it.
    """
    text, draw = KINDS[kind]
    body = "".join(draw())
    return (
        f'<svg class="compared" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
        f"<title>{text}</title>{_label(105, 'teacher', TEACHER)}{_label(315, 'student', STUDENT)}{body}</svg>"
    )


def _label(x: float, text: str, colour: str) -> str:
    return f'<text x="{x}" y="14" text-anchor="middle" fill="{colour}">{text}</text>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"'
        f' fill-opacity="{opacity:.2f}" stroke="{colour}" stroke-width="1"/>'
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-dasharray="4 3"/>'


def _bars(values: Iterable[float], left: float, colour: str) -> Iterable[str]:
    for place, value in enumerate(values):
        height = 180 * value
        yield _rectangle(left + 30 * place, 135 - height, 22, height, colour, 0.6)


def _classes() -> Iterable[str]:
    yield from _bars(SHOWN, 32, TEACHER)
    yield from _bars(GUESSED, 242, STUDENT)
    yield _arrow(182, 90, 238, 90)


def _ranked() -> Iterable[str]:
    yield from _bars(SHOWN, 32, TEACHER)
    yield from _bars(sorted([*GUESSED, 0.1], reverse=True)[:5], 242, STUDENT)
    yield _arrow(182, 90, 238, 90)


def _grid(left: float, colour: str, strengths: list[list[float]], size: float = 22) -> Iterable[str]:
    for row, line in enumerate(strengths):
        for column, strength in enumerate(line):
            yield _rectangle(left + size * column, 28 + size * row, size - 2, size - 2, colour, strength)


MAP = [[0.1, 0.2, 0.2, 0.1], [0.2, 0.8, 0.9, 0.2], [0.2, 0.9, 1.0, 0.4], [0.1, 0.3, 0.4, 0.2]]
BLURRED = [[0.3, 0.3, 0.3, 0.2], [0.4, 0.6, 0.6, 0.3], [0.3, 0.7, 0.7, 0.5], [0.2, 0.4, 0.5, 0.3]]
RELATIONS = [[1.0, 0.8, 0.2, 0.1], [0.8, 1.0, 0.3, 0.2], [0.2, 0.3, 1.0, 0.7], [0.1, 0.2, 0.7, 1.0]]
LOOSE = [[1.0, 0.5, 0.4, 0.3], [0.5, 1.0, 0.4, 0.3], [0.4, 0.4, 1.0, 0.5], [0.3, 0.3, 0.5, 1.0]]


def _maps(first: list[list[float]], second: list[list[float]]) -> Iterable[str]:
    yield from _grid(60, TEACHER, first)
    yield from _grid(270, STUDENT, second)
    yield _arrow(155, 72, 262, 72)


def _boxes() -> Iterable[str]:
    yield from _maps(MAP, BLURRED)
    for left in (60, 270):
        place = f'x="{left + 20}" y="48" width="46" height="46"'
        yield f'<rect {place} fill="none" stroke="currentColor" stroke-width="2"/>'


def _features() -> Iterable[str]:
    for place, (shown, guessed) in enumerate(zip([0.9, 0.2, 0.6, 0.4], [0.6, 0.3, 0.5, 0.5], strict=True)):
        yield _rectangle(70, 28 + 27 * place, 70 * shown, 20, TEACHER, 0.6)
        yield _rectangle(280, 28 + 27 * place, 70 * guessed, 20, STUDENT, 0.6)
        yield _arrow(150, 38 + 27 * place, 272, 38 + 27 * place)


def _learned() -> Iterable[str]:
    yield _rectangle(45, 50, 60, 60, TEACHER, 0.6)
    yield _rectangle(315, 50, 60, 60, STUDENT, 0.6)
    yield '<rect x="195" y="55" width="90" height="50" rx="6" fill="none" stroke="currentColor"/>'
    yield '<text x="240" y="84" text-anchor="middle" fill="currentColor">learned</text>'
    yield _arrow(310, 80, 287, 80)
    yield _arrow(193, 80, 110, 80)


def _layers() -> Iterable[str]:
    for left, colour in ((50, TEACHER), (260, STUDENT)):
        for place in range(3):
            yield _rectangle(left + 40 * place, 50, 24, 60, colour, 0.4 + 0.2 * place)
        yield f'<path d="M {left + 12} 118 q 40 24 80 0" fill="none" stroke="currentColor"/>'
    yield _arrow(172, 80, 252, 80)


def _candidates() -> Iterable[str]:
    for left, colour, scores in ((40, TEACHER, SHOWN), (250, STUDENT, GUESSED)):
        yield f'<text x="{left}" y="84" fill="currentColor">query</text>'
        for place, score in enumerate(scores):
            yield _rectangle(left + 50, 26 + 23 * place, 20 + 120 * score, 16, colour, 0.6)


KINDS: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
    "classes": ("The probabilities of each class, of teacher and student", _classes),
    "ranked": ("The probabilities in order of size, whatever their classes", _ranked),
    "relations of classes": (
        "How classes and examples of a batch relate, in teacher and student",
        lambda: _maps(RELATIONS, LOOSE),
    ),
    "positions": ("Where on a map the teacher and the student are active", lambda: _maps(MAP, BLURRED)),
    "features": ("The features of one example, number by number", _features),
    "relations": (
        "How similar the examples of a batch are to each other, in teacher and student",
        lambda: _maps(RELATIONS, LOOSE),
    ),
    "attention": (
        "How much each token looks at each other token, in teacher and student",
        lambda: _maps(RELATIONS, LOOSE),
    ),
    "learned": ("The student's feature, through parts that are learned, and the teacher's feature", _learned),
    "layers": ("How a feature changes from one layer to the next, in teacher and student", _layers),
    "boxes": ("Features inside and outside of boxes, of teacher and student", _boxes),
    "candidates": ("The scores of a query's candidates, of teacher and student", _candidates),
}
