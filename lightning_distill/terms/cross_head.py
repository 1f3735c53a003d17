"""The term that sends the student's features through a part of the teacher."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.adapters import AdapterFactory, make_adapter
from lightning_distill.losses import DistillationLoss, QualityFocalLoss
from lightning_distill.recording import Call, Tap
from lightning_distill.recording.boxes import BoxPlace, find_boxes
from lightning_distill.recording.recorder import find_layer
from lightning_distill.schedules import Weight
from lightning_distill.terms.base import LossCallable
from lightning_distill.terms.features import FeatureDistillation
from lightning_distill.terms.losses import Mask, value_of, widened
from lightning_distill.terms.maps import reads_maps, resized


class CrossHeadDistillation(FeatureDistillation):
    """A loss between the teacher's predictions and those that its frozen head makes from the student's features.

    The student's own head learns from the labels alone, so that labels and teacher do not pull it in two directions.
    The gradients flow through the teacher's head into the student's features. The head may take one tensor, several, or
    a list or dict of them, such as the levels of a feature pyramid: the student's features take their places.

    Args:
        student_layer: Layer of the student whose output goes into the teacher's head, such as ``"head.tower"``, or a
            :class:`Tap`, or a list of them. For all levels: ``Tap("head", output="*", where="input")``.
        teacher_layer: The part of the teacher that reads them, such as ``"head.scores"``, or a :class:`Tap` whose
            ``output`` names the prediction; as many as for the student.
        loss: As for :class:`FeatureDistillation`; ``None`` is :class:`QualityFocalLoss`, for class scores of a sigmoid.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: As for :class:`FeatureDistillation`, from the student's feature to what the head takes.
        name: Name in logs and checkpoints; ``None`` takes the teacher layer's, with ``"cross_"`` before it.
        mask: As for :class:`FeatureDistillation`.
        ignore_index: As for :class:`FeatureDistillation`.
        boxes: As for :class:`FeatureDistillation`.

    Raises:
        ValueError: If a setting is not one of those above, or the loss has parameters or compares several layers.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> CrossHeadDistillation("head.tower", "head.scores").name
        'cross_head.scores'

    References:
        Wang et al. (2023). CrossKD: Cross-Head Knowledge Distillation for Object Detection. arXiv:2306.11369.
    """

    needs_network = True

    def __init__(
        self,
        student_layer: str | Tap | Sequence[str | Tap],
        teacher_layer: str | Tap | Sequence[str | Tap],
        loss: str | DistillationLoss | LossCallable | None = None,
        *,
        weight: Weight = 1.0,
        adapter: str | nn.Module | AdapterFactory | None = "auto",
        name: str | None = None,
        mask: Mask | None = None,
        ignore_index: int | None = None,
        boxes: BoxPlace | None = None,
    ) -> None:
        super().__init__(
            student_layer,
            teacher_layer,
            QualityFocalLoss() if loss is None else loss,
            weight=weight,
            adapter=adapter,
            name=name,
            mask=mask,
            ignore_index=ignore_index,
            boxes=boxes,
        )
        heads = [tap for _, tap in self._pairs]
        if name is None:
            self.name = "cross_" + "+".join(dict.fromkeys(tap.layer for tap in heads))
        if self.requires.learned or self.requires.several_layers:
            raise ValueError(
                f"Expected `loss` to compare two predictions without parameters of its own, but got"
                f" {type(self.loss).__name__}. Use it in a FeatureDistillation."
            )
        wrong = next((tap for tap in heads if tap.where == "input" or not tap.layer), None)
        if wrong is not None:
            raise ValueError(
                f"Expected `teacher_layer` to be a part of the teacher that makes predictions, but got {wrong}. Pass"
                " the path of a layer, which is called with the student's features."
            )
        self._inputs = [replace(tap, output="*", where="input") for tap in heads]
        self.teacher_taps = [*heads, *self._inputs]
        self._first: list[int] = []  # the first adapter of each pair, by teacher and then by pair

    def build(self, student: Call, teachers: Sequence[Call]) -> None:
        """Make an adapter for each tensor that a head takes."""
        adapters, first = nn.ModuleList(), []
        fitted: list[nn.Module] = []
        for teacher in teachers:
            for (student_tap, head_tap), taken in zip(self._pairs, self._inputs, strict=True):
                features = [student.feature(level) for level in student.levels(student_tap)]
                inputs = [teacher.feature(level) for level in teacher.levels(taken)]
                if len(features) != len(inputs):
                    raise ValueError(
                        f"Expected student layer {student_tap.layer!r} to give the {len(inputs)} tensors that teacher"
                        f" layer {head_tap.layer!r} takes, but got {len(features)}. Pass Tap({student_tap.layer!r},"
                        " output='*') for all of a list, or tap what goes into the student's own head."
                    )
                first.append(len(fitted))
                for feature, target in zip(features, inputs, strict=True):
                    adapter = make_adapter(self._adapter[0], feature.shape, target.shape, student_tap.layer)
                    dtype = torch.float32 if torch.is_autocast_enabled(feature.device.type) else feature.dtype
                    adapters.append(adapter.to(device=feature.device, dtype=dtype))
                    fitted.append(adapters[-1].train())
        self.adapters, self._fitted, self._first = adapters, fitted, first

    def forward(self, student: Call, teacher: Call, labels: Tensor | None = None) -> Tensor:
        """The loss without its weight, a scalar."""
        mask = self._mask(student, labels)
        boxes = None if self.boxes is None else find_boxes(student, self.boxes)
        values = []
        for index, (_, head_tap) in enumerate(self._pairs):
            output = self._crossed(index, student, teacher)
            crossed = Call.from_outputs(features={(head_tap.layer, "output"): output})
            place = replace(head_tap, call=None)
            for level, target_level in zip(crossed.levels(place), teacher.levels(head_tap), strict=True):
                prediction, target = crossed.feature(level), teacher.feature(target_level)
                if prediction.ndim == target.ndim == 4 and reads_maps(self.loss):
                    target = resized(widened(target), prediction)
                if prediction.shape != target.shape:
                    raise ValueError(
                        f"Expected teacher layer {head_tap.layer!r} to make predictions of equal shapes from both"
                        f" networks' features, but got {tuple(prediction.shape)} and {tuple(target.shape)}. Tap"
                        " features of the same height and width."
                    )
                weighed = self._weighed(mask, boxes, prediction) if mask is not None or boxes is not None else ()
                values.append(value_of(self.loss, self.requires, prediction, target, labels, *weighed))
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def _crossed(self, index: int, student: Call, teacher: Call) -> Any:
        """The output of the teacher's layer for the student's features."""
        student_tap, head_tap = self._pairs[index]
        head = None if teacher.network is None else find_layer(teacher.network, head_tap.layer)
        if head is None:
            raise ValueError(
                f"Expected a teacher network with a layer {head_tap.layer!r} for term {self.name!r}, which calls it,"
                " but got none. Pass the network itself as `teacher`."
            )
        first = self._first[teacher.teacher * len(self._pairs) + index]
        inputs = [teacher.feature(level) for level in teacher.levels(self._inputs[index])]
        features = [
            self._fitted[first + number](student.feature(level)).to(target.dtype)
            for number, (level, target) in enumerate(zip(student.levels(student_tap), inputs, strict=True))
        ]
        return _called(head, teacher.recorded(self._inputs[index]), features)


def _called(head: nn.Module, taken: Any, features: list[Tensor]) -> Any:
    """The output of a layer for other tensors in the places of those that it was called with."""
    if isinstance(taken, Tensor):
        return head(features[0])
    names = [
        name
        for name, parameter in inspect.signature(head.forward).parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(taken, dict):
        named = dict(zip(taken, features, strict=True))
        return head(**named) if set(named) <= set(names) else head(named)
    if isinstance(taken, tuple) and len(features) <= len(names):
        return head(*features)
    return head([*features] if isinstance(taken, list) else tuple(features))
