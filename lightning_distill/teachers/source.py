"""The interface of all teachers, and the teachers that are networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill import checks, compat
from lightning_distill.recording import Call, Recorder, Recording, Tap, first_tensor, map_tensors
from lightning_distill.recording.arguments import drop_capturing_hooks, has_capturing_hooks
from lightning_distill.recording.calls import changed
from lightning_distill.recording.student import StudentFinder
from lightning_distill.teachers.configs import check_images
from lightning_distill.teachers.fixed import FixedTeacher
from lightning_distill.teachers.hold import Hold, modules_of_student
from lightning_distill.teachers.inputs import TeacherInputs
from lightning_distill.teachers.route import Route, rows_of, shown_rows
from lightning_distill.teachers.without_network import WithoutNetwork


class TeacherSource(Protocol):
    """Interface of a source of the teacher's outputs.

    Attributes:
        live: Whether it can answer any input, so that validation can be measured.
        stored: Whether the answers come with the batches of a Trainer's training loader.
        moves: Whether the teacher changes with the steps of the student's optimizer.
    """

    live: bool
    stored: bool
    moves: bool

    @property
    def scheduled(self) -> list[tuple[str, Any]]:
        """Objects with settings that may be schedules, each with the prefix of their names in logs."""

    def meet(self, student: StudentFinder) -> None:
        """Take note of the student, once."""

    def follow(self, leader: Optimizer) -> None:
        """Take note of the student's optimizer, whose steps a teacher may follow."""

    def unfollow(self) -> None:
        """Stop following the optimizer."""

    def before_step(self) -> None:
        """Called before the student is called in a step, and before its optimizer steps."""

    def check_followed(self) -> None:
        """Raise if an optimizer is missing."""

    def state_dict(self) -> dict[str, Any]:
        """State to save; empty for a teacher that does not change."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, or from the start if it is empty."""

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if it lacks an output or a layer that the terms read.

        Args:
            taps: Pairs of the argument that named a layer of the teacher, and the tap.
            reader: Name of a term that reads the teacher; ``None`` where no term does.
            output_reader: Name of a term that reads its output; ``None`` where no term does.
        """

    def check_student(self, student: nn.Module) -> None:
        """Compare the teacher with the student, or with the module that contains it.

        Raises:
            ValueError: If they do not fit each other.
        """

    def hold(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Prepare for a run: freeze the networks and move them to a device, and to a precision if none was chosen."""

    def release(self) -> None:
        """Restore everything to its state before the run."""

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The answer of each teacher to a call of the student, with the features at the terms' taps.

        Args:
            call: The student's call.
            stored: Answers that came with the batch.
        """

    def cast(self, value: Any) -> Any:
        """``value`` with its floating point tensors in the teacher's own precision, if it has one."""

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """A batch as the user's code knows it, and the answers that came with it, if any."""

    def clear(self) -> None:
        """Release everything recorded."""

    def modules(self) -> Iterator[nn.Module]:
        """The networks; empty if the outputs are stored."""


