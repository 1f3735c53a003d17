"""The settings of a distillation: those that a run reads, and as hyper-parameters for its loggers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_distill import compat
from lightning_distill.adapters import OptimizerCallable
from lightning_distill.cache import TeacherCache
from lightning_distill.losses import DistillationLoss
from lightning_distill.on_policy import OnPolicyDistillation
from lightning_distill.recording import Call
from lightning_distill.schedules import Schedule
from lightning_distill.teachers import EMATeacher, SelfTeacher, members
from lightning_distill.teachers.inputs import Place
from lightning_distill.terms import DistillationTerm
from lightning_distill.terms.mixing import TeacherMix

OneTeacher = nn.Module | SelfTeacher | EMATeacher | TeacherCache
Teacher = OneTeacher | Sequence[OneTeacher] | None
Terms = DistillationTerm | DistillationLoss | Sequence[DistillationTerm | DistillationLoss] | None
Plain = str | int | float | bool | None


class Settings(Protocol):
    """The settings of a callback that a run reads, and the methods that users override."""

    name: str
    teacher: Any
    terms: list[DistillationTerm]
    student: str | Sequence[str] | None
    labels: str | int | Callable[[Any], Tensor] | None
    teacher_inputs: Place
    teacher_dtype: torch.dtype | None
    adapter_optimizer: OptimizerCallable | None
    validate: bool | None
    logs: bool
    prog_bar: tuple[str, ...]
    task_weight: Any
    schedules: dict[str, Schedule]
    on_policy: OnPolicyDistillation | None
    mix: TeacherMix

    @property
    def distils_alone(self) -> bool:
        """Whether no task loss counts."""

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for a call of the student."""

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output."""


def log_hyperparameters(trainer: Trainer, values: dict[str, Plain]) -> None:
    """Hand hyper-parameters to every logger, together with those that Lightning logs by itself.

    They go together because TensorBoard shows only the first set that a run logs.

    Args:
        trainer: The Trainer, before it logs the hyper-parameters of the module and the data.
        values: The hyper-parameters.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_hyperparams({**compat.logged_hyperparameters(trainer), **values})


def settings_of(callback: Any) -> dict[str, Plain]:
    """The settings of a callback and its terms, as numbers and text.

    Args:
        callback: The callback.

    Returns:
        ``<name>/teacher``, ``<name>/student``, ``<name>/task_weight``, and for each term ``<name>/<term>/term``, its
        ``weight`` and ``loss``, and the settings of the loss, such as ``temperature``. A schedule is given in words.
    """
    dtype = callback.teacher_dtype
    settings: dict[str, Any] = {
        "teacher": _teacher(callback.teacher),
        "teacher_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "student": callback.student,
        "task_weight": callback.schedules.get("task_weight", callback.task_weight),
        **callback.mix.settings(),
    }
    if (on_policy := callback.on_policy) is not None:
        names = ("fraction", "max_new_tokens", "temperature", "seed")
        values = {name: on_policy.schedules.get(name, getattr(on_policy, name)) for name in names}
        settings |= {f"on_policy/{name}": value for name, value in values.items()}
    for term in callback.terms:
        of_term = {"term": _one_line(term), "weight": term.schedules.get("weight", term.weight)}
        if (loss := getattr(term, "loss", None)) is not None:
            of_term |= {"loss": getattr(loss, "__qualname__", type(loss).__qualname__), **_settings_of_loss(loss)}
        settings |= {f"{term.name}/{name}": value for name, value in of_term.items()}
    return {f"{callback.name}/{name}": _plain(value) for name, value in settings.items()}


def _settings_of_loss(loss: Any) -> dict[str, Any]:
    schedules = getattr(loss, "schedules", {})
    return {name: schedules.get(name, getattr(loss, name)) for name in getattr(loss, "_shown", ())}


def _teacher(teacher: Any) -> Any:
    names = [f"{type(each).__module__}.{type(each).__qualname__}" for each in members(teacher)]
    return None if teacher is None else ", ".join(names)


def _one_line(term: DistillationTerm) -> str:
    return f"{type(term).__name__}({' '.join(term.extra_repr().split())})"


def _plain(value: Any) -> Plain:
    """A value that YAML can hold and read again; anything else is given in words."""
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
