"""The loss that reads the student's feature with the teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.classifiers import softmax_regression
from lightning_distill.functional.inputs import prepare
from lightning_distill.functional.primitives import precise
from lightning_distill.functional.vectors import positions_mask, without
from lightning_distill.losses.base import DistillationLoss
from lightning_distill.losses.networks import built, channel_dim, linear_classifier
from lightning_distill.schedules import Schedule

__all__ = ["SoftmaxRegressionLoss"]

_EPS = 1e-5


class SoftmaxRegressionLoss(DistillationLoss):
    r"""Squared difference of two averaged features, and of the logits that the teacher's classifier makes of them.

    .. math:: \frac{1}{N} \sum_n \left( w_f \frac{1}{C} \| \bar h_n - \bar f^t_n \|_2^2
        + w_r \frac{1}{K} \| W \bar h_n - W \bar f^t_n \|_2^2 \right), \qquad
        h = \mathrm{ReLU}(\mathrm{BN}(A f^s))

    Take the last feature of each model before its classifier, as a map or averaged. The connector is learned: a linear
    map A of the channels to the teacher's (a 1x1 convolution of maps), batch normalisation with the statistics of the
    batch, and a ReLU. No adapter is needed, and the positions may differ. The teacher's classifier W stays as it is. In
    a FeatureDistillation the connector is made, trained, saved and resumed as adapters are, and W is read from the
    teacher. See :func:`lightning_distill.functional.softmax_regression`.

    Args:
        classifier: Name of the teacher's classifier, a linear layer; ``None`` takes the only linear layer of the
            teacher that takes as many numbers as the feature has channels.
        feature_weight: Weight of the first part, 0 or greater, or a schedule.
        regression_weight: Weight of the second part, 0 or greater, or a schedule.

    Returns:
        A scalar when called with features ``(N, C_s, H, W)``, ``(N, L, C_s)`` or ``(N, C_s)`` of the student, then the
        teacher's of the same examples.

    Raises:
        TypeError: If a weight is not a number.
        ValueError: If a weight is negative.

    Example:
        >>> loss = SoftmaxRegressionLoss()
        >>> loss.read_teacher(lambda name: nn.Linear(16, 10))
        >>> loss.build(torch.Size((3, 8, 4, 4)), torch.Size((3, 16, 4, 4)))
        >>> [tuple(parameter.shape) for parameter in loss.parameters()]
        [(16,), (16,), (16, 8)]

    References:
        Yang et al. 2021 (SRRL, "Knowledge distillation via softmax regression representation learning"), section 3,
        ICLR, with both weights 1.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    reads_teacher: ClassVar[bool] = True
    classifier: str | None
    _weight: Tensor | None

    def __init__(
        self,
        *,
        classifier: str | None = None,
        feature_weight: float | Schedule = 1.0,
        regression_weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(classifier, str | None):
            raise TypeError(checks.message("`classifier` to be the name of a layer", f"classifier={classifier!r}"))
        self._fix(classifier=classifier)
        self.feature_weight = self._setting("feature_weight", feature_weight, checks.non_negative)
        self.regression_weight = self._setting("regression_weight", regression_weight, checks.non_negative)
        self.connector: nn.Linear | None = None
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self._layer_of: Callable[[str | None], nn.Module] | None = None
        # read from the teacher in every run, never saved
        self.register_buffer("_weight", None, persistent=False)

    def read_teacher(self, layer_of: Callable[[str | None], nn.Module]) -> None:
        """Remember where the teacher's classifier is; :meth:`build` takes the one that fits the feature."""
        self._layer_of = layer_of

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the connector for features of these shapes, and take the classifier's weight."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        channels = teacher[channel_dim(teacher)]
        if self._layer_of is not None:
            layer, self._layer_of = linear_classifier(self._layer_of, self.classifier, channels), None
            self._weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32), copy=True)
        self.connector = nn.Linear(student[channel_dim(student)], channels, bias=False)
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        connector, scale, shift = built(self.connector), built(self.scale), built(self.shift)
        if self._weight is None:
            remedy = "Call loss.read_teacher(lambda name: teacher.fc) before `build`, or use a FeatureDistillation."
            raise ValueError(checks.message("the teacher's classifier to be known", "none", remedy))
        student, teacher = prepare(student, teacher)
        counts = positions_mask(mask, student)
        dim = channel_dim(student.shape)
        mapped = precise(connector, without(student, counts).movedim(dim, -1))
        feature = (scale * _standardized(mapped, counts) + shift).relu().movedim(-1, dim)
        return softmax_regression(
            feature,
            teacher,
            classifier=self._weight,
            feature_weight=self.feature_weight,
            regression_weight=self.regression_weight,
            mask=mask,
            reduction="mean",
        )


def _standardized(mapped: Tensor, counts: Tensor | None) -> Tensor:
    """Channels, the last dimension, with mean 0 and variance 1 over the positions of the batch that count."""
    dims = tuple(range(mapped.ndim - 1))
    shares = torch.ones_like(mapped[..., :1]) if counts is None else counts.unsqueeze(-1).to(mapped.dtype)
    number = shares.sum().clamp(min=1)
    centred = mapped - (mapped * shares).sum(dim=dims) / number
    variance = (centred.square() * shares).sum(dim=dims) / number
    return centred / (variance + _EPS).sqrt()
