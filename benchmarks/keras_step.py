"""The cost of distillation in Keras on TensorFlow: ``python -m benchmarks.keras_step``.

Every arm is a real ``fit`` (or ``evaluate``) over the same batches, which lie in memory, against ``keras.distillation``
with the same losses and against what has to be computed. Ratios are of processor time, one thread, the arms in turn.
The teacher's inference and the adapter's arithmetic are timed as functions of their own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Plan, Row, Runs, absolute, compare, prepare, report

if __name__ == "__main__":
    # before TensorFlow is imported, which reads all of them once
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    prepare("benchmarks.keras_step")

import keras
import tensorflow as tf

from benchmarks.keras_workloads import (
    KerasArm,
    KerasWorkload,
    adapter_arithmetic,
    compiled,
    distil_model,
    evaluating,
    fitting,
    in_memory,
    inference,
    interleave_blocks,
    keras_distiller,
    keras_workload,
    network,
)

PEER = hasattr(keras, "distillation")
NAME = "keras.distillation"
FEATURE, ADAPTED = "stage2", "stage1"  # of equal shape, and of fewer channels in the student


@dataclass(frozen=True)
class Effort:
    """How long to measure; ``warmup`` counts blocks."""

    train: Plan
    evaluate: Plan
    xla: Plan


QUICK = Effort(Plan(8, 7, 1, warmup=2), Plan(16, 7, 1, warmup=2), Plan(8, 7, 1, warmup=2))
FULL = Effort(Plan(16, 12, 2, warmup=2), Plan(32, 12, 2, warmup=2), Plan(16, 12, 1, warmup=2))


# Questions -----------------------------------------------------------------------------------------------------------


def training_questions(effort: Effort) -> list[Row]:
    """Steps of training: against keras.distillation, and against what has to be computed."""
    work, steps = keras_workload(), effort.train.block

    def arms() -> dict[str, KerasArm]:
        data = work.data(steps)
        made = {
            "plain": fitting(work.student(), data),
            "teacher": inference(work, data),
            "logits": fitting(distil_model(work), data),
            "features": fitting(distil_model(work, [FEATURE]), data),
            "adapted": fitting(distil_model(work, [ADAPTED]), data),
            "adapter": adapter_arithmetic(work, ADAPTED, steps),
            "cached logits": cached(work, [], steps),
            "cached features": cached(work, [FEATURE], steps),
        }
        if PEER:
            made["peer logits"] = fitting(keras_distiller(work), data)
            made["peer features"] = fitting(keras_distiller(work, [FEATURE]), data)
        return made

    runs = interleave_blocks(arms, effort.train, "training")
    both, bare = ("plain", "teacher"), "student in fit, teacher as a bare function"
    return [
        absolute("plain step", runs, "plain", "student alone, for scale"),
        absolute("teacher's inference", runs, "teacher", "for scale"),
        absolute("step with logits + feature", runs, "features", "for scale"),
        *against_peer(f"logits + feature / {NAME}", runs, "features", "peer features", gate=0.80),
        *against_peer(f"logits / {NAME}", runs, "logits", "peer logits"),
        compare("logits / (student + teacher)", runs, "logits", *both, gate=1.05, note=bare),
        compare("logits + feature / (student + teacher)", runs, "features", *both, gate=1.05, note=bare),
        compare(
            "logits + feature through an adapter / (student + teacher + adapter)",
            runs,
            "adapted",
            *both,
            "adapter",
            gate=1.05,
            note="adapter as a bare function",
        ),
        *against_peer(f"{NAME}, logits + feature / (student + teacher)", runs, "peer features", *both),
        compare("cached targets, logits / student alone", runs, "cached logits", "plain", gate=1.05),
        compare("cached targets, logits + feature / student alone", runs, "cached features", "plain", gate=1.05),
    ]


def cached(work: KerasWorkload, features: list[str], steps: int) -> KerasArm:
    """An arm: training on the teacher's answers, which the first pass over the data keeps in memory."""
    model = distil_model(work, features)
    data = in_memory(work.data(steps).map(lambda x, y: (x, model.teacher_targets(x, y))))
    return fitting(model, data)


def evaluation_questions(effort: Effort) -> list[Row]:
    """Evaluation without the teacher, and with it."""
    work = keras_workload()
    data = work.data(effort.evaluate.block)

    def arms() -> dict[str, KerasArm]:
        made = {
            "plain": evaluating(work.student(), data),
            "teacher": inference(work, data),
            "off": evaluating(distil_model(work, [FEATURE], evaluate_distillation=False), data),
            "on": evaluating(distil_model(work, [FEATURE]), data),
        }
        if PEER:
            made["peer"] = evaluating(keras_distiller(work, [FEATURE]), data)
        return made

    runs = interleave_blocks(arms, effort.evaluate, "evaluation")
    return [
        compare("evaluate, evaluate_distillation=False / plain", runs, "off", "plain", gate=1.10),
        compare("evaluate with the distillation / (student + teacher)", runs, "on", "plain", "teacher"),
        *against_peer(f"{NAME}: evaluate / plain", runs, "peer", "plain"),
    ]


