"""Base classes of the losses: requirements that a term reads, settings that repr shows, masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.losses.temperature import CurriculumTemperature
from lightning_distill.schedules import Progress, Schedule, first_value

__all__ = ["DistillationLoss"]


class DistillationLoss(nn.Module):
    """Base of every loss: a module called with the student's tensor, then the teacher's, that returns a scalar.

    A subclass stores checked settings and defines ``forward(student, teacher)``, or
    ``forward(student, teacher, labels)`` with ``needs_labels = True``. Eleven attributes describe it to a term:

    - ``needs_labels``: the batch's labels are the third argument.
    - ``channels_must_match``: the two features need the same number of channels, if necessary through an adapter.
    - ``positions_must_match``: the two features need the same positions; a term resizes the teacher's map.
    - ``several_layers``: the two arguments are lists of features, one for each layer.
    - ``merges_classes``: it is a divergence between the distributions of a row, also where classes of the row are
      merged, so that a cache of the likeliest classes is enough.
    - ``linear_in_teacher``: its gradient is linear in the teacher's probabilities at temperature 1, so that a cache of
      classes drawn at random gives an unbiased one.
    - ``learned``: :meth:`build` makes parameters. A FeatureDistillation builds a copy of the loss for each pair of
      layers, and treats it as it does adapters.
    - ``reads_teacher``: :meth:`read_teacher` takes numbers from layers of the teacher. Every pair of layers then has a
      copy of the loss too.
    - ``needs_boxes``: the weights of the batch's boxes at the positions of a map are the third argument; see
      :func:`lightning_distill.functional.foreground_weights`.
    - ``needs_index``: the row of each example in the training data is the third argument; its number of rows is the
      loss's ``size``, which a term sets where it is ``None``. Validation leaves the term out.
    - ``learns_temperature``: it has a gradient for its temperature, which may be a CurriculumTemperature.
    - ``class_scores``: both arguments are class scores (logits), so that agreement with the teacher is meaningful.

    Every loss of this package also takes ``mask=``, a bool tensor that is True where an example ``(N,)`` or a position
    (``(N, L)`` or ``(N, H, W)``) counts. Masked values change nothing, NaN included, and get a gradient of exactly 0;
    the mean is over the values that count, and 0 where none does. A loss that compares whole examples averages over
    those with a position that counts.

    Example:
        >>> import torch
        >>> class LargestDifference(DistillationLoss):
        ...     def forward(self, student, teacher):
        ...         return (student - teacher.detach()).abs().amax(dim=-1).mean()
        >>> LargestDifference()(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 2.0], [0.0, 1.0]]))
        tensor(2.)
    """

    needs_labels: ClassVar[bool] = False
    channels_must_match: ClassVar[bool] = True
    positions_must_match: ClassVar[bool] = True
    several_layers: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    reads_teacher: ClassVar[bool] = False
    merges_classes: ClassVar[bool] = False
    linear_in_teacher: ClassVar[bool] = False
    needs_boxes: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    class_scores: ClassVar[bool] = False
    learns_temperature: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        self._shown: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        self._set(name, value)
        known = name in self.__dict__ or name in self.__dict__.get("_settings", ())
        if known and name != "training" and not name.startswith("_"):
            for copied in list(self.__dict__.get("_copies", ())):
                setattr(copied, name, value)

    def _set(self, name: str, value: Any) -> None:
        schedules = self.__dict__.get("schedules")
        if schedules is not None and name in self.__dict__ and name in self.__dict__.get("_shown", ()):
            # a setting that is assigned later: a number takes the place of a schedule, and the other way round
            schedules.pop(name, None)
            if isinstance(value, Schedule):
                schedules[name] = value
                value = value.at(Progress(0, 0, 0.0))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the parameters of a loss with ``learned = True``.

        Args:
            student: Shape of the student's feature, after the adapter.
            teacher: Shape of the teacher's feature.

        Raises:
            ValueError: If the loss cannot compare features of these shapes.
        """

    def read_teacher(self, layer_of: Callable[[str | None], nn.Module]) -> None:
        """Take numbers from layers of the teacher, for a loss with ``reads_teacher = True``; before :meth:`build`.

        Args:
            layer_of: Returns the teacher's layer of a name; ``None`` is the layer that the term names.

        Raises:
            ValueError: If a layer is not of the kind that the loss reads.
        """

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def _setting(
        self,
        name: str,
        value: float | Schedule | CurriculumTemperature,
        check: Callable[[str, Any], None] = checks.positive,
    ) -> float:
        """The first number of a setting that may be a schedule, after a check of its numbers."""
        self._shown.append(name)
        if not isinstance(value, CurriculumTemperature):
            return float(first_value(name, value, check, self.schedules))
        if name != "temperature" or not self.learns_temperature:
            raise TypeError(
                f"Expected `{name}` of {type(self).__name__} to be a number or a schedule, since the loss has no"
                " gradient for it, but got a CurriculumTemperature. Use a loss such as SoftTargetLoss or"
                " DecoupledKDLoss."
            )
        return cast(float, copy.deepcopy(value))  # two losses must not learn one number

    def _number(self, name: str) -> Any:
        """The number of a setting; a scalar tensor for a temperature that is learned."""
        value = getattr(self, name)
        return value() if isinstance(value, CurriculumTemperature) else value

    def _fix(self, **settings: Any) -> None:
        """Store settings, checked already, that repr shows."""
        self._shown.extend(settings)
        for name, value in settings.items():
            setattr(self, name, value)


