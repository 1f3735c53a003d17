"""The divergences of two softmaxes that the kernels compute, and their settings."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from lightning_distill.functional.primitives import LEAST_SCORE

Kind = Literal[
    "forward_kl", "cross_entropy", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"
]

_LIMITS: dict[tuple[Kind, float], Kind] = {
    ("jensen_shannon", 0.0): "forward_kl",
    ("jensen_shannon", 1.0): "reverse_kl",
    ("skew_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
}


class Divergence(NamedTuple):
    r"""A divergence of the student's softmax :math:`q` and the teacher's softmax :math:`p`, both of logits over T.

    ==================  ======================================================================================
    forward_kl          :math:`\mathrm{KL}(p \| q)`
    cross_entropy       :math:`-\sum_c p_c \log q_c`
    reverse_kl          :math:`\mathrm{KL}(q \| p)`
    jensen_shannon      :math:`a \mathrm{KL}(p \| m) + (1 - a) \mathrm{KL}(q \| m)`, :math:`m = a p + (1 - a) q`
    skew_kl             :math:`\mathrm{KL}(p \| a p + (1 - a) q)`
    skew_reverse_kl     :math:`\mathrm{KL}(q \| a q + (1 - a) p)`
    total_variation     :math:`\frac{1}{2} \sum_c |q_c - p_c|`
    ==================  ======================================================================================

    Where the teacher forbids a class, :math:`p_c = 0`, the reverse divergence would be infinite: such a class is left
    out on both sides.

    Attributes:
        kind: One of the names above.
        share: The share :math:`a` in the mixture, greater than 0 and less than 1; not used by the others.
        temperature: Softening :math:`T` of both distributions, greater than 0.
    """

    kind: Kind
    share: float = 0.0
    temperature: float = 1.0

    @classmethod
    def of(cls, kind: Kind, share: float = 0.0, temperature: float = 1.0) -> Divergence:
        """A divergence whose share may be a limit: a mixture of one model alone makes a plain divergence.

        Args:
            kind: As above.
            share: From 0 to 1; less than 1 for the skewed ones.
            temperature: As above.
        """
        return cls(_LIMITS.get((kind, share), kind), share, temperature)

    @property
    def floor(self) -> float:
        """The least logit, which takes the place of minus infinity: ``LEAST_SCORE`` once it is divided by T."""
        return max(LEAST_SCORE * self.temperature, torch.finfo(torch.float32).min)
