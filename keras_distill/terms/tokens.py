"""The term on the token distributions of two language models."""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import ops

from keras_distill import checks, compat
from keras_distill.functional.inputs import logarithm, prepare
from keras_distill.functional.top_k import TopK, check_classes, merge_classes
from keras_distill.losses import DistillationLoss, SoftTargetLoss
from keras_distill.recording import Call, select
from keras_distill.recording.tokens import MaskPlace, Positions, TokenPositions
from keras_distill.schedules import Weight
from keras_distill.terms.logits import LogitsDistillation, LossLike, Scores, fitted_rows
from keras_distill.terms.outputs import by_output
from keras_distill.terms.weighing import in_precision, token_mean, zeroed

Normalization = Literal["tokens", "sequences"]
_MOST_PADDING = 512  # vocabularies are padded to a multiple of at most this number
_BY_WEIGHT = "mean_with_sample_weight"  # Keras' name of the mean that is divided by the sum of the weights
_REDUCTIONS = ("sum_over_batch_size", "mean", _BY_WEIGHT)


@keras.saving.register_keras_serializable(package="keras_distill")
class SequenceDistillation(LogitsDistillation):
    """A loss between the token distributions of two causal, masked or sequence-to-sequence language models.

    The logits of both models have the shape ``(B, T, V)``. A position counts if the token that it predicts does: its
    label is not ``ignore_index``, ``mask`` marks it, its own sample weight is not 0, and it is not padding. Padding is
    known from Keras' masks (``Embedding(mask_zero=True)``) and from ``padding_mask`` or ``attention_mask`` in a dict of
    inputs. Padding itself predicts nothing, and the last token of a packed document does not predict the first of the
    next: ``position_ids`` that begin again at 0, ``seq_idx``, a padding mask with a number for each document, or an
    attention mask of pairs of tokens, in a dict of inputs, tell them apart.

    The loss is the mean over the tokens of the batch that count, on all replicas of ``tf.distribute`` together, and 0
    if no token counts. Sample weights multiply the values and, as in Keras' own losses, do not change the divisor,
    except that a token with a weight of 0 of its own does not count. To divide by the sum of the weights pass a loss
    with ``reduction="mean_with_sample_weight"``. An optimizer with ``gradient_accumulation_steps`` averages the means
    of its batches; with unequal numbers of tokens this is not the mean over all tokens, and a warning says so.

    Vocabularies that differ by padding are compared over the columns that both have.

    Args:
        loss: A loss on logits with one value for each position, as for :class:`LogitsDistillation`; ``None`` is
            :class:`SoftTargetLoss` at temperature 1.
        weight: Factor of the term in the total loss, a number or a schedule.
        shift: Whether position t predicts token t + 1, and the labels are the tokens themselves; weights of single
            tokens and ``mask`` belong to the labels. False for masked and sequence-to-sequence models, and for labels
            that are shifted already, as by the preprocessors of KerasHub.
        ignore_index: Tokens with this label do not count. Pass the padding's number if the labels contain padding.
        normalize: ``"tokens"`` is the mean over all tokens that count; ``"sequences"`` the mean over the sequences of
            their own mean.
        mask: A key of the inputs, or a function of them, for a mask of the tokens that count, such as an answer's,
            shape ``(B, T)``.
        output: Which of a model's outputs, an index or a key.
        vocabulary: Number of columns to compare, from the first; ``None`` takes those that both models have, if their
            vocabularies differ by no more than padding.
        use_sample_weight: Whether the batch's sample weights are applied to the term.
        name: Name in logs and files.
        **kwargs: Further settings of :class:`DistillationTerm`.

    Attributes:
        temperature: The loss's temperature, if it has one; a number can be assigned during training.
        aligned: Whether the labels of a batch have been compared with its tokens.

    Raises:
        TypeError: If ``loss`` cannot be called, is a class, or has parameters of its own.
        ValueError: If a setting is not as above, or the loss does not return one value for each position. When a model
            is built with the term: if sequences or vocabularies do not fit. In the first step: if labels can be seen to
            be shifted otherwise than ``shift`` says.

    Example:
        >>> term = SequenceDistillation(weight=0.5)
        >>> student = Call(ops.array([[[2.0, 0, 0], [0, 1, 0], [9, 0, 0]]]))
        >>> teacher = Call(ops.array([[[1.0, 0, 0], [0, 3, 0], [0, 9, 0]]]))
        >>> value = term.compute(student, teacher, labels=ops.array([[1, 0, 2]]))
        >>> round(float(value), 4)  # the last position predicts nothing
        0.1937

    References:
        Hinton, Vinyals, Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.
        Kim, Rush (2016). Sequence-Level Knowledge Distillation, section 3.1 (word level). arXiv:1606.07947.
    """

    def __init__(
        self,
        loss: str | LossLike | None = None,
        *,
        weight: Weight = 1.0,
        shift: bool = True,
        ignore_index: int = -100,
        normalize: Normalization = "tokens",
        mask: MaskPlace | None = None,
        output: int | str | None = None,
        vocabulary: int | None = None,
        use_sample_weight: bool = True,
        name: str = "tokens",
        **kwargs: Any,
    ) -> None:
        loss = SoftTargetLoss(temperature=1.0) if loss is None else loss
        super().__init__(loss, weight=weight, output=output, use_sample_weight=use_sample_weight, name=name, **kwargs)
        self._check_loss()
        checks.boolean("shift", shift)
        checks.integer("ignore_index", ignore_index)
        checks.one_of("normalize", normalize, ("tokens", "sequences"))
        place: Any = mask
        if place is not None and not isinstance(place, str) and not callable(place):
            expected = "`mask` to be a key of the inputs, a function of them, or None"
            raise TypeError(checks.message(expected, f"mask={mask!r}"))
        if vocabulary is not None:
            checks.integer("vocabulary", vocabulary)
            checks.positive("vocabulary", vocabulary)
        self.normalize, self.vocabulary = normalize, vocabulary
        self.mask, self.ignore_index = mask, int(ignore_index)
        self.tokens = TokenPositions(shift=shift, ignore_index=int(ignore_index), mask=mask)
        self._kinds: tuple[str, ...] = ()
        self.aligned = False

    @property
    def labels_checked(self) -> bool:  # type: ignore[override]
        """Whether the labels of a batch have been compared with its tokens."""
        return self.aligned

    @property
    def shift(self) -> bool:
        """Whether position t predicts token t + 1."""
        return self.tokens.shift

    def owned(self, student: keras.Model) -> SequenceDistillation:
        """A copy for one owner, as in :class:`DistillationTerm`.

        Args:
            student: The owner's student.

        Returns:
            The copy.

        Raises:
            ValueError: If the student is known to predict tokens in place, and ``shift`` is True.
        """
        copy: SequenceDistillation = super().owned(student)  # type: ignore[assignment]
        copy._kinds, copy.aligned = tuple(kind.__name__ for kind in type(student).__mro__), False
        if self.shift and "MaskedLM" in copy._kinds:
            expected = "`shift` to be False for a masked language model, which predicts tokens in place"
            raise ValueError(checks.message(expected, "shift=True", "Pass shift=False."))
        return copy

    def expect_new_labels(self) -> None:
        """Let the first batch of a new training be checked too."""
        self.aligned = False

    def check_labels(self, inputs: Any, labels: Any, image: tuple[int, int] | None = None) -> None:
        """Check that labels are where ``shift`` expects them, once, as soon as their values are known.

        It waits for the device in that step.

        Args:
            inputs: The inputs of a batch.
            labels: Its labels.
            image: Height and width of the student's images, if they are known.

        Raises:
            ValueError: If the labels are shifted already, or not yet.
        """
        if not self.aligned:
            labels = self._own_labels(labels)
            self.aligned = self.tokens.check_alignment(inputs, labels, causal="CausalLM" in self._kinds)

    def check_calls(self, student: Call, teacher: Call) -> None:
        """Check that the two models' logits fit each other and the loss."""
        pair = self._pair(student, teacher)[:2]
        ends = {"student": student.facts_of(pair[0]).end, "teacher": teacher.facts_of(pair[1]).end}
        self._check_pair(*self._columns(*pair), ends)

    def compute(self, student: Call, teacher: Call, labels: Any = None, sample_weight: Any = None) -> Any:
        """The loss without its weight, a scalar: its sum over all replicas is the mean over their tokens."""
        self.check_labels(student.inputs, labels, student.image)
        loss = self.loss_of(student)
        student_logits, teacher_logits, positions = self._compared(student, teacher, labels, sample_weight)
        counts, target = positions.counts, teacher_logits
        if self.needs_labels:
            if positions.labels is None:
                expected = f"token labels of shape (batch, tokens) for {type(loss).__name__}"
                received = "none" if labels is None else f"labels of shape {getattr(labels, 'shape', None)}"
                raise ValueError(checks.message(expected, received, "Pass the numbers of the tokens as labels."))
            counts = ops.logical_and(counts, positions.labels >= 0)
            target = (teacher_logits, ops.where(counts, positions.labels, 0))
        if isinstance(teacher_logits, TopK):
            self._check_merging(teacher_logits)  # again, because the term may have been built with a teacher model
            student_logits = zeroed(student_logits, counts)
            student_logits, target = merge_classes(student_logits, teacher_logits, getattr(loss, "temperature", 1.0))
        student_logits, target = keras.tree.map_structure(
            lambda tensor: zeroed(tensor, counts), (student_logits, target)
        )
        target, student_logits = in_precision(loss, (target, student_logits))
        values = loss.call(target, student_logits)
        if len(values.shape) == 3:  # a plain function may return a value for each column
            values = ops.mean(values, axis=-1)
        if len(values.shape) != 2:
            expected = f"{type(loss).__name__} to return one value for each token, shape (batch, tokens)"
            raise ValueError(checks.message(expected, f"values of shape {tuple(values.shape)}"))
        own_mask = compat.get_keras_mask(values)  # False for rows that the loss itself leaves out
        return token_mean(
            values,
            counts if own_mask is None else ops.logical_and(counts, own_mask),
            positions.weights,
            by_sequence=self.normalize == "sequences",
            by_weight=loss.reduction == _BY_WEIGHT,
        )

    def scores(self, student: Call, teacher: Call, sample_weight: Any = None, labels: Any = None) -> list[Scores]:
        """The logits of the tokens that count, for the metrics of the teacher.

        Args:
            student: The student's call.
            teacher: The teacher's call.
            sample_weight: The batch's sample weights.
            labels: The batch's labels.

        Returns:
            One entry, or an empty list if the loss does not compare class scores.
        """
        if not self.scores_classes:
            return []
        weights = sample_weight if self.use_sample_weight else None
        student_logits, teacher_logits, positions = self._compared(student, teacher, labels, weights)
        rows = ops.cast(positions.counts, "float32")
        rows = rows if positions.weights is None else rows * positions.weights
        if isinstance(teacher_logits, TopK):
            return [Scores(student_logits, teacher_logits, rows)]
        student_logits, teacher_logits = (
            zeroed(logits, rows > 0) for logits in prepare(student_logits, teacher_logits)
        )
        if not getattr(self.loss, "from_logits", True):
            student_logits, teacher_logits = logarithm(student_logits), logarithm(teacher_logits)
        return [Scores(student_logits, teacher_logits, rows)]

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON; a function as ``mask`` has to be registered with Keras."""
        return {
            **super().get_config(),
            "shift": self.tokens.shift,
            "ignore_index": self.tokens.ignore_index,
            "normalize": self.normalize,
            "mask": keras.saving.serialize_keras_object(self.tokens.mask),
            "vocabulary": self.vocabulary,
        }

    # Logits ----------------------------------------------------------------------------------------------------------

    def _compared(self, student: Call, teacher: Call, labels: Any, sample_weight: Any) -> tuple[Any, Any, Positions]:
        """Both models' logits over the same columns, and the positions that count."""
        own, other, weights = self._pair(student, teacher, sample_weight)
        masks = [student.mask_of(own), None if isinstance(other, TopK) else teacher.mask_of(other)]
        positions = self.tokens.of(own, student.inputs, self._own_labels(labels), weights, masks)
        own, other = self._columns(own, other)
        return own, other if isinstance(other, TopK) else fitted_rows(own, other), positions

    def _pair(self, student: Call, teacher: Call, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        pairs = self.paired(student, teacher, sample_weight)
        if len(pairs) != 1:
            expected = "models with one output for SequenceDistillation"
            raise ValueError(checks.message(expected, f"{len(pairs)} outputs", "Pass output=<the logits>."))
        own, other, weights = pairs[0]
        for who, logits in (("student", own), ("teacher", other)):
            shape = tuple(logits.indices.shape if isinstance(logits, TopK) else logits.shape)
            if len(shape) != 3:
                expected = f"the {who}'s logits to have the shape (batch, tokens, vocabulary)"
                remedy = "Pass output=<the logits of that shape>, or use LogitsDistillation."
                raise ValueError(checks.message(expected, f"shape {shape}", remedy))
        rows = tuple(own.shape)[:2], tuple(other.indices.shape if isinstance(other, TopK) else other.shape)[:2]
        if checks.shapes_differ(*rows):
            expected = "student and teacher to score the same tokens"
            raise ValueError(checks.message(expected, f"logits for {rows[0]} and {rows[1]} (batch, tokens)"))
        return own, other, weights

    def _columns(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """Both models' logits over the shared part of their vocabularies."""
        if isinstance(teacher, TopK):
            student = _narrowed(student, self._shared(student.shape[-1], teacher.classes.shape[-1]))
            check_classes(student, teacher)
            return student, teacher
        shared = self._shared(student.shape[-1], teacher.shape[-1])
        return _narrowed(student, shared), _narrowed(teacher, shared)

    def _shared(self, student: int, teacher: int) -> int:
        smaller, larger = sorted((student, teacher))
        if self.vocabulary is not None:
            if self.vocabulary > smaller:
                expected = f"`vocabulary` to be at most {smaller}, which both models have"
                raise ValueError(checks.message(expected, f"vocabulary={self.vocabulary}"))
            return self.vocabulary
        if larger - smaller >= _MOST_PADDING or larger - smaller > larger // 4:
            expected = "the vocabularies to differ by padding at most"
            remedy = (
                "With the same tokenizer pass vocabulary=<number of tokens>; distributions over the tokens of two"
                " tokenizers cannot be compared column by column."
            )
            received = f"{student} entries of the student's and {teacher} of the teacher's"
            raise ValueError(checks.message(expected, received, remedy))
        return smaller

    def _own_labels(self, labels: Any) -> Any:
        """The labels of this term's output."""
        if not keras.tree.is_nested(labels) or labels is None:
            return labels
        if isinstance(self.output_key, int):  # a list of outputs
            labels = by_output(labels, self.output_names, self.output_names)
        return select(labels, self.output_key, "the labels")

    def _check_loss(self) -> None:
        """Refuse a loss without a value for each position, or that is not averaged.

        Raises:
            ValueError: If the loss is one.
        """
        if isinstance(self.loss, DistillationLoss) and self.loss.gives != "positions":
            expected = "`loss` to return one value for each position"
            remedy = "Use a divergence such as SoftTargetLoss(), or LogitsDistillation."
            raise ValueError(checks.message(expected, f"{self.loss!r}, which compares whole examples", remedy))
        if self.loss.reduction not in _REDUCTIONS:
            expected = f"`loss` to be averaged, with a reduction of {', '.join(map(repr, _REDUCTIONS))}"
            raise ValueError(checks.message(expected, f"reduction={self.loss.reduction!r}", "Leave it out."))


def _narrowed(logits: Any, columns: int) -> Any:
    return logits if logits.shape[-1] == columns else logits[..., :columns]
