"""The term in which each layer of the teacher reviews the student's layers from there to the deepest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill import checks
from keras_distill.functional.vectors import resized
from keras_distill.losses import HierarchicalContextLoss
from keras_distill.losses.networks import BatchNormalized
from keras_distill.recording import Call
from keras_distill.schedules import Weight
from keras_distill.terms.features import FeatureDistillation
from keras_distill.terms.layouts import KINDS, arranged, widened
from keras_distill.terms.levels import Layers, taps_and_settings
from keras_distill.terms.logits import LossLike
from keras_distill.terms.weighing import weigh, weights_of_examples


@keras.saving.register_keras_serializable(package="keras_distill")
class ReviewDistillation(FeatureDistillation):
    r"""A loss between each layer of the teacher and the student's layers from there to the deepest, fused.

    .. math:: \sum_i D(g(x_i), f^t_i), \qquad x_i = a_i \odot h_i(f^s_i) + b_i \odot \mathrm{up}(x_{i+1})

    The deepest layer is first. Each shallower one is joined with what has been fused so far, enlarged to its size: the
    factors a and b of each position come from both, through a sigmoid. The parts (1x1 convolutions h, the attention for
    a and b, and 3x3 convolutions g to the teacher's channels) are learned, and made, trained and saved as adapters are.
    Their batch normalisation takes the statistics of the batch, in evaluation too.

    Args:
        student_layers: Layers of the student, from the shallowest to the deepest, each with a map.
        teacher_layers: As many layers of the teacher, in the same order.
        loss: The loss at each layer, a loss on two maps of equal shape; ``None`` is :class:`HierarchicalContextLoss`.
        channels: Channels of the fused maps; ``None`` takes those of the student's deepest layer, at most 512.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and files.
        **kwargs: Further settings of :class:`DistillationTerm`.

    Raises:
        ValueError: If the two sides have different numbers of layers, ``channels`` is less than 1, or a layer does not
            return a map.
        TypeError: If ``loss`` cannot be called, or has parameters of its own.

    Example:
        >>> ReviewDistillation(["block1", "block2", "block3"], ["block1", "block2", "block3"], weight=5.0).name
        'review'

    References:
        Chen et al. 2021 (ReviewKD), section 3, arXiv:2104.09044, with weights of 0.6 to 8 on CIFAR-100. As everywhere
        in this package, a map of the teacher is resized to the student's height and width.
    """

    reads_boxes = leaves_out = False

    def __init__(
        self,
        student_layers: Layers,
        teacher_layers: Layers,
        loss: LossLike | None = None,
        *,
        channels: int | None = None,
        weight: Weight = 1.0,
        name: str = "review",
        **kwargs: Any,
    ) -> None:
        loss = HierarchicalContextLoss() if loss is None else loss
        super().__init__(student_layers, teacher_layers, loss, weight=weight, adapter=None, name=name, **kwargs)
        if self.requires.learned or self.requires.several_layers or self.requires.needs_labels:
            expected = "`loss` to be a loss on two maps without parameters of its own"
            raise TypeError(checks.message(expected, repr(loss), "Use it in a FeatureDistillation."))
        if channels is not None:
            checks.integer("channels", channels)
            checks.at_least("channels", channels, 1)
        self.channels = channels

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the parts from the shapes of the features."""
        self.check_calls(student, teacher)
        super().build_from_calls(student, teacher)

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the features are maps, with the channels of those that the parts were made for."""
        for index, taps in enumerate(self.levels(student, teacher)):
            *shapes, student_layout, teacher_layout = self._described(index, taps, student, teacher)
            kinds = {KINDS.get(layout) for layout in (student_layout, teacher_layout)} - {"map", None}
            names = f"layers {taps[0].name!r} and {taps[1].name!r}"
            if kinds or any(len(shape) != 4 for shape in shapes):
                expected = f"{names} to return maps (N, H, W, C)"
                raise ValueError(checks.message(expected, f"{tuple(shapes[0])} and {tuple(shapes[1])}"))
            if self._built_for and shapes[1][-1] != self._built_for[index][1][-1]:
                expected = f"{names} to have the channels that the term was made for, {self._built_for[index][1][-1]}"
                raise ValueError(checks.message(expected, f"{shapes[1][-1]}", "Make a new DistillModel."))

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, added over the layers, a scalar."""
        sample_weight = weights_of_examples(sample_weight)
        features, targets = [], []
        for index, taps in enumerate(self.levels(student, teacher)):
            (_, feature), (_, target) = self._raw(taps, student, teacher)
            student_layout, teacher_layout = self._built_for[index][2:]
            features.append(arranged(widened(feature), student_layout))
            target = ops.stop_gradient(ops.convert_to_tensor(target))  # stored features are arrays
            targets.append(arranged(widened(target), teacher_layout))
        loss, values = self.loss_of(student), []
        for fused, target in zip(self._adapters[0](features), targets, strict=True):  # type: ignore[misc]
            values.append(weigh(loss, fused, resized(target, fused.shape), sample_weight=sample_weight))
        return sum(values[1:], values[0])

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        config = super().get_config()
        del config["adapter"]
        layers = {f"{side}_layers": config.pop(f"{side}_layer") for side in ("student", "teacher")}
        return {**config, **layers, "channels": self.channels}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ReviewDistillation:
        """The term that :meth:`get_config` describes."""
        return cls(**taps_and_settings(config, "student_layers", "teacher_layers"))

    def _build_adapters(self, pairs: list[Any]) -> None:
        student, teacher = ([pair[side] for pair in pairs] for side in (0, 1))
        middle = self.channels or min(student[-1][-1], 512)
        review = _Review([shape[-1] for shape in teacher], middle, name="review", dtype="float32")
        review.build([tuple(shape) for shape in student])
        self._adapters, self._built_for = [review], pairs


class _Review(keras.layers.Layer):
    """Fuses maps from the deepest to the shallowest, and maps each result to the teacher's channels."""

    def __init__(self, channels: Sequence[int], middle: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.middle = middle
        self.squeeze = [BatchNormalized(middle, 1, dtype=self.dtype) for _ in channels]
        settings = {"activation": "sigmoid", "data_format": "channels_last", "dtype": self.dtype}
        self.attention = [keras.layers.Conv2D(2, 1, **settings) for _ in channels[1:]]
        self.spread = [BatchNormalized(wide, 3, dtype=self.dtype) for wide in channels]

    def build(self, shapes: Sequence[Sequence[int | None]]) -> None:
        """Build the layers for maps of these shapes."""
        for shape, squeeze, spread in zip(shapes, self.squeeze, self.spread, strict=True):
            squeeze.build(shape)
            spread.build((*shape[:-1], self.middle))
        for shape, attention in zip(shapes, self.attention, strict=False):
            attention.build((*shape[:-1], 2 * self.middle))
        self.built = True

    def call(self, features: Sequence[Any]) -> list[Any]:
        """The fused maps, in the order of the features."""
        fused: Any = None
        results: list[Any] = []
        for index in reversed(range(len(features))):
            feature = self.squeeze[index](features[index])
            if fused is not None:
                fused = _enlarged(fused, feature)
                factors = self.attention[index](ops.concatenate([feature, fused], axis=-1))
                feature = feature * factors[..., :1] + fused * factors[..., 1:]
            fused = feature
            results.insert(0, self.spread[index](feature))
        return results


def _enlarged(feature: Any, like: Any) -> Any:
    """The map at the height and width of another one, by its nearest positions."""
    for axis in (1, 2):
        size, new_size = ops.shape(feature)[axis], ops.shape(like)[axis]
        feature = ops.take(feature, ops.arange(new_size) * size // new_size, axis=axis)
    return feature
