"""The tables of the page on speed and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from benchmarks.performance.records import (
    MISSED,
    ON_DEVICE,
    Entry,
    Record,
    goal,
    limit,
    markdown,
    number,
    quartiles,
    shown,
    span,
)

COMPARED = ("what is compared", "measured", "half of the rounds", "goal")
TOKENS_AT_A_TIME = "tokens at a time"
GPT = {
    "student": "student alone",
    "teacher": "forward pass of the teacher",
    "hand": "by hand with `F.kl_div`",
    "SequenceDistillation": "`SequenceDistillation`",
    "FusedLinearDistillation": "`FusedLinearDistillation`",
}


def compared(record: Record, questions: Mapping[str, str]) -> str:
    """Rows of a record under other names.

    Args:
        record: The record.
        questions: The questions by the text of the first column. Those that the record lacks raise an error.
    """
    rows = {label: record.row(question) for label, question in questions.items()}
    return markdown(COMPARED, ([label, shown(row), quartiles(row), goal(row)] for label, row in rows.items()))


def fast_teachers(record: Record) -> dict[str, str]:
    """Questions of ``step_overhead`` on teachers in bfloat16 or compiled, by the text of the first column."""
    names = {
        "bfloat16 teacher": 'forward pass with `teacher_dtype="bfloat16"` / in float32',
        "compiled teacher": "forward pass of `torch.compile(teacher)` / of the teacher",
    }
    return {label: next(name for name in record.questions if name.startswith(start)) for start, label in names.items()}


def widths(record: Record, questions: Mapping[str, str]) -> str:
    """Rows of ``fused_linear``: a column for each hidden size.

    Args:
        record: The record.
        questions: The beginning of the questions, before the hidden size, by the text of the first column.
    """
    sizes = sorted({int(name.rpartition("H ")[2]) for name in record.questions})
    lines = []
    for label, question in questions.items():
        rows = [record.row(f"{question}, H {size}") for size in sizes]
        goals = dict.fromkeys(filter(None, map(limit, rows)))
        cells = [shown(row) + (f", {MISSED}" if row["passed"] is False else "") for row in rows]
        lines.append([label, *cells, ", ".join(goals)])
    return markdown(["what is compared", *(f"hidden size {size}" for size in sizes), "goal"], lines)


def steps_with_cache(record: Record) -> str:
    """Rows of ``cache``: the step with the teacher live and from the cache."""
    cases = [name.removesuffix(": live / plain") for name in record.questions if name.endswith(": live / plain")]
    lines = []
    for case in cases:
        live, cached = (record.row(f"{case}: {way} / plain") for way in ("live", "cached"))
        label = case.replace(", teacher ", ", teacher with ").replace("x", " times the arithmetic")
        lines.append([label, shown(live), shown(cached), goal(cached)])
    return markdown(["student and teacher", "teacher live", "from the cache", "goal"], lines)


def losses(records: Mapping[str, Record]) -> str:
    """Time and memory of the losses on a CPU, as far as they were measured, the slowest first."""
    timed, memory = (records[name].questions if name in records else {} for name in ("loss_time", "loss_memory"))
    halves = {"PyTorch": "torch", "TensorFlow": "tensorflow"}
    names = sorted(timed, key=lambda name: -timed[name]["value"])
    names += [name for name in dict.fromkeys(key.partition(": ")[2] for key in memory) if name not in timed]
    lines = []
    for name in names:
        cells = [_judged(timed[name]) if name in timed else "", timed[name]["note"] if name in timed else ""]
        rows = [memory.get(f"{half}: {name}") for half in halves.values()]
        lines.append([name, *cells, *("" if row is None else _judged(row) for row in rows)])
    return markdown(["loss", "time / formula's time", "shape", *(f"memory, {half}" for half in halves)], lines)


def _judged(row: Entry) -> str:
    return shown(row) + (f", {MISSED}" if row["passed"] is False else "")


def memory_span(record: Record, half: str) -> str:
    """The smallest and largest memory of the losses on features in one half."""
    rows = record.of_kind("Row")
    return span(row["value"] for row in rows if row["question"].startswith(half) and row["gate"] is not None)


def stored(record: Record) -> dict[str, str]:
    """Questions of ``cache`` on the codec, by the text of the first column."""
    names = {
        "bytes a token": "bytes a token",
        "mean KL over k + 1 outcomes": "KL divergence from the teacher",
        "mean |delta log p|": "mean error of a log-probability",
    }
    return {
        question.replace(end, label): question
        for question in record.questions
        for end, label in names.items()
        if question.endswith(f": {end}")
    }


def peers(record: Record) -> str:
    """Rows of ``cache`` that compare with other libraries, with their notes."""
    rows = [row for row in record.of_kind("Row") if row["question"].startswith("peer ")]
    heads = ("compared with", "measured", "remark")
    return markdown(heads, ([row["question"].removeprefix("peer "), shown(row), row["note"]] for row in rows))


def as_they_are(record: Record) -> dict[str, str]:
    """All questions of a record, by their own words."""
    return {question: question for question in record.questions}


def codecs(record: Record, logits: str) -> str:
    """Rows of ``codecs`` for logits from one place, with every number of classes."""
    lines = []
    for row in record.of_kind("Result"):
        if row["logits"] == logits:
            apart = "" if row["divergence"] is None else f"{row['divergence']:.0e}"
            cosine = "" if row["cosine"] is None else f"{row['cosine']:.4f}"
            decoded = "" if row["decoded"] is None else f"{row['decoded'] / 1000:.1f} million"
            error = f"{row['loss_error']:.0e}" if abs(row["loss_error"]) < 0.01 else f"{row['loss_error']:.2f}"
            kept = row["setting"].removeprefix("features, ")
            lines.append([f"{row['classes']:,}", kept, f"{row['bytes']:,.0f}", apart, error, cosine, decoded])
    count = "channels" if logits == "features" else "classes"
    error = "error" if logits == "features" else "error of the loss"
    heads = [count, "setting", "bytes a token", "KL", error, "cosine", "tokens decoded in a second"]
    return markdown(heads, lines)


def training_of(record: Record, quantity: str) -> str:
    """Steps or nats of the teacher and the student whose logits ``codecs`` reads, over both vocabularies."""
    values = [value for name, value in record.settings.items() if name.startswith(f"{quantity} of teacher and student")]
    sides = (" to ".join(dict.fromkeys(map(number, sorted(side)))) for side in zip(*values, strict=True))
    return " and ".join(sides)


# Devices -------------------------------------------------------------------------------------------------------------


def time_of(arm: Entry | None, key: str = "milliseconds") -> str:
    """Milliseconds of an arm, or the reason why it failed; empty if it was not tried."""
    if arm is None:
        return ""
    return f"failed: {arm['error'].partition(':')[0]}" if arm["error"] else f"{number(arm[key])} ms"


def extra(arm: Entry | None) -> str:
    """Memory of an arm beyond its inputs; empty if it was not measured."""
    return "" if arm is None or arm["extra_mib"] is None else f"{number(arm['extra_mib'])} MiB"


def vocabulary_shape(record: Record) -> str:
    """Shape and type of the logits of the divergences over a vocabulary; empty if they were not measured."""
    shapes = (row["shape"] for row in record.of_kind("Measured") if row["question"].endswith(", logits"))
    return next(shapes, "")


def vocabulary(record: Record) -> str:
    """Divergences over a vocabulary."""
    lines = []
    for question in dict.fromkeys(row["question"] for row in record.of_kind("Measured")):
        if question.endswith(", logits"):
            arms = record.arms(question)
            library, plain = arms["library"], arms["formula"]
            formula = ", ".join(filter(None, (time_of(plain), extra(plain))))
            others = [time_of(arms.get(arm)) for arm in ("compiled formula", "liger")]
            cells = [time_of(library), time_of(library, "in_a_row"), extra(library), formula, *others]
            lines.append([question.removesuffix(", logits"), *cells])
    heads = ("alone", "in a row", "extra memory", "plain formula", "compiled formula", "Liger")
    return markdown([f"logits {vocabulary_shape(record)}", *heads], lines)


def device_losses(record: Record) -> str:
    """The other losses against the papers' formulas, the largest ratio first."""
    lines = []
    for question in dict.fromkeys(row["question"] for row in record.of_kind("Measured")):
        arms = record.arms(question)
        library, formula = arms["library"], arms["formula"]
        if question.endswith(", logits"):
            continue
        failed = library["error"] or formula["error"]
        ratio = None if failed else library["milliseconds"] / formula["milliseconds"]
        memory = " / ".join(filter(None, (extra(library), extra(formula))))
        cells = [library["shape"], time_of(library), time_of(formula), "" if ratio is None else number(ratio), memory]
        lines.append((ratio, [question, *cells]))
    lines.sort(key=lambda line: -(line[0] or 0))
    heads = ("loss", "shape", "library", "plain formula", "ratio", "extra memory, library / formula")
    return markdown(heads, (cells for _, cells in lines))


