"""The section of a report on the course of the training: a small panel for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Final

from distill_core.guidance.blocks import Panel, Panels, Row, Section, Table
from distill_core.guidance.figures import Axis, Frame, area, path, thinned
from distill_core.guidance.material import Material, mean_curve
from distill_core.guidance.records import ALONE
from distill_core.guidance.wording import clipped, plural

_Points = list[tuple[float, list[float]]]
_STATIONS: Final = 6  # columns of the table


def curves(material: Material) -> Section:
    """The section on the course of the training."""
    results, numbers = material.results, material.numbers
    name, title, metric = "curves", "Curves", clipped(results.curve_metric)
    means = {method: mean_curve(results.finished(method), results.curve_metric) for method in results.methods}
    means = {method: points for method, points in means.items() if points}
    if not means:
        reason = f"No finished run has recorded {metric} during the training."
        return Section(name, title, absent=reason)
    teacher = results.teacher_value(results.curve_metric)
    values = [value for points in means.values() for _, several in points for value in several]
    y_axis = Axis.of([*values, teacher])
    panels = [_panel(material, method, means, y_axis, teacher) for method in means]
    legend = [("own", "the method: mean of the seeds; band: least to greatest")]
    legend += [("base", ALONE)] if ALONE in means else []
    legend += [("teacher", "teacher")] if math.isfinite(teacher) else []
    rows = [
        Row(clipped(method), [numbers.value(statistics.fmean(values)) for values in _stations(points)])
        for method, points in means.items()
    ]
    columns = (
        "method",
        "begin",
        *(f"{100 * station // (_STATIONS - 1)} %" for station in range(1, _STATIONS - 1)),
        "end",
    )
    table = Table(f"Mean {metric} along each training", columns, rows, folded="Show the numbers")
    unit = ", in percent" if numbers.percent else ""
    lead = (
        f"{metric}{unit} by epoch, each panel to the end of its training. A curve that still rises at"
        " its end asks for a longer training."
    )
    return Section(name, title, lead, (Panels("", panels, legend), table))


def _panel(
    material: Material,
    method: str,
    means: Mapping[str, _Points],
    y_axis: Axis,
    teacher: float,
) -> Panel:
    frame, numbers = Frame(), material.numbers

    points = means[method]
    x_axis = Axis.of((place for place, _ in points), count=4, margin=0)

    def line(points: _Points, reduce: Any) -> list[tuple[float, float]]:
        return [(x_axis.share(place), y_axis.share(reduce(values))) for place, values in thinned(points)]

    lines = [(path(line(points, statistics.fmean), frame), "own")]
    if ALONE in means and method != ALONE:
        base = [(place, values) for place, values in means[ALONE] if place <= points[-1][0]]
        lines.insert(0, (path(line(base, statistics.fmean), frame), "base"))
    if math.isfinite(teacher):
        lines.insert(0, (path([(0, y_axis.share(teacher)), (1, y_axis.share(teacher))], frame), "teacher"))
    bands = [(area(line(points, max), line(points, min), frame), "own")] if len(points[0][1]) > 1 else []
    last, seeds = points[-1], len(points[0][1])
    begun, reached = (numbers.value(statistics.fmean(point[1])) for point in (points[0], last))
    label = (
        f"{clipped(method)}: {clipped(material.results.curve_metric)} from {begun} at"
        f" epoch {points[0][0]:g} to {reached} at epoch {last[0]:g}, mean of {plural(seeds, 'seed')}"
    )
    return Panel(
        clipped(method),
        label,
        frame,
        [(frame.x(x_axis.share(tick)), f"{tick:g}") for tick in x_axis.ticks],
        [(frame.y(y_axis.share(tick)), numbers.tick(tick)) for tick in y_axis.ticks],
        bands,
        lines,
        note=f"{reached} at the end",
    )


def _stations(points: _Points) -> list[list[float]]:
    """The values at equal distances from the first to the last epoch."""
    return [points[round(station * (len(points) - 1) / (_STATIONS - 1))][1] for station in range(_STATIONS)]
