"""A training step without logits: the loss is made where both heads' matrices are whole, in the student's head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.compat import is_compiled
from lightning_distill.functional.fused_linear import FusedLosses, fused_linear_losses
from lightning_distill.functional.inputs import IGNORE_INDEX
from lightning_distill.functional.rows import RowSettings
from lightning_distill.heads import ForwardSwap, Matrix, Recipe, Trace, carrier_in, matrix_of, placeholder
from lightning_distill.recording import Call, find_layer
from lightning_distill.terms.fused_linear import FusedLinearDistillation

_REMEDY = "Use SequenceDistillation, which reads the logits."


class SkippedCall:
    """One call of the student whose head was skipped.

    Args:
        hidden: Input of the student's head.
        matrix: Its matrix and bias.
        length: Number of positions of a sequence.

    Attributes:
        trace: The student's operations after its head.
        losses: The loss with its graph, the mean divergence and the mean cross entropy, once the teacher has answered.
        answers: The teacher's answers.
    """

    def __init__(self, hidden: Tensor, matrix: Matrix, length: int) -> None:
        self.hidden, self.matrix, self.length = hidden, matrix, length
        self.trace = Trace()
        self.losses: Any = None
        self.answers: list[Call] = []

    def value(self, call: Call) -> Tensor:
        """The loss, through the student's own output: wrappers that shard or synchronise hang their work on that.

        Args:
            call: The student's call.
        """
        carrier = carrier_in(call.output)
        value: Tensor = self.losses.total if carrier is None else carrier.squeeze(0)
        return value


class SkippedHeads:
    """Skips both heads of a term; entered for each training step, around the student's calls.

    The student's head does not make logits. It asks the teacher, whose head does not make logits either: it has both
    models' hidden states while both matrices are whole, also under FSDP2, and makes the loss and its gradients.

    Attributes:
        known: Whether it is known what the student does after its head.
        student_head: The student's head.

    Args:
        term: The term.
        student_head: The student's head.
        teacher_head: The teacher's head.
        open_call: The call of the student that is under way, with its batch, or ``None``.
        answer: Asks the teacher about a call.
        rerun: Calls the student once more as in a call, and puts the new call into its place.
        calls: The recorded calls.
    """

    def __init__(
        self,
        term: FusedLinearDistillation,
        student_head: nn.Module,
        teacher_head: nn.Module,
        *,
        open_call: Callable[[], Call | None],
        answer: Callable[[Call], list[Call]],
        rerun: Callable[[Call], Call],
        calls: Callable[[], Iterable[Call]],
    ) -> None:
        self.term, self._open_call, self._answer, self._rerun, self._calls = term, open_call, answer, rerun, calls
        self.student_head = student_head
        self._recipes: list[Recipe] = [(), ()]
        self.known = False
        self._asking: SkippedCall | None = None
        self._teacher_trace = Trace()
        self._student_autocast: tuple[bool, torch.dtype] = (False, torch.float32)
        self._call: Call = Call((), {})
        self._shared = student_head is teacher_head  # frozen: both models have the same head
        self._swaps = [ForwardSwap(student_head, self._student), ForwardSwap(teacher_head, self._teacher)]

    def __enter__(self) -> None:
        try:
            for swap in self._swaps[:1] if self._shared else self._swaps:
                swap.put()
        except TypeError:
            for swap in self._swaps:
                swap.take()  # only those that were put
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for call in list(self._calls()):
                    self._check_recipe(call)
        finally:
            for swap in self._swaps:
                swap.take()
            self._asking = None

    def _check_recipe(self, call: Call) -> None:
        """Make a call once more if the student did something else after its head than was assumed."""
        if call.skipped is None:
            return
        recipe = call.skipped.trace.recipe
        if recipe != self._recipes[0]:
            if self.known:
                raise ValueError(
                    f"Expected the student to do the same after its head in every step, but got {recipe} after"
                    f" {self._recipes[0]} (factors and tanh). {_REMEDY}"
                )
            self._recipes[0] = recipe
            call = self._rerun(call)
            if call.skipped is None or call.skipped.trace.recipe != recipe:
                raise ValueError(f"Expected the student to do the same in both calls after its head. {_REMEDY}")
        self.known = True

    # The heads -------------------------------------------------------------------------------------------------------

    def _student(self, head: nn.Module, hidden: Tensor) -> Any:
        if self._shared and self._asking is not None:
            return self._teacher(head, hidden)
        call = self._open_call() if torch.is_grad_enabled() else None
        if call is None:  # generation for the log, metrics: logits as usual
            return self._swaps[0].original(hidden)
        if call.skipped is not None:
            raise ValueError(
                f"Expected the student to call its head {self.term.student_head!r} once, but it was called twice in one"
                f" call of the student. {_REMEDY}"
            )
        if hidden.ndim != 3:
            raise ValueError(
                f"Expected the input of the student's head to have the shape (batch, tokens, width), but got shape"
                f" {tuple(hidden.shape)}. {_REMEDY}"
            )
        device = hidden.device.type
        self._student_autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        matrix = matrix_of(head)
        skipped = call.skipped = SkippedCall(hidden, matrix, hidden.shape[1])
        self._ask(call, skipped)
        return placeholder(skipped.losses.total.reshape(1), (*hidden.shape[:-1], len(matrix.weight)), skipped.trace)

    def _ask(self, call: Call, skipped: SkippedCall) -> None:
        for _ in range(2):
            self._teacher_trace, self._asking, self._call = Trace(), skipped, call
            try:
                skipped.answers = self._answer(call)
            finally:
                self._asking = None
            self._teacher_trace.open = False
            if skipped.losses is None:
                raise ValueError(
                    f"Expected the teacher to call its head {self.term.teacher_head!r}, but it did not. Name the head"
                    " that it calls: FusedLinearDistillation(teacher_head=...)."
                )
            if self._teacher_trace.recipe == self._recipes[1]:
                return
            self._recipes[1] = self._teacher_trace.recipe  # known from now on: once more with it
        raise ValueError(f"Expected the teacher to do the same after its head in every step. {_REMEDY}")

    def _teacher(self, head: nn.Module, hidden: Tensor) -> Any:
        skipped = self._asking
        if skipped is None:
            return self._swaps[1].original(hidden)
        matrix = matrix_of(head)
        # the teacher may run without autocast, without gradients, or in inference mode; the student's head does not
        with torch.inference_mode(False), torch.enable_grad(), self._autocast(hidden.device.type):
            skipped.losses = self._losses(skipped, hidden, matrix)
        return placeholder(hidden.new_zeros(1), (*hidden.shape[:-1], len(matrix.weight)), self._teacher_trace)

    def _losses(self, skipped: SkippedCall, hidden: Tensor, teacher: Matrix) -> FusedLosses:
        """The losses of a call, from both heads' inputs and matrices."""
        term, call = self.term, self._call
        positions = term.tokens.of_call(call, skipped.length)
        call.counted[term.name] = positions.counts.sum()
        (student_scale, student_cap), (teacher_scale, teacher_cap) = (
            _scale_and_cap(recipe) for recipe in self._recipes
        )
        task_weight = 0.0 if call.own_text else term.task_weight
        settings = RowSettings(
            **term.divergence(),
            weight=float(term.weight),
            task_weight=task_weight,
            scales=(student_scale, teacher_scale),
            soft_caps=(student_cap, teacher_cap),
        )
        if task_weight and positions.labels is None:
            raise ValueError(
                "Expected labels for the cross entropy of task_weight, but got none. Pass labels=<their place in the"
                " batch>, or task_weight=0."
            )
        return fused_linear_losses(
            (skipped.hidden, *skipped.matrix),
            (hidden, *teacher),
            positions.labels if task_weight else None,
            positions.counts,
            settings,
            IGNORE_INDEX if term.ignore_index is None else term.ignore_index,
            term.chunk_size,
        )

    def _autocast(self, device: str) -> Any:
        enabled, dtype = self._student_autocast
        return (
            torch.autocast(device, dtype=dtype, enabled=enabled) if enabled else torch.autocast(device, enabled=False)
        )


