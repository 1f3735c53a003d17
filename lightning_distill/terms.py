"""Terms: a loss at a place in the two networks, with a weight and perhaps an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.adapters import AdapterFactory, make_adapter
from lightning_distill.functional.inputs import resolve_class_dim
from lightning_distill.functional.top_k import TopK, merge_classes
from lightning_distill.losses import DistillationLoss, FeatureDistance, SoftTargetLoss
from lightning_distill.schedules import Schedule, first_value
from lightning_distill.taps import Call, Tap

LossCallable = Callable[..., Tensor]


class DistillationTerm(nn.Module):
    """A loss at a place, with a weight: the base class of the terms, and of a user's own.

    A subclass implements :meth:`forward`; it names the layers that it reads in ``student_taps`` and ``teacher_taps``,
    and makes what depends on the features' shapes in :meth:`build`. Its parameters are trained along with the student.

    Args:
        weight: Factor of the term in the total loss, 0 or greater, or a schedule; 0 skips its work. May be set while
            training.
        name: Name in logs and checkpoints, distinct among the terms.

    Attributes:
        student_taps: Layers of the student that the term reads.
        teacher_taps: Layers of the teacher that the term reads.
        needs_labels: Whether :meth:`forward` is given the batch's labels.
        needs_teacher: Whether the term reads the teacher at all, and not the student alone.

    Raises:
        ValueError: If ``weight`` is negative or not finite, or ``name`` is empty or taken by the library.
        TypeError: If ``weight`` is not a number.

    Example:
        >>> class MeanGap(DistillationTerm):
        ...     def forward(self, student, teacher, labels=None):
        ...         return (student.logits.mean() - teacher.logits.mean()).abs()
        >>> term = MeanGap(weight=0.5, name="gap")
        >>> term(Call((), {}, output=torch.ones(2, 3)), Call((), {}, output=torch.full((2, 3), 3.0)))
        tensor(2.)
    """

    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    needs_labels: bool = False
    needs_teacher: bool = True

    def __init__(self, *, weight: float | Schedule = 1.0, name: str) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        weight = first_value("weight", weight, checks.non_negative, self.schedules)
        if not name or name in ("task", "distillation"):  # the log has a task_loss and a distillation_loss of its own
            raise ValueError(f"Expected `name` to be neither empty, 'task' nor 'distillation', but got name={name!r}.")
        self.weight, self.name = weight, name

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make what depends on the features' shapes, once, before the first use.

        Args:
            student: A recorded call of the student.
            teachers: The answer of each teacher to it.
        """

    def reset(self) -> None:
        """Drop what :meth:`build` made."""

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight.

        Args:
            student: A recorded call of the student.
            teacher: One teacher's answer to it.
            labels: The batch's labels, where ``needs_labels``.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to implement `forward(student, teacher, labels)`.")


