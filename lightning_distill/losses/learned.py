"""Losses with parameters of their own, which are trained along with the student."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill import checks
from lightning_distill.functional.learned import log_sum_distance, masked_generative, variational_information
from lightning_distill.functional.vectors import channels_at, over_examples, positions_mask, without
from lightning_distill.losses.base import DistillationLoss

__all__ = ["MaskedGenerativeLoss", "SimpleRecipeLoss", "VariationalInformationLoss"]

T = TypeVar("T")
_LAYERS: Final[dict[int, Any]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_SMALLEST_VARIANCE = 1e-5


class VariationalInformationLoss(DistillationLoss):
    r"""Negative log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts.

    .. math:: \frac{1}{N D} \sum_n \sum_d \frac{1}{2} \left( \frac{(\mu(f^s_n)_d - f^t_{nd})^2}{\sigma_{c(d)}^2}
        + \log \sigma_{c(d)}^2 \right), \qquad \sigma_c^2 = \log(1 + e^{\rho_c}) + 10^{-5}

    The mean :math:`\mu` is learned, and so is the variance of each channel. The mean is three 1x1 convolutions (three
    linear maps for vectors and tokens) without bias, as wide as the teacher's feature, with a ReLU between them. It
    maps the student's channels to the teacher's: no adapter is needed. Inside a FeatureDistillation the parameters are
    made, trained, saved and resumed as adapters are. See
    :func:`lightning_distill.functional.variational_information`.

    Args:
        initial_variance: Variance of every channel at first, 1e-4 or greater.

    Returns:
        A scalar in nats, which may be negative, when called with features ``(N, C_s, H, W)``, ``(N, L, C_s)`` or
        ``(N, C_s)`` of the student, then the teacher's at the same positions; C may differ.

    Raises:
        TypeError: If ``initial_variance`` is not a number.
        ValueError: If ``initial_variance`` is less than 1e-4.

    Example:
        >>> loss = VariationalInformationLoss(initial_variance=2.0)
        >>> loss.build(torch.Size((1, 3)), torch.Size((1, 2)))
        >>> loss(torch.zeros(1, 3), torch.tensor([[1.0, 3.0]])).detach()
        tensor(1.5966)

    References:
        Ahn et al. 2019, equations 5 and 6, arXiv:1904.05835; deviation: the mean instead of the sum over channels and
        positions, as in published code, which has a weight of 1.
    """

    channels_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    initial_variance: float

    def __init__(self, *, initial_variance: float = 5.0) -> None:
        super().__init__()
        checks.at_least("initial_variance", initial_variance, 1e-4)
        self._fix(initial_variance=float(initial_variance))
        self.mean: nn.Sequential | None = None
        self.rho: nn.Parameter | None = None

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the mean and the variances for features of these shapes, replacing earlier ones."""
        _check_ranks(student, teacher)
        layer, wide = _LAYERS[len(teacher)], teacher[_channels(teacher)]
        size = {} if layer is nn.Linear else {"kernel_size": 1}
        first, *others = (layer(n, wide, **size, bias=False) for n in (student[_channels(student)], wide, wide))
        self.mean = nn.Sequential(first, *(part for other in others for part in (nn.ReLU(), other)))
        excess = self.initial_variance - _SMALLEST_VARIANCE
        # the inverse of softplus, in the form that neither overflows nor cancels
        self.rho = nn.Parameter(torch.full((wide,), excess + math.log(-math.expm1(-excess))))

    @property
    def variance(self) -> Tensor:
        """Variance of each channel of the teacher, shape ``(C,)``."""
        return F.softplus(built(self.rho)) + _SMALLEST_VARIANCE

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        mean = _channels_first(built(self.mean))
        return variational_information(student, teacher, mean=mean, variance=self.variance, mask=mask, reduction="mean")


