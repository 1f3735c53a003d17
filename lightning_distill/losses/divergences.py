"""Losses that are divergences between the two models' distributions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_distill import checks
from lightning_distill.functional.divergences import (
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from lightning_distill.losses.base import DistillationLoss
from lightning_distill.schedules import Schedule


class ReverseKLLoss(DistillationLoss):
    r"""Divergence of the teacher's probabilities from the student's, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_c p^s_{nc} (\log p^s_{nc} - \log p^t_{nc}), \qquad p = \mathrm{softmax}(z / T)

    The student keeps to the teacher's main modes instead of covering all of them. See
    :func:`lightning_distill.functional.reverse_kl`.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> ReverseKLLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.4825)

    References:
        Gu et al. 2023 (MiniLLM), equation 1, arXiv:2306.08543, with a weight of 1.
    """

    merges_classes: ClassVar[bool] = True

    def __init__(self, temperature: float | Schedule = 1.0, *, class_dim: int = -1) -> None:
        super().__init__()
        checks.inner_dim("class_dim", class_dim)
        self.temperature = self._setting("temperature", temperature)
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of a batch, a scalar."""
        return reverse_kl(student, teacher, temperature=self.temperature, class_dim=self.class_dim).mean()

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"temperature={self.temperature}, class_dim={self.class_dim}"


class GeneralizedJSDLoss(DistillationLoss):
    r"""Generalised Jensen-Shannon divergence, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \beta \, \mathrm{KL}(p^t_n \| m_n) + (1 - \beta) \, \mathrm{KL}(p^s_n \| m_n), \qquad
        m = \beta p^t + (1 - \beta) p^s, \qquad p = \mathrm{softmax}(z / T)

    A bounded loss; ``beta`` 0 stands for the forward divergence, 1 for the reverse. See
    :func:`lightning_distill.functional.generalized_jsd`.

    Args:
        beta: Share of the teacher in the mixture, from 0 to 1; may be set while training.
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0, ``beta`` is not from 0 to 1 or ``class_dim`` is the
            batch dimension.

    Example:
        >>> import torch
        >>> GeneralizedJSDLoss(0.1)(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.0226)

    References:
        Agarwal et al. 2023 (GKD), section 2 and equation 1, arXiv:2306.13649, with a beta of 0.1, 0.5 or 0.9 by task.
    """

    merges_classes: ClassVar[bool] = True

    def __init__(self, beta: float = 0.5, temperature: float | Schedule = 1.0, *, class_dim: int = -1) -> None:
        super().__init__()
        checks.between("beta", beta, 0, 1)
        checks.inner_dim("class_dim", class_dim)
        self.beta = float(beta)
        self.temperature = self._setting("temperature", temperature)
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of a batch, a scalar."""
        return generalized_jsd(
            student, teacher, beta=self.beta, temperature=self.temperature, class_dim=self.class_dim
        ).mean()

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"beta={self.beta}, temperature={self.temperature}, class_dim={self.class_dim}"


class SkewKLLoss(DistillationLoss):
    r"""Divergence from a mixture of both models, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(p^t_n \, \| \, \alpha p^t_n + (1 - \alpha) p^s_n)
        \quad\text{or, reverse,}\quad \mathrm{KL}(p^s_n \, \| \, \alpha p^s_n + (1 - \alpha) p^t_n)

    The gradient stays small where one model finds impossible what the other does not. See
    :func:`lightning_distill.functional.skew_kl` and :func:`lightning_distill.functional.skew_reverse_kl`.

    Args:
        skew: Share :math:`\alpha` of the first distribution in the mixture, from 0 to less than 1; may be set while
            training.
        reverse: Whether the student's distribution comes first instead of the teacher's.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``skew`` is out of its range or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> SkewKLLoss(reverse=True)(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.2873)

    References:
        Ko et al. 2024 (DistiLLM), equation 4 and section 3.1, arXiv:2402.03898, which recommends 0.1.
    """

    merges_classes: ClassVar[bool] = True

    def __init__(self, skew: float = 0.1, *, reverse: bool = False, class_dim: int = -1) -> None:
        super().__init__()
        checks.fraction("skew", skew)
        checks.boolean("reverse", reverse)
        checks.inner_dim("class_dim", class_dim)
        self.skew = float(skew)
        self.reverse = reverse
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of a batch, a scalar."""
        divergence = skew_reverse_kl if self.reverse else skew_kl
        return divergence(student, teacher, skew=self.skew, class_dim=self.class_dim).mean()

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"skew={self.skew}, reverse={self.reverse}, class_dim={self.class_dim}"


class TotalVariationLoss(DistillationLoss):
    r"""Total variation distance, averaged over the examples.

    .. math:: \frac{1}{2 N} \sum_n \sum_c |p^s_{nc} - p^t_{nc}|, \qquad p = \mathrm{softmax}(z / T)

    Symmetric and at most 1, however certain the models are. See
    :func:`lightning_distill.functional.total_variation`.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        class_dim: Dimension that holds the classes; 1 for dense maps ``(N, C, H, W)``.

    Returns:
        A scalar from 0 to 1 when called with logits ``(N, ..., C)`` of the student, then the teacher.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``class_dim`` is the batch dimension.

    Example:
        >>> import torch
        >>> TotalVariationLoss()(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[4.0, 1.0, 0.0]]))
        tensor(0.2710)

    References:
        Wen et al. 2023 (f-distill), theorem 1, arXiv:2307.15190. No weight is given.
    """

    merges_classes: ClassVar[bool] = True

    def __init__(self, temperature: float | Schedule = 1.0, *, class_dim: int = -1) -> None:
        super().__init__()
        checks.inner_dim("class_dim", class_dim)
        self.temperature = self._setting("temperature", temperature)
        self.class_dim = class_dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of a batch, a scalar."""
        return total_variation(student, teacher, temperature=self.temperature, class_dim=self.class_dim).mean()

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"temperature={self.temperature}, class_dim={self.class_dim}"
