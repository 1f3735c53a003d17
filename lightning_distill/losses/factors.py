"""The loss between factors: learned summaries of the two models' features."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.factors import factor_transfer
from lightning_distill.functional.features import feature_mse
from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.primitives import precise
from lightning_distill.functional.vectors import positions_mask, without
from lightning_distill.losses.base import DistillationLoss
from lightning_distill.losses.networks import built, channel_dim, channels_first, check_ranks, wide_layer
from lightning_distill.schedules import Schedule

__all__ = ["FactorTransferLoss"]


class FactorTransferLoss(DistillationLoss):
    r"""Difference of two learned factors of length one, plus the error with which the teacher's is turned back.

    .. math:: w_f \frac{1}{N D} \sum_n \sum_d \left| \frac{T(f^s_n)_d}{\|T(f^s_n)\|_2}
        - \frac{P(f^t_n)_d}{\|P(f^t_n)\|_2} \right|^p + w_r \, \mathrm{mean} \left( R(P(f^t)) - f^t \right)^2

    Three networks are learned, of three convolutions of width 3 each (linear maps for vectors) with leaky ReLUs: the
    translator T of the student's feature, the paraphraser P of the teacher's, and R, which restores the teacher's
    feature from its factor. P and R learn from the second part alone, without labels and without the student: no
    gradient of the first part reaches them. No adapter is needed. Inside a FeatureDistillation the networks are made,
    trained, saved and resumed as adapters are. See :func:`lightning_distill.functional.factor_transfer`.

    The paper trains the paraphraser before the student. Here it learns alongside by default. For the paper's order let
    ``factor_weight`` be 0 at first: ``factor_weight=Step([0.0, 1.0], boundaries=[5])``. Both parts are multiplied by
    the weight of the term: with an optimizer that sees the scale, such as SGD, divide ``reconstruction_weight`` by it.

    Args:
        rate: Channels of a factor as a share of the teacher's channels, greater than 0.
        power: The exponent p of the differences, at least 1.
        factor_weight: Weight of the first part, 0 or greater, or a schedule.
        reconstruction_weight: Weight of the second part, 0 or greater, or a schedule. At 0 the paraphraser stays as it
            is.

    Returns:
        A scalar when called with features ``(N, C_s, H, W)``, ``(N, L, C_s)`` or ``(N, C_s)`` of the student, then the
        teacher's at the same positions; C may differ.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = FactorTransferLoss(rate=0.5)
        >>> loss.build(torch.Size((2, 3, 4, 4)), torch.Size((2, 8, 4, 4)))
        >>> [tuple(layer.weight.shape[:2]) for layer in loss.translator[::2]]
        [(3, 3), (4, 3), (4, 4)]

    References:
        Kim et al. 2018, section 3, arXiv:1802.04977, with rate 0.5, power 1 and a weight of 500 on the last map before
        the classifier; deviations: the mean over a factor instead of the sum, as in the authors' code; the paraphraser
        is trained along with the student unless ``factor_weight`` has a schedule; no batch normalisation in the
        networks; tokens and vectors, by the same rule.
    """

    channels_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    rate: float
    power: float

    def __init__(
        self,
        *,
        rate: float = 0.5,
        power: float = 1.0,
        factor_weight: float | Schedule = 1.0,
        reconstruction_weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__()
        checks.positive("rate", rate)
        checks.at_least("power", power, 1)
        self._fix(rate=float(rate), power=float(power))
        self.factor_weight = self._setting("factor_weight", factor_weight, checks.non_negative)
        self.reconstruction_weight = self._setting("reconstruction_weight", reconstruction_weight, checks.non_negative)
        self.translator: nn.Sequential | None = None
        self.paraphraser: nn.Sequential | None = None
        self.restorer: nn.Sequential | None = None

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the three networks for features of these shapes, replacing earlier ones."""
        check_ranks(student, teacher)
        rank, narrow, wide = len(teacher), student[channel_dim(student)], teacher[channel_dim(teacher)]
        factor = max(1, int(self.rate * wide))
        self.translator = _network(rank, narrow, narrow, factor, factor)
        self.paraphraser = _network(rank, wide, wide, factor, factor)
        self.restorer = _network(rank, factor, factor, wide, wide)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        translator, paraphraser, restorer = (
            channels_first(built(network)) for network in (self.translator, self.paraphraser, self.restorer)
        )
        student, teacher = prepare(student, teacher)
        # Positions that do not count are set to 0 before the networks, like the padding at the edges, and after them.
        positions = positions_mask(mask, student)
        student, teacher = without(student, positions), without(teacher, positions)
        translated = without(precise(translator, student), positions)
        factor = without(precise(paraphraser, teacher), positions)
        restored = precise(restorer, factor)
        distance = factor_transfer(translated, factor, power=self.power, mask=mask, reduction="mean")
        error = feature_mse(restored, teacher, mask=mask, reduction="mean")
        return self.factor_weight * distance + self.reconstruction_weight * error


def _network(rank: int, *channels: int) -> nn.Sequential:
    """Convolutions of width 3 from one number of channels to the next, with leaky ReLUs."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(channels):
        layers += [wide_layer(rank, narrow, wide), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