class LogitsDistillation(DistillationTerm):
    """A loss between the logits of the two networks.

    Args:
        loss: A loss on ``(student_logits, teacher_logits)``; ``None`` is :class:`SoftTargetLoss` at temperature 4.
            Given ``needs_labels = True`` it is called with the labels too.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and checkpoints.

    Raises:
        TypeError: If ``loss`` cannot be called, or is a class.
        ValueError: If ``weight`` is negative.

    Example:
        >>> term = LogitsDistillation(SoftTargetLoss(temperature=1.0), weight=0.5)
        >>> term(Call((), {}, output=torch.tensor([[2.0, 0.0]])), Call((), {}, output=torch.tensor([[0.0, 1.0]])))
        tensor(1.0068)

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    def __init__(
        self,
        loss: DistillationLoss | LossCallable | None = None,
        *,
        weight: float | Schedule = 1.0,
        name: str = "logits",
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.loss = _checked_loss(SoftTargetLoss() if loss is None else loss)
        if getattr(loss, "learned", False):
            raise TypeError(
                f"Expected `loss` to have no parameters of its own, but got {type(loss).__name__}. Use it in a"
                ' FeatureDistillation; the layers "" and "" are the outputs of the two networks.'
            )
        self.needs_labels = getattr(self.loss, "needs_labels", False)

    @property
    def class_dim(self) -> int | None:
        """Dimension of the logits that counts the classes; None where their shape tells."""
        dim: int | None = getattr(self.loss, "class_dim", None)
        return dim

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        top_k: TopK | None = getattr(teacher, "top_k", None)
        if top_k is None:
            return _scalar(self.loss, student.logits, teacher.logits, labels, self.needs_labels)
        own = getattr(self.loss, "merges_classes", False) and not getattr(self.loss, "standardize", False)
        dims = (-1, student.logits.ndim - 1)
        if not own or resolve_class_dim(student.logits, self.class_dim, labels) not in dims:
            raise ValueError(
                f"Expected a cache of full outputs for {self.loss}, but it holds the likeliest"
                f" {top_k.indices.shape[-1]} classes alone. Build it without top_k, or use a divergence such as"
                " SoftTargetLoss."
            )
        merged = merge_classes(student.logits, top_k, getattr(self.loss, "temperature", 1.0))
        return _scalar(self.loss, *merged, labels, False)


class FeatureDistillation(DistillationTerm):
    """A loss between a feature of the student, mapped by an adapter, and a feature of the teacher.

    A teacher map (N, C, H, W) of another height or width than the student's is resized to it: averaged down,
    interpolated up. The adapters take their shapes from the first batch, and so does a loss with parameters of its own,
    of which every pair of layers has a copy.

    Args:
        student_layer: Name of a layer of the student, such as ``"layer3.0"``, or a :class:`Tap`, or a list of them.
        teacher_layer: The same for the teacher; as many as for the student.
        loss: ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"``, ``"kl"``, or a loss on ``(student, teacher)``. A loss
            with ``several_layers = True`` is given lists of features; any other is averaged over the pairs of layers.
            A loss with ``learned = True`` is trained along with the adapters.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: ``"auto"`` (identity where the shapes agree, else a 1x1 convolution for maps and a linear map for
            vectors and token sequences), ``None``, ``"linear"``, ``"conv1x1"``, a module, which is copied, or a factory
            called with the shapes of both features.
        name: Name in logs and checkpoints; ``None`` takes the student layer's.

    Attributes:
        adapters: The adapters, by teacher and then by layer; empty before the first step.
        learned: The copies of a loss with parameters of its own, in the same order; empty for other losses.

    Raises:
        ValueError: If a setting is not one of those above, or ``loss`` has been built already.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> FeatureDistillation("layer2", "layer4", "cosine", weight=10.0).name
        'layer2'

    References:
        Romero et al. (2015). FitNets: Hints for Thin Deep Nets. arXiv:1412.6550. The paper's factor 1/2 is left out.
    """

    def __init__(
        self,
        student_layer: str | Tap | Sequence[str | Tap],
        teacher_layer: str | Tap | Sequence[str | Tap],
        loss: str | DistillationLoss | LossCallable = "mse",
        *,
        weight: float | Schedule = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        name: str | None = None,
    ) -> None:
        student_taps, teacher_taps = _taps(student_layer), _taps(teacher_layer)
        super().__init__(weight=weight, name=name or "+".join(tap.layer for tap in student_taps) or "features")
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise ValueError(
                "Expected `student_layer` and `teacher_layer` to name equally many layers, at least one, but got"
                f" {len(student_taps)} and {len(teacher_taps)}. Pair them."
            )
        if isinstance(adapter, str):
            checks.one_of("adapter", adapter, ("auto", "linear", "conv1x1"))
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        self._pairs = [*zip(student_taps, teacher_taps, strict=True)]
        self.loss = FeatureDistance(loss) if isinstance(loss, str) else _checked_loss(loss)  # type: ignore[arg-type]
        self._learns = getattr(self.loss, "learned", False)
        if self._learns and any(True for _ in self.loss.parameters()):  # type: ignore[union-attr]
            raise ValueError(
                f"Expected `loss` not to be built yet, but got {type(self.loss).__name__} with parameters. Pass a new"
                " one: the term builds a copy for each pair of layers."
            )
        self.needs_labels = getattr(self.loss, "needs_labels", False)
        self._several_layers = getattr(self.loss, "several_layers", False)
        self._channels_must_match = getattr(self.loss, "channels_must_match", True)
        self._positions_must_match = getattr(self.loss, "positions_must_match", True)
        self._adapter = [adapter]  # in a list, so that a module is not registered: it is only copied
        self.adapters = nn.ModuleList()
        self.learned = nn.ModuleList()
        self._fitted: list[nn.Module] = []  # the same: a module list is slow to index

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the adapters from the features of a first call."""
        for teacher in teachers:
            for student_tap, teacher_tap in self._pairs:
                theirs, wanted = student.feature(student_tap), self._target(student, teacher, teacher_tap)
                adapter = self._adapter[0]
                if adapter == "auto" and not self._channels_must_match:
                    adapter = None
                made = make_adapter(adapter, theirs.shape, wanted.shape, student_tap.layer)
                # under autocast parameters stay in float32; without it they must have the feature's own precision
                dtype = torch.float32 if torch.is_autocast_enabled(theirs.device.type) else theirs.dtype
                made = made.to(device=theirs.device, dtype=dtype)
                if self._learns:
                    self.learned.append(self._built_loss(made, theirs, wanted))
                self.adapters.append(made.train())
        self._fitted = [*self.adapters]

    def reset(self) -> None:
        """Drop the adapters, and the parameters of the loss."""
        self.adapters, self.learned, self._fitted = nn.ModuleList(), nn.ModuleList(), []

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        if len(self._pairs) == 1 and not self._several_layers:
            loss = self.learned[teacher.teacher] if self._learns else self.loss
            return _scalar(loss, *self._pair(0, student, teacher), labels, self.needs_labels)
        pairs = [self._pair(index, student, teacher) for index in range(len(self._pairs))]
        if self._several_layers:
            mine, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            return _scalar(self.loss, mine, theirs, labels, self.needs_labels)
        first = teacher.teacher * len(pairs)
        losses = self.learned[first : first + len(pairs)] if self._learns else [self.loss] * len(pairs)
        values = [_scalar(loss, *pair, labels, self.needs_labels) for loss, pair in zip(losses, pairs, strict=True)]
        return torch.stack(values).mean()

    def _built_loss(self, adapter: nn.Module, student: Tensor, teacher: Tensor) -> nn.Module:
        """The copy of a learned loss for one pair of layers."""
        with torch.no_grad():
            adapted = adapter.eval()(student)
        loss: DistillationLoss = copy.deepcopy(self.loss)  # type: ignore[assignment]
        loss.build(adapted.shape, teacher.shape)
        # in the precision in which the features will be compared
        dtype = torch.promote_types(torch.promote_types(adapted.dtype, teacher.dtype), torch.float32)
        return loss.to(device=adapted.device, dtype=dtype).train()

    def _pair(self, index: int, student: Call, teacher: Call) -> tuple[Tensor, Tensor]:
        student_tap, teacher_tap = self._pairs[index]
        feature = student.feature(student_tap)
        target = self._target(student, teacher, teacher_tap)
        adapted = self._fitted[teacher.teacher * len(self._pairs) + index](feature)
        if self._positions_must_match and adapted.ndim == target.ndim == 4 and self._adapter[0] != "linear":
            target = _resized(_widened_one(target), adapted)
        if self._channels_must_match and self._positions_must_match and adapted.shape != target.shape:
            raise ValueError(
                f"Expected student feature {student_tap.layer!r} and teacher feature {teacher_tap.layer!r} to have"
                f" equal shapes, but got {tuple(adapted.shape)} and {tuple(target.shape)}."
                + (' Pass adapter="auto".' if self._adapter[0] is None else " Pass an adapter that makes them equal.")
            )
        return adapted, target

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        """What the student's feature is compared with."""
        return teacher.feature(tap)