def xla_questions(effort: Effort) -> list[Row]:
    """The effect of ``jit_compile=True``, here and in keras.distillation."""
    work, steps = keras_workload(), effort.xla.block

    def arms() -> dict[str, KerasArm]:
        data = work.data(steps)
        made: dict[str, KerasArm] = {}
        for suffix, xla in (("", False), (", XLA", True)):
            made["plain" + suffix] = fitting(work.student(), data, jit_compile=xla)
            made["logits" + suffix] = fitting(distil_model(work), data, jit_compile=xla)
            made["features" + suffix] = fitting(distil_model(work, [FEATURE]), data, jit_compile=xla)
            if PEER:
                made["peer logits" + suffix] = fitting(keras_distiller(work), data, jit_compile=xla)
                made["peer features" + suffix] = fitting(keras_distiller(work, [FEATURE]), data, jit_compile=xla)
        return made

    runs = interleave_blocks(arms, effort.xla, "XLA")
    rows = []
    for label, arm in (("logits", "logits"), ("logits + feature", "features")):
        peer = against_peer(f"{NAME}, {label}: XLA / without", runs, f"peer {arm}, XLA", f"peer {arm}")
        # XLA may slow the step no more than it slows keras.distillation; where that gains, this need not gain as much
        gate = max(1.0, peer[0].value or 1.0)
        rows += [compare(f"{label}: XLA / without", runs, f"{arm}, XLA", arm, gate=gate), *peer]
    return [
        *rows,
        compare("student alone: XLA / without", runs, "plain, XLA", "plain", note="for scale"),
        *against_peer(f"logits + feature / {NAME}, both with XLA", runs, "features, XLA", "peer features, XLA"),
    ]


def against_peer(question: str, runs: Runs, arm: str, *against: str, gate: float | None = None) -> list[Row]:
    """A row that needs keras.distillation, or one that says it is absent."""
    if PEER:
        return [compare(question, runs, arm, *against, gate=gate)]
    return [Row(question, None, "x", gate=gate, note=f"not measured: Keras {keras.__version__} has no {NAME}")]


def counting_questions() -> list[Row]:
    """Forward passes a step, and the size of files."""
    work = keras_workload()
    models: dict[str, Any] = {"logits + feature": distil_model(work, [FEATURE])}
    if PEER:
        models[f"{NAME}, logits + feature"] = keras_distiller(work, [FEATURE])
    rows = [row for label, model in models.items() for row in counted(label, model, work.data(2), 1)]
    model = distil_model(work, [FEATURE])
    data = work.data(2).map(lambda x, y: (x, model.teacher_targets(x, y)))
    rows += counted("cached targets", model, in_memory(data), 0)
    return rows + file_rows(work)


def file_rows(work: KerasWorkload) -> list[Row]:
    """Sizes of files, of a student of a quarter of a million weights, since names and settings take some bytes."""

    def student() -> keras.Model:
        return network(64, 64, 2, "student")

    plain = file_size(compiled(student()), work)
    model_bytes = file_size(compiled(distil_model(work, [FEATURE], student())), work)
    note = f"{model_bytes - plain} bytes beyond the plain student's {plain}"
    rows = [Row("logits + feature: model file / student's", model_bytes / plain, "x", gate=1.01, note=note)]
    if PEER:
        peer = file_size(compiled(keras_distiller(work, [FEATURE], student())), work)
        rows.append(Row(f"{NAME}, logits + feature: model file / student's", peer / plain, "x"))
    return rows


def counted(label: str, model: Any, data: tf.data.Dataset, teacher_gate: int) -> list[Row]:
    """How often a layer of each model runs in a step of eager training."""
    teacher, calls, undo = model.teacher, {"student": 0, "teacher": 0}, []
    for who, counted_model in (("student", model.student), ("teacher", teacher)):
        layer = counted_model.get_layer(FEATURE)

        def counting(*args: Any, who: str = who, call: Any = layer.call, **kwargs: Any) -> Any:
            calls[who] += not isinstance(args[0], keras.KerasTensor)
            return call(*args, **kwargs)

        undo.append((layer, layer.call))
        layer.call = counting
    compiled(model, run_eagerly=True)
    model.fit(data, verbose=0, shuffle=False)
    for layer, call in undo:
        layer.call = call
    gates = {"student": 1, "teacher": teacher_gate} if not label.startswith(NAME) else {}
    return [
        Row(f"{label}: {who} forwards a step", number / len(data), "calls", gate=gates.get(who))
        for who, number in calls.items()
    ]


def file_size(model: Any, work: KerasWorkload) -> int:
    """Bytes of a model's file after a step, optimizer included."""
    model.fit(work.data(1), verbose=0, shuffle=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, default=Path("keras_step.json"), help="where to write the figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    rows = [
        *training_questions(effort),
        *evaluation_questions(effort),
        *xla_questions(effort),
        *counting_questions(),
    ]
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
    report("The cost of distillation in a step of Keras", rows, arguments.json, {**asdict(effort), **versions})


if __name__ == "__main__":
    main()
