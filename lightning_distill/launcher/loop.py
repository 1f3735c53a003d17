"""The distiller of a user's own loop, in which only hooks say what happens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_distill.distiller import Distiller
from lightning_distill.launcher.batches import as_arguments
from lightning_distill.launcher.training import CriterionTerm
from lightning_distill.recording import Call


class LoopDistiller(Distiller):
    """A distiller that records from :meth:`open` to :meth:`close`, and is told the student's output and the input.

    The adapters follow the first optimizer that steps with a parameter of the student, unless another is named.
    """

    _input: Any = None
    _given: Any = None
    _hook: RemovableHandle | None = None

    def open(self) -> None:
        """Begin to record."""
        self.adapters.awaits_leader = True
        self._recording = self.record()
        self._recording.__enter__()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def step(self, inputs: Any, output: Any, student_loss: Tensor, teacher_output: Any = None) -> Tensor:
        """The total loss of one call of the student.

        Args:
            inputs: What the teacher is called with; ``None`` is what the student was called with.
            output: The student's output.
            student_loss: The student's own loss, a scalar.
            teacher_output: The teacher's output if it is known; with features as ``{"output": ..., "features": {layer:
                tensor}}``.

        Returns:
            A scalar.

        Raises:
            ValueError: If the student was not called as a module where its layers are read, or as :meth:`total`.
        """
        recorder: Any = self._recorder
        calls = recorder.calls
        call = next((one for one in calls if one.output is output), calls[-1] if calls else None)
        if call is None:
            if any(term.student_taps for term in self.terms):
                raise ValueError(self._never_called())
            call = Call((), {}, trains=True)
        call.output, call._output_versions = output, []
        recorder.calls[:] = [call]
        self._input, self._given = inputs, teacher_output
        for term in self.terms:
            if isinstance(term, CriterionTerm):
                term.student_loss = student_loss
        try:
            return self.total(student_loss)
        finally:
            self._input = self._given = None

    def answers(self, call: Call) -> list[Call]:
        """The teacher's answer: the one that was given, or its own."""
        if self._given is None:
            return super().answers(call)
        answer = Call((), {}, output=self._given, who="teacher", read_logits=self.logits)
        if isinstance(self._given, dict) and self._given.keys() == {"output", "features"}:
            answer.output = self._given["output"]
            for layer, feature in self._given["features"].items():
                answer._runs[layer, "output"] = [(feature, [])]
        call.read_logits = self.logits
        return [answer]

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for the input that was named, or for the student's own."""
        if self._input is None:
            return super().teacher_forward(call)
        args, kwargs = as_arguments(self.frozen.cast(self._input))
        return self.teacher(*args, **kwargs)

    def close(self) -> None:
        """Stop recording, remove every hook, and give the teacher back as it was."""
        if self._hook is not None:
            self._hook.remove()
            self._recording.__exit__(None, None, None)
            self._hook = None
        super().close()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch before any optimizer's step."""
        if not self.adapters.leaderless:
            return
        mine = {id(parameter) for parameter in self.student.parameters()}
        if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            self.follow(optimizer)

    def _never_called(self) -> str:
        return (
            f"Expected the student, {type(self.student).__name__}, to be called with gradients before"
            " `on_after_compute_loss`, but it was not. Call it as a module, model(x) and not model.forward(x)."
        )


def export(model: torch.nn.Module, path: str, example: Any) -> None:
    """Write a model as a program of torch.export, which runs without its source.

    Args:
        model: The model; it is traced in eval mode and put back.
        path: File to write, usually ``.pt2``.
        example: Inputs to trace it with.
    """
    args, kwargs = as_arguments(example)
    training = model.training
    try:
        torch.export.save(torch.export.export(model.eval(), args, kwargs), path)
    finally:
        model.train(training)
