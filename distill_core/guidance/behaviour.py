"""The sections of a report on single models: calibration, classes, confusion, examples and layers."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distill_core.guidance.blocks import Block, Example, Examples, Marks, Panel, Panels, Row, Section, Table, Text
from distill_core.guidance.evaluation import Reliability
from distill_core.guidance.figures import Axis, Frame, data_url, path, thumbnail
from distill_core.guidance.material import Material
from distill_core.guidance.measures import Measures
from distill_core.guidance.overview import no_predictions
from distill_core.guidance.records import ALONE
from distill_core.guidance.wording import clipped, count, share, shares

_CLASSES: Final = 20
_PAIRS: Final = 15
_GRID: Final = 12  # classes of a table of all pairs
_EXAMPLES: Final = 24
_PICTURES: Final = 600_000  # characters of all pictures together
_CELLS: Final = 2500  # of the map of layers
_MAP_CAPTION: Final = "Each square is a pair of layers: the stronger the colour, the more similar"
_SQUARE: Final = Frame(width=164, height=160, left=30, bottom=18, top=6, right=12)


def calibration(material: Material) -> Section:
    """The section on calibration."""
    name, title = "calibration", "Calibration"
    models = [(model, measures) for model, measures in material.models() if measures.reliability is not None]
    if not models:
        return Section(name, title, absent=no_predictions(material))
    panels = [_reliability_panel(model, measures) for model, measures in models]
    rows = [
        Row(
            clipped(model),
            [shares(measures.calibration), _points(measures.reliability)],
            strong=model == material.shown,
        )
        for model, measures in [
            *models[: material.measurements.teacher is not None],
            *material.measurements.methods.items(),
        ]
    ]
    errors = Table(
        "Expected calibration error, and mean confidence minus accuracy",
        ("model", "calibration error", "confidence − accuracy, points"),
        rows,
    )
    bins = len(models[0][1].reliability.counts)  # type: ignore[union-attr]  # models without one are left out above
    edges = [f"{100 * index / bins:.0f}–{100 * (index + 1) / bins:.0f} %" for index in range(bins)]
    columns = (
        "confidence",
        *(f"{clipped(model, 40)}: {part}" for model, _ in models for part in ("examples", "accuracy")),
    )
    cells = [_bin_cells(measures.reliability) for _, measures in models]
    table = Table(
        "Examples and accuracy by confidence, all seeds together",
        columns,
        [Row(edge, [cell for model in cells for cell in model[index]]) for index, edge in enumerate(edges)],
        folded="Show the numbers",
    )
    lead = (
        "A calibrated model that is 80 % sure is right in 80 % of the cases: its bars end on the diagonal. Bars below"
        " the diagonal belong to a model that is too sure. Pale bars hold few examples."
    )
    legend = [("diagonal", "perfect calibration")]
    return Section(name, title, lead, (Panels("Accuracy by confidence, in percent", panels, legend), errors, table))


def _points(diagram: Reliability | None) -> str:
    return "" if diagram is None else f"{100 * diagram.gap:+.1f}"


def _bin_cells(diagram: Reliability | None) -> list[tuple[str, str]]:
    if diagram is None:
        return []
    return [
        (count(examples), share(right / examples) if examples else "")
        for examples, right in zip(diagram.counts, diagram.correct, strict=True)
    ]


def _reliability_panel(model: str, measures: Measures) -> Panel:
    diagram, frame = measures.reliability, _SQUARE
    bins = len(diagram.counts) if diagram else 0
    cells = []
    for index in range(bins):
        if diagram is None or not diagram.counts[index]:
            continue
        accuracy = diagram.correct[index] / diagram.counts[index]
        left, right, top = frame.x(index / bins), frame.x((index + 1) / bins), frame.y(accuracy)
        opacity = 0.25 + 0.6 * math.sqrt(diagram.counts[index] / diagram.counts.max())
        width, height = round(right - left - 1, 1), max(round(frame.y(0) - top, 1), 0.8)
        cells.append((left, frame.y(0) - height, width, height, round(opacity, 2)))
    ticks = (0.0, 0.5, 1.0)
    error = shares(measures.calibration)
    return Panel(
        clipped(model),
        f"Reliability diagram of {clipped(model)}: expected calibration error {error}, confidence minus accuracy"
        f" {_points(diagram)} points",
        frame,
        [(frame.x(tick), f"{100 * tick:.0f}") for tick in ticks],
        [(frame.y(tick), f"{100 * tick:.0f}") for tick in ticks],
        lines=[(path([(0, 0), (1, 1)], frame), "diagonal")],
        cells=cells,
        note=f"calibration error {error}",
    )


def classes(material: Material) -> Section:
    """The section on the accuracy of single classes."""
    name, title = "classes", "Gaps of single classes"
    shown, methods = material.shown, material.measurements.methods
    if shown is None or ALONE not in methods:
        absent = (
            no_predictions(material) if not methods else f"Predictions of “{ALONE}” and a distilled method are needed."
        )
        return Section(name, title, absent=absent)
    best, alone, teacher = methods[shown], methods[ALONE], material.measurements.teacher
    if best.classes is None or alone.classes is None or best.examples is None:
        return Section(name, title, absent=no_predictions(material))
    gains = best.classes - alone.classes
    order = [int(index) for index in np.argsort(gains, kind="stable") if best.examples[index]]
    listed = order if len(order) <= _CLASSES else [*order[: _CLASSES // 2], *order[-_CLASSES // 2 :]]
    axis = Axis.of([0.0, *(float(gains[index]) for index in listed)])
    rows = [
        Row(
            material.class_name(index),
            (
                f"{100 * gains[index]:+.1f}",
                share(float(best.classes[index])),
                share(float(alone.classes[index])),
                share(float(teacher.classes[index])) if teacher and teacher.classes is not None else "",
                count(best.examples[index]),
            ),
            Marks(
                bar=(axis.percent(min(0.0, float(gains[index]))), axis.percent(max(0.0, float(gains[index])))),
                tone="better" if gains[index] > 0 else "worse",
            ),
        )
        for index in listed
    ]
    part = f", the {_CLASSES} classes with the greatest gaps of {len(order)}" if len(listed) < len(order) else ""
    table = Table(
        f"Accuracy of “{clipped(shown)}” minus that of the student alone, in points, by class{part}",
        ("class", "gap", "distilled", "alone", "teacher", "examples"),
        rows,
        chart="gap",
        ticks=[(axis.percent(tick), f"{100 * tick:.4g}") for tick in axis.ticks],
        lines=[(axis.percent(0.0), "zero")],
    )
    lead = "Mean over the seeds, the worst first. A class with few examples has a gap by chance alone."
    return Section(name, title, lead, (table,))


def confusion(material: Material) -> Section:
    """The section on the answers where the teacher and the distilled student differ."""
    name, title = "confusion", "Where teacher and student differ"
    shown = material.shown
    if shown is None or material.measurements.teacher_predictions is None:
        return Section(name, title, absent=_needs_teacher(material))
    measures = material.measurements.methods[shown]
    answers = len(measures.agreement) * len(material.measurements.teacher_predictions.labels)
    pairs = sorted(measures.pairs.items(), key=lambda item: (-int(item[1][0]), item[0]))
    if not pairs:
        return Section(name, title, absent=f"Teacher and “{clipped(shown)}” give the same answer to every example.")
    totals = sum(counts for _, counts in pairs)
    rows = [
        Row(
            material.class_name(teacher),
            (material.class_name(student), count(counts[0]), count(counts[1]), count(counts[2])),
        )
        for (teacher, student), counts in pairs[:_PAIRS]
    ]
    more = f"; the {_PAIRS} most frequent of {len(pairs)} pairs" if len(pairs) > _PAIRS else ""
    table = Table(
        f"Pairs of answers, all seeds together{more}",
        ("teacher says", "student says", "times", "teacher right", "student right"),
        rows,
    )
    lead = (
        f"Teacher and “{clipped(shown)}” differ in {count(totals[0])} of {count(answers)} answers"
        f" ({share(totals[0] / answers)}). There the teacher is right in {share(totals[1] / totals[0])}, the student in"
        f" {share(totals[2] / totals[0])}."
    )
    blocks: list[Block] = [table]
    if (number_of_classes := material.measurements.teacher_predictions.logits.shape[1]) <= _GRID:
        blocks.insert(0, _grid(material, measures, number_of_classes))
    return Section(name, title, lead, blocks)


def _needs_teacher(material: Material) -> str:
    if not material.measurements.methods:
        return no_predictions(material)
    return "Predictions of the teacher and of a distilled method are needed, and one of them is missing."


def _grid(material: Material, measures: Measures, classes_: int) -> Table:
    """A table of all pairs of classes."""
    counts = np.zeros((classes_, classes_), int)
    for pair, numbers in measures.pairs.items():
        counts[pair] = numbers[0]
    names = [material.class_name(index) for index in range(classes_)]
    rows = [
        Row(
            name,
            ["–" if row == column else count(counts[row, column]) for column in range(classes_)],
            tints=[round(float(value / counts.max()), 2) for value in counts[row]],
        )
        for row, name in enumerate(names)
    ]
    return Table(
        "How often the teacher says the row's class and the student the column's", ("teacher \\ student", *names), rows
    )


def examples(material: Material) -> Section:
    """The section with examples where the teacher and the distilled student differ."""
    name, title = "examples", "Examples where they differ"
    shown, teacher = material.shown, material.measurements.teacher_predictions
    if shown is None or teacher is None:
        return Section(name, title, absent=_needs_teacher(material))
    if not (material.results.folder / "samples.npz").is_file():
        return Section(name, title, absent="The comparison has stored no examples (samples.npz).")
    try:
        samples = material.results.arrays("samples.npz", "images", "texts", "index")
        shown_as, index = _checked_samples(samples, len(teacher.labels))
    except ValueError as error:
        return Section(name, title, absent=f"The examples cannot be shown: {clipped(error, 300)}.")
    student_classes = material.measurements.methods[shown].first
    teacher_classes = teacher.logits.argmax(axis=1)
    if student_classes is None:
        return Section(name, title, absent=_needs_teacher(material))
    differ = [place for place, row in enumerate(index) if teacher_classes[row] != student_classes[row]]
    if not differ:
        absent = f"Teacher and “{clipped(shown)}” agree on all {len(index)} examples that the comparison has stored."
        return Section(name, title, absent=absent)
    pictures: list[Example] = []
    length = 0
    for place in differ[:_EXAMPLES]:
        row = int(index[place])
        voices = (("label", teacher.labels[row]), ("teacher", teacher_classes[row]), ("student", student_classes[row]))
        answers = [(who, material.class_name(int(answer))) for who, answer in voices]
        if shown_as == "texts":
            pictures.append(Example(row, "", clipped(samples["texts"][place], 400), answers))
            continue
        image = thumbnail(samples["images"][place])
        url = data_url(image)
        length += len(url)
        if length > _PICTURES:
            break
        pictures.append(Example(row, url, "", answers, image.shape[1], image.shape[0]))
    kind = "texts" if shown_as == "texts" else "pictures"
    lead = (
        f"Of {len(index)} stored {kind}, the teacher and “{clipped(shown)}” (its first seed) differ on {len(differ)};"
        f" {'all are' if len(pictures) == len(differ) else f'the first {len(pictures)} are'} shown."
    )
    return Section(name, title, lead, (Examples(pictures),))


def _checked_samples(samples: dict[str, NDArray[Any]], size: int) -> tuple[str, NDArray[Any]]:
    """Whether the examples are "images" or "texts", and their places in the validation set."""
    kind = "images" if "images" in samples else "texts"
    if kind not in samples or "index" not in samples:
        raise ValueError("samples.npz has neither images nor texts, or no index")
    values, index = samples[kind], samples["index"]
    if index.ndim != 1 or index.dtype.kind not in "iu" or len(values) != len(index):
        raise ValueError(f"samples.npz has {kind} of shape {values.shape} and an index of shape {index.shape}")
    if len(index) and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"the index in samples.npz exceeds the {size} examples of the validation set")
    if kind == "images" and (values.ndim != 4 or values.shape[-1] != 3 or values.dtype != np.uint8 or not values.size):
        raise ValueError(f"the images in samples.npz have shape {values.shape} and type {values.dtype}")
    if kind == "texts" and values.dtype.kind not in "US":
        raise ValueError(f"the texts in samples.npz have type {values.dtype}")
    return kind, index


def layers(material: Material) -> Section:
    """The section on the similarity of layers."""
    name, title = "layers", "Similarity of layers"
    pairs = material.layers
    if pairs is None:
        return Section(name, title, absent="No map of layers was made for this comparison (pairs.json).")
    similarity = np.array(pairs.similarity)
    best = similarity.argmax(axis=1)
    rows = [
        Row(
            f"{index + 1}. {clipped(layer)}",
            (f"{best[index] + 1}. {clipped(pairs.teacher[best[index]])}", f"{similarity[index, best[index]]:.2f}"),
        )
        for index, layer in enumerate(pairs.student[:60])
    ]
    table = Table("The most similar layer of the teacher", ("student's layer", "teacher's layer", "similarity"), rows)
    lead = (
        "Centred kernel alignment (CKA) of the features of each pair of layers, from 0 to 1. Similar layers are good"
        " places for a term on features."
    )
    blocks: list[Block] = [table]
    if similarity.size <= _CELLS:
        blocks.insert(
            0,
            Panels(
                _MAP_CAPTION,
                [_layer_map(similarity)],
                wide=True,
            ),
        )
    else:
        blocks.append(Text(f"The map of {len(similarity)} by {similarity.shape[1]} layers is too large to draw."))
    return Section(name, title, lead, blocks)


def _layer_map(similarity: NDArray[Any]) -> Panel:
    rows, columns = similarity.shape
    side = 300 / max(rows, columns)
    frame = Frame(width=34 + side * columns, height=28 + side * rows, left=30, bottom=24, top=4, right=4)
    cells = [
        (
            round(frame.left + side * column, 1),
            round(frame.top + side * row, 1),
            round(side - 0.6, 1),
            round(side - 0.6, 1),
            round(float(np.clip(similarity[row, column], 0, 1)), 2),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    row, column = divmod(int(similarity.argmax()), columns)

    def ticks(number: int, start: float) -> list[tuple[float, str]]:
        step = math.ceil(number / 10)
        return [(round(start + side * (place + 0.5), 1), str(place + 1)) for place in range(0, number, step)]

    return Panel(
        "Map: student's layers from top to bottom, teacher's from left to right",
        f"Map of the similarity of {rows} layers of the student and {columns} of the teacher, from"
        f" {similarity.min():.2f} to {similarity.max():.2f}; greatest for student's layer {row + 1} and teacher's layer"
        f" {column + 1}",
        frame,
        ticks(columns, frame.left),
        ticks(rows, frame.top),
        cells=cells,
        grid=False,
    )
