"""The term on the outputs of the two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.functional.inputs import log_odds, logarithm, prepare
from keras_distill.functional.top_k import Sampled, TopK, check_classes, merge_classes
from keras_distill.losses import (
    BinarySoftTargetLoss,
    FeatureDistance,
    FunctionLoss,
    LogitMSELoss,
    SoftTargetLoss,
)
from keras_distill.recording import Call, select
from keras_distill.schedules import Weight
from keras_distill.terms.counting import CountingTerm, MaskPlace
from keras_distill.terms.outputs import by_output, output_names, paired_outputs
from keras_distill.terms.weighing import row_weights, weigh, zeroed

LossLike: TypeAlias = keras.losses.Loss | Callable[..., Any]

# Keras' own losses that are smallest where both models agree and that change with every logit. A test measures both.
# All other losses of Keras expect probabilities or classes as their first argument.
FIT_FOR_LOGITS: Final = (
    "MeanSquaredError",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "Huber",
    "LogCosh",
    "CosineSimilarity",
)
# Keras' functions may be plain formulas: only those on probabilities and classes are refused.
_UNFIT_FUNCTIONS: Final = ("crossentropy", "kl_divergence", "poisson", "hinge", "dice", "tversky")


class Scores(NamedTuple):
    """Both models' logits of the same classes, for the metrics of the teacher.

    Attributes:
        student: The student's logits.
        teacher: The teacher's logits, or a :class:`TopK`.
        weights: Weight of each row, 0 for masked rows; None if all rows count alike.
    """

    student: Any
    teacher: Any
    weights: Any


@keras.saving.register_keras_serializable(package="keras_distill")
class LogitsDistillation(CountingTerm):
    """A loss between the outputs of the two models.

    If the models declare several outputs (functional models, dicts), the outputs are compared one by one and the losses
    are added. Tuples of subclassed models are compared in this way only if all their shapes are equal. ``output`` picks
    one of several outputs.

    Args:
        loss: A loss of this package, a regression loss of Keras, ``"mse"``, ``"l1"``, ``"smooth_l1"``, ``"cosine"`` or
            ``"kl"``, or a function of ``(student_logits, teacher_logits)``; ``None`` is :class:`SoftTargetLoss` at
            temperature 4.
        weight: Factor of the term in the total loss, a number or a schedule.
        output: Which of a model's outputs, an index or a key; ``None`` adds the losses of all outputs.
        mask: Where the inputs keep the mask of the positions that count: a key, an index, or a function of the inputs.
            Shape ``(N,)``, ``(N, L)`` or ``(N, H, W)``; a position of a smaller map counts if at least half of its
            pixels do.
        ignore_index: Positions with this label do not count, such as void pixels; None reads no labels. The labels may
            have more pixels than the logits.
        use_sample_weight: Whether the batch's sample weights are applied to the term.
        name: Name in logs and files.
        **kwargs: Further settings of :class:`DistillationTerm`.

    Attributes:
        temperature: The loss's temperature, if it has one; a number can be assigned during training.

    Raises:
        TypeError: If ``loss`` cannot be called, is a class, or has parameters of its own.
        ValueError: If ``weight`` is negative, or the loss cannot leave out positions. When a model is built with the
            term: if the loss expects logits and a model returns probabilities, or the other way round.

    Example:
        >>> term = LogitsDistillation(SoftTargetLoss(temperature=1.0), weight=0.5)
        >>> round(float(term.compute(Call(ops.array([[2.0, 0.0]])), Call(ops.array([[0.0, 1.0]])))), 4)
        1.0068

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
    """

    takes_curriculum = True
    output_names: tuple[str, ...] = ()  # of the owner's student

    def __init__(
        self,
        loss: str | LossLike | None = None,
        *,
        weight: Weight = 1.0,
        output: int | str | None = None,
        mask: MaskPlace | None = None,
        ignore_index: int | None = None,
        use_sample_weight: bool = True,
        name: str = "logits",
        **kwargs: Any,
    ) -> None:
        chosen = as_loss(SoftTargetLoss() if loss is None else loss)
        kwargs |= {"mask": mask, "ignore_index": ignore_index}
        settings: dict[str, Any] = {"weight": weight, "name": name, "use_sample_weight": use_sample_weight}
        super().__init__(chosen, **settings, **kwargs)
        if self.requires.needs_boxes:
            remedy = "Use it in a FeatureDistillation(..., boxes=...)."
            raise TypeError(checks.message("`loss` to need no boxes", f"a {type(loss).__name__}", remedy))
        if self.requires.learned:
            expected = "`loss` to have no parameters of its own"
            remedy = "Use it in a FeatureDistillation, between the models' last layers for instance."
            raise TypeError(checks.message(expected, f"a {type(loss).__name__}", remedy))
        self.output_key = output

    def owned(self, student: keras.Model) -> LogitsDistillation:
        """A copy for one owner, as in :class:`DistillationTerm`, which knows the names of the student's outputs."""
        copy: LogitsDistillation = super().owned(student)  # type: ignore[assignment]
        copy.output_names = output_names(student)
        return copy

    def build_from_calls(self, student: Call, teacher: Call) -> None:
        """Check that the two models' outputs fit each other and the loss."""
        self.check_calls(student, teacher)

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the two models' outputs fit each other and the loss."""
        for student_logits, teacher_logits, _ in self.paired(student, teacher):
            ends = {"student": student.facts_of(student_logits).end, "teacher": teacher.facts_of(teacher_logits).end}
            self._check_pair(student_logits, teacher_logits, ends)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar."""
        total = 0.0
        loss, pairs = self.loss_of(student), self.paired(student, teacher, sample_weight)
        for (student_logits, teacher_logits, weights), known in zip(
            pairs, self._labels_of(labels, student, len(pairs)), strict=True
        ):
            counted = self.counted(student, known, student_logits)
            masks = [student.mask_of(student_logits), teacher.mask_of(teacher_logits)]
            if isinstance(teacher_logits, TopK):
                self._check_merging(teacher_logits)  # again, because the term may have been built with a teacher model
                temperature = getattr(loss, "temperature", 1.0)
                student_logits, teacher_logits = merge_classes(student_logits, teacher_logits, temperature)
            else:
                teacher_logits = fitted_rows(student_logits, teacher_logits)
            total = total + weigh(
                loss,
                student_logits,
                teacher_logits,
                labels=self.labels_of_loss(known),
                needs_labels=self.requires.needs_labels,
                masks=masks,
                counted=counted,
                sample_weight=weights,
            )
        return total

    @property
    def scores_classes(self) -> bool:
        """Whether the loss compares class scores. The squared error may, if each row has several outputs."""
        compares = self.requires.class_scores or self.requires.merges_classes
        return compares or isinstance(self.loss, (BinarySoftTargetLoss, LogitMSELoss))

    def scores(self, student: Call, teacher: Call, sample_weight: Any = None, labels: Any = None) -> list[Scores]:
        """The pairs of outputs for which both models choose a class.

        Args:
            student: The student's call.
            teacher: The teacher's call.
            sample_weight: The batch's sample weights.
            labels: The batch's labels, which tell some terms which rows count.

        Returns:
            A list, empty if the loss does not compare class scores.
        """
        if not self.scores_classes:
            return []
        binary, from_logits = isinstance(self.loss, BinarySoftTargetLoss), getattr(self.loss, "from_logits", True)
        weights = sample_weight if self.use_sample_weight else None
        scores = []
        pairs = self.paired(student, teacher, weights)
        for (own, other, weight), known in zip(pairs, self._labels_of(labels, student, len(pairs)), strict=True):
            shape = tuple(own.shape)
            single = len(shape) < 2 or shape[-1] == 1
            # several sigmoids do not choose one class; a single score means a class only with the binary loss
            fits = isinstance(other, TopK) or not checks.shapes_differ(shape, tuple(other.shape))
            if single != binary or not fits:
                continue
            masks = [student.mask_of(own), teacher.mask_of(other), self.counted(student, known, own)]
            rows = row_weights(own, masks, weight)
            if isinstance(other, TopK):
                scores.append(Scores(own, other, rows))
                continue
            own, other = prepare(own, fitted_rows(own, other))
            if rows is not None:  # so that a masked row that is not finite does not make the mean NaN
                own, other = zeroed(own, rows > 0), zeroed(other, rows > 0)
            if not from_logits:
                own, other = (log_odds(own), log_odds(other)) if single else (logarithm(own), logarithm(other))
            scores.append(Scores(own, other, rows))
        return scores

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        loss = keras.saving.serialize_keras_object(self.loss)
        return {**super().get_config(), "loss": loss, "output": self.output_key}

    def paired(self, student: Call, teacher: Call, sample_weight: Any = None) -> list[tuple[Any, Any, Any]]:
        """The outputs that the term compares, with their weights, as :func:`paired_outputs` returns them.

        Args:
            student: The student's call.
            teacher: The teacher's call.
            sample_weight: The batch's sample weights.
        """
        return paired_outputs(student, teacher, self.output_key, sample_weight, self.output_names)

    def _labels_of(self, labels: Any, student: Call, count: int) -> list[Any]:
        """The labels of each output: nested labels belong to the outputs one by one, a single tensor to all of them."""
        labels = by_output(labels, student.output, self.output_names) if self.needs_labels else labels
        if not self.needs_labels or not keras.tree.is_nested(labels):
            return [labels] * count
        if self.output_key is not None:
            return [select(labels, self.output_key, "the labels")]
        several: list[Any] = keras.tree.flatten(labels)
        if len(several) != count:
            expected = f"labels for each of the {count} outputs, since term {self.name!r} needs them"
            raise ValueError(checks.message(expected, f"{len(several)}", "Pass output=<the output that has labels>."))
        return several

    def _check_pair(self, student_logits: Any, teacher_logits: Any, ends: dict[str, str | None]) -> None:
        """Check that two outputs, with these last activations, fit each other and the loss.

        Raises:
            ValueError: If they do not.
        """
        if isinstance(teacher_logits, TopK):
            self._check_merging(teacher_logits)
            check_classes(student_logits, teacher_logits)
            self._check_kind({"student": ends["student"]})
            return
        self._check_kind(ends)
        if self.requires.channels_must_match:  # else the loss compares their shapes itself
            remedy = "Both models must score the same classes."
            checks.same_shape(student_logits, teacher_logits, names=("student_logits", "teacher_logits"), remedy=remedy)
        if tuple(student_logits.shape)[-1:] == (1,) and isinstance(self.loss, SoftTargetLoss):
            expected = "outputs of at least 2 classes for SoftTargetLoss"
            remedy = "For a single logit use BinarySoftTargetLoss(). To pick one of several outputs pass output=..."
            raise ValueError(checks.message(expected, f"shape {tuple(student_logits.shape)}", remedy))

    def _check_kind(self, ends: dict[str, str | None]) -> None:
        """Check that the loss fits outputs that are known to be logits or probabilities.

        Raises:
            ValueError: If it does not.
        """
        name = type(self.loss).__name__
        probabilities = [who for who, end in ends.items() if end in ("softmax", "sigmoid")]
        logits = [who for who, end in ends.items() if end == "linear"]
        from_logits = getattr(self.loss, "from_logits", None)
        if _is_of_keras(self.loss):
            if len(probabilities) < len(ends):
                _refuse_loss_of_keras(self.loss)
        elif from_logits is True and probabilities:
            both = len(probabilities) == len(ends)
            remedy = f"Leave out the last softmax or sigmoid of the {' and the '.join(probabilities)}"
            remedy += ", or pass a loss with from_logits=False." if both else ": the other model returns logits."
            expected = f"the {probabilities[0]}'s output to be logits, since the loss has from_logits=True"
            raise ValueError(checks.message(expected, "probabilities of a softmax or sigmoid", remedy))
        elif from_logits is False and logits:
            expected = f"the {logits[0]}'s output to be probabilities, since {name} has from_logits=False"
            remedy = "End both models in a softmax or sigmoid, or neither and pass a loss with from_logits=True."
            raise ValueError(checks.message(expected, "logits of a layer without activation", remedy))

    def _check_merging(self, teacher: TopK) -> None:
        """Check that the loss is a divergence of logits, which also holds for merged classes.

        Raises:
            ValueError: If it is not.
        """
        if self.curriculum is not None:
            expected = f"a cache of full outputs for term {self.name!r}, whose temperature is learned"
            remedy = "Build it without top_k and sampled, or pass a number as the temperature."
            raise ValueError(checks.message(expected, "a part of the classes", remedy))
        merges = self.requires.merges_classes and not getattr(self.loss, "standardize", False)
        temperature = getattr(self.loss, "temperature", 1.0)
        if isinstance(teacher, Sampled) and not (merges and self.requires.linear_in_teacher and temperature == 1.0):
            expected = "SoftTargetLoss or SoftCrossEntropyLoss at temperature 1 for a cache of classes drawn at random"
            remedy = "Other losses and temperatures would be biased: build the cache with top_k, or without."
            received = f"{type(self.loss).__name__} at temperature {temperature}"
            raise ValueError(checks.message(expected, received, remedy))
        if not merges or not getattr(self.loss, "from_logits", True):
            expected = f"a cache of full outputs for {type(self.loss).__name__}"
            remedy = "Build it without top_k, or use a divergence of logits such as SoftTargetLoss()."
            received = f"the likeliest {teacher.indices.shape[-1]} classes alone"
            raise ValueError(checks.message(expected, received, remedy))


def as_loss(loss: str | LossLike) -> keras.losses.Loss:
    """Turn the name of a feature distance, a loss or a function into a loss object."""
    if isinstance(loss, str):
        return FeatureDistance(loss)  # type: ignore[arg-type]
    return loss if isinstance(loss, keras.losses.Loss) else FunctionLoss(loss)


def fitted_rows(student: Any, teacher: Any) -> Any:
    """The teacher's tensor with the student's number of examples, so that a single row is not broadcast over a batch.

    XLA removes assertions, and TensorFlow without XLA removes a reshape to the same shape: both are needed.

    Args:
        student: The student's tensor.
        teacher: The teacher's tensor, of the same shape except for the number of examples.

    Returns:
        The teacher's tensor.
    """
    backends.check_batch(student, teacher)
    if student.shape[0] == teacher.shape[0] is not None:
        return teacher
    return ops.reshape(teacher, (ops.shape(student)[0], *ops.shape(teacher)[1:]))


def _is_of_keras(loss: keras.losses.Loss) -> bool:
    kind = getattr(loss, "function", None) if isinstance(loss, FunctionLoss) else type(loss)
    return str(getattr(kind, "__module__", "")).startswith("keras.")


def _refuse_loss_of_keras(loss: keras.losses.Loss) -> None:
    """Refuse a loss of Keras that expects probabilities or classes as its first argument.

    Raises:
        ValueError: If it is one.
    """
    function = getattr(loss, "function", None) if isinstance(loss, FunctionLoss) else None
    name = type(loss).__name__ if function is None else getattr(function, "__name__", "")
    unfit = name not in FIT_FOR_LOGITS if function is None else name.endswith(_UNFIT_FUNCTIONS)
    if unfit:
        expected = "`loss` to be a loss between the logits of two models"
        remedy = "Use SoftTargetLoss(), SoftCrossEntropyLoss() or, with a sigmoid per class, BinarySoftTargetLoss()."
        received = f"keras.losses.{name}, which takes the teacher's logits for probabilities or classes"
        raise ValueError(checks.message(expected, received, remedy))
