"""Losses on one feature of each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, Literal

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.features import (
    attention_transfer,
    channel_wise_kl,
    feature_cosine,
    feature_kl,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
)
from lightning_distill.losses.base import DistillationLoss, FormulaLoss
from lightning_distill.schedules import Schedule

__all__ = ["AttentionTransferLoss", "ChannelWiseLoss", "FeatureDistance"]

DISTANCES: Final[dict[str, Callable[..., Tensor]]] = {
    "mse": feature_mse,
    "l1": feature_l1,
    "smooth_l1": feature_smooth_l1,
    "cosine": feature_cosine,
    "kl": feature_kl,
}
_OVER_CHANNELS = ("cosine", "kl")


class FeatureDistance(DistillationLoss):
    r"""One of the plain distances between two features of equal shape, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n D(f^s_n, f^t_n)

    The strings of a FeatureDistillation stand for these losses: "mse", "l1", "smooth_l1", "cosine" and "kl". See the
    function ``feature_<kind>`` in :mod:`lightning_distill.functional`.

    Args:
        kind: Which distance.
        channel_dim: Dimension of the vectors ("cosine") or of the softmax ("kl"); None means 1 for tensors of four or
            more dimensions, else the last. The other kinds have no such setting.

    Returns:
        A scalar when called with the features ``(N, ...)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``kind`` is unknown, or does not take ``channel_dim``.

    Example:
        >>> import torch
        >>> FeatureDistance("l1")(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
        tensor(1.2500)

    References:
        Romero et al. 2015 (FitNets), arXiv:1412.6550, in RepDistiller with a weight of 100; Sanh et al. 2019
        (DistilBERT), arXiv:1910.01108, in the authors' code with a weight of 1 beside 5 on the soft targets.
    """

    kind: str

    def __init__(
        self, kind: Literal["mse", "l1", "smooth_l1", "cosine", "kl"] = "mse", *, channel_dim: int | None = None
    ) -> None:
        super().__init__()
        checks.one_of("kind", kind, DISTANCES)
        if channel_dim is not None:
            checks.inner_dim("channel_dim", channel_dim)
            if kind not in _OVER_CHANNELS:
                raise ValueError(checks.message(f"`channel_dim` to be None for kind={kind!r}", f"{channel_dim=}"))
        self._fix(kind=kind, **({"channel_dim": channel_dim} if kind in _OVER_CHANNELS else {}))

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar."""
        settings = {name: getattr(self, name) for name in self._shown if name != "kind"}
        return DISTANCES[self.kind](student, teacher, mask=mask, reduction="mean", **settings)


class AttentionTransferLoss(FormulaLoss):
    r"""Mean squared difference of the normalised maps of attention, averaged over the examples.

    .. math:: \frac{1}{N P} \sum_n \left\| \frac{Q^s_n}{\|Q^s_n\|_2} - \frac{Q^t_n}{\|Q^t_n\|_2} \right\|_2^2, \qquad
        Q_{ni} = \frac{1}{C} \sum_c |f_{n,c,i}|^p

    It needs no adapter, because the channels are averaged out. The values are small: the usual weight is 1000. See
    :func:`lightning_distill.functional.attention_transfer`.

    Args:
        p: Power of the activations, at least 1; larger values stress the strongest positions.

    Returns:
        A scalar when called with feature maps ``(N, C, H, W)`` of the student, then the teacher; C may differ.

    Raises:
        TypeError: If ``p`` is not a number.
        ValueError: If ``p`` is less than 1.

    Example:
        >>> import torch
        >>> loss = AttentionTransferLoss()
        >>> loss(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]))
        tensor(0.7575)

    References:
        Zagoruyko and Komodakis 2017, equation 2, arXiv:1612.03928; deviation: the mean of the squared differences
        over the positions, as in the authors' code, where the equation has half the norm.
    """

    channels_must_match: ClassVar[bool] = False
    _formula = staticmethod(attention_transfer)

    def __init__(self, *, p: float = 2.0) -> None:
        super().__init__()
        checks.at_least("p", p, 1)
        self._fix(p=float(p))


class ChannelWiseLoss(FormulaLoss):
    r"""Divergence between the softmaxes over the positions of each channel, averaged over channels and examples.

    .. math:: \frac{T^2}{N C} \sum_n \sum_c \sum_i q^t_{nci} (\log q^t_{nci} - \log q^s_{nci}), \qquad
        q_{nci} = \frac{\exp(f_{nci} / T)}{\sum_j \exp(f_{ncj} / T)}

    The factor :math:`T^2` keeps the gradient's size when the temperature changes. Made for dense prediction, on maps of
    features or of logits. See
    :func:`lightning_distill.functional.channel_wise_kl`.

    Args:
        temperature: Softening of both distributions over the positions, greater than 0; a number or a schedule.

    Returns:
        A scalar, in nats times :math:`T^2`, when called with maps ``(N, C, H, W)`` of the student, then the teacher.

    Raises:
        TypeError: If the temperature is not a number.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[0.0, 1.0, 3.0]], [[1.0, 1.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[2.0, 1.0, 0.0]], [[4.0, 0.0, 1.0]]]])
        >>> ChannelWiseLoss(temperature=2.0)(student, teacher)
        tensor(1.5985)

    References:
        Shu et al. 2021, equations 4 and 5, arXiv:2011.13256; on maps of logits the authors' code has a temperature of 4
        and a weight of 3.
    """

    _formula = staticmethod(channel_wise_kl)

    def __init__(self, temperature: float | Schedule = 4.0) -> None:
        super().__init__()
        self.temperature = self._setting("temperature", temperature)