def linear(record: Record) -> str:
    """The loss from hidden states and heads."""
    rows = record.of_kind("Measured")
    names = {"library": "`fused_linear_divergence`", "dense logits": "whole logits and `soft_target_kl`"}
    lines = []
    for row in rows:
        first, _, rest = row["arm"].partition(", ")
        label = ", ".join(filter(None, (names.get(first, first), rest)))
        lines.append([label, time_of(row), time_of(row, "in_a_row"), extra(row)])
    return markdown([rows[0]["shape"], "alone", "in a row", "extra memory"], lines)


def language_steps(record: Record) -> str:
    """Steps of a language model."""
    lines = []
    for arm, label in GPT.items():
        memory = record.questions.get(f"GPT: {arm}, peak memory")
        ratio = record.questions.get(f"GPT: {arm} / (student + teacher)")
        cells = [shown(record.row(f"GPT: {arm}")), "" if ratio is None else shown(ratio)]
        lines.append([label, *cells, "" if memory is None else shown(memory)])
    return markdown(["one step", "time", "of student and teacher", "peak memory"], lines)


def other_steps(record: Record) -> str:
    """Steps of a network for images, and steps that are all launches, against a module written by hand."""
    words = ("images: ", "small MLP: ")
    names = [name for name in record.questions if name.startswith(words) and "by hand" in name]
    return compared(record, {name: name for name in names})


