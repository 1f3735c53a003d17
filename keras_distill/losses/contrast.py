"""The loss that tells an example's own remembered embedding from those of other examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_distill import backends, checks
from keras_distill.functional.contrast import contrast_scores, log_partition, noise_contrast
from keras_distill.functional.inputs import prepare
from keras_distill.functional.vectors import averaged, unit
from keras_distill.losses.base import DistillationLoss
from keras_distill.losses.networks import built
from keras_distill.schedules import Schedule

__all__ = ["ContrastiveRepresentationLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class ContrastiveRepresentationLoss(DistillationLoss):
    r"""Binary cross entropy of telling an example's own remembered embedding from those of other examples.

    .. math:: \frac{1}{N} \sum_n \sum_{(u, v)} \left( - \log h(u_n, v_n)
        - \sum_{k=1}^{K} \log (1 - h(u_n, v_{j_k})) \right), \qquad
        h(u, v) = \frac{p}{p + K / M}, \quad p = \frac{1}{Z} \exp \left( \frac{u \cdot v}{T} \right)

    Take the last feature of each model before its classifier. Two linear maps to embeddings of length one are learned,
    and two memories hold an embedding of each example of the data set: u is the student's embedding and v an entry of
    the teacher's memory, then the other way round. In each step the K negatives are drawn from the examples other than
    n; where the data set has no more, each of them is one. After a step the entries of the batch move to the new
    embeddings. Maps and tokens are averaged over their positions. No adapter is needed.

    The row of each example in the data set must be known. In a FeatureDistillation a cache with features knows it;
    without a cache put it into a dict of inputs, and name it: ``FeatureDistillation(..., index="row")``. Evaluation
    leaves the term out, since the rows are those of the training data. Inside a FeatureDistillation the maps and the
    memories are made, trained and saved as adapters are; each of several teachers has its own. See
    :func:`keras_distill.functional.contrastive_representation`.

    Args:
        temperature: The temperature T, greater than 0; a number or a schedule.
        size: Number M of examples in the data set, at least 2.
        negatives: Number K of negatives of an example, at least 1. A step needs memory for 2 N K ``width`` numbers.
        width: Width of the embeddings, at least 1.
        momentum: Share of an entry that stays, at least 0 and less than 1.
        normalizer: The constant Z, greater than 0; ``None`` takes it from the first batch, as the mean of the
            exponentials times M, and keeps it.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar in nats when called with the pair of features ``(N, ..., C_t)`` of the teacher and rows ``(N,)``, then
        features ``(N, ..., C_s)`` of the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of its range, or several replicas train under ``tf.distribute``, whose memories
            would differ.

    Example:
        >>> loss = ContrastiveRepresentationLoss(size=6, width=4)
        >>> loss.build((None, 8), (None, 16))
        >>> tuple(loss.layer.student_memory.shape)
        (6, 4)

    References:
        Tian et al. 2020 (CRD), equations 18 and 19, arXiv:1910.10699, with 16,384 negatives and a weight of 0.8 (R);
        deviations: Z, which is 1 in the paper, is that of the authors' code; negatives are other examples of any class,
        drawn with replacement; the authors' code adds 1e-7 to the denominators, and flattens maps.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    keeps_teacher: ClassVar[bool] = True
    needs_index: ClassVar[bool] = True
    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        temperature: float | Schedule = 0.07,
        *,
        size: int | None = None,
        negatives: int = 16384,
        width: int = 128,
        momentum: float = 0.5,
        normalizer: float | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "contrastive_representation_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        for setting, number, least in (("size", size, 2), ("negatives", negatives, 1), ("width", width, 1)):
            if number is not None:
                checks.integer(setting, number)
                checks.at_least(setting, number, least)
        checks.fraction("momentum", momentum)
        if normalizer is not None:
            checks.positive("normalizer", normalizer)
        self._fix(size=None if size is None else int(size), negatives=int(negatives), width=int(width))
        self._fix(momentum=float(momentum), normalizer=None if normalizer is None else float(normalizer))
        self.temperature = self._setting("temperature", temperature)

    def build(self, student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
        """Make the maps, and memories of random vectors, for features of these shapes, replacing earlier ones."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        if self.size is None:
            expected = "`size` to be the number of examples in the data set"
            remedy = "Pass ContrastiveRepresentationLoss(size=len(x)), with a cache size=cache.manifest.length."
            raise ValueError(checks.message(expected, "size=None", remedy))
        layer = self.layer = keras.layers.Layer(name="contrast", dtype=self.dtype)
        for side, channels in (("student", student[-1]), ("teacher", teacher[-1])):
            embedding = keras.layers.Dense(self.width, name=f"{side}_embedding", dtype=self.dtype)
            embedding.build((None, channels))
            setattr(layer, f"{side}_embedding", embedding)
            memory = self._fixed_weight(f"{side}_memory", (self.size, self.width), "random_normal")
            memory.assign(unit(ops.convert_to_tensor(memory), 1))
        if self.normalizer is None:  # Z is 0 until a batch has given it
            self._fixed_weight("log_normalizers", (2,), keras.initializers.Constant(-math.inf))
        layer.seed_generator = keras.random.SeedGenerator()
        layer.seed_state = layer.seed_generator.state  # a weight too, which files keep
        layer.built = True

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example; in training the batch's entries of the memories move to its embeddings."""
        layer = built(self.layer)
        if not isinstance(y_true, (tuple, list)) or len(y_true) != 2:
            expected = "`y_true` to be the pair (teacher_feature, rows)"
            remedy = "Call loss((teacher_feature, rows), student_feature); a term of DistillModel passes them."
            raise ValueError(checks.message(expected, f"a {type(y_true).__name__}", remedy))
        teacher, index = y_true
        student, teacher = prepare(y_pred, teacher)
        embeddings = layer.student_embedding(averaged(student)), layer.teacher_embedding(averaged(teacher))
        variables = layer.student_memory, layer.teacher_memory
        memories = [ops.convert_to_tensor(variable) for variable in variables]
        index = ops.cast(index, "int32")
        chosen = self._chosen(index)
        entries = [ops.take(memory, chosen, axis=0) for memory in memories]
        scores = [
            contrast_scores(embedding, others, self.temperature)
            for embedding, others in zip(embeddings, reversed(entries), strict=True)
        ]
        logs = self._log_normalizers(scores)
        if self.training:
            if backends.replicas() > 1:
                expected = "one replica for ContrastiveRepresentationLoss, whose memories cannot be shared"
                raise ValueError(checks.message(expected, f"{backends.replicas()} replicas"))
            for variable, memory, embedding in zip(variables, memories, embeddings, strict=True):
                fresh = unit(ops.cast(ops.stop_gradient(embedding), memory.dtype), 1)
                moved = self.momentum * ops.take(memory, index, axis=0) + (1 - self.momentum) * fresh
                variable.assign(ops.scatter_update(memory, ops.expand_dims(index, 1), unit(moved, 1)))
        values = [noise_contrast(each, log, memories[0].shape[0]) for each, log in zip(scores, logs, strict=True)]
        return values[0] + values[1]

    def _fixed_weight(self, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        """A weight of the layer that no optimizer trains."""
        layer = built(self.layer)
        weight = layer.add_weight(name=name, shape=shape, dtype=self.dtype, trainable=False, initializer=initializer)
        setattr(layer, name, weight)
        return weight

    def _chosen(self, index: Any) -> Any:
        """The row of each example, then the rows of its negatives, shape ``(N, K + 1)``."""
        size, rows = built(self.layer).student_memory.shape[0], ops.expand_dims(index, 1)
        if self.negatives < size - 1:
            shape = (ops.shape(index)[0], self.negatives)
            steps = keras.random.randint(shape, 1, size, dtype="int32", seed=built(self.layer).seed_generator)
        else:
            steps = ops.expand_dims(ops.arange(1, size, dtype="int32"), 0)
        return ops.concatenate([rows, ops.mod(rows + steps, size)], axis=1)

    def _log_normalizers(self, scores: Sequence[Any]) -> list[Any]:
        """The logarithms of both constants; those of the first batch are kept."""
        if self.normalizer is not None:
            return [math.log(self.normalizer)] * 2
        variable = built(self.layer).log_normalizers
        known = ops.convert_to_tensor(variable)
        estimates = ops.stack([log_partition(each, built(self.layer).student_memory.shape[0]) for each in scores])
        used = ops.where(ops.isinf(known), ops.cast(estimates, known.dtype), known)
        if self.training:
            variable.assign(used)
        return [ops.cast(used[number], each.dtype) for number, each in enumerate(scores)]
