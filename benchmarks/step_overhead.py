"""The cost of distillation beyond the arithmetic that it needs: ``python -m benchmarks.step_overhead``.

Every arm is a real ``Trainer.fit`` on the same batches, made beforehand. Ratios are of processor time, one thread, the
arms in turn. A teacher's inference and the adapters' arithmetic are timed in bare loops.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Plan, Row, Runs, absolute, compare, interleave, prepare, report, spread

if __name__ == "__main__":
    prepare("benchmarks.step_overhead")  # before torch is imported: it may restart the program

import torch
from lightning.pytorch import Callback
from torch import nn

from benchmarks.workloads import (
    HandWritten,
    Plain,
    Premade,
    Workload,
    adapters_arithmetic,
    callback,
    conv_workload,
    fit,
    forward_arm,
    inference,
    mlp_workload,
    trainer_for,
)
from lightning_distill import DistillCallback

PEERS = {"nvidia-modelopt": "modelopt", "torchdistill": "torchdistill"}
IMPORTS = """
import time
start = time.process_time(), time.perf_counter()
import lightning.pytorch
middle = time.process_time(), time.perf_counter()
import lightning_distill
end = time.process_time(), time.perf_counter()
print(*(b - a for a, b in zip(middle, end)))
"""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    conv: Plan
    mlp: Plan
    imports: int
    compiled: bool


QUICK = Effort(Plan(3, 7, 1, warmup=3), Plan(50, 12, 1, warmup=30), imports=5, compiled=False)
FULL = Effort(Plan(2, 16, 3, warmup=3), Plan(50, 24, 3, warmup=50), imports=9, compiled=True)


# Questions -----------------------------------------------------------------------------------------------------------


def conv_questions(effort: Effort) -> list[Row]:
    """Steps of 15 ms and more: against a hand-written module, against what has to be computed, and idle."""
    work = conv_workload()
    runs = interleave(
        {
            "hand": fit(work, lambda: HandWritten(work, False)),
            "logits": fit(work, lambda: Plain(work), lambda: callback(work)),
            "logits, log 50": fit(work, lambda: Plain(work), lambda: callback(work), log_every_n_steps=50),
            "hand features": fit(work, lambda: HandWritten(work, True)),
            "features": fit(work, lambda: Plain(work), lambda: callback(work, True)),
            "teacher": inference(work),
            "adapters": adapters_arithmetic(work),
            "plain": fit(work, lambda: Plain(work)),
            "idle": fit(work, lambda: Plain(work), lambda: callback(work, True, weight=0.0)),
        },
        effort.conv,
        "convolutions",
    )
    note = "teacher inference and adapters in bare loops"
    return [
        absolute("convolutions: plain step", runs, "plain", "student alone, for scale"),
        absolute("convolutions: distillation step", runs, "logits", "student and teacher, for scale"),
        compare("logits / hand-written", runs, "logits", "hand", gate=1.02),
        compare("logits / hand-written, log_every_n_steps=50", runs, "logits, log 50", "hand"),
        compare("logits + 2 features / hand-written", runs, "features", "hand features", gate=1.02),
        compare("logits / (student + teacher)", runs, "logits", "plain", "teacher", gate=1.03, note=note),
        compare("hand-written logits / (student + teacher)", runs, "hand", "plain", "teacher"),
        compare(
            "logits + features / (student + teacher + adapters)",
            runs,
            "features",
            *("plain", "teacher", "adapters"),
            gate=1.05,
            note=note,
        ),
        compare(
            "hand-written features / (student + teacher + adapters)",
            runs,
            "hand features",
            *("plain", "teacher", "adapters"),
        ),
        compare("idle callback / plain", runs, "idle", "plain", gate=1.01, note="every weight 0"),
    ]


def mlp_questions(effort: Effort) -> list[Row]:
    """Steps of 1 ms: milliseconds beyond the hand-written module."""
    work = mlp_workload()
    runs = interleave(
        {
            "plain": fit(work, lambda: Plain(work)),
            "hand": fit(work, lambda: HandWritten(work, False)),
            "logits": fit(work, lambda: Plain(work), lambda: callback(work)),
            "logits, log 50": fit(work, lambda: Plain(work), lambda: callback(work), log_every_n_steps=50),
            "logits, log off": fit(work, lambda: Plain(work), lambda: callback(work, log=False)),
            "hand features": fit(work, lambda: HandWritten(work, True)),
            "features": fit(work, lambda: Plain(work), lambda: callback(work, True)),
            "idle": fit(work, lambda: Plain(work), lambda: callback(work, True, weight=0.0)),
            "empty": fit(work, lambda: Plain(work), Callback),
        },
        effort.mlp,
        "small MLP",
    )
    return [
        absolute("small MLP: hand-written logits step", runs, "hand", "for scale"),
        compare("small MLP: logits - hand-written", runs, "logits", "hand", unit="ms", gate=0.10),
        compare("small MLP: the same, log_every_n_steps=50", runs, "logits, log 50", "hand", unit="ms"),
        compare("small MLP: the same, log=False", runs, "logits, log off", "hand", unit="ms"),
        compare(
            "small MLP: logits + 2 features - hand-written", runs, "features", "hand features", unit="ms", gate=0.20
        ),
        compare("small MLP: idle callback - plain", runs, "idle", "plain", unit="ms"),
        compare("small MLP: empty callback - plain", runs, "empty", "plain", unit="ms", note="a bare Callback()"),
    ]


def validation_questions(effort: Effort) -> list[Row]:
    """Validation without the agreement, which must not touch the teacher, and with it."""
    work = conv_workload()
    calls = Calls()

    def counted() -> DistillCallback:
        made = callback(work, validate=False)
        calls.of(made.teacher)
        return made

    runs = interleave(
        {
            "plain": fit(work, lambda: Plain(work), validate=True),
            "off": fit(work, lambda: Plain(work), counted, validate=True),
            "on": fit(work, lambda: Plain(work), lambda: callback(work), validate=True),
            "teacher": inference(work),
        },
        effort.conv,
        "validation",
    )
    return [
        compare("validation, validate=False / plain", runs, "off", "plain", gate=1.02),
        Row("validation, validate=False: teacher calls", calls.number, "calls", gate=0),
        compare("validation with agreement / (student + teacher)", runs, "on", "plain", "teacher"),
    ]


def fast_teacher_questions(effort: Effort) -> list[Row]:
    """A teacher in bfloat16 or compiled: information, since both depend on the processor and the compiler."""
    work = conv_workload()
    inputs = [x for x, _ in work.batches]
    arms = {
        "teacher": inference(work),
        "step": fit(work, lambda: Plain(work), lambda: callback(work)),
    }
    names: dict[str, tuple[str, str]] = {}
    rows = []
    if has_bfloat16():
        arms["bf16 teacher"] = inference(work, torch.bfloat16)
        arms["bf16 step"] = fit(work, lambda: Plain(work), lambda: callback(work, teacher_dtype="bfloat16"))
        names["bf16"] = ("bfloat16 teacher", "teacher_dtype='bfloat16'")
    else:
        rows.append(Row("bfloat16 teacher", None, "x", note="not measured: this processor has no bfloat16"))
    if effort.compiled:
        try:
            compiled = torch.compile(copy.deepcopy(work.teacher))
            with torch.no_grad():
                compiled(inputs[0])
        except Exception as error:  # no compiler on this machine is one of many reasons
            rows.append(Row("compiled teacher", None, "x", note=f"not measured: {type(error).__name__}"))
        else:

            def compiled_callback() -> DistillCallback:
                return DistillCallback(compiled)

            arms["compiled teacher"] = forward_arm(compiled, inputs)
            arms["compiled step"] = fit(work, lambda: Plain(work), compiled_callback)
            names["compiled"] = ("compiled teacher", "teacher=torch.compile(teacher)")
    else:
        rows.append(Row("compiled teacher", None, "x", note="not measured with --quick"))
    runs: Runs = interleave(arms, effort.conv, "fast teachers")
    for name, (label, how) in names.items():
        rows.append(compare(f"{label} / float32 eager teacher", runs, f"{name} teacher", "teacher", note=how))
        rows.append(compare(f"step with {label} / with float32 eager teacher", runs, f"{name} step", "step", note=how))
    return rows


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16 by itself."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


class Calls:
    """Counts a network's forward passes."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, network: nn.Module) -> nn.Module:
        network.register_forward_hook(self._count)
        return network

    def _count(self, *_: Any) -> None:
        self.number += 1