# All benchmarks ------------------------------------------------------------------------------------------------------


def judged(records: Mapping[str, Record]) -> list[tuple[str, Entry]]:
    """The rows with a goal and a measured value, each with the name of its benchmark."""
    return [
        (name, row)
        for name, record in records.items()
        for row in record.of_kind("Row")
        if row["passed"] is not None and not _tiny(record)
    ]


def missed(records: Mapping[str, Record]) -> str:
    """The rows that miss their goal."""
    rows = [(name, row) for name, row in judged(records) if not row["passed"]]
    cells = ([f"`{name}`", row["question"], shown(row), limit(row)] for name, row in rows)
    return markdown(["benchmark", "what is compared", "measured", "goal"], cells)


def missed_count(records: Mapping[str, Record]) -> int:
    """The number of rows that miss their goal."""
    return sum(not row["passed"] for _, row in judged(records))


def command(name: str) -> str:
    """The command that writes a record into its place."""
    device = " --device cuda" if name in ON_DEVICE else ""
    return f"python -m benchmarks.{name}{device} --json benchmarks/records/{name}.json"


def machine(record: Record) -> str:
    """The machine of a record, in words."""
    facts = record.content["machine"]
    processor = f"{facts['processor']} ({facts['instructions']}), {facts['cores']} cores"
    if "gpu" not in facts:
        return processor
    return f"{facts['gpu']} with {facts['gpu_memory_gib']:.0f} GiB, CUDA {facts['cuda']}, beside {processor}"


def versions(record: Record) -> str:
    """The versions of a record, in words."""
    return ", ".join(f"{package} {version}" for package, version in record.content["versions"].items())


def _tiny(record: Record) -> bool:
    """Whether a benchmark for a GPU ran on a CPU, with inputs that only show that it runs."""
    return record.settings.get("device") == "cpu"


def sharing(records: Mapping[str, Record]) -> str:
    """A sentence on the other work of the machine on which the processor time was measured."""
    own = [record.content["machine"] for name, record in records.items() if name not in ON_DEVICE]
    busy = [facts["cores_busy_with_other_work"] for facts in own if facts["cores_busy_with_other_work"] is not None]
    if not busy:
        return ""
    if max(busy) < 0.1:
        return "The machine had no other work."
    cores = span(facts["cores"] for facts in own)
    return f"The machine was shared: other programs kept {span(busy)} of its {cores} cores busy during a benchmark."


def machines(records: Mapping[str, Record]) -> Iterator[str]:
    """Machine, versions and environment of the benchmarks, those with the same ones together."""

    def facts(record: Record) -> tuple[str, str, str]:
        variables = (f"`{name}={value}`" for name, value in record.content["environment"].items())
        return machine(record), versions(record), " ".join(variables)

    for (where, packages, variables), group in groupby(sorted(records.values(), key=facts), facts):
        names = ", ".join(f"`{record.name}`" for record in group)
        yield f"- {where}, with {packages}: {names}." + (f" Environment: {variables}." if variables else "")


def runs(records: Mapping[str, Record]) -> str:
    """When and how each benchmark was run."""
    heads = ["benchmark", "date", "threads", "cores busy with other work", "commit", "command"]
    return markdown(heads, (_run(record) for record in records.values()))


def _run(record: Record) -> list[Any]:
    content, facts = record.content, record.content["machine"]
    busy = facts["cores_busy_with_other_work"]
    other = "" if busy is None else number(busy)
    words = f"`{content['command']}`"
    return [f"`{record.name}`", content["date"], facts["threads"], other, (content["commit"] or "")[:12], words]
