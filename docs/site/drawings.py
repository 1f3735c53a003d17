"""The drawings of one step's way, for docs/architecture.md: ``python docs/site/drawings.py`` writes them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).resolve().parents[1] / "images"
WIDTH, MARGIN, GAP, LINE = 440, 8, 22, 17


class Box(NamedTuple):
    """A station of the way.

    Args:
        name: A module, class or method of the half, or other code: then the box is dashed.
        note: The work that is done there; lines.
        side: ``"student"`` or ``"teacher"`` for a colour, or ``""``.
        own: Whether the name is of this library.
    """

    name: str
    note: tuple[str, ...] = ()
    side: str = ""
    own: bool = True


CHAIN = (Box("terms"), Box("losses"), Box("functional"))
WAYS: dict[str, tuple[tuple[Box, ...], ...]] = {
    "lightning": (
        (Box("Trainer.fit", ("a batch for the strategy's training_step",), own=False),),
        (Box("patch.patch_step", ("calls the run in place of the module's step",)),),
        (Box("run.Run.training_step", ("sets the scheduled weights and temperatures",)),),
        (Box("step.DistillStep.record", ("hooks on the tapped layers, for this step alone",)),),
        (Box("training_step", ("your own: it calls the student, and returns its loss",), "student", own=False),),
        (
            Box("recording.Call", ("the student's output", "and features"), "student"),
            Box("teachers.source", ("the teacher's answers:", "live, or from the batch"), "teacher"),
        ),
        (Box("adapters.learned.LearnedParts.build", ("in the first step, from the shapes of both",)),),
        (Box("terms.mixing.TeacherMix.values", ("each term, for each teacher",)),),
        CHAIN,
        (Box("step.DistillStep.total", ("task_weight * your loss + sum of weight * term",)),),
        (Box("Trainer", ("backward, and the step of the student's optimizer",), own=False),),
        (Box("adapters.follower.Follower", ("after it: the step of the adapters' optimizer",)),),
    ),
    "keras": (
        (Box("Model.fit", ("an execution: one batch, or several",), own=False),),
        (Box("execution.StepFunction", ("chooses the graph of the terms whose weight is not 0",)),),
        (Box("model.DistillModel.train_step", ("Keras' own train_step",)),),
        (Box("step.DistillStep.build", ("in the first step: adapters, from the shapes of both",)),),
        (Box("model.DistillModel.call", ("calls the step's forward",)),),
        (Box("step.DistillStep.forward", ("calls the student; the record hangs on its output",), "student"),),
        (Box("model.DistillModel.compute_loss", ("the compiled loss is the task loss",)),),
        (Box("step.DistillStep.compare", ("the terms that work",)),),
        (
            Box("recording.recorder", ("the student's call,", "from the record"), "student"),
            Box("ensemble.Ensemble", ("the teacher's calls:", "live, or from targets"), "teacher"),
        ),
        (Box("ensemble.Ensemble.value", ("each term, for each teacher",)),),
        CHAIN,
        (Box("model.DistillModel.compute_loss", ("task_weight * task loss + sum of weight * term",)),),
        (Box("Model.optimizer", ("one step for student and adapters",), own=False),),
    ),
}
TEXTS = {
    "lightning": "The way of a training step in the Lightning half, from Trainer.fit to the step of the adapters",
    "keras": "The way of a training step in the Keras half, from Model.fit to the step of the optimizer",
}
STYLE = (
    "<style>.way{color:#1f2328;--student:#8a3ffc;--teacher:#0b6e4f}"
    "@media(prefers-color-scheme:dark){.way{color:#e6edf3;--student:#c9a2ff;--teacher:#5fd3a8}}</style>"
)


def drawing(half: str) -> str:
    """The drawing of a half, as SVG with a description for those who do not see it."""
    parts, top, head = [STYLE], float(MARGIN), f"way-{half}"
    rows = WAYS[half]
    for row, boxes in enumerate(rows):
        height = 13 + LINE * max(1 + len(box.note) for box in boxes)
        width = (WIDTH - 2 * MARGIN - GAP * (len(boxes) - 1)) / len(boxes)
        for place, box in enumerate(boxes):
            left = MARGIN + place * (width + GAP)
            parts += _box(box, left, top, width, height)
            if boxes is CHAIN and place:
                parts.append(_arrow(left - GAP, top + height / 2, left - 2, top + height / 2, head))
        top += height
        if row + 1 < len(rows):
            parts += [_arrow(x, top, x, top + GAP - 2, head) for x in _between(boxes, rows[row + 1])]
            top += GAP
    height = top + MARGIN
    names = " ".join(f"{place + 1}. {', '.join(box.name for box in boxes)}." for place, boxes in enumerate(rows))
    marker = (
        f'<defs><marker id="{head}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="way" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
        f' role="img" aria-label="{TEXTS[half]}"><title>{TEXTS[half]}</title><desc>{names}</desc>{marker}'
        + "".join(parts)
        + "</svg>\n"
    )


def _between(above: tuple[Box, ...], below: tuple[Box, ...]) -> list[float]:
    """Where arrows go from a row to the next."""
    if len(above) == 2 or len(below) == 2:
        return [WIDTH / 4, 3 * WIDTH / 4]
    if above is CHAIN:
        return [WIDTH - MARGIN - 65]
    return [MARGIN + 65 if below is CHAIN else WIDTH / 2]


def _box(box: Box, left: float, top: float, width: float, height: float) -> Iterator[str]:
    colour = f"var(--{box.side})" if box.side else "currentColor"
    dashes = "" if box.own else ' stroke-dasharray="5 4"'
    yield (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height}" rx="6" fill="none"'
        f' stroke="{colour}" stroke-width="1.5"{dashes}/>'
    )
    text = f'x="{left + width / 2:.1f}" text-anchor="middle"'
    yield (
        f'<text {text} y="{top + 20:.1f}" fill="{colour}" font-family="monospace" font-size="14"'
        f' font-weight="bold">{box.name}</text>'
    )
    for line, note in enumerate(box.note):
        y = top + 20 + LINE * (line + 1)
        yield f'<text {text} y="{y:.1f}" fill="currentColor" font-family="sans-serif" font-size="14">{note}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float, head: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-width="1.5" marker-end="url(#{head})"/>'


if __name__ == "__main__":
    for name in WAYS:
        (IMAGES / f"step_{name}.svg").write_text(drawing(name), encoding="utf-8")
