"""Divergences of two softmaxes over large vocabularies: one function, and three ways behind it."""

from lightning_distill.functional.kernels.dispatch import divergence, divergence_and_cross_entropy, rows_in_place_for
from lightning_distill.functional.kernels.settings import Divergence, Kind

__all__ = ["Divergence", "Kind", "divergence", "divergence_and_cross_entropy", "rows_in_place_for"]
