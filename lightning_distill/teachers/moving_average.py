"""A teacher that is the moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_distill import checks, compat
from lightning_distill.processes import world_size
from lightning_distill.recording import Call, Tap
from lightning_distill.recording.student import StudentFinder
from lightning_distill.schedules import Schedule, Setting
from lightning_distill.teachers.copies import independent_copy
from lightning_distill.teachers.fixed import FixedTeacher
from lightning_distill.teachers.inputs import TeacherInputs
from lightning_distill.teachers.source import LiveTeachers

_HALF = (torch.float16, torch.bfloat16)


def _check_decay(name: str, value: Any) -> None:
    checks.between(name, value, 0, 1)


class EMATeacher:
    r"""The moving average of the student's weights as the teacher (mean teacher, self-distillation).

    .. math:: \theta' \leftarrow d \, \theta' + (1 - d) \, \theta

    It starts as a copy of the student at the first step and is updated after each step of the student's optimizer, not
    after each micro-batch. Buffers of floating point numbers, such as the statistics of batch normalisation, are
    averaged too; others are copied. It runs in eval mode and without gradients, and terms may read its layers. It is
    saved with the callback's state and resumes exactly.

    Args:
        decay: Share of the old average in each update, from 0 (the student itself) to 1 (its first weights), a number
            or a schedule.

    Attributes:
        network: The average, a copy of the student; ``None`` before the first step. After the training it may be used
            like the student.

    Raises:
        ValueError: If ``decay`` is not from 0 to 1.
        TypeError: If ``decay`` is not a number.

    Example:
        >>> from lightning_distill import Distiller
        >>> student = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> with Distiller(student, EMATeacher(decay=0.9)) as distiller:
        ...     distiller.follow(optimizer)
        ...     for _ in range(2):
        ...         with distiller.record():
        ...             loss = student(torch.ones(1, 2)).sum()
        ...         distiller.total(loss).backward()
        ...         optimizer.step()
        >>> distiller.teacher.network.training
        False

    References:
        Tarvainen and Valpola 2017, Mean teachers are better role models, arXiv:1703.01780.
    """

    decay = Setting(_check_decay)
    schedules: dict[str, Schedule]

    def __init__(self, decay: float | Schedule = 0.999) -> None:
        self.decay = decay
        self.network: nn.Module | None = None
        self._source: AverageSource | None = None  # the training that updates it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the average.

        Raises:
            ValueError: If no training has begun.
        """
        if self.network is None:
            raise ValueError("Expected the EMATeacher to be called in a training, but it has no weights yet. Train.")
        return self.network(*args, **kwargs)

    def __repr__(self) -> str:
        return f"EMATeacher(decay={self.schedules.get('decay', self.decay)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> EMATeacher:
        return EMATeacher(self.schedules.get("decay", self.decay))  # of another training: it starts again

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # of this training

    def source(
        self, taps: Sequence[Tap], forward: Callable[[Call], Any], inputs: TeacherInputs | None
    ) -> AverageSource:
        """The source of its outputs."""
        return AverageSource(self, taps, forward, inputs)


