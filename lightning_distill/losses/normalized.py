"""Losses on features that are normalised first."""

from __future__ import annotations

from typing import ClassVar

from lightning_distill import checks
from lightning_distill.functional.normalized import (
    centered_kernel_alignment,
    feature_map_transfer,
    neuron_selectivity,
    normalized_mse,
    pearson_feature,
)
from lightning_distill.losses.base import FormulaLoss

__all__ = ["CKALoss", "FeatureMapTransferLoss", "NeuronSelectivityLoss", "PatientLoss", "PearsonFeatureLoss"]


class PearsonFeatureLoss(FormulaLoss):
    r"""Half the mean squared difference of the z-scores of the channels, over the examples and positions of a batch.

    .. math:: \frac{1}{2 M} \sum_{n,c,i} (\hat f^s_{nci} - \hat f^t_{nci})^2, \qquad
        \hat f_{nci} = \frac{f_{nci} - \mu_c}{\sigma_c + 10^{-6}}

    The student copies where a channel is strong, but not its mean and size. This suits a teacher of another
    architecture. See :func:`lightning_distill.functional.pearson_feature`.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)`` of the student, then the
        teacher.

    Example:
        >>> import torch
        >>> PearsonFeatureLoss()(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [4.0], [2.0]]))
        tensor(0.3333)

    References:
        Cao et al. 2022 (PKD), section 3, arXiv:2207.02039; its weight depends on the detector.
    """

    _of_batch: ClassVar[bool] = True
    _formula = staticmethod(pearson_feature)


class NeuronSelectivityLoss(FormulaLoss):
    r"""Squared maximum mean discrepancy of the channels' maps, averaged over the examples.

    .. math:: \overline{k(s_i, s_j)} + \overline{k(t_i, t_j)} - 2 \overline{k(s_i, t_j)}, \qquad
        k(a, b) = \left(\frac{a \cdot b}{\|a\| \|b\|}\right)^2

    The bars are means over pairs of channels. It needs no adapter. The usual weight is 50. See
    :func:`lightning_distill.functional.neuron_selectivity`.

    Returns:
        A scalar when called with feature maps ``(N, C, H, W)`` of the student, then the teacher; C may differ.

    Example:
        >>> import torch
        >>> NeuronSelectivityLoss()(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]]]))
        tensor(1.2800)

    References:
        Huang and Wang 2017, section 4, arXiv:1707.01219, with the polynomial kernel of d = 2 and c = 0; deviation:
        without the factor 1/2 that the paper gives its term.
    """

    channels_must_match: ClassVar[bool] = False
    _formula = staticmethod(neuron_selectivity)


class CKALoss(FormulaLoss):
    r"""One minus the linear centred kernel alignment (CKA) of the two models' features of a batch.

    .. math:: 1 - \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    X and Y are the features, one row per example, with centred columns. It needs no adapter, and the features may have
    any shapes. See :func:`lightning_distill.functional.centered_kernel_alignment`.

    Returns:
        A scalar from 0 to 1 when called with features ``(N, ...)`` of the student, then the teacher.

    Example:
        >>> import torch
        >>> CKALoss()(torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0], [4.0]]))
        tensor(0.9343)

    References:
        Kornblith et al. 2019, equation 4, arXiv:1905.00414; with the biased estimate of HSIC. There it is a measure and
        not a loss, so the paper gives no weight.
    """

    channels_must_match: ClassVar[bool] = False
    positions_must_match: ClassVar[bool] = False
    _of_batch: ClassVar[bool] = True
    _formula = staticmethod(centered_kernel_alignment)


class PatientLoss(FormulaLoss):
    r"""Mean squared difference of channel vectors of length one, averaged over examples and positions.

    .. math:: \frac{1}{N C} \sum_{n,c} \left( \frac{f^s_{nc}}{\|f^s_n\|_2} - \frac{f^t_{nc}}{\|f^t_n\|_2} \right)^2

    Meant for the first token's hidden state of several layers: make the tap select the token. The usual weight is 10
    to 1000. See :func:`lightning_distill.functional.normalized_mse`.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)`` of the student, then the
        teacher.

    Example:
        >>> import torch
        >>> PatientLoss()(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
        tensor(0.7000)

    References:
        Sun et al. 2019 (Patient KD), equation 7, arXiv:1908.09355; deviation: the mean over the channels, as in the
        authors' code, where the equation has the sum.
    """

    _formula = staticmethod(normalized_mse)


class FeatureMapTransferLoss(FormulaLoss):
    r"""Mean squared difference after a layer normalisation without weights, averaged over examples and positions.

    .. math:: \frac{1}{N C} \sum_{n,c} (\hat f^s_{nc} - \hat f^t_{nc})^2, \qquad
        \hat f_{nc} = \frac{f_{nc} - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}}

    For the hidden states of transformers, layer by layer. See
    :func:`lightning_distill.functional.feature_map_transfer`.

    Args:
        eps: Added to the variance, at least 0.

    Returns:
        A scalar when called with features ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)`` of the student, then the
        teacher.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``eps`` is less than 0.

    Example:
        >>> import torch
        >>> FeatureMapTransferLoss()(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 4.0, 2.0]]))
        tensor(1.0000)

    References:
        Sun et al. 2020 (MobileBERT), section 3.5 and equation 2, arXiv:2004.02984: the discrepancy of the normalised
        feature maps, not that of their statistics; deviation: a vector that is constant up to rounding becomes zero.
        The paper gives no weight.
    """

    _formula = staticmethod(feature_map_transfer)

    def __init__(self, *, eps: float = 1e-12) -> None:
        super().__init__()
        checks.non_negative("eps", eps)
        self._fix(eps=float(eps))
