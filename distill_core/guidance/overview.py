"""The sections of a report on all methods: verdict, curves, results, costs, and how it was measured."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from distill_core.guidance.blocks import Lines, Marks, Row, Section, Table, Text
from distill_core.guidance.figures import Axis
from distill_core.guidance.material import Material
from distill_core.guidance.records import ALONE, EQUAL_COMPUTE
from distill_core.guidance.run_records import number
from distill_core.guidance.verdict import BETTER, UNCLEAR, UNTESTED, WORSE, Difference
from distill_core.guidance.wording import UNKNOWN, Numbers, clipped, count, duration, plural, shares, size

_LISTED: Final = 40  # errors, warnings and problems, each kind
_TONES: Final = {BETTER: "better", WORSE: "worse"}
_ANSWERS: Final = {
    BETTER: "Yes, it helped.",
    WORSE: "No, it did harm.",
    UNCLEAR: "Not clearly.",
    UNTESTED: "One seed cannot tell.",
}
_LIMITS: Final = {UNCLEAR: "not clearly with equal compute", WORSE: "not with equal compute"}


def verdict_sentences(material: Material) -> list[str]:
    """The verdict: an answer in a few words, and the sentences of the comparison on the best method.

    Args:
        material: The content of the report.
    """
    verdict, results = material.verdict, material.results
    if verdict.best is None:
        return [f"No verdict: no run of a method with a teacher has ended with a value of {clipped(results.metric)}."]
    beside, compute = verdict.beside(ALONE), verdict.beside(EQUAL_COMPUTE)
    if beside is None or not beside.seeds:
        return [f"No verdict: “{ALONE}” and “{clipped(verdict.best)}” have no finished seed in common."]
    compared, count_of_methods = results.compared, len(results.distilled)
    answer = _ANSWERS[beside.verdict]
    if compute and beside.verdict == BETTER and compute.verdict in _LIMITS:
        answer = f"Partly: after equal steps, but {_LIMITS[compute.verdict]}."
    if count_of_methods > 1:
        answer += f" “{clipped(verdict.best)}” has the best mean of {count_of_methods} methods."
    sentences = [answer, compared.sentence(verdict.best)]
    if count_of_methods > 1 and beside.seeds > 1:
        sentences.append(f"The intervals are right together for all {count_of_methods} methods (Bonferroni).")
    return [clipped(sentence, 1000) for sentence in (*sentences, *compared.remarks)]


def figures_of_merit(material: Material) -> list[tuple[str, str]]:
    """The few numbers at the top of the report: name and value."""
    results, numbers = material.results, material.numbers
    teacher = results.teacher_value()
    entries = [("teacher", numbers.value(teacher) if math.isfinite(teacher) else UNKNOWN)]
    entries += [
        (clipped(method, 60), numbers.spread(list(results.values(method).values())))
        for method in (ALONE, EQUAL_COMPUTE, material.verdict.best)
        if method in results.methods and method is not None
    ]
    ratio = _fraction(*(material.cost(model).get("parameters") for model in ("student", "teacher")))
    if ratio:
        entries.append(("parameters, student / teacher", ratio))
    return entries


def differences(material: Material) -> list[Table | Text]:
    """A table of differences for each baseline."""
    numbers, results = material.numbers, material.results
    methods = len(results.distilled)
    together = f", right together for all {methods} methods" if methods > 1 else ""
    blocks: list[Table | Text] = []
    for baseline, how in ((ALONE, "equal steps"), (EQUAL_COMPUTE, "equal compute")):
        rows = [item for item in material.verdict.differences if item.baseline == baseline]
        ends = [value for item in rows for value in (item.mean, item.low, item.high)]
        if not any(map(math.isfinite, ends)):
            continue
        axis = Axis.of([0.0, *ends])
        better = "to the right is better" if results.higher_is_better else "to the left is better"
        blocks.append(
            Table(
                f"{clipped(results.metric)} minus that of the student alone with {how}, same seeds{_in(numbers.unit)};"
                f" line: 95 % interval{together}; {better}",
                ("method", "difference", "95 % interval", "seeds", "verdict"),
                [_difference_row(material, item, axis) for item in rows],
                chart="differences",
                ticks=[(axis.percent(tick), numbers.tick(tick)) for tick in axis.ticks],
                lines=[(axis.percent(0.0), "zero")],
            )
        )
    if not blocks:
        blocks.append(Text("No two methods have a finished seed in common, so that nothing can be compared."))
    return blocks


def _in(unit: str) -> str:
    return f", in{unit}" if unit else ""


def _difference_row(material: Material, item: Difference, axis: Axis) -> Row:
    numbers = material.numbers
    known, tested = math.isfinite(item.mean), math.isfinite(item.low)
    interval = f"{numbers.difference(item.low)} to {numbers.difference(item.high)}" if tested else "none"
    marks = Marks(
        interval=(axis.percent(item.low), axis.percent(item.high)) if tested else None,
        centre=axis.percent(item.mean) if known else None,
        tone=_TONES.get(item.verdict, ""),
    )
    cells = (numbers.difference(item.mean) or "none", interval, str(item.seeds), item.verdict)
    return Row(clipped(item.method), cells, marks, strong=item.method == material.verdict.best)


def outcomes(material: Material) -> Section:
    """The section on the last values of all methods."""
    results, numbers, measurements = material.results, material.numbers, material.measurements
    metric = clipped(results.metric)
    teacher = results.teacher_value()
    values = {method: results.values(method) for method in results.methods}
    axis = Axis.of([teacher, *(value for each in values.values() for value in each.values())])
    columns = ["method", metric, "finished runs"]
    measured = bool(measurements.methods)
    columns += ["accuracy", "agreement", "divergence (nats)"] if measured else []
    rows = [_outcome_row(material, method, values[method], axis, measured) for method in results.methods]
    cells = [numbers.value(teacher) if math.isfinite(teacher) else UNKNOWN, ""]
    if measured:
        cells += [shares(measurements.teacher.accuracy) if measurements.teacher else "", "", ""]
    marks = Marks(centre=axis.percent(teacher)) if math.isfinite(teacher) else Marks()
    rows.insert(0, Row("teacher", cells, marks))
    table = Table(
        f"{metric} after the training: each dot is a seed, the line is the mean"
        + ("; ticks in percent; mean ± standard deviation" if numbers.percent else "; mean ± standard deviation"),
        columns,
        rows,
        chart="seeds",
        ticks=[(axis.percent(tick), numbers.tick(tick)) for tick in axis.ticks],
        lines=[(axis.percent(teacher), "teacher")] if math.isfinite(teacher) else [],
    )
    lead = (
        "Agreement: the share of examples where the student answers as its teacher does, right or wrong. Divergence:"
        " the mean Kullback-Leibler divergence of the student's probabilities from the teacher's; 0 is a perfect copy."
    )
    blocks: list[Table | Text] = [table, *_all_metrics(material)]
    if not measured:
        lead = ""
        blocks.append(Text(no_predictions(material) + " Accuracy, agreement and divergence need them."))
    return Section("results", "Accuracy, agreement and divergence", lead, blocks)


def _all_metrics(material: Material) -> list[Table]:
    """A closed table of all metrics that the runs have recorded, if there are others than the deciding one."""
    results, plain = material.results, Numbers(percent=False)
    names = sorted({name for run in results.runs for name in run.metrics})
    if len(names) < 2:
        return []
    rows = []
    for method in results.methods:
        runs = results.finished(method)
        values = [[value for run in runs if (value := run.metrics.get(name)) is not None] for name in names]
        rows.append(Row(clipped(method), [plain.spread(each) if each else "" for each in values]))
    columns = ("method", *map(clipped, names[:_LISTED]))
    return [Table("All recorded metrics, mean ± standard deviation", columns, rows, folded="Show all metrics")]


def no_predictions(material: Material) -> str:
    """A sentence on why predictions are missing."""
    if material.measurements.problems:
        return "The predictions of the runs cannot be used: see the problems at the end of this page."
    if not any(material.results.finished(method) for method in material.results.methods):
        return "No run has finished: predictions are written at the end of a run."
    return "The comparison has stored no predictions; it does so for classification only."


def _outcome_row(material: Material, method: str, values: Mapping[int, float], axis: Axis, measured: bool) -> Row:
    results, numbers, measures = material.results, material.numbers, material.measurements.methods.get(method)
    runs = [run for run in results.runs if run.method == method]
    finished = len(results.finished(method))
    state = f"{finished} of {max(len(runs), len(results.seeds))}"
    if lost := finished - len(values):
        state += f", {lost} without a number"
    cells = [numbers.spread(list(values.values())) if values else "none", state]
    if measured:
        cells += (
            ["", "", ""]
            if measures is None
            else [
                shares(measures.accuracy),
                shares(measures.agreement),
                f"{statistics.fmean(measures.divergence):.3g}" if measures.divergence else "",
            ]
        )
    marks = Marks(
        dots=[axis.percent(value) for value in values.values()],
        centre=axis.percent(statistics.fmean(values.values())) if values else None,
    )
    return Row(clipped(method), cells, marks, strong=method == material.verdict.best)


def costs(material: Material) -> Section:
    """The section on costs."""
    results = material.results
    columns = ("model", "parameters", "multiply-adds", "file", "latency", "memory")
    writers = {
        "parameters": count,
        "multiply_adds": count,
        "bytes": size,
        "latency_seconds": duration,
        "memory_bytes": size,
    }
    both = [material.cost(model) for model in ("teacher", "student")]
    rows = [
        Row(model, [write(cost.get(key)) for key, write in writers.items()])
        for model, cost in zip(("teacher", "student"), both, strict=True)
    ]
    rows.append(Row("student / teacher", [_fraction(both[1].get(key), both[0].get(key)) for key in writers]))
    models = Table("One example through each model; file: the saved weights", columns, rows)
    training = []
    for method in results.methods:
        runs = results.finished(method)
        if runs:
            training.append(
                Row(
                    clipped(method),
                    [
                        duration(_mean(run.step_seconds for run in runs)),
                        count(_mean(run.steps or None for run in runs)),
                        duration(_mean(run.seconds or None for run in runs)),
                    ],
                )
            )
    blocks: list[Table | Text] = [models] if any(both) else [Text("The comparison has not stored the models' costs.")]
    if training:
        blocks.append(Table("Training, mean of the runs", ("method", "a step", "steps", "a run"), training))
    lead = "Latency is the median for one example on the machine named below."
    return Section("costs", "Costs", lead, blocks)


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _fraction(part: Any, whole: Any) -> str:
    if not all(isinstance(value, int | float) and value > 0 for value in (part, whole)):
        return ""
    ratio = whole / part
    return f"1/{ratio:.3g}" if ratio >= 1 else f"{1 / ratio:.3g}"


def method_of_measurement(material: Material) -> Section:
    """The section on machine, versions, command, seeds, failures and warnings."""
    results = material.results
    comparison = results.comparison
    facts = {
        "framework": {"lightning": "PyTorch Lightning", "keras": "Keras"}.get(str(comparison.get("kind")), UNKNOWN),
        "command": comparison.get("command"),
        "seeds": ", ".join(map(str, results.seeds)),
        "commit": comparison.get("commit"),
        "fingerprint of the settings": comparison.get("fingerprint"),
        "equal compute": _equal_compute(comparison.get("equal_compute")),
        "machine": _joined(comparison.get("machine")),
        "versions": _joined(comparison.get("versions")),
    }
    rows = [Row(name, [clipped(value, 500) if value else UNKNOWN]) for name, value in facts.items()]
    blocks: list[Any] = [Table("Origin of the numbers", ("fact", "value"), rows, words=True)]
    settings = comparison.get("settings")
    if isinstance(settings, dict) and settings:
        rows = [Row(clipped(name), [clipped(value, 1000)]) for name, value in list(settings.items())[:_LISTED]]
        blocks.append(Table("Settings", ("setting", "value"), rows, words=True))
    failed = [run for run in results.runs if run.error is not None]
    errors = [f"{clipped(run.method)}, seed {run.seed}: {clipped(run.error, 300)}" for run in failed]
    warned = Counter(warning for run in results.runs for warning in run.warnings)
    warnings = [f"{clipped(text, 300)} ({plural(times, 'time')})" for text, times in warned.most_common()]
    for title, lines in (
        ("Failed runs", errors),
        ("Warnings", warnings),
        ("Problems with the files", list(material.problems)),
    ):
        shown = [clipped(line, 400) for line in lines[:_LISTED]]
        shown += [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        blocks.append(Lines(title, shown or ["None."]))
    return Section("measured", "How it was measured", "", blocks)


def _equal_compute(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    ratio = f"{number(entry.get('ratio')):.2f} times the steps"
    return f"{ratio}, since a step of “{clipped(entry.get('method'))}” takes so much longer"


def _joined(mapping: Any) -> str:
    if not isinstance(mapping, dict):
        return ""
    return "; ".join(f"{name} {value}" for name, value in mapping.items() if value is not None)
