"""The report on a comparison: one HTML file that needs neither a network nor a script."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from distill_core import __version__
from distill_core.guidance import behaviour, overview
from distill_core.guidance.advice import advise
from distill_core.guidance.blocks import Section, Steps
from distill_core.guidance.curves import curves
from distill_core.guidance.material import Material, facts_of, gather
from distill_core.guidance.wording import clipped
from distill_core.installed import unusable

FILE: Final = "report.html"


def write_report(folder: str | Path, file: str | Path | None = None) -> Path:
    """Write one self-contained HTML file on a comparison of methods.

    The file shows the verdict, curves, accuracy and agreement, calibration, classes, examples, layers and costs, and
    the next steps with their reasons. It holds its style and pictures, loads nothing and runs no script.

    Args:
        folder: The results folder of a comparison.
        file: The file to write; None writes ``report.html`` into the folder.

    Returns:
        The path of the file.

    Raises:
        ImportError: If Jinja2 is not installed or too old.
        ValueError: If the folder does not hold the results of a comparison.
        OSError: If a file cannot be read or written.

    Example:
        >>> write_report("no_such_folder")
        Traceback (most recent call last):
        ValueError: Expected `folder` to hold the results of a comparison, but got 'no_such_folder', which is not a
        folder. Pass the folder that a comparison of methods has written.
    """
    if problem := unusable("The report", "jinja2"):
        raise problem
    path = Path(folder) / FILE if file is None else Path(file)
    page = _render(gather(folder))
    path.write_text(page, encoding="utf-8")
    return path


def _render(material: Material) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distill_core.guidance"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    return environment.get_template("report.html.jinja").render(
        title=f"Distillation report: {clipped(material.results.folder.resolve().name)}",
        metric=clipped(material.results.metric),
        better="higher is better" if material.results.higher_is_better else "lower is better",
        methods=len(material.results.methods),
        seeds=len(material.results.seeds),
        sentences=overview.verdict_sentences(material),
        merit=overview.figures_of_merit(material),
        sections=_sections(material),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=__version__,
    )


def _unbroken(value: Any) -> Any:
    """Text in which a percent sign stays on the line of its number."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def _sections(material: Material) -> list[Section]:
    return [
        Section("differences", "Differences", "", overview.differences(material)),
        curves(material),
        overview.outcomes(material),
        behaviour.calibration(material),
        behaviour.classes(material),
        behaviour.confusion(material),
        behaviour.examples(material),
        behaviour.layers(material),
        overview.costs(material),
        _next_steps(material),
        overview.method_of_measurement(material),
    ]


def _next_steps(material: Material) -> Section:
    steps = [(advice.action, advice.reason, advice.rule) for advice in advise(facts_of(material))]
    name, title = "next", "Next steps, and why"
    if not steps:
        return Section(name, title, absent="No rule applies to these numbers.")
    lead = "Each step follows from a rule on the numbers of this page; the documentation lists all rules."
    return Section(name, title, lead, (Steps(steps),))
