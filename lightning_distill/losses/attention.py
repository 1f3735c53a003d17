"""Losses on transformers' attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.attention import attention_kl, attention_mse, attention_relation, check_heads
from lightning_distill.losses.base import DistillationLoss, FormulaLoss

__all__ = ["AttentionMapLoss", "AttentionRelationLoss"]

_KINDS = ("kl", "mse")


class AttentionMapLoss(DistillationLoss):
    r"""Difference of the two models' attention in one layer, averaged over examples, heads and queries.

    .. math:: \frac{1}{N A L} \sum_{n,a,i} D(S^s_{nai}, S^t_{nai})

    D is the divergence of the attention probabilities ("kl") or the mean squared difference of the scores ("mse"). See
    :func:`lightning_distill.functional.attention_kl` and :func:`lightning_distill.functional.attention_mse`.

    Args:
        kind: "kl" or "mse".
        from_scores: For "kl", whether it is called with scores; False for probabilities, which Hugging Face models
            return. "mse" takes its inputs as they are.

    Returns:
        A scalar when called with attention ``(N, A, L, L)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``kind`` is unknown.

    Example:
        >>> import torch
        >>> AttentionMapLoss()(torch.tensor([[[[0.0, 1.0, 3.0]]]]), torch.tensor([[[[2.0, 1.0, 0.0]]]]))
        tensor(1.8226)

    References:
        Sun et al. 2020 (MobileBERT), equation 3, arXiv:2004.02984; Jiao et al. 2020 (TinyBERT), equation 7,
        arXiv:1909.10351, with a weight of 1 for each layer.
    """

    kind: str
    from_scores: bool

    def __init__(self, kind: str = "kl", *, from_scores: bool = True) -> None:
        super().__init__()
        checks.one_of("kind", kind, _KINDS)
        checks.boolean("from_scores", from_scores)
        self._fix(kind=kind, from_scores=from_scores)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        if self.kind == "mse":
            return attention_mse(student, teacher, mask=mask, reduction="mean")
        return attention_kl(student, teacher, from_scores=self.from_scores, mask=mask, reduction="mean")


class AttentionRelationLoss(FormulaLoss):
    r"""Divergence of the relations between tokens, averaged over examples, relation heads and tokens.

    .. math:: \frac{1}{N A L} \sum_{n,a,i} \mathrm{KL}(R^t_{nai} \,\|\, R^s_{nai})

    One term each for queries, keys and values makes the paper's sum. The widths may differ. See
    :func:`lightning_distill.functional.attention_relation`.

    Args:
        relation_heads: Number of relation heads, a divisor of both widths; the paper has 48 or 64.

    Returns:
        A scalar when called with vectors ``(N, L, H)`` or ``(N, L, heads, d)`` of the student, then the teacher.

    Raises:
        TypeError: If ``relation_heads`` is not an int.
        ValueError: If it is less than 1.

    Example:
        >>> import torch
        >>> AttentionRelationLoss(relation_heads=1)(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0], [1.0]]]))
        tensor(0.0890)

    References:
        Wang et al. 2021 (MiniLMv2), equations 5 to 8, arXiv:2012.15828, with 48 relation heads for teachers of base and
        64 for those of large size, and a weight of 1 each for queries, keys and values.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False  # (N, L, heads, d) is not a map: a term must not resize it
    _formula = staticmethod(attention_relation)

    def __init__(self, *, relation_heads: int) -> None:
        super().__init__()
        check_heads(relation_heads)
        self._fix(relation_heads=int(relation_heads))
