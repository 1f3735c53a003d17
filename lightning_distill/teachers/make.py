"""From what a user passes as the teacher to a source of its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_distill.recording import Call, Tap
from lightning_distill.teachers.callable_teacher import takes_arrays
from lightning_distill.teachers.group import GroupSource, TeacherGroup
from lightning_distill.teachers.hold import memory_of, modules_of_student
from lightning_distill.teachers.inputs import TeacherInputs
from lightning_distill.teachers.moving_average import EMATeacher
from lightning_distill.teachers.route import Route
from lightning_distill.teachers.self_teacher import SelfTeacher
from lightning_distill.teachers.source import LiveTeachers, NoTeacher, TeacherEnsemble, TeacherSource


def as_teacher(teacher: Any) -> Any:
    """The teacher as one object: several networks become an ensemble, other teachers together a group.

    Anything else is returned unchanged.

    Raises:
        TypeError: If something in it is not a teacher.
        ValueError: If it is an empty sequence, or several caches.
    """
    if isinstance(teacher, nn.ModuleList) and not isinstance(teacher, TeacherEnsemble):  # it has no forward
        teacher = list(teacher)
    if teacher is None or _is_teacher(teacher) or isinstance(teacher, TeacherGroup):
        return teacher
    if isinstance(teacher, (str, bytes, dict)) or not isinstance(teacher, Sequence):
        if not isinstance(teacher, type) and (callable(teacher) or takes_arrays(teacher)):
            raise TypeError(
                f"Expected `teacher` to be a module or a sequence of modules, but got teacher={teacher!r}. Wrap a"
                " function, a session or an estimator: CallableTeacher(function)."
            )
        got = f"the class {teacher.__name__}" if isinstance(teacher, type) else f"teacher={teacher!r}"
        raise TypeError(
            f"Expected `teacher` to be a module or a sequence of modules, but got {got}."
            " Use load_teacher(checkpoint, model) for a file."
        )
    if not teacher:
        raise ValueError("Expected `teacher` to be at least one module, but got an empty sequence. Pass a network.")
    if wrong := [type(each).__name__ for each in teacher if not _is_teacher(each)]:
        raise TypeError(
            f"Expected `teacher` to hold modules only, but got {wrong[0]}. Pass networks, or CallableTeacher(function)."
        )
    if all(isinstance(each, nn.Module) for each in teacher):
        return TeacherEnsemble(teacher)
    return teacher[0] if len(teacher) == 1 else TeacherGroup(teacher)


def _is_teacher(teacher: Any) -> bool:
    """Whether it is one teacher: a network, the student itself, its moving average, or a cache."""
    return isinstance(teacher, (nn.Module, SelfTeacher, EMATeacher)) or hasattr(teacher, "as_source")


def as_source(
    teacher: Any,
    taps: Sequence[Tap],
    forward: Callable[[Call], Any],
    dtype: torch.dtype | None,
    inputs: TeacherInputs | None = None,
    route: Route | None = None,
) -> TeacherSource:
    """The source of a teacher that :func:`as_teacher` has returned.

    Args:
        teacher: A network, an ensemble, the student itself, its moving average, a cache, a group, or ``None``.
        taps: The layers of the teacher that terms read.
        forward: The teacher's output for a call of the student.
        dtype: The precision of networks.
        inputs: Makes the teacher's inputs from the student's call; ``None`` takes the student's.
        route: Says which examples each of several networks answers for.

    Raises:
        ValueError: If other inputs are given for a cache, which holds the outputs already, or a teacher of a group is
            to be called in a way of the user's own.
    """
    if teacher is None:
        return NoTeacher()
    if isinstance(teacher, TeacherGroup):
        return GroupSource([_member_source(each, taps, dtype, inputs) for each in teacher])
    if isinstance(teacher, nn.Module):
        return LiveTeachers(teacher, taps, forward, dtype, inputs, route)
    if isinstance(teacher, SelfTeacher):
        if dtype is not None:
            raise ValueError(
                f"Expected `teacher_dtype` to be None with a SelfTeacher, which has the student's precision, but got"
                f" teacher_dtype={dtype}."
            )
        return teacher.source(forward, inputs or TeacherInputs(None, {}))
    if isinstance(teacher, EMATeacher):
        if dtype is not None:
            raise ValueError(
                "Expected `teacher_dtype` to be None with an EMATeacher, which has the student's precision, but got"
                f" teacher_dtype={dtype}."
            )
        return teacher.source(taps, forward, inputs)
    if inputs is not None and inputs.place is not None:
        raise ValueError(
            "Expected `teacher_inputs` to be None with a cache, which holds the teacher's outputs already, but got"
            f" teacher_inputs={inputs.place!r}. Pass it to TeacherCache.build."
        )
    source: TeacherSource = teacher.as_source()
    return source


def _member_source(
    teacher: Any, taps: Sequence[Tap], dtype: torch.dtype | None, inputs: TeacherInputs | None
) -> TeacherSource:
    """The source of one teacher of a group."""
    if inputs is not None and inputs.chosen:
        raise ValueError(
            "Expected `teacher_forward` not to be overridden where the teachers are not all networks, but it is. Pass"
            " teacher_inputs=<function>."
        )
    is_cache = hasattr(teacher, "as_source")  # it holds the answers to inputs of its own
    own_inputs = None if is_cache else copy.copy(inputs)  # each notes which arguments its network takes
    return as_source(teacher, taps, lambda call: teacher(*call.args, **call.kwargs), dtype, own_inputs)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name.

    Raises:
        ValueError: If the name is not that of a floating point dtype.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ValueError(
            f"Expected `teacher_dtype` to be a floating point dtype, but got teacher_dtype={dtype!r}."
            " Pass 'bfloat16', 'float16', 'float32' or 'float64'."
        )
    return named


def check_shares_nothing(student: nn.Module, teachers: Iterable[nn.Module], further_remedy: str = "") -> None:
    """Raise if the teacher has a parameter that the student trains, or one with the same memory.

    ``nn.Parameter(other)`` and ``parameter.data = other.data`` copy no values. A teacher that is a part of the
    student's module (``self.teacher``) does not count as the student's, and frozen parameters may be shared.

    Args:
        student: The student, or the module that contains it.
        teachers: The teacher's networks.
        further_remedy: A sentence for the message.

    Raises:
        ValueError: If so.
    """
    networks = [*teachers]
    own = modules_of_student(student, networks)
    trained = {memory_of(p) for module in own for p in module.parameters(recurse=False) if p.requires_grad}
    if not trained:  # everything that the student trains is inside the teacher
        trained = {memory_of(parameter) for parameter in student.parameters() if parameter.requires_grad}
    for network in networks:
        for name, parameter in network.named_parameters():
            if memory_of(parameter) in trained:
                raise ValueError(
                    f"Expected `teacher` to share no parameter with the student, but both train {name!r}. Pass"
                    f" copy.deepcopy(teacher), or freeze the shared parameters.{further_remedy}"
                )