def _scale_and_cap(recipe: Recipe) -> tuple[float, float | None]:
    """Factor and soft cap of the logits: what a model does after its head.

    Raises:
        ValueError: If it does something else.
    """
    factors = [step for step in recipe if isinstance(step, float)]
    if len(recipe) == len(factors) <= 1 and all(factor > 0 for factor in factors):
        return (factors[0] if factors else 1.0), None
    tanh = recipe.index("tanh") if recipe.count("tanh") == 1 else -1
    if tanh in (0, 1) and len(recipe) - tanh <= 2 and all(factor > 0 for factor in factors):
        inner = recipe[0] if tanh == 1 else 1.0
        outer = recipe[-1] if tanh + 1 < len(recipe) else 1.0
        return float(inner) * float(outer), float(outer)
    raise ValueError(
        f"Expected the model to scale its logits by a positive number or to cap them, c * tanh(logits / c), but got"
        f" {recipe} (factors and tanh). {_REMEDY}"
    )


def check_not_compiled(root: nn.Module, layer: str) -> None:
    """Raise if a head is inside a compiled module, whose graph would not skip it.

    Args:
        root: The student, or the module that contains it.
        layer: Path of the head below it.

    Raises:
        ValueError: If so.
    """
    head = find_layer(root, layer)
    above = [module for module in root.modules() if is_compiled(module) and head in set(module.modules())]
    if head is not None and above:
        raise ValueError(
            "Expected the student's head not to be inside a compiled module, whose graph would make the logits, but"
            f" {type(above[0]).__name__} is compiled. Compile what is below the head instead, such as"
            " model.model.forward = torch.compile(model.model.forward)."
        )
