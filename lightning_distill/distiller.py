"""The distiller: distillation in your own training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill import checks, processes
from lightning_distill.adapters.learned import LearnedParts
from lightning_distill.cache.data import IndexedBatch
from lightning_distill.compat import HookGuards, is_compiled, redefined
from lightning_distill.hparams import Teacher, Terms
from lightning_distill.on_policy import LoopTexts, OnPolicyBatches, OnPolicyDistillation, reverse_term
from lightning_distill.recording import Call, select
from lightning_distill.recording.student import StudentFinder
from lightning_distill.schedules import Progress, Schedule, Scheduler, Setting
from lightning_distill.step import DistillStep, Labels
from lightning_distill.step_calls import StepCalls
from lightning_distill.teachers import as_dtype, as_teacher
from lightning_distill.teachers.inputs import Place
from lightning_distill.teachers.make import as_source, check_shares_nothing
from lightning_distill.teachers.route import Place as Route
from lightning_distill.terms import LogitsDistillation, as_terms, teacher_inputs_of
from lightning_distill.terms.counting import LoopWindow
from lightning_distill.terms.mixing import TeacherMix, Weights


class Distiller:
    r"""Distillation in your own training loop: it turns the student's calls in a step into the total loss.

    .. math:: \text{total} = w_{task} \, L_{task} + \sum_i w_i \, D_i(A_i(F^{student}_i), F^{teacher}_i)

    With several teachers each term is averaged over them, unless ``mix`` or ``route`` say otherwise. A weight of 0
    skips the work behind it.

    Args:
        student: The network that is called in the step.
        teacher: The network to match, or several, held in eval mode without gradients until :meth:`close`; ``None``
            where no term needs one.
        terms: The terms; ``None`` is ``[LogitsDistillation()]``. A loss on logits is wrapped in a LogitsDistillation.
        task_weight: Factor of the task loss, 0 or greater, or a schedule.
        labels: Where a batch keeps its labels: a key, an index, or a function of the batch; ``None`` looks in the usual
            places. Read only for losses that need labels.
        teacher_inputs: The teacher's inputs, if they are not the student's: the key or index of them in the batch, or a
            function from the student's inputs (its only argument, the tuple of its arguments, or the dict of its
            keyword arguments) to the teacher's, in the same forms.
        teacher_weights: A weight for each of several teachers, 0 or greater, numbers or schedules, divided by their
            sum; ``"entropy"`` for weights by each teacher's confidence in each example; ``None`` for equal weights.
        mix: ``"losses"``, ``"probabilities"`` or ``"logits"``, as in :class:`DistillCallback`.
        route: Where a batch keeps the index of the teacher that each example belongs to: a key, an index, or a function
            of the batch. Pass the batch to :meth:`total`.
        teacher_dtype: Precision that the teacher computes in, such as ``"bfloat16"``; ``None`` takes that of the
            surrounding code.
        on_policy: Lets the student write the text of some batches, in :meth:`continued`. The default of ``terms`` is
            then a :class:`SequenceDistillation` with a :class:`ReverseKLLoss`.

    Attributes:
        parts: After a step the detached parts of the total: ``task_loss``, ``distillation_loss`` (the weighted sum) and
            ``<term>_loss`` of each term, without its weight.
        terms: The terms, with their adapters.
        teacher: The teacher, or a container of several.

    Raises:
        ValueError: If the teacher shares trained parameters with the student, terms share a name, or a weight is
            negative.
        TypeError: If the teacher is not a module, or a term is not a :class:`DistillationTerm`.

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

    task_weight = Setting(checks.non_negative)

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        terms: Terms = None,
        *,
        task_weight: float | Schedule = 1.0,
        labels: Labels = None,
        teacher_inputs: Place = None,
        teacher_weights: Weights = None,
        mix: str = "losses",
        route: Route | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        on_policy: OnPolicyDistillation | None = None,
    ) -> None:
        self.task_weight, self.on_policy = task_weight, on_policy
        self.student, self._teacher = student, as_teacher(teacher)
        self._mix = TeacherMix(teacher_weights, mix, route)
        self._mix.check_teacher(self._teacher)
        default = LogitsDistillation if on_policy is None else reverse_term
        self.terms = [term.owned() for term in as_terms(terms, default)]
        self._dtype, self._labels, self._inputs = as_dtype(teacher_dtype), labels, teacher_inputs
        self._learned, self._window = LearnedParts(self.terms), LoopWindow()
        self._guards: HookGuards | None = None
        self._looked = False  # whether the networks were searched for compiled ones
        self._count, self._counts = 0, True  # steps so far, and whether they are counted here
        self._step = self._new_step()
        self._step.check()
        self._texts: LoopTexts | None = None
        if on_policy is not None:
            batches = OnPolicyBatches(on_policy, self._step.student, self.terms, labels, processes.process_number())
            batches.check(self._step.source.stored, teacher_inputs)
            self._texts = LoopTexts(batches)
        check_shares_nothing(student, self._step.source.modules())

    def _new_step(self) -> DistillStep:
        taps = [tap for term in self.terms for tap in term.teacher_taps]
        return DistillStep(
            self,
            self.terms,
            StudentFinder(self.student, [tap for term in self.terms for tap in term.recorded_taps], ""),
            as_source(
                self.teacher,
                taps,
                lambda call: self.teacher_forward(call),
                self._dtype,
                teacher_inputs_of(self.terms, self._inputs, redefined(self, "teacher_forward")),
                self._mix.route,
            ),
            self._learned,
            labels=self._labels,
            read_logits=lambda output: self.logits(output),
            never_called=lambda: self._never_called(),
            mix=self._mix,
        )

    # Methods to override ---------------------------------------------------------------------------------------------

    def teacher_forward(self, call: Call) -> Any:
        """The teacher's output for a call of the student; by default it is called as the student was.

        Args:
            call: The student's call; ``call.args`` and ``call.kwargs`` are in the teacher's precision, ``call.batch``
                is the batch that was passed to :meth:`total`.

        Returns:
            The output, or with several teachers the list of their outputs.
        """
        return self.teacher(*call.args, **call.kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output: the tensor itself, its ``logits``, or its only tensor."""
        return select(output, None, "the model's output")

    @property
    def teacher(self) -> Any:
        """The teacher, or a container of several; for another one make another distiller."""
        return self._teacher

    # A step ----------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Tensor]:
        """The detached parts of the last total."""
        return self._step.parts

    @property
    def idle(self) -> bool:
        """Whether every term's weight is 0."""
        return self._step.idle

    def record(self, needs_grad: bool = True, features: bool = True, batch: Any = None) -> AbstractContextManager[None]:
        """A context in which the student's calls are recorded.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep the features at the tapped layers.
            batch: The batch, for a :class:`FusedLinearDistillation`, which makes its loss while the student is called.
        """
        if self._counts and (self._step.skips_heads or self._step.adds_arguments):
            # already here, not only in `total`: the weights decide how the student is called
            self._step.advance(Progress(self._count))
        if not self._looked:
            self._looked = True
            networks = [self.student, *self._step.source.modules()]
            if any(is_compiled(module) for network in networks for module in network.modules()):
                self._guards = HookGuards(self)
        if self._texts is not None and self._step.skips_heads and needs_grad and torch.is_grad_enabled():
            self._step.own_text = self._texts.is_own(batch, uses=False)
        return self._step.record(needs_grad, features, batch)

    def continued(self, batch: Any) -> Any:
        """The batch, with its prompts continued by the student if that is drawn; see :class:`OnPolicyDistillation`.

        Args:
            batch: The batch, on the student's device. Pass the returned one on, to the student, :meth:`window`,
                :meth:`record` and :meth:`total`, which leaves out the task loss of the student's own text.

        Raises:
            ValueError: If ``on_policy`` was not given, the prompts are not known, or the new batch cannot be made.
        """
        if self._texts is None:
            raise ValueError(
                "Expected `on_policy` to be given, but got on_policy=None. Pass Distiller(...,"
                " on_policy=OnPolicyDistillation(0.5, max_new_tokens=64))."
            )
        if self._counts:
            self._step.advance(Progress(self._count))
        return self._texts.continued(batch)

    def total(self, task_loss: Tensor, batch: Any = None) -> Tensor:
        """The total loss of the calls recorded since the last total.

        Args:
            task_loss: The student's own loss on its labels, a scalar.
            batch: The batch, where a term needs its labels or a mask.

        Returns:
            ``task_weight * task_loss + sum of weighted terms``, a scalar. With gradients disabled, as in evaluation,
            nothing is distilled and this is ``task_weight * task_loss``.

        Raises:
            ValueError: If the student was not called, a layer did not run, a shape does not fit, labels are missing.
        """
        if not torch.is_grad_enabled() and not self._step.student.find():
            self._step.parts = {"task_loss": task_loss.detach()}
            return torch.mul(task_loss, self.task_weight)
        batch, stored = self._unpacked(batch)
        return self._total(task_loss, batch, StepCalls(stored=stored))

    def _unpacked(self, batch: Any) -> tuple[Any, Any]:
        """The batch and its stored answers; takes its share of the tokens."""
        self._step.own_text = self._texts is not None and self._texts.is_own(batch)
        batch, stored = self._step.source.unpack(batch)
        self._step.share = self._window.share(batch)
        return batch, stored

    def _total(self, task_loss: Tensor, batch: Any, step_calls: StepCalls) -> Tensor:
        if self._counts:
            self._step.advance(Progress(self._count))
            self._count += 1  # also without a schedule: one may be assigned later
        return self._step.total(task_loss, batch, step_calls)

    def window(self, batches: Sequence[Any]) -> AbstractContextManager[None]:
        """A context for the micro-batches of one optimizer step.

        In it, terms on tokens are the mean over the tokens of all these batches and all processes, if the gradients are
        averaged: if each total is divided by ``len(batches)`` before its backward pass, and DDP averages over the
        processes. Every process must enter it.

        Args:
            batches: The batches, as they are passed to :meth:`total`.

        Raises:
            ValueError: If the tokens of a batch cannot be counted before the student is called with it.

        Example:
            >>> from lightning_distill import SequenceDistillation
            >>> student, teacher = nn.Embedding(5, 5), nn.Embedding(5, 5)
            >>> batches = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 0]])]
            >>> count = lambda tokens: torch.ones_like(tokens)
            >>> distiller = Distiller(student, teacher, SequenceDistillation(mask=count), task_weight=0)
            >>> with distiller.window(batches):
            ...     for tokens in batches:
            ...         with distiller.record():
            ...             task_loss = student(tokens).mean()
            ...         (distiller.total(task_loss, tokens) / len(batches)).backward()
        """
        plain = [batch.batch if isinstance(batch, IndexedBatch) else batch for batch in batches]
        return self._window.opened(self.terms, plain, self._labels, self.student)

    def advance(self, step: int, epoch: int | None = None, fraction: float | None = None) -> None:
        """Set the scheduled values before a step. Schedules over steps count the calls of :meth:`total` instead.

        Args:
            step: Optimizer steps made so far.
            epoch: The epoch, from 0, for schedules over epochs.
            fraction: Share of the whole training, from 0 to 1, for schedules over it.

        Raises:
            ValueError: If a schedule needs a position that is not given.
        """
        self._counts = False
        self._step.advance(Progress(step, epoch, fraction))

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; its ``values`` are the last values of the scheduled settings, by their names in the logs."""
        return self._step.scheduler

    def loss(self, batch: Any = None, calls: int | slice | None = None, *, task_loss: Tensor | None = None) -> Tensor:
        """The weighted sum of the terms, without the task loss, over the calls recorded since the last one.

        Args:
            batch: The batch, where a term needs its labels or a mask.
            calls: Which of the recorded calls count, such as ``-1``; ``None`` is the mean of all.
            task_loss: The task loss, if a weight is balanced; it is not added.

        Returns:
            A scalar.

        Raises:
            ValueError: As :meth:`total`.
        """
        batch, stored = self._unpacked(batch)
        return self._step.loss(batch, StepCalls(calls, stored=stored), task_loss)

    def agree(self, batch: Any = None) -> list[tuple[Tensor, Tensor]]:
        """The logits of both sides for each call recorded since the last loss.

        Args:
            batch: The batch, where :meth:`teacher_forward` reads it.

        Returns:
            Pairs of the student's and the teacher's logits; of several teachers the log of their mean probabilities.
        """
        return [pair[:2] for pair in self._step.measure(batch, losses=False)[1]]

    # Adapters --------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, for an optimizer of your own; they exist after the first total.

        Raises:
            ValueError: If a term reads layers whose shapes are unknown before the first batch.
        """
        return self._learned.hand_over()

    def follow(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the adapters step with the student's optimizer, with its class and settings.

        Args:
            optimizer: The student's optimizer, bare or wrapped by Lightning or Fabric.
            scaler: The gradient scaler of a hand-written loop.

        Raises:
            ValueError: If the optimizer cannot be cloned. Pass :meth:`parameters` to an optimizer of your own instead.
        """
        self._step.follow(optimizer, scaler)

    def state_dict(self) -> dict[str, Any]:
        """The adapters, their optimizer's state and the number of steps; empty without adapters and schedules.

        It never holds the teacher.
        """
        count = {"step": self._count} if self._counts and self._step.scheduler else {}
        texts = {} if self._texts is None else {"texts": self._texts.count}
        return {**self._step.state_dict(), **count, **texts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state. The adapters are made with the next batch, which has their shapes.

        Args:
            state: A state that :meth:`state_dict` has returned; an empty one starts with fresh adapters.
        """
        self._step.load_state_dict(state)
        self._count = state.get("step", 0)
        if self._texts is not None:
            self._texts.count = state.get("texts", 0)

    def release(self) -> None:
        """Release everything captured in the last step."""
        self._step.release()

    def close(self) -> None:
        """Restore the teacher. The adapters stay, and a later recording holds the teacher again."""
        self._learned.unfollow()
        self._step.student.close()
        self._step.source.release()
        if self._guards is not None:
            self._guards.undo()
        self._guards, self._looked = None, False
        before, self._step = self._step, self._new_step()  # the student may have changed meanwhile
        self._step.parts = before.parts
        self._step.source.load_state_dict(before.source.state_dict())
        self._step.balance.load_state_dict(before.balance.state_dict())

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _never_called(self) -> str:
        return (
            f"Expected the student, {type(self.student).__name__}, to be called with gradients, but it was not. Call it"
            " as a module, student(x) and not student.forward(x), inside `with distiller.record():`."
        )
