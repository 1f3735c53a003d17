"""Guidance: which layers, and did distillation help."""

from lightning_distill.guidance.pairs import LayerPairs, pair_layers

__all__ = ["LayerPairs", "pair_layers"]