class TeacherEnsemble(nn.ModuleList):
    """Several teachers that are called with the same input; it returns their outputs in a list.

    Attributes:
        rows: The examples of each teacher while a route is followed; ``None`` calls every teacher with all of them.
        dtypes: The precision of each teacher's own, where they differ; ``None`` for one that takes the inputs as they
            are.
    """

    rows: Sequence[Tensor] | None = None
    dtypes: Sequence[torch.dtype | None] = ()

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The output of every teacher, ``None`` for a teacher without examples."""
        inputs: list[tuple[tuple[Any, ...], dict[str, Any]] | None] = [(args, kwargs)] * len(self)
        if self.rows is not None:
            number = len(first_tensor(args, kwargs))
            inputs = [rows_of((args, kwargs), part, number) if len(part) else None for part in self.rows]
        dtypes = self.dtypes or [None] * len(self)
        return [
            None if each is None else _called(teacher, *each, dtype)
            for teacher, each, dtype in zip(self, inputs, dtypes, strict=True)
        ]


class LiveTeachers(FixedTeacher):
    """One network or several, run without gradients on the student's arguments.

    Args:
        module: The network, or an ensemble of several.
        taps: The layers that terms read.
        forward: The teacher's output for a call of the student; a list of outputs for an ensemble.
        dtype: The precision that the teachers compute in.
        inputs: Makes the teachers' inputs from the student's call; ``None`` takes the student's.
        route: Says which examples of a call each of several teachers answers for; ``None`` is all of them.

    Attributes:
        held: The hold on the networks.
    """

    live, stored = True, False

    def __init__(
        self,
        module: nn.Module,
        taps: Sequence[Tap],
        forward: Callable[[Call], Any],
        dtype: torch.dtype | None = None,
        inputs: TeacherInputs | None = None,
        route: Route | None = None,
    ) -> None:
        self._inputs, self._route = inputs or TeacherInputs(None, {}), route
        self._several = isinstance(module, TeacherEnsemble)
        networks = list(module.children()) if self._several else [module]
        self.module, self.held = module, Hold(module, dtype)
        self._forward = forward
        self._recorders = [Recorder(network, taps, "teacher") for network in networks] if taps else []
        self._own_dtype: torch.dtype | None = None
        self._student: StudentFinder | None = None
        self._without_capturing: list[nn.Module] = []  # transformers adds hooks where terms read hidden states

    def meet(self, student: StudentFinder) -> None:
        """Take note of the student, which may share modules with the teacher."""
        self._student = student

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if a teacher lacks a layer.

        Raises:
            ValueError: With the closest names.
        """
        for recorder in self._recorders:
            recorder.check(taps)

    def check_student(self, student: nn.Module) -> None:
        """Compare the images that the networks expect, where they say so.

        Raises:
            ValueError: If several teachers expect different images.
        """
        check_images(student, [*self.modules()], self._inputs)

    def layer(self, name: str) -> nn.Module:
        """The module of that name below the only teacher.

        Raises:
            ValueError: If there are several teachers, or it has no such module.
        """
        module = None if self._several or not self._recorders else self._recorders[0].find(name)
        if module is None:
            raise ValueError(f"Expected one teacher with a layer {name!r}, but there are several or it has none.")
        return module

    def layers_named(self, name: str) -> list[nn.Module]:
        """The modules of that name, one of each teacher.

        Raises:
            ValueError: If a teacher has no such module.
        """
        modules = []
        for recorder in self._recorders:
            module = recorder.find(name)
            if module is None:
                expected = f"the teacher to have a layer {name!r}"
                remedy = checks.closest(name, [path for path, _ in recorder.root.named_modules()])
                raise ValueError(checks.message(expected, type(recorder.root).__name__, remedy))
            modules.append(module)
        return modules

    def hold(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Freeze the networks on a device, in a precision if none was chosen; further calls do nothing."""
        if self.held.taken:
            return
        if self._student is not None:
            self.held.student = modules_of_student(self._student.root, self.modules())
        self.held.take(device, dtype)
        self._inputs.look_at(self.modules())
        self._without_capturing = [network for network in self.modules() if not has_capturing_hooks(network)]
        each = [_own_dtype(network) for network in self.modules()]
        alike = len(set(each)) == 1
        self._own_dtype = each[0] if alike else None
        if self._several:
            cast(TeacherEnsemble, self.module).dtypes = [None] * len(each) if alike else each

    def release(self) -> None:
        """Restore the networks to their state before the run."""
        self.held.release()
        for network in self._without_capturing:
            drop_capturing_hooks(network)
        self._without_capturing = []
        self.clear()

    def modules(self) -> Iterator[nn.Module]:
        """The networks."""
        yield from self.module.children() if self._several else [self.module]

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """The batch; no answers come with it."""
        return batch, None

    def clear(self) -> None:
        """Release everything recorded."""
        for recorder in self._recorders:
            recorder.clear()

    def cast(self, value: Any) -> Any:
        """``value`` with its floating point tensors in the teacher's own precision, if it has one."""
        return _in_precision(value, self.held.dtype or self._own_dtype)

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The teachers' outputs and features for a call of the student."""
        device = first_tensor(call.args, call.kwargs, call.output).device
        self.hold(device)
        self.held.still()
        self.clear()
        shown = self._inputs.of(call)
        surroundings: AbstractContextManager[None] = nullcontext()
        # its own precision, without autocast, which would mix double precision with half
        fixed = self.held.dtype is not None or self._own_dtype == torch.float64
        if fixed:
            surroundings = torch.autocast(device.type, enabled=False)
        if fixed or (self._own_dtype and not torch.is_autocast_enabled(device.type)):
            shown = replace(shown, args=self.cast(shown.args), kwargs=self.cast(shown.kwargs))
        # not inference_mode: its tensors could not be saved for the backward
        rows = None if self._route is None else self._route.rows(call, len(list(self.modules())))
        with torch.no_grad(), surroundings, self.held.evaluated(), Recording(self._recorders), self._parted(rows):
            output = self._output(shown)
        if changed(call.input_versions):
            raise ValueError(
                "Expected `teacher` to leave its input as it is, but it was changed in place, and the student's"
                " backward pass and other teachers need it. Build the teacher's first layer with inplace=False."
            )
        answers, networks = [], list(self.modules())
        for index, single in enumerate(output if self._several else [output]):
            recorded = self._recorders[index].calls if self._recorders else []
            # an override may answer without calling the teacher, and then has no features
            answer = recorded[-1] if recorded else Call((), {}, who="teacher")
            answer.output, answer.teacher, answer.read_logits = single, index, call.read_logits
            answer.args, answer.kwargs, answer.network = shown.args, shown.kwargs, networks[index]
            answer.rows = None if rows is None else rows[index]
            answers.append(answer)
        return answers

    @contextmanager
    def _parted(self, rows: Sequence[Tensor] | None) -> Iterator[None]:
        """A context in which each of several teachers is called with its own examples."""
        if rows is None:
            yield
            return
        ensemble = cast(TeacherEnsemble, self.module)
        ensemble.rows = shown_rows(rows, all_answer=bool(self._recorders))
        try:
            yield
        finally:
            ensemble.rows = None

    def _output(self, call: Call) -> Any:
        try:
            return self._forward(call)
        except NotImplementedError as error:
            without_forward = [network for network in self.modules() if not compat.overrides(network, "forward")]
            if not without_forward:
                raise
            raise TypeError(
                f"Expected `teacher` to have a `forward` of its own, but got {type(without_forward[0]).__name__}. Pass"
                " the network inside it, such as module.model, or override `teacher_forward`."
            ) from error


def _own_dtype(network: nn.Module) -> torch.dtype | None:
    """The half or double precision that a network is kept in; it computes in it, beside any student."""
    dtypes = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
    own = next(iter(dtypes)) if len(dtypes) == 1 else None
    return own if own in (torch.float16, torch.bfloat16, torch.float64) else None


def _in_precision(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _called(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The output of one of several teachers in its own precision, as a single one would compute it."""
    if dtype is None:
        return teacher(*args, **kwargs)
    kind, double = first_tensor(args, kwargs).device.type, dtype == torch.float64
    if double or not torch.is_autocast_enabled(kind):
        args, kwargs = _in_precision((args, kwargs), dtype)
    with torch.autocast(kind, enabled=False) if double else nullcontext():
        return teacher(*args, **kwargs)


class NoTeacher(WithoutNetwork):
    """The source of terms that read the student alone."""

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if a term reads the teacher.

        Raises:
            ValueError: If so.
        """
        if reader is not None:
            raise ValueError(
                f"Expected `teacher` to be a module, since term {reader!r} reads it, but got teacher=None. Pass the"
                " teacher, or only terms of SelfDistillation."
            )

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """An empty answer."""
        return [Call((), {}, who="teacher", read_logits=call.read_logits)]
