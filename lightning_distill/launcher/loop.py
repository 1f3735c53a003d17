"""The distiller for a user's own training loop, which calls the hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_distill import checks
from lightning_distill.distiller import Distiller
from lightning_distill.launcher.criteria import SelfKnowledgeDistillationLoss
from lightning_distill.launcher.last_call import LastCall
from lightning_distill.launcher.training import CriterionTerm
from lightning_distill.recording import Call, find_layer
from lightning_distill.recording.batches import as_arguments
from lightning_distill.step_calls import StepCalls


class LoopDistiller(Distiller):
    """A distiller that records from :meth:`open` to :meth:`close`; the loop passes the input and the student's output.

    The adapters follow the first optimizer that steps with a parameter of the student, unless another is named.

    Attributes:
        keyed: A criterion that reads the student's output directly if that is a dict with all of its names.
    """

    keyed: SelfKnowledgeDistillationLoss | None = None
    _input: Any = None
    _hook: RemovableHandle | None = None

    def open(self) -> None:
        """Begin to record."""
        self._learned.awaits_leader = True
        self._recording = self.record()
        self._calls = LastCall()
        self._step.student.keep(self._calls)
        self._recording.__enter__()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Tensor:
        """The total loss of one call of the student.

        Args:
            inputs: The teacher's input; ``None`` takes the student's.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known; with features, ``{"output": ..., "features": {layer:
                tensor}}``.

        Returns:
            A scalar.

        Raises:
            ValueError: If the terms read layers and the student was not called as a module, if it was called again
                since, or as in :meth:`total`.
        """
        student_loss = torch.as_tensor(student_loss)
        if self.keyed is not None and self.keyed.reads(output):
            self.release()
            return self.keyed(output, teacher_output, student_loss)
        call = self._call_of(output, read=inputs is None and teacher_output is None)
        self._input = inputs
        criteria = [term for term in self.terms if isinstance(term, CriterionTerm)]
        for term in criteria:
            term.student_loss = student_loss
        try:
            call.output, call.output_versions = output, []  # the loop may have made it from the student's own
            return self._total(student_loss, None, StepCalls([call], self._teacher_calls(teacher_output)))
        finally:
            self._input = None
            for term in criteria:
                term.student_loss = None

    def _teacher_calls(self, output: Any) -> list[Call] | None:
        """The teacher's output that the loop has passed, as a call; None if it has passed none."""
        if output is None:
            return None
        if isinstance(output, dict) and output.keys() == {"output", "features"}:
            features = {(layer, "output"): feature for layer, feature in output["features"].items()}
            return [Call.from_outputs(output["output"], features, read_logits=self.logits)]
        return [Call.from_outputs(output, read_logits=self.logits)]

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for the input of :meth:`step`, or for the student's own."""
        if self._input is None:
            return super().teacher_forward(call)
        args, kwargs = as_arguments(self._step.source.cast(self._input))
        return self.teacher(*args, **kwargs)

    def close(self) -> None:
        """Stop recording, remove every hook, and restore the teacher."""
        if self._hook is not None:
            self._hook.remove()
            self._recording.__exit__(None, None, None)
            self._hook = None
        super().close()

    def _call_of(self, output: Any, read: bool) -> Call:
        """The student's last call; an empty call if neither its inputs nor its layers are read."""
        reads_layers = any(term.student_taps for term in self.terms)
        if (read or reads_layers) and self._calls.replaced(output):
            raise ValueError(
                "Expected `student_output` to be the output of the student's last call, but got that of an earlier one."
                " Call `on_after_compute_loss` before the student is called again: one call is kept."
            )
        if self._calls:
            return self._calls[-1]
        if reads_layers:
            raise ValueError(self._never_called())
        return Call((), {}, trains=True)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch before any optimizer's step."""
        if not self._learned.leaderless:
            return
        parameters = {id(parameter) for parameter in self.student.parameters()}
        if any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
            self.follow(optimizer)

    def _never_called(self) -> str:
        return (
            f"Expected the student, {type(self.student).__name__}, to be called with gradients before"
            " `on_after_compute_loss`, but it was not. Call it as a module, model(x) and not model.forward(x)."
        )


class KeyedLoop:
    """Self-distillation of a dict of tensors that the loop passes; nothing is recorded, and no adapters are used.

    Args:
        student: The student.
        criterion: The criterion; some of its names are not layers of the student.
    """

    def __init__(self, student: nn.Module, criterion: SelfKnowledgeDistillationLoss) -> None:
        self.student, self.criterion = student, criterion

    def open(self) -> None:
        """No-op: nothing is recorded."""

    def step(self, inputs: Any, output: Any, student_loss: Any, teacher_output: Any = None) -> Tensor:
        """The total loss of a dict of tensors.

        Raises:
            ValueError: If the output is not a dict that holds every name of the criterion.
        """
        keys = [str(key) for key in output] if isinstance(output, Mapping) else []
        lacking = next((name for name in self.criterion.names if name not in keys), None)
        if lacking is not None:
            known = [*keys, *(name for name, _ in self.student.named_modules())]
            received = f"keys {keys}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
            expected = f"`student_output` to be a dict with the key {lacking!r}, which is not a layer of the student"
            raise ValueError(checks.message(expected, received, checks.closest(lacking, known)))
        return self.criterion(output, teacher_output, torch.as_tensor(student_loss))

    def parameters(self) -> list[nn.Parameter]:
        """An empty list: no adapters are used."""
        return []

    def follow(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """No-op: no adapters are used."""

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No-op: the state is empty."""

    def release(self) -> None:
        """No-op: nothing is recorded."""

    def close(self) -> None:
        """No-op: no hooks are used."""


def loop_of(
    student: nn.Module, teacher: nn.Module | None, criterion: Any, terms: list[Any], task_weight: float
) -> LoopDistiller | KeyedLoop:
    """The loop for a criterion, not open yet.

    Args:
        student: The student.
        teacher: The teacher; not used if no term needs it.
        criterion: The criterion.
        terms: Its terms.
        task_weight: Factor of the student's own loss.

    Returns:
        The loop.

    Raises:
        ValueError: If a layer does not exist, or the teacher is missing or shares parameters with the student.
    """
    keyed = criterion if isinstance(criterion, SelfKnowledgeDistillationLoss) else None
    if keyed is not None and not all(find_layer(student, name) is not None for name in keyed.names):
        return KeyedLoop(student, keyed)
    if not any(term.needs_teacher for term in terms):
        teacher = None  # it may be the student itself, as in the older API's self-distillation
    loop = LoopDistiller(student, teacher, terms, task_weight=task_weight)
    loop.keyed = keyed
    return loop


def export(model: torch.nn.Module, path: str, example: Any) -> None:
    """Write a model as a program of torch.export, which runs without its source.

    Args:
        model: The model; it is traced in eval mode, and its mode is restored.
        path: File to write, usually ``.pt2``.
        example: Inputs to trace it with.
    """
    args, kwargs = as_arguments(example)
    training = model.training
    try:
        torch.export.save(torch.export.export(model.eval(), args, kwargs), path)
    finally:
        model.train(training)
