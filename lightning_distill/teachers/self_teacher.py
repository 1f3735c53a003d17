"""The student as its own teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_distill.recording import Call, Tap, first_tensor
from lightning_distill.teachers.inputs import TeacherInputs
from lightning_distill.teachers.without_network import WithoutNetwork


@contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own mode again.

    Args:
        network: The network.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()  # some releases of torch would use its weights, without gradients, in the step


@contextmanager
def _without_adapters(student: Any) -> Iterator[None]:
    """The model that the adapters were added to. PEFT would then train those again that the user has frozen."""
    trained = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    try:
        with student.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


class SelfTeacher:
    """The student as its own teacher: without its adapters of PEFT, or with a richer prompt.

    It runs in eval mode and without gradients, with the weights that the student has at that moment, and takes no
    memory of its own. ``adapters=False`` is the model that the adapters were added to. With adapters it is the student
    itself, so pass ``teacher_inputs=`` to the callback, such as the same question with its answer in the prompt.

    Args:
        student: The network that is trained, in the module or loop that owns it.
        adapters: Whether its adapters are on.

    Raises:
        TypeError: If ``student`` is not a module.
        ValueError: If it has no adapters to leave out.

    Example:
        >>> student = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
        >>> teacher = SelfTeacher(student)
        >>> teacher(torch.ones(1, 2)).requires_grad, student.training
        (False, True)
    """

    def __init__(self, student: nn.Module, *, adapters: bool = True) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"Expected `student` to be a module, but got student={student!r}.")
        if not adapters and not callable(getattr(student, "disable_adapter", None)):
            raise ValueError(
                f"Expected `student` to have adapters of PEFT, but got a {type(student).__name__}. Pass the model that"
                " peft.get_peft_model has returned."
            )
        self.student, self.adapters = student, adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output for a teacher's input."""
        with evaluated(self.student), nullcontext() if self.adapters else _without_adapters(self.student):
            return self.student(*args, **kwargs)

    def source(self, forward: Callable[[Call], Any], inputs: TeacherInputs) -> SelfSource:
        """The source of its outputs."""
        return SelfSource(self, forward, inputs)


class SelfSource(WithoutNetwork):
    """The source of a student that teaches itself. The network belongs to the training.

    Args:
        teacher: The teacher.
        forward: Its output for a call of the student.
        inputs: Makes its inputs from the student's call.
    """

    def __init__(self, teacher: SelfTeacher, forward: Callable[[Call], Any], inputs: TeacherInputs) -> None:
        self._teacher, self._forward, self._inputs = teacher, forward, inputs
        self._compared = False
        inputs.look_at([teacher.student])

    def check_student(self, student: nn.Module) -> None:
        """Raise if it would answer with another network than the one that is trained.

        Args:
            student: The student, or the module that contains it.

        Raises:
            ValueError: If so.
        """
        if not set(student.modules()) & set(self._teacher.student.modules()):
            raise ValueError(
                "Expected the SelfTeacher to hold the student that is trained, but got another network, such as the one"
                " that a copied module was copied from. Pass SelfTeacher(<the student inside the trained module>)."
            )

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if a term reads a layer.

        Raises:
            ValueError: If so.
        """
        if taps:
            raise ValueError(
                f"Expected terms on outputs with a SelfTeacher, but {taps[0][0]} names a layer. Use LogitsDistillation"
                " or SequenceDistillation."
            )

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The student's output for the teacher's input."""
        shown = self._inputs.of(call)
        answer = Call(shown.args, shown.kwargs, who="teacher", read_logits=call.read_logits)
        answer.output = self._forward(shown)
        bare = self._teacher.adapters and self._inputs.place is None
        if bare and self._teacher.student.training and not self._compared:
            self._compared = True
            _check_differs(call, answer)
        return [answer]


def _check_differs(call: Call, answer: Call) -> None:
    """Raise if student and teacher have the same output. It waits for the device."""
    student, teacher = (first_tensor(each.output) for each in (call, answer))
    if student.shape == teacher.shape and torch.equal(student, teacher):
        raise ValueError(
            "Expected the SelfTeacher to answer otherwise than the student, but got the same output: it has the same"
            " weights, no dropout and the same input. Pass teacher_inputs=<function> for a richer prompt, or"
            " SelfTeacher(student, adapters=False)."
        )
