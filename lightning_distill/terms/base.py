"""The base class of the terms, which are settings, and the copies of a term that its owners train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.losses import DistillationLoss
from lightning_distill.losses.base import linked_copy
from lightning_distill.recording import Call, Tap
from lightning_distill.schedules import Schedule, TermWeight, Weight
from lightning_distill.teachers.inputs import Place, TeacherInputs

LossCallable = Callable[..., Tensor]
TeacherLayers = Callable[[str], Sequence[nn.Module]]
_MISSING = object()


class DistillationTerm(nn.Module):
    """Base class of the terms, and of your own terms: a loss at a place, with a weight.

    A subclass implements :meth:`forward`. It names the layers that it reads in ``student_taps`` and ``teacher_taps``,
    and makes parts that depend on the features' shapes in :meth:`build`. Its parameters are trained along with the
    student.

    A term may be given to several callbacks, modules or distillers. Each of them owns a copy of the term's parameters,
    in its own ``terms``; the settings are shared, so an assignment to the term counts for every owner from the next
    step on. Attributes that are set within :meth:`build` belong to the owner alone.

    Args:
        weight: Factor of the term in the total loss, 0 or greater, a schedule, or ``"balanced"``, short for a
            :class:`Balanced`; 0 skips its work. May be set at any time; a number takes the place of a schedule.
        name: Name in logs and checkpoints, distinct among the terms.

    Attributes:
        student_taps: Layers of the student that the term reads.
        teacher_taps: Layers of the teacher that the term reads.
        student_values: Layers of the student whose whole outputs or inputs are recorded too, for ``Call.recorded``,
            such as the proposals of a detector.
        needs_labels: Whether :meth:`forward` is called with the batch's labels.
        needs_teacher: Whether the term reads the teacher at all, and not the student alone.
        trains_only: Whether validation leaves the term out, because it knows the training data alone.
        counts_tokens: Whether the term is a mean over the tokens of an optimizer step. Then :meth:`forward` returns the
            mean over the tokens of its call and stores their number in ``student.counted[self.name]``, and
            :meth:`counted` counts them ahead.
        skips_heads: Whether the two networks' heads make no logits in a training step.
        student_arguments: Keyword arguments to add to the student's calls in a step, if it takes them.
        teacher_arguments: Keyword arguments to add to the teacher's calls, if it takes them.
        needs_network: Whether the teacher must be a network, because a cache does not hold what the term reads.
        compares_class_scores: Whether the term compares class scores, so that the agreement of the two networks is
            measured in validation.

    Raises:
        ValueError: If ``weight`` is negative or not finite, or ``name`` is empty or taken by the library.
        TypeError: If ``weight`` is not a number.

    Example:
        >>> import torch
        >>> class MeanGap(DistillationTerm):
        ...     def forward(self, student, teacher, labels=None):
        ...         return (student.logits.mean() - teacher.logits.mean()).abs()
        >>> term = MeanGap(weight=0.5, name="gap")
        >>> term(Call((), {}, output=torch.ones(2, 3)), Call((), {}, output=torch.full((2, 3), 3.0)))
        tensor(2.)
    """

    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    student_values: Sequence[Tap] = ()
    needs_labels: bool = False
    needs_teacher: bool = True
    compares_class_scores: bool = False
    trains_only: bool = False
    counts_tokens: bool = False
    skips_heads: bool = False
    needs_network: bool = False
    student_arguments: Mapping[str, Any] = MappingProxyType({})
    teacher_arguments: Mapping[str, Any] = MappingProxyType({})
    weight = TermWeight(checks.non_negative)

    def __init__(self, *, weight: Weight = 1.0, name: str) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        self.weight = weight
        if not name or name in ("task", "distillation"):  # the log has a task_loss and a distillation_loss of its own
            raise ValueError(f"Expected `name` to be neither empty, 'task' nor 'distillation', but got name={name!r}.")
        self.name = name

    @property
    def logged_names(self) -> list[str]:
        """Names of the values that the term logs."""
        return [f"{self.name}_loss", *self.learned_numbers()]

    def learned_numbers(self) -> dict[str, Tensor]:
        """Numbers that the term learns and logs, by name."""
        return {}

    @property
    def recorded_taps(self) -> list[Tap]:
        """All layers of the student to record."""
        return [*self.student_taps, *self.student_values]

    @property
    def active(self) -> bool:
        """Whether the term has any work in a step."""
        return bool(self.weight != 0)

    def weighted(self, value: Tensor) -> Tensor:
        """A value of :meth:`forward` times the weight."""
        # a product is an operation forward and one backward
        return value if self.weight == 1 else self.weight * value

    def counted(self, batch: Any, label_place: Any = None, seq2seq: bool = False) -> Tensor:
        """How many tokens of a batch count, for a term with ``counts_tokens``; see :class:`SequenceDistillation`."""
        raise NotImplementedError(f"Expected {type(self).__name__} to implement `counted`.")

    def teacher_call(self, call: Call, networks: Sequence[nn.Module] = ()) -> Call | None:
        """The call that the teacher gets for one of the student's, if the term makes its inputs.

        Keyword arguments that the teacher does not take are left out.

        Args:
            call: The student's call; ``call.batch`` is the batch.
            networks: The teachers, if they are known.

        Returns:
            A call with the teacher's arguments, or ``None`` to leave them to ``teacher_inputs``.
        """
        return None

    def connect(self, layers: TeacherLayers | None) -> None:
        """Learn where the teachers' layers are, before the first step.

        Args:
            layers: Returns the layers of a name, one of each teacher; ``None`` if the teacher is not a network of its
                own.
        """

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make the parts that depend on the features' shapes, once for each owner, before the first use.

        Args:
            student: A recorded call of the student.
            teachers: The answer of each teacher to it.
        """

    def reset(self) -> None:
        """Drop the parts that :meth:`build` made."""

    @property
    def makes_parts(self) -> bool:
        """Whether the term has a :meth:`build` of its own."""
        return type(self).build is not DistillationTerm.build

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight.

        Args:
            student: A recorded call of the student; ``student.batch`` is the batch.
            teacher: One teacher's answer to it.
            labels: The batch's labels, where ``needs_labels``.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to implement `forward(student, teacher, labels)`.")

    # Owners ----------------------------------------------------------------------------------------------------------

    def owned(self) -> DistillationTerm:
        """A copy for one owner: it shares the settings and has parameters of its own."""
        state = self.__dict__
        if "_relatives" not in state:
            state.update(_relatives=WeakSet([self]), _built=set())
        copied: DistillationTerm = type(self).__new__(type(self))
        copied.__dict__.update(state)
        memo: dict[int, Any] = {}
        for kind in ("_parameters", "_buffers"):
            copied.__dict__[kind] = copy.deepcopy(state[kind], memo)
        copied.__dict__["_modules"] = {
            # a loss without learned parameters is shared like a setting; `build` fills containers
            name: module if _is_settings(module) else linked_copy(module, memo)
            for name, module in self._modules.items()
        }
        copied.__dict__.update(_is_copy=True, _built=set())
        copied.remake(copied.reset)
        state["_relatives"].add(copied)
        return copied

    def remake(self, make: Callable[..., None], *arguments: Any) -> None:
        """Call :meth:`build` or :meth:`reset`, whose assignments belong to this owner alone."""
        self.__dict__["_own"] = True
        try:
            make(*arguments)
        finally:
            self.__dict__["_own"] = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        state = self.__dict__
        relatives = state.get("_relatives")
        if relatives is None or name not in state:
            return
        if state.get("_own"):
            state["_built"].add(name)
        if name in state["_built"]:  # later too, such as a running mean that `build` starts and `forward` updates
            return
        for term in list(relatives):
            term.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        """An attribute of the term, or of the one owner's copy that has it."""
        try:
            value: Any = super().__getattr__(name)
        except AttributeError:
            value = _MISSING
        state = self.__dict__
        built = []
        if _is_empty(value) and "_relatives" in state and "_is_copy" not in state:
            entries = [term._stored(name) for term in state["_relatives"] if "_is_copy" in term.__dict__]
            built = [entry for entry in entries if not _is_empty(entry)]
        if len(built) > 1:
            raise ValueError(
                f"Expected term {self.name!r} to have one owner when {name!r} is read from it, but it has {len(built)}."
                f" Read it from the owner's own terms, such as callback.terms[0].{name}."
            )
        if not built and value is _MISSING:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return built[0] if built else value

    def _stored(self, name: str) -> Any:
        state = self.__dict__
        for place in (state, state["_parameters"], state["_buffers"], state["_modules"]):
            if name in place:
                return place[name]
        return _MISSING

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_relatives", "_layers")}


