"""The term that sends the student's features through a part of the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.adapters import AdapterFactory
from keras_distill.functional.vectors import resized
from keras_distill.losses import QualityFocalLoss
from keras_distill.recording import Call, Tap
from keras_distill.recording.boxes import BoxPlace
from keras_distill.recording.taps import by_name
from keras_distill.schedules import Weight
from keras_distill.terms.counting import MaskPlace
from keras_distill.terms.features import FeatureDistillation
from keras_distill.terms.layouts import arranged, known_layout, widened, without_prefix
from keras_distill.terms.levels import Layers, Pair, as_taps, matched
from keras_distill.terms.logits import LossLike, fitted_rows
from keras_distill.terms.weighing import weigh, weights_of_examples


@keras.saving.register_keras_serializable(package="keras_distill")
class CrossHeadDistillation(FeatureDistillation):
    """A loss between the teacher's predictions and those that its frozen head makes from the student's features.

    The student's own head learns from the labels alone, so that labels and teacher do not pull it in two directions.
    The gradients flow through the teacher's head into the student's features. The head may take one tensor, several, or
    a list or dict of them, such as the levels of a feature pyramid: the student's features take their places.

    Args:
        student_layer: Layer of the student whose output goes into the teacher's head, such as ``"tower"``, or a
            :class:`Tap`, or a list of them. For all levels: ``Tap("head", output="*", where="input")``.
        teacher_layer: The part of the teacher that reads them, such as ``"scores"``, or a :class:`Tap` whose ``output``
            names the prediction; as many as for the student.
        loss: As for :class:`FeatureDistillation`; ``None`` is :class:`QualityFocalLoss`, for class scores of a sigmoid.
        weight: Factor of the term in the total loss, a number or a schedule.
        adapter: As for :class:`FeatureDistillation`, from the student's feature to what the head takes; not ``"pool"``.
        boxes: As for :class:`FeatureDistillation`.
        mask: As for :class:`FeatureDistillation`, at the positions of the prediction.
        ignore_index: As for :class:`FeatureDistillation`.
        use_sample_weight: Whether the batch's sample weights are applied to the term.
        name: Name in logs and files; ``None`` takes the teacher layer's, with ``"cross_"`` before it.
        **kwargs: Further settings of :class:`DistillationTerm`.

    Raises:
        ValueError: If a setting is not one of those above, or the loss has parameters or compares several layers.
        TypeError: If ``loss`` cannot be called.

    Example:
        >>> CrossHeadDistillation("head/tower", "head/scores").name
        'cross_head_scores'

    References:
        Wang et al. (2023). CrossKD: Cross-Head Knowledge Distillation for Object Detection. arXiv:2306.11369.
    """

    needs_network = adapters_per_teacher = True

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        loss: str | LossLike | None = None,
        *,
        weight: Weight = 1.0,
        adapter: str | keras.layers.Layer | AdapterFactory | None = "auto",
        boxes: BoxPlace | None = None,
        mask: MaskPlace | None = None,
        ignore_index: int | None = None,
        use_sample_weight: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        heads = as_taps(teacher_layer)
        wrong = next((tap for tap in heads if tap.where == "input" or not tap.layer), None)
        if wrong is not None:
            expected = "`teacher_layer` to be a part of the teacher that makes predictions"
            remedy = "Pass the name of a layer, which is called with the student's features."
            raise ValueError(checks.message(expected, f"{wrong}", remedy))
        if adapter == "pool":
            expected = "`adapter` to keep the positions, which the teacher's head reads"
            raise ValueError(checks.message(expected, "adapter='pool'", "Pass adapter='auto'."))
        name = name or "cross_" + re.sub(r"\W", "_", "_".join(dict.fromkeys(tap.name for tap in heads)))
        super().__init__(
            student_layer,
            teacher_layer,
            QualityFocalLoss() if loss is None else loss,
            weight=weight,
            adapter=adapter,
            boxes=boxes,
            mask=mask,
            ignore_index=ignore_index,
            use_sample_weight=use_sample_weight,
            name=name,
            **kwargs,
        )
        needs = self.requires
        if needs.learned or needs.several_layers or needs.reads_teacher or needs.needs_index:
            expected = "`loss` to compare two predictions without parameters of its own"
            raise ValueError(checks.message(expected, f"a {type(self.loss).__name__}", "Use a FeatureDistillation."))

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of taps: the student's features, and the teacher's part that reads them."""
        return list(zip(self.student_taps, self.teacher_taps[: len(self.student_taps)], strict=True))

    def levels(self, student: Call, teacher: Call) -> list[Pair]:
        """Each feature of the student with the tensor that the teacher's part takes in its place."""
        levels: list[Pair] = []
        for student_tap, head, place in self._places():
            if place.place not in teacher.runs:
                raise ValueError(self._without_network(head))
            sides = student.levels(student_tap), teacher.levels(place)
            if not matched(*sides):
                own, taken = ([level.last for level in side] for side in sides)
                expected = f"student layer {student_tap.name!r} to give what teacher layer {head.name!r} takes, {taken}"
                remedy = "Tap what goes into the student's own head: Tap(<head>, output='*', where='input')."
                raise ValueError(checks.message(expected, f"{own}", remedy))
            levels += zip(*sides, strict=True)
        return levels

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make an adapter for each tensor that the teacher's parts take."""
        for (_, place), described in zip(
            self.levels(student, teacher), self._all_described(student, teacher), strict=True
        ):
            if described[3] in ("heads", "scores"):
                expected = f"teacher layer {place.name!r} to take maps, tokens or vectors"
                raise ValueError(checks.message(expected, f"the layout {described[3]!r}", "Name another layer."))
        for _, head, _ in self._places():
            for level in teacher.levels(head):
                self._check_layout(level, teacher)
        super().build_from_calls(student, teacher)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        sample_weight = weights_of_examples(sample_weight)
        levels = self.levels(student, teacher)
        if teacher.network is None:
            raise ValueError(self._without_network(self.pairs[0][1]))
        self.check_labels(student.inputs, labels, student.image)
        features = iter([self._fed(index, taps, student, teacher) for index, taps in enumerate(levels)])
        loss, values = self.loss_of(student), []
        settings = self._weighing(labels, sample_weight)
        for _, head, place in self._places():
            args, kwargs = teacher.form(place).filled(_replaced(teacher.recorded(place), features))
            output = teacher.network.called(head.layer, args, kwargs)
            once = replace(head, call=None)
            crossed = Call(None, {once.place: [output]}, who="teacher")
            for level, target_level in zip(crossed.levels(once), teacher.levels(head), strict=True):
                pair = crossed.feature(level), teacher.feature(target_level)
                masks = [crossed.mask_of(pair[0]), teacher.mask_of(pair[1])]
                prediction, target = (arranged(widened(each), head.layout) for each in pair)
                if len(prediction.shape) == len(target.shape) == 4:
                    target = resized(target, prediction.shape)
                self._check_predictions(prediction, target, head)
                target, masks = self._in_boxes(prediction, fitted_rows(prediction, target), masks, student, labels)
                counted = self.counted(student, labels, prediction)
                values.append(weigh(loss, prediction, target, masks=masks, counted=counted, **settings))
        return sum(values) / len(values)

    def _places(self) -> Iterator[tuple[Tap, Tap, Tap]]:
        """For each pair the student's features, the teacher's part, and what that part takes."""
        number = len(self.student_taps)
        return zip(self.student_taps, self.teacher_taps[:number], self.teacher_taps[number:], strict=True)

    def _store_taps(self, student_taps: list[Tap], teacher_taps: list[Tap]) -> None:
        """Set the taps; the teacher's are its parts, then all that goes into them."""
        inputs = [replace(tap, output="*", where="input", layout=None) for tap in teacher_taps]
        self.student_taps, self.teacher_taps = student_taps, [*teacher_taps, *inputs]

    def _fed(self, index: int, taps: Pair, student: Call, teacher: Call) -> Any:
        """A feature of the student, as the teacher's part takes it."""
        feature, target = student.feature(taps[0]), teacher.feature(taps[1])
        student_layout, teacher_layout = self._built_for[index][2:] if self._built_for else (None, None)
        feature = without_prefix(
            taps[0], arranged(widened(feature), student_layout), f"student feature {taps[0].name!r}"
        )
        adapter = self._adapters[index] if self._adapters else None
        if adapter is not None:
            feature = adapter(feature, training=student.training)
        if teacher_layout is None and len(feature.shape) >= 4:
            teacher_layout = keras.config.image_data_format()
        return ops.cast(ops.moveaxis(feature, -1, 1) if teacher_layout == "channels_first" else feature, target.dtype)

    def _in_one_form(self, index: int, taps: Pair, features: Sequence[Any], sides: Any) -> tuple[Any, Any]:
        """The features as they are: the teacher's part takes no other form."""
        return without_prefix(taps[0], features[0], f"student feature {taps[0].name!r}"), features[1]

    def _setting(self, kind: str | None) -> Any:
        return self.adapter

    def _check_layout(self, level: Tap, teacher: Call) -> None:
        """Check that the axes of a prediction are those that :meth:`compute` takes them for."""
        tensor = teacher.feature(level)
        layout = known_layout(level, tensor, teacher.facts_of(tensor))
        assumed = level.layout or keras.config.image_data_format()
        if len(tensor.shape) >= 4 and layout in ("channels_first", "channels_last") and layout != assumed:
            expected = f"the axes of teacher layer {level.name!r} to be named"
            remedy = f"Pass Tap({level.name!r}, layout={layout!r})."
            raise ValueError(checks.message(expected, f"shape {tuple(tensor.shape)}", remedy))

    def _check_predictions(self, prediction: Any, target: Any, head: Tap) -> None:
        shapes = tuple(prediction.shape), tuple(target.shape)
        if checks.shapes_differ(*shapes):
            expected = f"teacher layer {head.name!r} to make predictions of equal shapes from both models' features"
            remedy = "Tap features of the same height and width."
            raise ValueError(checks.message(expected, f"{shapes[0]} and {shapes[1]}", remedy))

    def _without_network(self, head: Tap) -> str:
        expected = f"a live teacher with a layer {head.name!r} for term {self.name!r}, which calls it"
        return checks.message(expected, "stored outputs alone", "Pass the model as `teacher`, without DistillTargets.")


def _replaced(inputs: Any, features: Iterator[Any]) -> Any:
    """A layer's input with other tensors in the places of its own."""
    if hasattr(inputs, "shape"):
        return next(features)
    if isinstance(inputs, dict):
        return {key: next(features) for key in by_name(inputs)}
    return keras.tree.pack_sequence_as(inputs, [next(features) for _ in inputs])