class MaskedGenerativeLoss(DistillationLoss):
    r"""Squared error of the teacher's feature as generated from the part of the student's that a random mask keeps.

    .. math:: \frac{1}{N} \sum_n \sum_d \left( G(m_n \odot f^s_n)_d - f^t_{nd} \right)^2

    The generator G is learned: two convolutions of width 3 with a ReLU between them, over height and width for maps and
    over the sequence for tokens; for vectors two linear maps. Inside a FeatureDistillation its parameters are made,
    trained, saved and resumed as adapters are, and where the channels differ the term's adapter makes them equal before
    the mask. The mask is drawn from PyTorch's global random state, as dropout is, and only in training mode. The sum
    makes values large: the paper's weights are 7e-5 and smaller. See
    :func:`lightning_distill.functional.masked_generative`.

    Args:
        mask_ratio: Share of the feature that is hidden, at least 0 and less than 1.
        mask: The entries that the mask hides: all channels at a position (``"spatial"``, published for dense
            prediction), or all positions of a channel (``"channel"``, published for classification).

    Returns:
        A scalar when called with features ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)`` of the student, then the
        teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``mask_ratio`` is out of range or ``mask`` is unknown.

    Example:
        >>> loss = MaskedGenerativeLoss(mask_ratio=0.5, mask="channel")
        >>> loss.build(torch.Size((2, 4, 3, 3)), torch.Size((2, 4, 3, 3)))
        >>> [tuple(parameter.shape) for parameter in loss.parameters()]
        [(4, 4, 3, 3), (4,), (4, 4, 3, 3), (4,)]

    References:
        Yang et al. 2022, section 3, arXiv:2205.01529, for maps; deviation: tokens and vectors, by the same rule. The
        authors' code hides 0.15 of the channels for ImageNet (weight 7e-5); of the positions 0.75 for segmentation,
        0.65 for one-stage (both 2e-5) and 0.45 for two-stage detectors (5e-7).
    """

    learned: ClassVar[bool] = True
    mask_ratio: float
    mask: str

    def __init__(self, *, mask_ratio: float = 0.5, mask: Literal["spatial", "channel"] = "spatial") -> None:
        super().__init__()
        checks.fraction("mask_ratio", mask_ratio)
        checks.one_of("mask", mask, ("spatial", "channel"))
        self._fix(mask_ratio=float(mask_ratio), mask=mask)
        self.generator: nn.Sequential | None = None

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the generator for features of these shapes, replacing an earlier one."""
        _check_ranks(student, teacher)
        if self.mask == "spatial" and len(student) < 3:
            expected = "the student's feature to have positions for mask='spatial'"
            raise ValueError(checks.message(expected, f"shape {tuple(student)}", "Pass mask='channel'."))
        layer, wide = _LAYERS[len(teacher)], teacher[_channels(teacher)]
        size = {} if layer is nn.Linear else {"kernel_size": 3, "padding": 1}
        first = layer(student[_channels(student)], wide, **size)
        self.generator = nn.Sequential(first, nn.ReLU(), layer(wide, wide, **size))

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        network, drawn = _channels_first(built(self.generator)), self._drawn(student)
        positions = positions_mask(mask, student)
        # Positions that do not count are set to 0 before the generator, like the padding at the edges, and after it,
        # like the teacher's.
        student, teacher = without(student, positions), without(teacher, positions)
        values = masked_generative(
            student, teacher, generator=lambda feature: without(network(feature), positions), mask=drawn
        )
        return over_examples(values, positions, "mean")

    def _drawn(self, student: Tensor) -> Tensor | None:
        """A mask for a batch, 1 where the feature stays."""
        if not self.training or self.mask_ratio == 0:
            return None
        dim = channels_at(student) % student.ndim
        alone = (0, dim) if self.mask == "channel" else set(range(student.ndim)) - {dim}
        shape = [size if index in alone else 1 for index, size in enumerate(student.shape)]
        return (torch.rand(shape, device=student.device) >= self.mask_ratio).float()


class SimpleRecipeLoss(DistillationLoss):
    r"""Logarithm of the summed powers of the differences between two batch-normalised features, one projected.

    .. math:: \log \sum_n \sum_c |\hat z^s_{nc} - \hat z^t_{nc}|^a, \qquad
        z^s_n = W \bar f^s_n, \quad z^t_n = \bar f^t_n, \quad
        \hat z_{nc} = \frac{z_{nc} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

    The projection W is learned: one linear map without a bias, from the student's channels to the teacher's, after an
    average over the positions. No adapter is needed, and the positions may differ. Inside a FeatureDistillation the
    projection is made, trained and saved as adapters are. The statistics are those of the batch: the value grows with
    the logarithm of its size, may be negative, and is 0 for a batch of one example. See
    :func:`lightning_distill.functional.log_sum_distance`.

    Args:
        power: The exponent a of the differences, at least 1; may be set while training.
        eps: Added to the variances, greater than 0.

    Returns:
        A scalar when called with features ``(N, C_s, H, W)``, ``(N, L, C_s)`` or ``(N, C_s)`` of the student, then the
        teacher's of the same examples.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If a setting is out of its range.

    Example:
        >>> loss = SimpleRecipeLoss()
        >>> loss.build(torch.Size((3, 8, 4, 4)), torch.Size((3, 16)))
        >>> [tuple(parameter.shape) for parameter in loss.parameters()]
        [(16, 8)]

    References:
        Miles and Mikolajczyk 2023 (SRD), section 3, arXiv:2303.11098, with power 4, on the last feature before the
        classifier, with a weight of 2 beside a divergence of the logits; deviation: 0 in the place of the logarithm
        of 0. The authors' projection has a bias, which the normalisation removes.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    power: float
    eps: float

    def __init__(self, *, power: float = 4.0, eps: float = 1e-4) -> None:
        super().__init__()
        checks.at_least("power", power, 1)
        checks.positive("eps", eps)
        self._fix(power=float(power), eps=float(eps))
        self.projection: nn.Linear | None = None

    def build(self, student: torch.Size, teacher: torch.Size) -> None:
        """Make the projection for features of these shapes, replacing an earlier one."""
        if min(len(student), len(teacher)) < 2:
            expected = "`student` and `teacher` to have examples and channels"
            raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}"))
        self.projection = nn.Linear(student[_channels(student)], teacher[_channels(teacher)], bias=False)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        projection = built(self.projection)
        return log_sum_distance(student, teacher, projection=projection, power=self.power, eps=self.eps, mask=mask)


def _channels(shape: torch.Size) -> int:
    return 1 if len(shape) >= 4 else -1


def _check_ranks(student: torch.Size, teacher: torch.Size) -> None:
    if len(student) != len(teacher) or len(student) not in _LAYERS:
        expected = "`student` and `teacher` to have the same number of dimensions, 2 to 5"
        raise ValueError(checks.message(expected, f"{tuple(student)} and {tuple(teacher)}", "Pass adapter=<a module>."))


def built(part: T | None) -> T:
    """A learned part of a loss.

    Raises:
        ValueError: If it was not made yet.
    """
    if part is None:
        remedy = "Call loss.build(student.shape, teacher.shape) once, or use the loss in a FeatureDistillation."
        raise ValueError(checks.message("the loss to be built before it is called", "no parameters", remedy))
    return part


def _channels_first(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network for features with their channels anywhere."""

    def apply(feature: Tensor) -> Tensor:
        dim = channels_at(feature)
        mapped: Tensor = network(feature.movedim(dim, 1)).movedim(1, dim)
        return mapped

    return apply