def counting_questions() -> list[Row]:
    """Forward passes a step, and the size of checkpoints."""
    work, steps = conv_workload(), 5
    rows = []
    for label, with_features in (("logits", False), ("logits + 2 features", True)):
        student, teacher, distil = Calls(), Calls(), callback(work, with_features)
        teacher.of(distil.teacher)

        def module(student: Calls = student) -> Plain:
            made = Plain(work)
            student.of(made.network)
            return made

        trainer_for([distil]).fit(module(), Premade(work.batches, steps))
        rows.append(Row(f"{label}: student forwards a step", student.number / steps, "calls", gate=1))
        rows.append(Row(f"{label}: teacher forwards a step", teacher.number / steps, "calls", gate=1))
    plain, _ = checkpoint_size(work, None)
    logits, _ = checkpoint_size(work, callback(work))
    features, learned = checkpoint_size(work, callback(work, True))
    note = f"plain: {plain} bytes"
    rows.append(Row("checkpoint, logits / plain", logits / plain, "x", gate=1.01, note=note))
    note = f"adapters and their momentum: {learned} bytes"
    question = "checkpoint, features / (plain + adapters and their optimizer)"
    rows.append(Row(question, features / (plain + learned), "x", gate=1.01, note=note))
    return rows


def checkpoint_size(work: Workload, distil: DistillCallback | None) -> tuple[int, int]:
    """Bytes of a checkpoint after two steps, and bytes of the tensors in it that belong to adapters."""
    trainer = trainer_for([] if distil is None else [distil])
    trainer.fit(Plain(work), Premade(work.batches, 2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        return path.stat().st_size, 0 if distil is None else tensor_bytes(distil.adapter_state())


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(entry) for entry in value.values())
    return sum(tensor_bytes(entry) for entry in value) if isinstance(value, (list, tuple)) else 0


def import_question(effort: Effort) -> Row:
    """What ``import lightning_distill`` adds, in fresh processes."""
    cpu, wall = [], []
    for count in range(effort.imports + 1):
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        if count:  # the first one fills the file cache
            seconds = [float(word) for word in done.stdout.split()]
            cpu.append(seconds[0])
            wall.append(seconds[1])
    note = "after import lightning.pytorch"
    return spread("import lightning_distill", cpu, "s", 0.15, note, wall=sorted(wall)[len(wall) // 2])


def peer_rows() -> list[Row]:
    """The other libraries of the field, as far as this benchmark knows them."""
    return [
        Row(
            f"peer {name}", None, "", note="absent" if importlib.util.find_spec(module) is None else "not compared here"
        )
        for name, module in PEERS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, nothing compiled")
    parser.add_argument("--json", type=Path, default=Path("step_overhead.json"), help="where to write the figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    torch.set_num_threads(1)
    quiet_lightning()
    rows = [
        *conv_questions(effort),
        *mlp_questions(effort),
        *validation_questions(effort),
        *fast_teacher_questions(effort),
        *counting_questions(),
        import_question(effort),
        *peer_rows(),
    ]
    report("The cost of distillation in a step", rows, arguments.json, asdict(effort))


def quiet_lightning() -> None:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    main()
