"""Losses on transformers' attention."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from keras_distill import checks
from keras_distill.functional.attention import attention_kl, attention_mse, attention_relation, check_heads
from keras_distill.losses.base import DistillationLoss, FormulaLoss

__all__ = ["AttentionMapLoss", "AttentionRelationLoss"]

_KINDS = ("kl", "mse")


@keras.saving.register_keras_serializable(package="keras_distill")
class AttentionMapLoss(DistillationLoss):
    r"""Difference of the two models' attention in one layer, averaged over examples, heads and queries.

    .. math:: \frac{1}{N A L} \sum_{n,a,i} D(S^s_{nai}, S^t_{nai})

    D is the divergence of the attention probabilities ("kl") or the mean squared difference of the scores ("mse"). See
    :func:`keras_distill.functional.attention_kl` and :func:`keras_distill.functional.attention_mse`.

    Args:
        kind: "kl" or "mse".
        from_scores: For "kl", whether it is called with scores; False for probabilities, which Keras'
            ``MultiHeadAttention`` returns. "mse" takes its inputs as they are.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with attention ``(N, A, L, L)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> round(float(AttentionMapLoss()([[[[2.0, 1.0, 0.0]]]], [[[[0.0, 1.0, 3.0]]]])), 4)
        1.8226

    References:
        Sun et al. 2020 (MobileBERT), equation 3, arXiv:2004.02984; Jiao et al. 2020 (TinyBERT), equation 7,
        arXiv:1909.10351, with a weight of 1 for each layer.
    """

    gives: ClassVar[str] = "examples"

    def __init__(
        self,
        kind: str = "kl",
        *,
        from_scores: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "attention_map_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        checks.one_of("kind", kind, _KINDS)
        checks.boolean("from_scores", from_scores)
        self._fix(kind=kind, from_scores=from_scores)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per example."""
        if self.kind == "mse":
            return attention_mse(y_pred, y_true)
        return attention_kl(y_pred, y_true, from_scores=self.from_scores)


@keras.saving.register_keras_serializable(package="keras_distill")
class AttentionRelationLoss(FormulaLoss):
    r"""Divergence of the relations between tokens, averaged over examples, relation heads and tokens.

    .. math:: \frac{1}{N A L} \sum_{n,a,i} \mathrm{KL}(R^t_{nai} \,\|\, R^s_{nai})

    One term each for queries, keys and values makes the paper's sum. The widths may differ. See
    :func:`keras_distill.functional.attention_relation`.

    Args:
        relation_heads: Number of relation heads, a divisor of both widths; the paper has 48 or 64.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with vectors ``(N, L, H)`` of the teacher, then the student.

    Raises:
        TypeError: If ``relation_heads`` is not an int.
        ValueError: If it is less than 1.

    Example:
        >>> round(float(AttentionRelationLoss(relation_heads=1)([[[2.0], [1.0]]], [[[1.0], [0.0]]])), 4)
        0.089

    References:
        Wang et al. 2021 (MiniLMv2), equations 5 to 8, arXiv:2012.15828, with 48 relation heads for teachers of base and
        64 for those of large size, and a weight of 1 each for queries, keys and values.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False  # a position is compared with others of its own sequence
    gives: ClassVar[str] = "examples"
    _formula = staticmethod(attention_relation)

    def __init__(
        self,
        *,
        relation_heads: int,
        reduction: str | None = "sum_over_batch_size",
        name: str = "attention_relation_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        check_heads(relation_heads)
        self._fix(relation_heads=int(relation_heads))