class AverageSource(FixedTeacher):
    """The source of a moving average's outputs, and its updates.

    Args:
        teacher: The teacher.
        taps: The layers that terms read.
        forward: Its output for a call of the student.
        inputs: Makes its inputs from the student's call; ``None`` takes the student's.
    """

    live, stored, moves = True, False, True

    def __init__(
        self, teacher: EMATeacher, taps: Sequence[Tap], forward: Callable[[Call], Any], inputs: TeacherInputs | None
    ) -> None:
        self._teacher, self._taps, self._forward, self._inputs = teacher, taps, forward, inputs
        self._student: StudentFinder | None = None
        self._named_taps: list[tuple[str, Tap]] = []
        self._live: LiveTeachers | None = None
        self._saved: dict[str, Tensor] = {}  # waits for the student
        self._begun = False  # whether it has averaged, and does not only stand for the student in validation
        self._leader: Optimizer | None = None
        self._handles: list[Any] = []

    @property
    def scheduled(self) -> list[tuple[str, Any]]:
        """The teacher, with the prefix of its settings in logs."""
        return [("teacher", self._teacher)]

    # The average -----------------------------------------------------------------------------------------------------

    def meet(self, student: StudentFinder) -> None:
        """Take the student to average."""
        self._student = student

    def check(self, taps: Sequence[tuple[str, Tap]], reader: str | None, output_reader: str | None) -> None:
        """Raise if the student cannot be averaged. Layers are checked with the first step.

        Raises:
            ValueError: If so, or another training has the teacher.
        """
        self._named_taps = list(taps)
        if self._student is not None and self._student.in_parts:
            raise ValueError(
                "Expected the student of an EMATeacher to be one network, but got several paths. Put the parts into one"
                " module, and call that."
            )
        if self._teacher._source not in (None, self):
            raise ValueError(
                "Expected each EMATeacher to belong to one training, but another one updates it. Pass a second"
                " EMATeacher(...)."
            )

    def _make(self) -> LiveTeachers:
        """The teacher that answers; made from the student before its first step."""
        if self._live is not None:
            return self._live
        student = _plain(self._student.root) if self._student is not None else nn.Module()
        _check_student(student)
        network = independent_copy(student)
        network.eval()
        for parameter in network.parameters():  # `requires_grad_` of the module is not there in TorchScript
            parameter.requires_grad_(False)
        if self._saved:
            _restore(network, self._saved)
            self._saved, self._begun = {}, True
        live = LiveTeachers(network, self._taps, self._forward, None, self._inputs)
        live.check(self._named_taps, None, None)
        self._teacher.network, self._teacher._source, self._live = network, self, live
        return live

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, *_: Any) -> None:
        """Called after each step of the student's optimizer."""
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer skips inside its own step
        if self._live is None or self._student is None or (overflow is not None and overflow.item()):
            return
        average, current = _tensors(self._live.module), _tensors(_plain(self._student.root))
        _check_same(average, current)
        floating = [name for name, tensor in average.items() if tensor.is_floating_point() or tensor.is_complex()]
        if floating:
            update = get_ema_multi_avg_fn(self._teacher.decay)  # type: ignore[no-untyped-call]
            update([average[name] for name in floating], [current[name] for name in floating], 0)
        for name in average.keys() - set(floating):
            average[name].copy_(current[name])
        _share_buffers(self._live.module)

    def before_step(self, *_: Any) -> None:
        """Make the average; a process may reach the optimizer's step without a call of the teacher."""
        if self._begun or self._student is None or not self._student.is_known:
            return
        if self._live is not None and not self._saved:  # made in a validation, since when the student may have changed
            _restore(self._live.module, _tensors(_plain(self._student.root)))
        self._make()
        self._begun = True

    def follow(self, leader: Optimizer) -> None:
        """Update the average after each step of this optimizer."""
        self.unfollow()
        self._leader = leader
        self._handles = [
            leader.register_step_pre_hook(self.before_step),
            leader.register_step_post_hook(self._update),
        ]

    def unfollow(self) -> None:
        """Stop following the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._leader, self._handles = None, []

    def check_followed(self) -> None:
        """Raise if no optimizer is followed, so that the average would keep the student's first weights.

        Raises:
            ValueError: If so.
        """
        if self._leader is None:
            raise ValueError(
                "Expected an optimizer for the EMATeacher to follow, but got none. In a loop of your own call"
                " distiller.follow(optimizer). Under a Trainer one of its optimizers must train the student."
            )

    def state_dict(self) -> dict[str, Any]:
        """The average by the names of its parameters and buffers; empty before the first step."""
        values = self._saved if self._live is None or not self._begun else _tensors(self._live.module)
        return {"average": dict(values)} if values else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved average, or start with the student if the state is empty.

        Raises:
            ValueError: If it is the state of a list of teachers.
        """
        if not state.keys() <= {"average"}:
            raise ValueError(
                f"Expected the saved state of one EMATeacher, but got that of a list of teachers, with the positions"
                f" {sorted(state)}. Pass the teachers of the training that is resumed."
            )
        self._drop()
        self._saved = dict(state.get("average", {}))

    def _drop(self) -> None:
        if self._live is not None:
            self._live.release()
        self._live, self._begun = None, False
        if self._teacher._source is self:
            self._teacher._source = None

    # A teacher -------------------------------------------------------------------------------------------------------

    def hold(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """No-op: the average is made with the first step, where the student is."""

    def release(self) -> None:
        """End the updates. The average stays in the teacher."""
        self.unfollow()
        self._saved = dict(self.state_dict().get("average", {}))
        self._drop()

    def answers(self, call: Call, stored: Any = None) -> list[Call]:
        """The average's output and features for a call of the student."""
        return self._make().answers(call, stored)

    def cast(self, value: Any) -> Any:
        """The unchanged value."""
        return value

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """The batch; no answers come with it."""
        return batch, None

    def clear(self) -> None:
        """Release everything recorded."""
        if self._live is not None:
            self._live.clear()

    def modules(self) -> Iterator[nn.Module]:
        """The average."""
        return iter(()) if self._live is None else self._live.modules()


def _plain(student: nn.Module) -> nn.Module:
    """The network inside wrappers of DDP, torch.compile and Fabric."""
    while compat.is_wrapper(student):
        inner = compat.unwrapped(student)
        if inner is None:
            break
        student = inner
    return student


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def _check_student(student: nn.Module) -> None:
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        problem = ""
        if hasattr(tensor, "full_tensor") or "FullyShardedDataParallel" in type(student).__name__:
            problem = "is a shard of FSDP. Use DDP, or one device"
        elif is_lazy(tensor) or tensor.is_meta:
            problem = "has no values yet. Call the student once before the training"
        elif tensor.dtype in _HALF and isinstance(tensor, nn.Parameter):
            dtype = str(tensor.dtype).removeprefix("torch.")
            problem = f"is in {dtype}, where small updates are lost. Use precision='bf16-mixed' or '16-mixed'"
        if problem:
            raise ValueError(
                "Expected the student of an EMATeacher to have whole parameters in float32 or float64, but"
                f" {name!r} {problem}."
            )


def _check_same(average: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    if average.keys() == current.keys() and all(average[name].shape == current[name].shape for name in average):
        return
    other = sorted(average.keys() ^ current.keys()) or [n for n in average if average[n].shape != current[n].shape]
    raise ValueError(
        "Expected the student of an EMATeacher to keep its parameters and buffers, but they have changed since the"
        f" first step: {', '.join(other[:3])}. Change the student before the training."
    )


def _restore(network: nn.Module, saved: dict[str, Tensor]) -> None:
    own = _tensors(network)
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise ValueError(
            "Expected the saved average of the EMATeacher to fit the student, but its parameters have other names or"
            " shapes. Resume with the student that was saved."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _share_buffers(network: nn.Module) -> None:
    """Give all processes the buffers of the first: each has statistics of its own batches until DDP shares them."""
    if world_size() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