def _is_empty(value: Any) -> bool:
    return value is None or value is _MISSING or (isinstance(value, nn.ModuleList) and len(value) == 0)


def _is_settings(module: nn.Module | None) -> bool:
    if module is None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return module is None
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def taps_of(layers: str | Tap | Sequence[str | Tap]) -> list[Tap]:
    """The taps on one layer or several.

    Args:
        layers: Names of layers, or taps.
    """
    return [Tap.of(layer) for layer in ([layers] if isinstance(layers, (str, Tap)) else layers)]


def as_terms(terms: Any, default: Callable[[DistillationLoss | None], DistillationTerm]) -> list[DistillationTerm]:
    """The terms as a list with distinct names.

    Args:
        terms: A term, a loss on logits, a sequence of them, or ``None`` for the default.
        default: Makes a term on the logits from a loss, or from ``None``.

    Raises:
        TypeError: If one of them is not a term.
        ValueError: If the sequence is empty, or two share a name.
    """
    if terms is None or isinstance(terms, nn.Module) or not isinstance(terms, Sequence):
        terms = [default(None) if terms is None else terms]
    if not terms:
        raise ValueError("Expected `terms` to hold at least one term, but got terms=[]. Pass None for logits alone.")
    terms = [default(term) if isinstance(term, DistillationLoss) and term.class_scores else term for term in terms]
    for index, term in enumerate(terms):
        if not isinstance(term, DistillationTerm):
            got = f"the class {term.__name__}" if isinstance(term, type) else type(term).__name__
            raise TypeError(
                f"Expected `terms[{index}]` to be a term, but got {got}. Wrap a loss:"
                " LogitsDistillation(loss) or FeatureDistillation(student_layer, teacher_layer, loss)."
            )
    checked: list[DistillationTerm] = list(terms)
    names = [term.name for term in checked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected `terms` to have distinct names, but got {twice!r} twice. Pass name=... to one.")
    return checked


def teacher_inputs_of(terms: Sequence[DistillationTerm], place: Place, chosen: bool) -> TeacherInputs:
    """The maker of the teacher's call, with the arguments that terms ask for.

    Args:
        terms: The terms, some of which may make the teacher's inputs themselves.
        place: Makes the teacher's inputs, or says where a batch has them.
        chosen: Whether the caller of the teacher may change its inputs further.
    """
    arguments = {name: value for term in terms for name, value in term.teacher_arguments.items()}
    makers = [term.teacher_call for term in terms if type(term).teacher_call is not DistillationTerm.teacher_call]
    return TeacherInputs(place, arguments, makers, chosen)


def connected(terms: Sequence[DistillationTerm], source: Any) -> Sequence[DistillationTerm]:
    """The terms, which know the layers of the teachers from now on.

    Args:
        terms: The terms of one owner.
        source: The teacher; one without a method ``layers_named`` has no network of its own.
    """
    for term in terms:
        term.remake(term.connect, getattr(source, "layers_named", None))
    return terms