class SelfDistillation(FeatureDistillation):
    """A loss between shallow layers of the student and a deep one, from which they learn: a network with several exits.

    The deep layer's feature is the target and gets no gradient. No teacher is needed: pass ``teacher=None`` where there
    are no other terms.

    Args:
        student_layer: The shallow layer, or several.
        teacher_layer: The deep layer of the same network; one for all, or as many.
        loss: As for :class:`FeatureDistillation`; between exits that give logits a loss on logits.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: As for :class:`FeatureDistillation`.
        name: Name in logs and checkpoints; ``None`` takes the shallow layer's.

    Raises:
        ValueError: If a setting is not one of those above.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> SelfDistillation(["exit1", "exit2"], "exit3", SoftTargetLoss(temperature=3.0), weight=0.5).name
        'exit1+exit2'

    References:
        Zhang et al. (2019). Be Your Own Teacher, arXiv:1905.08094.
    """

    needs_teacher = False

    def __init__(
        self,
        student_layer: str | Tap | Sequence[str | Tap],
        teacher_layer: str | Tap | Sequence[str | Tap],
        loss: str | DistillationLoss | LossCallable = "mse",
        *,
        weight: float | Schedule = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        name: str | None = None,
    ) -> None:
        deep = [teacher_layer] if isinstance(teacher_layer, (str, Tap)) else [*teacher_layer]
        if len(deep) == 1 and not isinstance(student_layer, (str, Tap)):
            deep *= len(student_layer)
        super().__init__(student_layer, deep, loss, weight=weight, adapter=adapter, name=name)
        self.student_taps, self.teacher_taps = [tap for pair in self._pairs for tap in pair], ()

    def _target(self, student: Call, teacher: Call, tap: Tap) -> Tensor:
        return student.feature(tap).detach()


