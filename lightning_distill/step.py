"""One step of distillation: the student's calls, the teacher's answers, the terms, the total."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.adapters.follower import bare
from lightning_distill.adapters.learned import LearnedParts
from lightning_distill.balancing import Balance, as_share
from lightning_distill.processes import world_size
from lightning_distill.recording import Call, find_labels, first_tensor
from lightning_distill.recording.outputs import tensors_in
from lightning_distill.recording.student import StudentFinder
from lightning_distill.schedules import Progress, Scheduler
from lightning_distill.step_calls import StepCalls
from lightning_distill.step_checks import check_step
from lightning_distill.teachers.source import LiveTeachers, TeacherSource
from lightning_distill.terms import DistillationTerm, LogitsDistillation, connected
from lightning_distill.terms.counting import TokenShare, over_calls
from lightning_distill.terms.mixing import TeacherMix
from lightning_distill.terms.skipped_heads import SkippedHeads, check_not_compiled
from lightning_distill.totals import summed

Pair = tuple[Tensor, Tensor, Tensor | None]
Labels = str | int | Callable[[Any], Tensor] | None


class DistillStep:
    r"""Turns the student's calls in a step into the total loss; the distiller and the run of a Trainer both use it.

    .. math:: \text{total} = w_{task} \, L_{task} + \sum_i w_i \, D_i(A_i(F^{student}_i), F^{teacher}_i)

    Args:
        settings: The object with the task weight and its schedules.
        terms: The terms, owned by it.
        student: Finds and records the student.
        source: The teacher.
        learned: The adapters and the parameters of learned losses.
        labels: Where a batch keeps its labels.
        read_logits: From a network's output to its logits.
        never_called: The error message where the student was not called.
        mix: How the answers of several teachers become the value of a term; ``None`` takes the mean over them.

    Attributes:
        parts: The detached parts of the last total.
        batch_size: Number of examples of the last call.
        share: The tokens of the optimizer step, for terms on tokens.
        unlogged: The last loss, a share of the optimizer step, less its part in ``parts``, a mean over the micro-batch;
            ``None`` if the two are the same.
        counted: The numbers of tokens of the last call, by term.
        own_text: Whether the batch is text of the student, whose labels are not a reference: no task loss counts.
        scheduler: Sets the scheduled settings.
        balance: Measures the balanced weights.
    """

    def __init__(
        self,
        settings: Any,
        terms: Sequence[DistillationTerm],
        student: StudentFinder,
        source: TeacherSource,
        learned: LearnedParts,
        *,
        labels: Labels,
        read_logits: Callable[[Any], Tensor],
        never_called: Callable[[], str],
        mix: TeacherMix | None = None,
    ) -> None:
        self.settings, self.student, self.source, self.learned = settings, student, source, learned
        self.terms = connected(terms, source)
        self._labels, self._read_logits, self._never_called = labels, read_logits, never_called
        self.mix = mix or TeacherMix()
        self.scheduler = Scheduler(terms, settings, [*self.mix.scheduled, *source.scheduled])
        self.balance = Balance(terms, settings, getattr(settings, "teacher", None))
        source.meet(student)
        self.parts: dict[str, Tensor] = {}
        self.batch_size, self.own_text, self.share = 0, False, TokenShare()
        self.unlogged: Tensor | None = None
        self.counted: dict[str, Tensor] = {}
        self._heads: SkippedHeads | None = None
        self._batch: Any = None
        self._unchecked = {term.name for term in terms if isinstance(term, LogitsDistillation)}

    @property
    def idle(self) -> bool:
        """Whether every term's weight is 0."""
        return not any(term.active for term in self.terms)

    @property
    def skips_heads(self) -> bool:
        """Whether the networks' heads make no logits in a training step."""
        return any(term.skips_heads and term.active for term in self.terms)

    @property
    def adds_arguments(self) -> bool:
        """Whether a term adds arguments to the student's calls."""
        return any(term.student_arguments for term in self.terms)

    def check(self, sharding: Sequence[str] = ()) -> None:
        """Raise if a tapped layer does not exist, or the teacher lacks an output or a layer that the terms read.

        Args:
            sharding: The strategy, if it shards the student.

        Raises:
            ValueError: With the closest layer names.
        """
        check_step(self.terms, self.student, self.source, self.mix)
        self.balance.check(sharding)

    def advance(self, progress: Progress) -> None:
        """Set the scheduled and the balanced settings at a point of the training."""
        self.scheduler.advance(progress)
        self.balance.advance(progress)

    def follow(self, leader: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the learned parts, and a teacher that moves, step with the student's optimizer.

        Args:
            leader: The optimizer, bare or wrapped by Lightning or Fabric.
            scaler: The gradient scaler of a hand-written loop.
        """
        self.learned.follow(leader, scaler)
        self.source.follow(bare(leader))

    def state_dict(self) -> dict[str, Any]:
        """The state of the learned parts, the teacher and the balanced weights; empty if they have none."""
        others = {"teacher": self.source.state_dict(), "balance": self.balance.state_dict()}
        return {**self.learned.state_dict(), **{name: state for name, state in others.items() if state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, or start again if it is empty."""
        others = ("teacher", "balance")
        self.learned.load_state_dict({name: value for name, value in state.items() if name not in others})
        self.source.load_state_dict(state.get("teacher", {}))
        self.balance.load_state_dict(state.get("balance", {}))

    def record(self, needs_grad: bool = True, features: bool = True, batch: Any = None) -> AbstractContextManager[None]:
        """A context in which the student's calls are recorded.

        Args:
            needs_grad: Whether to leave out calls made with gradients disabled.
            features: Whether to keep the features at the tapped layers.
            batch: The batch, for a term that makes its loss while the student is called.
        """
        if needs_grad:
            self.source.before_step()  # a copy of the student is made before a call updates its statistics
        asking = [term for term in self.terms if term.active or not needs_grad]  # validation measures all terms
        arguments = {name: value for term in asking for name, value in term.student_arguments.items()}
        recording = self.student.recording(needs_grad, features, arguments)
        term = next((term for term in self.terms if term.skips_heads and term.active), None)
        return recording if term is None or not needs_grad else self._skipping(recording, term, batch)

    @contextmanager
    def _skipping(self, recording: AbstractContextManager[None], term: Any, batch: Any) -> Iterator[None]:
        head = self.student.layer(term.student_head)
        if self._heads is None or self._heads.student_head is not head:  # the user may put another in its place
            check_not_compiled(self.student.root, term.student_head)
            self._heads = SkippedHeads(
                term,
                head,
                cast(LiveTeachers, self.source).layer(term.teacher_head),
                open_call=self._open_call,
                answer=self.answers,
                rerun=self.student.rerun,
                calls=self.student.find,
            )
        self._batch = batch
        self.student.keep_random_state(not self._heads.known)
        try:
            with recording, self._heads:
                yield
        finally:
            self._batch = None

    def _open_call(self) -> Call | None:
        """The call of the student that is under way."""
        call = self.student.open_call()
        if call is not None:
            self._prepare(call, self._batch)
        return call

    def total(self, task_loss: Tensor, batch: Any = None, step_calls: StepCalls | None = None) -> Tensor:
        """``task_weight * task_loss`` plus the weighted terms, a scalar.

        Args:
            task_loss: The student's own loss on its labels, a scalar.
            batch: The batch.
            step_calls: The calls and answers to use; ``None`` takes the recorded calls and asks the teacher.
        """
        distillation = self.loss(batch, step_calls, task_loss)
        if self.own_text:
            return distillation
        self.parts["task_loss"] = task_loss.detach()
        return summed(task_loss, self.settings.task_weight, distillation)

    def forget(self) -> None:
        """Forget the results of the last step; those of this one may be fewer."""
        self.parts, self.counted, self.unlogged = {}, {}, None

    def rest(self, task_loss: Any) -> None:
        """Store the parts of a step in which every term has weight 0 and the task loss is the total.

        Args:
            task_loss: The student's own loss; anything else is left to the Trainer.
        """
        calls = self.student.find()
        if calls and isinstance(task_loss, Tensor):
            self._count(calls[0])
            zero = torch.zeros((), device=task_loss.device)
            self.parts = {"distillation_loss": zero, "task_loss": task_loss.detach()}

    def loss(self, batch: Any = None, step_calls: StepCalls | None = None, task_loss: Tensor | None = None) -> Tensor:
        """The weighted sum of the terms over the calls recorded since the last one, a scalar.

        Args:
            batch: The batch.
            step_calls: The calls and answers to use; ``None`` takes the recorded calls and asks the teacher.
            task_loss: The task loss, which balanced weights refer to.

        Raises:
            ValueError: If the student was not called, a layer did not run, a shape does not fit, labels are missing.
        """
        try:
            return self._loss(batch, step_calls or StepCalls(), task_loss)
        finally:
            self.release()

    def _loss(self, batch: Any, step_calls: StepCalls, task_loss: Tensor | None) -> Tensor:
        active = [term for term in self.terms if term.active]
        calls = step_calls.of(self.student.find())
        self.forget()
        rest = self._anchor(calls)
        if not active:
            if calls:
                self._count(calls[0])
            self.balance.measure(calls, task_loss, {}, self._device)
            zero = self.parts["distillation_loss"] = torch.zeros((), device=self._device())
            return rest if isinstance(rest, Tensor) else zero
        if not calls:
            raise ValueError(self._never_called())
        self.learned.begin(self.student.root)
        self.source.check_followed()
        values = self._values(active, calls, batch, step_calls)
        parts: dict[str, tuple[Tensor, Tensor | None]] = {}
        for term in active:
            each, factor = values[term.name], None
            if term.counts_tokens:
                part, self.counted[term.name], factor = over_calls(term.name, calls, each, self.share)
            else:
                part = each[0] if len(each) == 1 else torch.stack(each).mean()
            self.parts |= {f"{term.name}_loss": part.detach(), **term.learned_numbers()}
            parts[term.name] = part, factor
        self.balance.measure(calls, task_loss, parts, self._device)
        weighted = [term.weighted(parts[term.name][0]) for term in active]
        shared = [as_share(value, parts[term.name][1]) for value, term in zip(weighted, active, strict=True)]
        counting = {name: term.name for term in active if term.counts_tokens for name in term.logged_names}
        for name in calls[0].logged:
            each = [call.logged[name] for call in calls]
            over_tokens = name in counting
            self.parts[name] = over_calls(counting[name], calls, each)[0] if over_tokens else torch.stack(each).mean()
        loss = sum(shared[1:], shared[0])
        self.parts["distillation_loss"] = loss.detach()
        if self.share.divisors:
            self.parts["distillation_loss"] = sum(weighted[1:], weighted[0]).detach()
            self.unlogged = loss.detach() - self.parts["distillation_loss"]
        return loss if isinstance(rest, float) else loss + rest

    def _device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.student.root.parameters()), None)

    def _values(
        self, active: Sequence[DistillationTerm], calls: Sequence[Call], batch: Any, step_calls: StepCalls
    ) -> dict[str, list[Tensor]]:
        """The value of each active term, for each call and each teacher."""
        labels = find_labels(batch, self._labels) if any(term.needs_labels for term in active) else None
        values: dict[str, list[Tensor]] = {term.name: [] for term in active}
        for call in calls:
            if call.skipped is not None and call.batch is None and batch is not None and "labels" not in call.kwargs:
                raise ValueError(
                    "Expected `record` to get the batch too, since FusedLinearDistillation makes its loss while the"
                    " student is called, but only `total` got it. Pass record(batch=batch)."
                )
            self._prepare(call, batch)
            asks = any(term.needs_teacher for term in active)
            asked = step_calls.answers or (call.skipped.answers if call.skipped else None)
            answers = asked or self.answers(call, step_calls.stored, asks)
            self.learned.build(active, call, answers)
            if self._unchecked:
                self._check_scores(active, call, answers)
            with nullcontext() if call.trains else self.learned.evaluated():
                for term in active:
                    values[term.name] += self.mix.values(term, call, answers, labels)
        return values

    def _prepare(self, call: Call, batch: Any) -> None:
        call.batch, call.own_text = batch, self.own_text
        call.read_logits, call.label_place = self._read_logits, self._labels

    def _check_scores(self, active: Sequence[DistillationTerm], call: Call, answers: Sequence[Call]) -> None:
        """Check the outputs that each term on logits compares, once."""
        for term in active:
            if isinstance(term, LogitsDistillation) and term.name in self._unchecked:
                self._unchecked.discard(term.name)
                self.mix.check_scores(term, call, answers)

    def answers(self, call: Call, stored: Any = None, asks: bool = True) -> list[Call]:
        """The answer of each teacher to a call of the student.

        Args:
            call: The student's call.
            stored: The teacher's answers, where they came with the batch.
            asks: Whether any term reads the teacher.
        """
        call.check_input()
        self._count(call)
        return self.source.answers(call, stored) if asks else [Call((), {}, who="teacher")]

    def _count(self, call: Call) -> None:
        self.batch_size = (first_tensor(call.args, call.kwargs, call.output).shape or (1,))[0]

    def _anchor(self, calls: Sequence[Call]) -> Tensor | float:
        """A zero that depends on the tensors that terms of weight 0 read.

        Under DDP every process must have gradients for the same parameters, and on another one these terms may work.
        A product with 0 would be NaN where the feature is infinite.
        """
        if world_size() == 1:
            return 0.0
        resting = [term for term in self.terms if not term.active]
        rest: Tensor | float = 0.0
        for call in calls:
            taps = [tap for term in resting for tap in term.student_taps]
            runs = [run for tap in taps for run in call.runs.get((tap.layer, tap.where), [])]
            whole = call.output if any(not term.student_taps for term in resting) else None
            values = tensors_in([*(run[0] for run in runs), whole])
            rest = sum((value.reshape(-1)[:0].sum() for value in values if value.requires_grad), rest)
        return rest

    def measure(self, batch: Any, losses: bool = True) -> tuple[dict[str, Tensor], list[Pair]]:
        """The losses and logits of validation, from the calls recorded since the last loss.

        Args:
            batch: The batch.
            losses: Whether the terms' losses are measured, beside the logits.

        Returns:
            The loss of each term whose parts exist. If a term compares class scores, also for each call the logits of
            both sides and the mask of the positions that count; for several teachers their mixture.

        Raises:
            ValueError: If an output does not fit.
        """
        try:
            calls = list(self.student.find())
            scored = next((term for term in self.terms if term.compares_class_scores), None)
            values: dict[str, list[Tensor]] = {}
            pairs: list[Pair] = []
            self.counted = {}
            for call in calls:
                self._prepare(call, batch)
                answers = self.answers(call)
                labels = self._labels_or_none(batch)
                measured = [term for term in self.terms if losses and not term.trains_only]
                # adapters of a checkpoint are made here too, for validation without training
                self.learned.build([term for term in measured if self.learned.waits(term)], call, answers)
                measured = [term for term in measured if not (term.needs_labels and labels is None)]
                with self.learned.evaluated():
                    for term in filter(self.learned.made, measured):
                        values.setdefault(term.name, []).extend(self.mix.values(term, call, answers, labels))
                if isinstance(scored, LogitsDistillation):
                    student_logits, teacher_logits = self.mix.scores(scored, call, answers)
                    pairs.append((student_logits.detach(), teacher_logits, scored.positions(call, labels)))
            means = {name: torch.stack(each).mean() for name, each in values.items()}
            for name in [name for name in means if name in calls[0].counted]:
                means[name], self.counted[name], _ = over_calls(name, calls, values[name])
            return means, pairs
        finally:
            self.release()

    def _labels_or_none(self, batch: Any) -> Tensor | None:
        if not any(term.needs_labels for term in self.terms):
            return None
        try:
            return find_labels(batch, self._labels)
        except ValueError:  # validation data need not be labelled: the terms that need labels are left out
            return None

    def release(self) -> None:
        """Release everything recorded."""
        self.student.clear()
        self.source.clear()
