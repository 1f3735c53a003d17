"""The parts of a DistillModel that the launcher's loop reaches into, all in one place."""

from __future__ import annotations

from typing import Any

from keras_distill.model import DistillModel
from keras_distill.steps import Step, in_step
from keras_distill.taps import Call
from keras_distill.targets import DistillTargets


def loss_of(model: DistillModel, student: Call, inputs: Any, output: Any, teacher_output: Any) -> Any:
    """The weighted sum of the terms for one call of the student.

    Args:
        model: The model with the teacher and the terms; it is not compiled.
        student: The student's call.
        inputs: The teacher's input.
        output: The student's output.
        teacher_output: The teacher's output, with features as ``DistillTargets`` carry them; None runs the teacher.

    Returns:
        A scalar.
    """
    step = Step(model, task_alone=True)  # regularisers are in the student's own loss, if the user wants them
    step.student = student
    targets = None if teacher_output is None else DistillTargets(None, teacher_output)
    with in_step(step):
        return model.compute_loss(x=output if inputs is None else inputs, y=targets, y_pred=output)
