"""The term that lets the student reuse the teacher's classifier, and the student that results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import checks, compat
from keras_distill.functional.vectors import averaged, resized
from keras_distill.losses.networks import linear_classifier
from keras_distill.recording import Call, Tap, find_layer
from keras_distill.schedules import Weight
from keras_distill.terms.base import DistillationTerm
from keras_distill.terms.features import FeatureDistillation
from keras_distill.terms.layouts import KINDS, arranged, widened
from keras_distill.terms.levels import taps_and_settings
from keras_distill.terms.weighing import weigh, weights_of_examples


@keras.saving.register_keras_serializable(package="keras_distill")
class ReusedClassifierDistillation(FeatureDistillation):
    r"""Mean squared difference of the student's projected feature and the teacher's, whose classifier then serves both.

    .. math:: \frac{1}{N D} \sum_n \| P(f^s_n) - f^t_n \|_2^2

    The projector P is learned: convolutions of 1, 3 and 1 with batch normalisation and ReLUs (dense layers for
    vectors). It is made, trained and saved as adapters are. The student's own classifier is not trained: pass
    ``task_weight=0.0``. After the training :meth:`deployable` puts student, projector and the teacher's classifier
    together. That model is what you evaluate, save and export.

    Args:
        student_layer: The student's last feature before its classifier: a map, or a vector.
        teacher_layer: The teacher's. Its classifier must make the logits from the average of this map over the
            positions, or from this vector, which is checked.
        classifier: Name of the teacher's classifier, a Dense layer; ``None`` takes the only Dense layer of the teacher
            that takes as many numbers as the feature has channels.
        factor: The projector is this much narrower inside than the teacher's feature, 1 or more.
        weight: Factor of the term in the total loss, a number or a schedule.
        name: Name in logs and files.
        **kwargs: Further settings of :class:`DistillationTerm`.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``factor`` is less than 1, or the features are neither maps nor vectors.

    Example:
        >>> ReusedClassifierDistillation("block4", "block4", classifier="head").name
        'reused_classifier'

    References:
        Chen et al. 2022 (SimKD), section 3, arXiv:2203.14001, with factor 2 and this loss alone; deviation: vectors, by
        the same rule. As everywhere in this package, a map of the teacher is resized to the student's.
    """

    one_teacher = True
    reads_boxes = leaves_out = False

    def __init__(
        self,
        student_layer: str | keras.layers.Layer | Tap,
        teacher_layer: str | keras.layers.Layer | Tap,
        *,
        classifier: str | None = None,
        factor: int = 2,
        weight: Weight = 1.0,
        name: str = "reused_classifier",
        **kwargs: Any,
    ) -> None:
        super().__init__(student_layer, teacher_layer, "mse", weight=weight, adapter=None, name=name, **kwargs)
        if len(self.pairs) != 1:
            raise ValueError(checks.message("`student_layer` to be one layer", f"{len(self.pairs)}"))
        if not isinstance(classifier, str | None):
            raise TypeError(checks.message("`classifier` to be the name of a layer", f"classifier={classifier!r}"))
        checks.integer("factor", factor)
        checks.at_least("factor", factor, 1)
        self.classifier, self.factor = classifier, factor

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Make the projector from the shapes of the features."""
        self.check_calls(student, teacher)
        super().build_from_calls(student, teacher)
        if self._find_in_teacher is not None:
            model: Any = self._find_in_teacher("")[1]
            layer = linear_classifier(self._classifier_of(model), self.classifier, self._built_for[0][1][-1])
            self._check_classifier(layer, model)

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the features are maps or vectors, of the channels that the projector was made for."""
        student_shape, teacher_shape, *layouts = self._all_described(student, teacher)[0]
        names = " and ".join(repr(tap.name) for tap in self.pairs[0])
        ranks = {len(student_shape), len(teacher_shape)}
        if ranks not in ({2}, {4}) or {KINDS.get(layout) for layout in layouts} - {"map", None}:
            expected = f"layers {names} to return maps (N, H, W, C) or vectors"
            raise ValueError(checks.message(expected, f"{tuple(student_shape)} and {tuple(teacher_shape)}"))
        if self._built_for and teacher_shape[-1] != self._built_for[0][1][-1]:
            expected = f"layers {names} to have the channels that the term was made for, {self._built_for[0][1][-1]}"
            raise ValueError(checks.message(expected, f"{teacher_shape[-1]}", "Make a new DistillModel."))

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        sample_weight = weights_of_examples(sample_weight)
        (_, feature), (_, target) = self._raw(self.levels(student, teacher)[0], student, teacher)
        student_layout, teacher_layout = self._built_for[0][2:]
        projector: Any = self._adapters[0]
        feature = projector(arranged(widened(feature), student_layout), training=bool(student.training))
        target = arranged(widened(ops.stop_gradient(ops.convert_to_tensor(target))), teacher_layout)
        if len(feature.shape) == 4:
            target = resized(target, feature.shape)
        return weigh(self.loss_of(student), feature, target, sample_weight=sample_weight)

    def deployable(self, student: keras.Model, teacher: keras.Model) -> keras.Model:
        """The student with the projector and the teacher's classifier.

        Args:
            student: The trained student, a functional or sequential model.
            teacher: The teacher, from which its classifier is copied.

        Returns:
            A functional model that returns logits ``(N, K)``, or what the teacher's classifier makes of them with its
            activation. Student and projector are shared with the training; a file of the model holds all of it.

        Raises:
            ValueError: If no model has made the projector, the student is not functional, the teacher has no such
                classifier, or the classifier does not make the teacher's outputs from its averaged feature.
        """
        if not self.adapters:
            remedy = "Make a DistillModel with the term first."
            raise ValueError(checks.message("the projector to be made", "no model yet", remedy))
        projector: Any = self.adapters[0]
        student_tap = self.pairs[0][0]
        if student_tap.where != "output" or not hasattr(student, "inputs") or not hasattr(student, "operations"):
            expected = "`student` to be a functional or sequential model, read at the output of a layer"
            raise ValueError(checks.message(expected, f"a {type(student).__name__}, {student_tap!r}"))
        layer = linear_classifier(self._classifier_of(teacher), self.classifier, projector.channels)
        self._check_classifier(layer, teacher)
        head = keras.layers.Dense.from_config({**layer.get_config(), "name": "reused_classifier", "dtype": "float32"})
        feature = find_layer(student, student_tap.layer, "student")[1].output
        projected = projector(feature, training=False)
        if len(projected.shape) == 4:
            projected = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(projected)
        name = f"{student.name}_reusing_{teacher.name}"
        model = keras.Model(compat.input_structure(student), head(projected), name=name)
        head.set_weights([ops.convert_to_numpy(weight) for weight in layer.weights])
        return model

    def _classifier_of(self, teacher: keras.Model) -> Callable[[str | None], keras.layers.Layer]:
        return lambda name: find_layer(teacher, name or "", "teacher")[1]

    def _check_classifier(self, layer: keras.layers.Dense, teacher: keras.Model) -> None:
        """Raise if the classifier does not make the teacher's outputs from its averaged feature."""
        tap = self.pairs[0][1]
        sizes = [tuple(tensor.shape[1:]) for tensor in getattr(teacher, "inputs", None) or []]
        if not hasattr(teacher, "operations") or tap.where != "output" or any(None in size for size in sizes):
            return  # there is nothing to call it with
        random = np.random.default_rng(0)
        inputs = [
            random.standard_normal((2, *size)).astype(keras.backend.standardize_dtype(tensor.dtype))
            for size, tensor in zip(sizes, teacher.inputs, strict=True)
        ]
        tapped = find_layer(teacher, tap.layer, "teacher")[1]
        both = keras.Model(teacher.inputs, [tapped.output, teacher.output])
        feature, output = both(inputs, training=False)
        layout = self._in_a_model()._built_for[0][3]
        made, output = (
            ops.convert_to_numpy(ops.cast(tensor, "float32"))
            for tensor in (layer(averaged(arranged(feature, layout))), output)
        )
        if made.shape != output.shape or np.abs(made - output).max() > 2e-2 * (np.abs(output).max() + 1e-6):
            expected = f"the teacher's classifier to make its outputs from the average of {tap.name!r}"
            remedy = "Name the last layer before the average, behind its activation."
            raise ValueError(checks.message(expected, "other outputs", remedy))

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        config = super().get_config()
        del config["adapter"], config["loss"]
        return {**config, "classifier": self.classifier, "factor": self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistillationTerm:
        """The term that :meth:`get_config` describes."""
        return cls(**taps_and_settings(config, "student_layer", "teacher_layer"))

    def _build_adapters(self, pairs: list[Any]) -> None:
        student, teacher = (tuple(shape) for shape in pairs[0][:2])
        projector = Projector(teacher[-1], self.factor, dtype="float32")
        projector.build(student)
        self._adapters, self._built_for = [projector], pairs


@keras.saving.register_keras_serializable(package="keras_distill")
class Projector(keras.layers.Layer):
    """Layers of 1, 3 and 1 with batch normalisation and ReLUs, narrower inside.

    Args:
        channels: Channels of its output.
        factor: How much narrower it is inside.
        **kwargs: Settings of a layer.
    """

    def __init__(self, channels: int, factor: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, self.factor = channels, factor

    def build(self, shape: Any) -> None:
        """Make the layers for maps or for vectors."""
        middle = max(1, self.channels // self.factor)
        self.parts = []
        for channels, kernel in ((middle, 1), (middle, 3), (self.channels, 1)):
            settings: dict[str, Any] = {"use_bias": False, "dtype": self.dtype}
            part = keras.layers.Dense(channels, **settings)
            if len(shape) == 4:
                settings |= {"padding": "same", "data_format": "channels_last"}
                part = keras.layers.Conv2D(channels, kernel, **settings)
            norm = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=self.dtype)
            part.build(shape)
            shape = (*shape[:-1], channels)
            norm.build(shape)
            self.parts += [part, norm]
        self.built = True

    def call(self, feature: Any, training: bool | None = None) -> Any:
        """The projected feature."""
        for part, norm in zip(self.parts[::2], self.parts[1::2], strict=True):
            feature = ops.relu(norm(part(feature), training=training))
        return feature

    def compute_output_shape(self, shape: Any) -> Any:
        """The shape with the projector's channels."""
        return (*shape[:-1], self.channels)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor."""
        return {**super().get_config(), "channels": self.channels, "factor": self.factor}