def linked_copy(loss: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy with parameters of its own, for which settings that are assigned to the loss later count too.

    Args:
        loss: The loss; any other module is copied without a link.
        memo: The copies made so far, as for ``copy.deepcopy``.
    """
    copied = copy.deepcopy(loss, memo)
    if isinstance(loss, DistillationLoss):
        loss.__dict__.setdefault("_copies", WeakSet()).add(copied)
    return copied


class FormulaLoss(DistillationLoss):
    """Base of the losses that are one function of :mod:`lightning_distill.functional`, with settings of equal names."""

    _formula: ClassVar[Callable[..., Tensor]]
    _of_batch: ClassVar[bool] = False  # whether the function returns a scalar by itself

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        return self._value(student, teacher, mask=mask)

    @property
    def has_rows(self) -> bool:
        """Whether the loss has a value for each row, so that :meth:`rows` may be called."""
        own = {vars(kind)["forward"] for kind in (FormulaLoss, LabelledLoss)}
        return not self._of_batch and type(self).forward in own

    def rows(self, *tensors: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each row, 0 where a row does not count, for a loss with :attr:`has_rows`."""
        return self._value(*tensors, mask=mask, reduction="none")

    def _value(self, *tensors: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
        settings = {name: self._number(name) for name in self._shown}
        if not self._of_batch:
            settings["reduction"] = reduction
        return type(self)._formula(*tensors, mask=mask, **settings)


class LogitsLoss(FormulaLoss):
    """Base of the losses on logits, which have a dimension of the classes.

    Probabilities are not recognised, because looking at their values would make the host wait for the device: hand
    over their logarithms, which are logits too.

    Args:
        class_dim: Dimension of the classes, or None.
    """

    class_dim: int | None

    def __init__(self, class_dim: int | None) -> None:
        super().__init__()
        if class_dim is not None:
            checks.inner_dim("class_dim", class_dim)
        self._fix(class_dim=class_dim)


class LabelledLoss(LogitsLoss):
    """Base of the losses on logits that look at the label's class.

    Args:
        class_dim: Dimension of the classes, or None.
        ignore_index: A label that marks rows that do not count, beside negative ones.
    """

    needs_labels: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True

    def __init__(self, class_dim: int | None, ignore_index: int) -> None:
        super().__init__(class_dim)
        checks.integer("ignore_index", ignore_index)
        self._fix(ignore_index=int(ignore_index))

    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch, a scalar."""
        return self._value(student, teacher, labels, mask=mask)
