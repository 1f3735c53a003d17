"""Losses that are divergences between the two models' distributions."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from distill_core.schedules import Over
from keras_distill import checks
from keras_distill.functional.divergences import (
    alpha_beta_divergence,
    generalized_jsd,
    interpolated_kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from keras_distill.losses.base import LogitsLoss
from keras_distill.schedules import Linear, Schedule

__all__ = ["AlphaBetaLoss", "GeneralizedJSDLoss", "ReverseKLLoss", "SkewKLLoss", "TAIDLoss", "TotalVariationLoss"]


@keras.saving.register_keras_serializable(package="keras_distill")
class ReverseKLLoss(LogitsLoss):
    r"""Divergence of the teacher's probabilities from the student's, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \sum_c p^s_{nc} (\log p^s_{nc} - \log p^t_{nc}), \qquad p = \mathrm{softmax}(z / T)

    The student keeps to the teacher's main modes instead of covering all of them. See
    :func:`keras_distill.functional.reverse_kl`.

    The loss is not multiplied by :math:`T^2`: at a higher temperature its gradient is smaller.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(ReverseKLLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.4825

    References:
        Gu et al. 2023 (MiniLLM), equation 1, arXiv:2306.08543, with a weight of 1.
    """

    merges_classes: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    _formula = staticmethod(reverse_kl)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "reverse_kl_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)


@keras.saving.register_keras_serializable(package="keras_distill")
class GeneralizedJSDLoss(LogitsLoss):
    r"""Generalised Jensen-Shannon divergence, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \beta \, \mathrm{KL}(p^t_n \| m_n) + (1 - \beta) \, \mathrm{KL}(p^s_n \| m_n), \qquad
        m = \beta p^t + (1 - \beta) p^s, \qquad p = \mathrm{softmax}(z / T)

    A bounded loss; ``beta`` 0 is the forward divergence, 1 the reverse. See
    :func:`keras_distill.functional.generalized_jsd`.

    The loss is not multiplied by :math:`T^2`: at a higher temperature its gradient is smaller.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        beta: Share of the teacher in the mixture, from 0 to 1.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or ``beta`` is not from 0 to 1.

    Example:
        >>> round(float(GeneralizedJSDLoss(beta=0.1)([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.0226

    References:
        Agarwal et al. 2023 (GKD), section 2 and equation 1, arXiv:2306.13649, with a beta of 0.1, 0.5 or 0.9 by task.
    """

    merges_classes: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    _formula = staticmethod(generalized_jsd)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        beta: float = 0.5,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "generalized_jsd_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        checks.between("beta", beta, 0, 1)
        self.temperature = self._setting("temperature", temperature)
        self._fix(beta=float(beta))


@keras.saving.register_keras_serializable(package="keras_distill")
class SkewKLLoss(LogitsLoss):
    r"""Divergence from a mixture of both models, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(p^t_n \, \| \, \alpha p^t_n + (1 - \alpha) p^s_n)
        \quad\text{or, reverse,}\quad \mathrm{KL}(p^s_n \, \| \, \alpha p^s_n + (1 - \alpha) p^t_n)

    The gradient stays small for classes that only one of the two models considers impossible. See
    :func:`keras_distill.functional.skew_kl` and :func:`keras_distill.functional.skew_reverse_kl`.

    It has no temperature.

    Args:
        skew: Share :math:`\alpha` of the first distribution in the mixture, from 0 to less than 1.
        reverse: Whether the student's distribution comes first instead of the teacher's.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``skew`` is out of its range.

    Example:
        >>> round(float(SkewKLLoss(reverse=True)([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.2873

    References:
        Ko et al. 2024 (DistiLLM), equation 4 and section 3.1, arXiv:2402.03898, which recommends 0.1.
    """

    merges_classes: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        skew: float = 0.1,
        reverse: bool = False,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "skew_kl_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        checks.fraction("skew", skew)
        checks.boolean("reverse", reverse)
        self._fix(skew=float(skew), reverse=reverse)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row of logits."""
        divergence = skew_reverse_kl if self.reverse else skew_kl
        return divergence(y_pred, y_true, skew=self.skew, from_logits=self.from_logits)


@keras.saving.register_keras_serializable(package="keras_distill")
class AlphaBetaLoss(LogitsLoss):
    r"""Alpha-beta divergence of the two models' probabilities, averaged over the examples.

    .. math:: \frac{1}{N \alpha \beta (\alpha + \beta)} \sum_n \sum_c \alpha (p^t_{nc})^{\alpha + \beta}
        + \beta (p^s_{nc})^{\alpha + \beta} - (\alpha + \beta) (p^t_{nc})^\alpha (p^s_{nc})^\beta,
        \qquad p = \mathrm{softmax}(z / T)

    A family between the forward divergence, at (1, 0), and the reverse one, at (0, 1). See
    :func:`keras_distill.functional.alpha_beta_divergence`.

    It has no factor :math:`T^2`: at another temperature the loss keeps its scale and the gradient shrinks.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        alpha: Exponent of the teacher's probabilities, any number; may be set while training.
        beta: Exponent of the student's probabilities, any number; may be set while training.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0 or an exponent is not finite.

    Example:
        >>> round(float(AlphaBetaLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.4891

    References:
        Wang et al. 2025 (ABKD), arXiv:2505.04560, with alpha 0.2 and beta 0.7 for language models; deviation: where an
        exponent or their sum is 0, the limit of the formula. The authors' code has another factor there.
    """

    merges_classes: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    _formula = staticmethod(alpha_beta_divergence)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        alpha: float = 0.2,
        beta: float = 0.7,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "alpha_beta_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        checks.number("alpha", alpha)
        checks.number("beta", beta)
        self.temperature = self._setting("temperature", temperature)
        self._fix(alpha=float(alpha), beta=float(beta))


@keras.saving.register_keras_serializable(package="keras_distill")
class TAIDLoss(LogitsLoss):
    r"""Divergence from a target that moves from the student to the teacher, averaged over the examples.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(p_n \| p^s_n), \qquad
        p = \mathrm{softmax}((1 - t) \bar z^s + t z^t), \quad p^s = \mathrm{softmax}(z^s)

    The loss brings its own schedule: the share t of the teacher, ``interpolation``, grows on a straight line from
    ``start`` to ``end`` in the course of the training. It is set, logged and resumed as other scheduled settings are;
    outside of a training it is ``start``. See :func:`keras_distill.functional.interpolated_kl`.

    Args:
        start: Share of the teacher at first, greater than 0.
        end: Share of the teacher at last, greater than 0 and at most 1.
        duration: Length of the ramp in steps or epochs, or as a fraction of the training; None is all of it.
        over: Unit of ``duration``: ``"steps"``, ``"epochs"`` or ``"fraction"``.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar, in nats, when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If ``start`` or ``end`` is not greater than 0 or is more than 1, or ``duration`` does not fit
            ``over``.

    Example:
        >>> round(float(TAIDLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.0832

    References:
        Shing et al. 2025 (TAID), section 3, arXiv:2501.16937, from 0.4 to 1; deviation: the straight line alone. The
        paper's adaptive update moves t ahead of it while the loss falls, which needs the value of each step.
    """

    # Not merges_classes: between two merged rows of logits lies another target than that of the rows.
    class_scores: ClassVar[bool] = True

    def __init__(
        self,
        *,
        start: float = 0.4,
        end: float = 1.0,
        duration: float | None = None,
        over: Over = "fraction",
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "taid_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        for name, share in (("start", start), ("end", end)):
            _check_share(name, share)
        ramp = Linear(start, end, duration=duration, over=over)
        self.interpolation = self._setting("interpolation", ramp, _check_share)
        duration = None if duration is None else float(duration)
        self._fix(start=float(start), end=float(end), duration=duration, over=over)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value per row."""
        return interpolated_kl(y_pred, y_true, interpolation=self.interpolation, from_logits=self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """Settings of the constructor, ready for JSON."""
        return {name: value for name, value in super().get_config().items() if name != "interpolation"}


@keras.saving.register_keras_serializable(package="keras_distill")
class TotalVariationLoss(LogitsLoss):
    r"""Total variation distance, averaged over the examples.

    .. math:: \frac{1}{2 N} \sum_n \sum_c |p^s_{nc} - p^t_{nc}|, \qquad p = \mathrm{softmax}(z / T)

    Symmetric and at most 1, however certain the models are. See :func:`keras_distill.functional.total_variation`.

    The loss is not multiplied by :math:`T^2`: at a higher temperature its gradient is smaller.

    Args:
        temperature: Softening of both distributions, greater than 0; a number or a schedule.
        from_logits: Whether the models return logits; if False they return probabilities, and z is their logarithm.
        reduction: How the values are averaged, as for every Keras loss.
        name: Name of the loss.
        dtype: Precision of the computation, at least float32; ``None`` is ``keras.config.floatx()``.

    Returns:
        A scalar from 0 to 1 when called with logits ``(N, ..., C)`` of the teacher, then the student.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If the temperature is not greater than 0.

    Example:
        >>> round(float(TotalVariationLoss()([[4.0, 1.0, 0.0]], [[2.0, 0.0, 1.0]])), 4)
        0.271

    References:
        Wen et al. 2023 (f-distill), theorem 1, arXiv:2307.15190. The paper gives no weight.
    """

    merges_classes: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True
    _formula = staticmethod(total_variation)

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "total_variation_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits=from_logits, name=name, reduction=reduction, dtype=dtype)
        self.temperature = self._setting("temperature", temperature)


def _check_share(name: str, value: Any) -> None:
    checks.positive(name, value)
    checks.between(name, value, 0, 1)
