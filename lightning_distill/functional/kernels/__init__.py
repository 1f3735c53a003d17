"""Divergences of two softmaxes: one function, and four ways behind it."""

from lightning_distill.functional.kernels.dispatch import (
    divergence,
    divergence_and_cross_entropy,
    rows_in_place_for,
    softmax_divergence,
)
from lightning_distill.functional.kernels.settings import Divergence, Kind

__all__ = [
    "Divergence",
    "Kind",
    "divergence",
    "divergence_and_cross_entropy",
    "rows_in_place_for",
    "softmax_divergence",
]