def _taps(layers: str | Tap | Sequence[str | Tap]) -> list[Tap]:
    return [Tap.of(layer) for layer in ([layers] if isinstance(layers, (str, Tap)) else layers)]


def _checked_loss(loss: DistillationLoss | LossCallable) -> DistillationLoss | LossCallable:
    if isinstance(loss, type) or not callable(loss):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else f"loss={loss!r}"
        remedy = f"Pass an instance: {loss.__name__}(...)." if isinstance(loss, type) else "Pass a loss from losses."
        raise TypeError(f"Expected `loss` to be a loss object or a function, but got {got}. {remedy}")
    return loss


def _resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's map at the student's height and width: averaged down, interpolated up."""
    size = student.shape[-2:]
    if teacher.shape[-2:] == size:
        return teacher
    smaller = (min(teacher.shape[-2], size[0]), min(teacher.shape[-1], size[1]))
    teacher = F.adaptive_avg_pool2d(teacher, smaller)
    return teacher if smaller == size else F.interpolate(teacher, size, mode="bilinear", align_corners=False)


def _scalar(
    loss: LossCallable | DistillationLoss,
    student: Tensor | list[Tensor],
    teacher: Tensor | list[Tensor],
    labels: Tensor | None,
    needs_labels: bool,
) -> Tensor:
    """The loss in float32 or better, whatever precision surrounds it, averaged if it is not a scalar."""
    first = student if isinstance(student, Tensor) else student[0]
    if not isinstance(loss, DistillationLoss):  # ours widen what they are given themselves
        student, teacher = _widened(student), _widened(teacher)
    arguments = (student, teacher, labels) if needs_labels else (student, teacher)
    if torch.is_autocast_enabled(first.device.type):
        with torch.autocast(first.device.type, enabled=False):
            value = loss(*arguments)
    else:
        value = loss(*arguments)
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `loss` to return a tensor, but got {type(value).__name__}.")
    return value if value.ndim == 0 else value.mean()


def _widened(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [_widened_one(one) for one in value] if isinstance(value, list) else _widened_one(value)


def _widened_one(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
