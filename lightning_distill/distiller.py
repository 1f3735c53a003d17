"""The distiller: from a step's recorded calls to the teacher's answers, the terms and the total loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill import checks
from lightning_distill.adapter_trainer import AdapterTrainer
from lightning_distill.cache import IndexedBatch, TeacherCache
from lightning_distill.cache.teacher import CachedTeacher
from lightning_distill.labels import find_labels
from lightning_distill.outputs import first_tensor, select
from lightning_distill.schedules import Progress, Schedule, Scheduler, first_value
from lightning_distill.student import StudentFinder
from lightning_distill.taps import Call, Recorder, Recording
from lightning_distill.teacher import FrozenTeacher, NoTeacher, TeacherEnsemble, as_dtype, as_teacher
from lightning_distill.terms import DistillationTerm, LogitsDistillation

Terms = DistillationTerm | Sequence[DistillationTerm] | None


class Distiller:
    r"""What turns the student's calls in a training step into the total loss; it needs no Trainer.

    .. math:: \text{total} = w_{task} \, L_{task} + \sum_i w_i \, D_i(A_i(F^{student}_i), F^{teacher}_i)

    With several teachers each term is averaged over them. A weight of 0 skips the work behind it.

    Args:
        student: The network that is called in the step.
        teacher: The network to match, or several, held in eval mode without gradients until :meth:`close`; ``None``
            where no term needs one.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``.
        task_weight: Factor of the task loss, 0 or greater, or a schedule.
        labels: Where a batch keeps its labels: a key, an index, or a function of the batch; ``None`` looks in the usual
            places. Read only for losses that need labels.
        teacher_dtype: The teacher's precision, such as ``"bfloat16"``, whatever surrounds it.

    Attributes:
        parts: After a step the detached parts of the total: ``task_loss``, ``distillation_loss`` (the weighted sum) and
            ``<term>_loss`` of each term, without its weight.

    Raises:
        ValueError: If teacher and student share parameters, terms share a name, or a weight is negative.
        TypeError: If the teacher is no module, or a term is no :class:`DistillationTerm`.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> with Distiller(student, teacher) as distiller:
        ...     distiller.follow(optimizer)
        ...     with distiller.record():
        ...         loss = nn.functional.cross_entropy(student(x), y)
        ...     distiller.total(loss, (x, y)).backward()
        ...     optimizer.step()
        >>> sorted(distiller.parts)
        ['distillation_loss', 'logits_loss', 'task_loss']
    """

    _checks_at_once = True  # not where layers may be made later

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherCache | Sequence[nn.Module] | None,
        terms: Terms = None,
        *,
        task_weight: float | Schedule = 1.0,
        labels: str | int | Callable[[Any], Tensor] | None = None,
        teacher_dtype: torch.dtype | str | None = None,
    ) -> None:
        self.schedules: dict[str, Schedule] = {}
        self.task_weight = first_value("task_weight", task_weight, checks.non_negative, self.schedules)
        self.student, self.teacher, self.terms = student, as_teacher(teacher), as_terms(terms)
        self.labels, self._rows = labels, None
        self.loaders: Any = None  # a cache's part of the current fit
        self.parts: dict[str, Tensor] = {}
        self.batch_size = 0
        self.frozen = FrozenTeacher(self.teacher, as_dtype(teacher_dtype))
        self._several = isinstance(self.teacher, TeacherEnsemble)
        self._recorder: Recorder | StudentFinder | None = None
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        cached = isinstance(self.teacher, CachedTeacher)
        teachers = list(self.teacher.children()) if self._several else [] if cached else [self.teacher]
        self._teachers = [Recorder(one, taps, "teacher") for one in teachers] if taps else []
        self.adapters = AdapterTrainer(self.terms)
        self.scheduler = Scheduler(self.terms, self)
        self._step, self._counts = 0, True  # whether steps are counted here and not told
        if self._checks_at_once:
            self.check()

    # What users override ---------------------------------------------------------------------------------------------

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for a call of the student; by default it is shown just what the student was.

        Args:
            call: The student's call; ``call.args`` and ``call.kwargs`` are in the teacher's precision.

        Returns:
            The output, or with several teachers the list of their outputs.
        """
        return self.teacher(*call.args, **call.kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output: the tensor itself, its ``logits``, or its first element."""
        return select(output, None, "the model's output")

    # A step ----------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether every term's weight is 0."""
        return all(term.weight == 0 for term in self.terms)

    def record(self, needs_grad: bool = True, features: bool = True) -> AbstractContextManager[None]:
        """A context in which the student's calls are recorded.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep what the tapped layers give.
        """
        if self._recorder is None:
            self.check()
            self._recorder = self._watch()
        return Recording(self._recorder.watched, needs_grad, features)

    def total(self, task_loss: Tensor, batch: Any = None) -> Tensor:
        """The total loss of the calls recorded since the last total.

        Args:
            task_loss: The student's own loss on its labels, a scalar.
            batch: The batch, where a term needs its labels.

        Returns:
            ``task_weight * task_loss + sum of weighted terms``, a scalar.

        Raises:
            ValueError: If the student was not called, a layer did not run, a shape does not fit, labels are missing.
        """
        if self.scheduler and self._counts:
            self.scheduler.advance(Progress(self._step))
            self._step += 1
        distillation = self.loss(batch)
        self.parts["task_loss"] = task_loss.detach()
        # where all weights are 0 the task loss stays even so: a total without any graph could not be differentiated
        if self.task_weight == 0 and distillation.requires_grad:
            return distillation
        return _weighted(self.task_weight, task_loss) + distillation

    def advance(self, step: int, epoch: int | None = None, fraction: float | None = None) -> None:
        """Set what schedules determine, before a step; not needed for schedules over the calls of :meth:`total`.

        Args:
            step: Optimizer steps made so far.
            epoch: The epoch, from 0, for schedules over epochs.
            fraction: Share of the whole training, from 0 to 1, for schedules over it.

        Raises:
            ValueError: If a schedule needs what is not given.
        """
        self._counts = False
        self.scheduler.advance(Progress(step, epoch, fraction))

    def loss(self, batch: Any = None) -> Tensor:
        """The weighted sum of the terms, without the task loss, over the calls recorded since the last one.

        Args:
            batch: The batch, where a term needs its labels.

        Returns:
            A scalar.

        Raises:
            ValueError: As :meth:`total`.
        """
        try:
            return self._loss(batch)
        finally:
            self.release()

    def _loss(self, batch: Any) -> Tensor:
        self._rows, batch = batch[::-1] if isinstance(batch, IndexedBatch) else (None, batch)
        active = [term for term in self.terms if term.weight != 0]
        if not active:
            self.parts = {}
            return torch.zeros((), device=next((parameter.device for parameter in self.student.parameters()), None))
        calls = self._recorder.calls if self._recorder else []
        if not calls:
            raise ValueError(self._never_called())
        self.adapters.check_trained()
        labels = find_labels(batch, self.labels) if any(term.needs_labels for term in active) else None
        values: dict[str, list[Tensor]] = {term.name: [] for term in active}
        asks = any(term.needs_teacher for term in self.terms)
        for call in calls:
            call.check_input()
            answers = self.answers(call) if asks else [Call((), {}, who="teacher")]
            self.adapters.build(call, answers)
            for term in active:
                values[term.name] += [term(call, answer, labels) for answer in answers]
        parts = {name: each[0] if len(each) == 1 else torch.stack(each).mean() for name, each in values.items()}
        weighted = [_weighted(term.weight, parts[term.name]) for term in active]
        loss = sum(weighted[1:], weighted[0])
        self.parts = {f"{name}_loss": part.detach() for name, part in parts.items()}
        self.parts["distillation_loss"] = loss.detach()
        return loss

    def answers(self, call: Call) -> list[Call]:
        """The answer of each teacher to a call of the student.

        Args:
            call: The student's call.

        Returns:
            One call for each teacher, with its output and the features at the terms' taps.
        """
        first = first_tensor(call.args, call.kwargs, call.output)
        device, self.batch_size = first.device, len(first) if first.ndim else 1
        if isinstance(self.teacher, CachedTeacher):
            call.read_logits = self.logits
            return [self.teacher.answer_step(call, self.loaders, self._rows, self.logits)]
        self.frozen.freeze(device)
        self.frozen.still()
        call.read_logits, shown = self.logits, call
        plain: AbstractContextManager[None] = nullcontext()
        if self.frozen.dtype is not None:  # its own precision, whatever surrounds it
            shown = replace(call, args=self.frozen.cast(call.args), kwargs=self.frozen.cast(call.kwargs))
            plain = torch.autocast(device.type, enabled=False)
        # not inference_mode: its tensors could not be saved for the backward
        with torch.no_grad(), plain, Recording(self._teachers):
            output = self.teacher_forward(shown)
        answers = []
        for index, one in enumerate(output if self._several else [output]):
            recorded = self._teachers[index].calls if self._teachers else []
            # an override may answer without calling the teacher: then there are no features to read
            answer = recorded[-1] if recorded else Call((), {}, who="teacher")
            answer.output, answer.teacher, answer.read_logits = one, index, self.logits
            answers.append(answer)
        return answers

    def agree(self) -> list[tuple[Tensor, Tensor]]:
        """The logits of both sides for each call recorded since the last loss.

        Returns:
            Pairs of the student's and the teacher's logits; of several teachers the log of their mean probabilities.
        """
        try:
            pairs = []
            alone = isinstance(self.teacher, (NoTeacher, CachedTeacher))
            for call in self._recorder.calls if self._recorder and not alone else []:
                theirs = [answer.logits for answer in self.answers(call)]
                if self._several:
                    theirs = [torch.stack([one.float().softmax(self.class_dim) for one in theirs]).mean(0).log()]
                pairs.append((call.logits.detach(), theirs[0]))
            return pairs
        finally:
            self.release()

    @property
    def class_dim(self) -> int:
        """Dimension of the logits that counts the classes, as the first term on logits has it."""
        return next((term.class_dim for term in self.terms if isinstance(term, LogitsDistillation)), -1)

    # Adapters --------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, for an optimizer of the user's own; they exist after the first total.

        Raises:
            ValueError: If a term reads layers and no batch has shown their shapes yet.
        """
        return self.adapters.hand_over()

    def follow(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the adapters step with the student's optimizer, with its class and settings.

        Args:
            optimizer: The student's optimizer, bare or wrapped by Lightning or Fabric.
            scaler: The gradient scaler of a hand-written loop.

        Raises:
            ValueError: If the optimizer cannot be cloned; then give :meth:`parameters` to one of your own.
        """
        self.adapters.follow(optimizer, scaler)

    def state_dict(self) -> dict[str, Any]:
        """The adapters, their optimizer's state and the steps counted; empty where there are none of them.

        It never holds the teacher.
        """
        return {**self.adapters.state_dict(), **({"step": self._step} if self.scheduler and self._counts else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the adapters are filled when the next batch has shown their shapes.

        Args:
            state: What :meth:`state_dict` gave; an empty one starts with fresh adapters.
        """
        self.adapters.load_state_dict(state)
        self._step = state.get("step", 0)

    def release(self) -> None:
        """Let go of everything captured from the last step."""
        for recorder in (self._recorder, *self._teachers):
            if recorder is not None:
                recorder.clear()

    def close(self) -> None:
        """Remove every hook and give the teacher back as it was. The adapters stay; recording again starts over."""
        self.adapters.unfollow()
        for recorder in (self._recorder, *self._teachers):
            if recorder is not None:
                recorder.detach()
        self._recorder = None
        self.frozen.release()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Checks ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> Recorder | StudentFinder:
        return Recorder(self.student, [tap for term in self.terms for tap in term.student_taps])

    def check(self) -> None:
        """Raise if a tapped layer does not exist, or the teacher shares parameters with the student.

        Raises:
            ValueError: With the closest layer names.
        """
        lacking = next((term.name for term in self.terms if term.needs_teacher), None)
        if lacking is not None and isinstance(self.teacher, NoTeacher):
            raise ValueError(
                f"Expected `teacher` to be a module, since term {lacking!r} reads it, but got teacher=None. Pass the"
                " teacher, or terms of SelfDistillation alone."
            )
        if isinstance(self.teacher, CachedTeacher):
            reads_logits = any(isinstance(term, LogitsDistillation) for term in self.terms)
            self.teacher.check([tap for term in self.terms for tap in term.teacher_taps], reads_logits)
        for side, recorders in (("student", [self._watch()]), ("teacher", self._teachers)):
            taps = [
                (f"terms[{index}].{side}_layer", tap)
                for index, term in enumerate(self.terms)
                for tap in getattr(term, f"{side}_taps")
            ]
            for recorder in recorders:
                recorder.check(taps)
        mine = {id(parameter) for parameter in self.student.parameters()}
        shared = next((name for name, one in self.teacher.named_parameters() if id(one) in mine), None)
        if shared is not None:
            raise ValueError(
                f"Expected `teacher` to share no parameter with the student, but got {shared!r} in both. Pass a copy,"
                " copy.deepcopy(teacher), and keep the teacher out of the student's attributes."
            )

    def _never_called(self) -> str:
        return (
            f"Expected the student, {type(self.student).__name__}, to be called with gradients, but it was not. Call it"
            " as a module, student(x) and not student.forward(x), inside `with distiller.record():`."
        )


def _weighted(weight: float, value: Tensor) -> Tensor:
    return value if weight == 1 else weight * value  # a product is an operation forward and one backward


def as_terms(terms: Terms) -> list[DistillationTerm]:
    """The terms as a list with distinct names.

    Raises:
        TypeError: If one of them is no term.
        ValueError: If there are none, or two share a name.
    """
    several: list[Any] = (
        [terms] if isinstance(terms, nn.Module) else [LogitsDistillation()] if terms is None else [*terms]
    )
    if not several:
        raise ValueError("Expected `terms` to hold at least one term, but got terms=[]. Pass None for logits alone.")
    for index, term in enumerate(several):
        if not isinstance(term, DistillationTerm):
            raise TypeError(
                f"Expected `terms[{index}]` to be a term, but got {type(term).__name__}. Wrap a loss:"
                " LogitsDistillation(loss) or FeatureDistillation(student_layer, teacher_layer, loss)."
            )
    names = [term.name for term in several]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected `terms` to have distinct names, but got {twice!r} twice. Pass name=... to one.")
    return several
